"""Pictures of the class: drawn without the safety checker, told where some are left out, and known by their notes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from lorafit.diffusion import prior
from lorafit.diffusion.drawing import draw
from tests.diffusion import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns a lot
Run = Callable[..., Any]


@pytest.fixture
def given(settings: Run, tmp_path: Path) -> Run:
    def given(**different: Any) -> Any:
        usual = {"class_prompt": "a disc", "class_images": str(tmp_path / "class"), "num_class_images": 2}
        return settings(**{**usual, **different})

    return given


def strict() -> Any:
    """A pipeline with a safety checker that blackens all."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipe = tiny.made("sd")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16)
    ).eval()
    checker.concept_embeds_weights.data.fill_(-2.0)
    parts = {**pipe.components, "safety_checker": checker}
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    checked = StableDiffusionPipeline(**parts)
    checked.set_progress_bar_config(disable=True)
    return checked


def noted(path: Path) -> Any:
    return json.loads(Image.open(path).info[prior.ORIGIN])


def rewritten(path: Path, **different: Any) -> None:
    """The same pixels, with another note, or none without what differs; None leaves a key out."""
    image, note = Image.open(path).convert("RGB"), PngInfo()
    if different:
        merged = {key: value for key, value in {**noted(path), **different}.items() if value is not None}
        note.add_text(prior.ORIGIN, json.dumps(merged))
    image.save(path, pnginfo=note)


def test_what_a_safety_checker_blackens_is_not_learnt(given: Run, tmp_path: Path) -> None:
    pipe = strict()
    with pytest.warns(lf.LorafitWarning, match="safety checker"):
        (black,) = draw(pipe, ["a disc"], seeds=[0], steps=1, size=16)
    assert black.getextrema() == ((0, 0),) * 3
    checker, config = pipe.safety_checker, dict(pipe.config)
    said: list[str] = []
    gallery = prior.gather(pipe, given(), said.append)
    assert [one.image.getextrema() != ((0, 0),) * 3 for one in gallery.pictures] == [True] * 2
    assert sum("safety checker is not asked" in line for line in said) == 1
    assert pipe.safety_checker is checker and dict(pipe.config) == config, "the pipeline is left as it was"
    plain = prior.gather(tiny.made("sd"), given(class_images=str(tmp_path / "plain")), said.append)
    assert [one.digest for one in plain.pictures] == [one.digest for one in gallery.pictures]


def test_the_checker_is_set_back_where_drawing_fails(given: Run) -> None:
    pipe = strict()
    checker = pipe.safety_checker

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    pipe.unet.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no memory"):
        prior.gather(pipe, given(), lambda _: None)
    assert pipe.safety_checker is checker


def test_black_ones_that_are_there_are_told(given: Run, tmp_path: Path) -> None:
    pipe = tiny.made("sd")
    said: list[str] = []
    prior.gather(pipe, given(), said.append)
    path = tmp_path / "class" / "drawn-000001.png"
    note = PngInfo()
    note.add_text(prior.ORIGIN, json.dumps(noted(path)))
    Image.new("RGB", (16, 16)).save(path, pnginfo=note)
    assert not any("black all over" in line for line in said)
    prior.gather(pipe, given(), said.append)
    assert any("black all over" in line and "drawn-000001.png" in line for line in said)


def test_own_pictures_that_are_left_out_are_told(given: Run, tmp_path: Path) -> None:
    tiny.discs(tmp_path / "class", 3)
    said: list[str] = []
    assert len(prior.gather(tiny.made("sd"), given(), said.append).pictures) == 2
    assert any("the first 2 of 3 pictures" in line and "--num-class-images 3" in line for line in said)
    (tmp_path / "class" / "2.png").unlink()
    said.clear()
    prior.gather(tiny.made("sd"), given(), said.append)
    assert said == []


def test_a_drawn_picture_that_does_not_say_from_what_is_named(given: Run, tmp_path: Path) -> None:
    pipe = tiny.made("sd")
    prior.gather(pipe, given(), lambda _: None)
    path = tmp_path / "class" / "drawn-000001.png"
    before = path.read_bytes()
    rewritten(path)
    with pytest.raises(lf.DataError, match=r"drawn-000001\.png[\s\S]*remove it"):
        prior.gather(pipe, given(), lambda _: None)
    path.unlink()
    prior.gather(pipe, given(), lambda _: None)
    assert path.read_bytes() == before


def test_the_note_has_the_pipelines_type_and_sampler(given: Run, tmp_path: Path) -> None:
    pipe = tiny.made("sd")
    prior.gather(pipe, given(), lambda _: None)
    path = tmp_path / "class" / "drawn-000000.png"
    assert noted(path)["dtype"] == "float32" and noted(path)["scheduler"] == "DDIMScheduler"
    with pytest.raises(lf.ConfigError, match=r"dtype 'float32'[\s\S]*dtype 'bfloat16'"):
        prior.gather(tiny.made("sd").to(torch.bfloat16), given(), lambda _: None)
    rewritten(path, scheduler="PNDMScheduler")
    with pytest.raises(lf.ConfigError, match=r"scheduler 'PNDMScheduler'[\s\S]*scheduler 'DDIMScheduler'"):
        prior.gather(pipe, given(), lambda _: None)
    rewritten(path, scheduler=None, dtype=None)  # as it was noted before these were
    assert len(prior.gather(pipe, given(), lambda _: None).pictures) == 2
    rewritten(path, seed=None)
    with pytest.raises(lf.ConfigError, match="seed None"):
        prior.gather(pipe, given(), lambda _: None)
