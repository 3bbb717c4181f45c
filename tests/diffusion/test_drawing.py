"""Drawing: a picture depends on its prompt and seed; sheets; files; and pipelines that cannot be opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from lorafit.diffusion.drawing import GAP, WORDS, draw, sheet, write_png
from lorafit.diffusion.pipelines import open_pipeline
from tests.diffusion import tiny

pytestmark = pytest.mark.filterwarnings("ignore", "error::lorafit.errors.LorafitWarning")  # diffusers warns a lot


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(numpy.abs(numpy.asarray(one).astype(int) - numpy.asarray(other).astype(int)).max())


@pytest.mark.parametrize("name", list(tiny.MADE))
def test_a_picture_depends_on_its_prompt_and_seed_alone(name: str) -> None:
    pipe = tiny.made(name)
    before = torch.random.get_rng_state()
    together = draw(pipe, ["a disc", "x"], seeds=[0, 1], steps=2, size=16, batch=4)
    assert torch.equal(before, torch.random.get_rng_state()), "torch's own generator is left as it was"
    assert [image.size for image in together] == [(16, 16)] * 4
    alone = draw(pipe, ["x"], seeds=[1], steps=2, size=16)
    assert apart(together[3], alone[0]) <= 1, "rounding in a batch of another size may move a level"
    assert [image.tobytes() for image in draw(pipe, ["a disc", "x"], seeds=[0, 1], steps=2, size=16)] == [
        image.tobytes() for image in together
    ]
    assert together[0].tobytes() != together[1].tobytes() and together[0].tobytes() != together[2].tobytes()


def test_modes_stay_and_no_graph_is_kept() -> None:
    pipe = tiny.made("sd")
    pipe.unet.train()
    handle = lf.attach(pipe.unet, lf.LoRA(r=2, dropout=0.5), targets=["to_q"], seed=0)
    first = draw(pipe, ["x"], seeds=[0], steps=1, size=16)
    assert pipe.unet.training and not pipe.vae.training
    assert first[0].tobytes() == draw(pipe, ["x"], seeds=[0], steps=1, size=16)[0].tobytes(), "dropout is off"
    assert all(parameter.grad is None for parameter in handle.parameters())


@pytest.mark.parametrize(
    "different",
    [{"prompts": []}, {"prompts": [" "]}, {"seeds": []}, {"seeds": [-1]}, {"steps": 0}, {"size": 12}],
    ids=lambda value: str(value),
)
def test_what_cannot_be_drawn_is_named(different: dict[str, Any]) -> None:
    options: dict[str, Any] = {"prompts": ["x"], "seeds": [0], "steps": 1, "size": 16, **different}
    key = next(iter(different))
    with pytest.raises(lf.ConfigError, match=key):
        draw(None, options.pop("prompts"), **options)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_what_is_not_to_be_seen_takes_guidance(guidance: float) -> None:
    pipe = tiny.made("sd")
    with pytest.raises(lf.ConfigError, match="guidance above 1"):
        draw(pipe, ["x"], seeds=[0], steps=1, size=16, guidance=guidance, negative="a cat")
    plain, without = (draw(pipe, ["x"], seeds=[0], steps=2, size=16, negative=text)[0] for text in ("", "a cat"))
    assert plain.tobytes() != without.tobytes()


def test_a_sheet_has_its_pictures_in_rows(tmp_path: Path) -> None:
    colors = ["red", "green", "blue", "black", "white"]
    images = [Image.new("RGB", (10, 10), color) for color in colors]
    plain = sheet(images, columns=3)
    assert plain.size == (3 * 10 + 4 * GAP, 2 * 10 + 3 * GAP)
    assert plain.getpixel((GAP + 14 + 5, GAP + 14 + 5)) == (255, 255, 255), "the fifth is white"
    assert plain.getpixel((GAP + 5, GAP + 14 + 5)) == (0, 0, 0), "the fourth begins the second row"
    worded = sheet(
        images, columns=3, rows_said=["a row – with a very long name indeed", ""], columns_said=["1", "2", "3"]
    )
    assert plain.width < worded.width <= WORDS + GAP and worded.height > plain.height, "for the words"
    assert sheet(images, columns=3, rows_said=["", "1"]).width == plain.width
    write_png(worded, tmp_path / "deep" / "sheet.png")
    assert Image.open(tmp_path / "deep" / "sheet.png").size == worded.size
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    "options", [{"columns": 0}, {"columns": 2, "rows_said": ["one"]}, {"columns": 2, "columns_said": ["one"]}], ids=str
)
def test_a_sheet_that_cannot_be_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(lf.ConfigError, match="sheet"):
        sheet([Image.new("RGB", (4, 4))] * 3, **options)


@pytest.mark.parametrize("name", list(tiny.MADE))
def test_a_pipeline_opens_as_it_was_saved(pipelines: Callable[[str], Path], name: str) -> None:
    pipe = open_pipeline(pipelines(name), dtype=torch.float32, device="cpu")
    assert torch.equal(tiny.denoised(pipe), tiny.denoised(tiny.made(name)))
    half = open_pipeline(str(pipelines(name)), dtype=torch.bfloat16, device="cpu")
    assert next(half.vae.parameters()).dtype is torch.bfloat16


def test_what_is_no_pipeline_is_named(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(lf.ConfigError, match=r"model_index\.json"):
        open_pipeline(tmp_path)
    place = pipelines("sd")
    with pytest.raises(lf.ConfigError) as error:
        open_pipeline(place.parent)
    assert str(place) in str(error.value), "a pipeline inside is named"
    tiny.made("sd").save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "config.json").unlink()
    with pytest.raises(lf.ConfigError, match="cannot be opened"):
        open_pipeline(tmp_path / "broken", device="cpu")
    for file in (tmp_path / "broken").rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(lf.ConfigError, match="pickle"):
        open_pipeline(tmp_path / "broken", device="cpu")


def _without(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "file", "key"),
    [("text_encoder", "model", "q_proj"), ("unet", "diffusion_pytorch_model", "mid_block")],
)
@pytest.mark.parametrize("how", ["missing", "another shape"])
def test_weights_that_files_lack_are_never_drawn_at_random(
    pipelines: Callable[[str], Path], tmp_path: Path, part: str, file: str, key: str, how: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if key in name]:
            if how == "missing":
                del tensors[name]
            else:
                tensors[name] = tensors[name][:1].clone()

    shutil.copytree(pipelines("sd"), tmp_path / "pipe")
    _without(tmp_path / "pipe" / part / f"{file}.safetensors", change)
    with pytest.raises(lf.ConfigError, match="lack weights") as error:
        open_pipeline(tmp_path / "pipe", device="cpu")
    text = str(error.value)
    assert f"pipe: {part}" in text and ("shapes" in text if how != "missing" else key in text)


def test_a_pipeline_that_is_not_whole_is_named(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(pipelines("sd"), tmp_path / "pipe")
    weights = tmp_path / "pipe" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(lf.ConfigError, match="SafetensorError"):
        open_pipeline(tmp_path / "pipe", device="cpu")
    shutil.rmtree(tmp_path / "pipe" / "tokenizer")
    with pytest.raises(lf.ConfigError, match="no folder tokenizer"):
        open_pipeline(tmp_path / "pipe", device="cpu")


def test_without_diffusers_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(lf.MissingExtraError, match=r"lorafit\[diffusion\]"):
        open_pipeline("x")
