"""Files of a pipeline's adapters both ways: what diffusers makes of ours, and what we make of its own, old and new."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")
pytest.importorskip("peft", reason="diffusers reads such files with peft")

from lorafit.diffusion.drawing import draw
from lorafit.diffusion.families import family
from lorafit.diffusion.places import adapt
from lorafit.diffusion.reading import detach, load
from lorafit.diffusion.saving import save
from lorafit.diffusion.strength import strength
from lorafit.exporting.diffusers import METADATA, WEIGHTS
from tests.diffusion import tiny
from tests.diffusion.tiny import near, saved

pytestmark = pytest.mark.filterwarnings("ignore", "error::lorafit.errors.LorafitWarning")  # diffusers warns a lot
PLAIN: Mapping[str, Any] = {
    "lora": lf.LoRA(r=4, alpha=2),
    "odd-scale": lf.LoRA(r=3, alpha=5),
    "dora": lf.DoRA(lf.LoRA(r=4, alpha=8)),
}


# Round trips


@pytest.mark.parametrize("method", list(PLAIN))
@pytest.mark.parametrize("name", list(tiny.MADE))
def test_what_is_read_is_what_was_saved(tmp_path: Path, name: str, method: str) -> None:
    wanted = saved(name, tmp_path, PLAIN[method])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", WEIGHTS], "the file alone says it all"
    pipe = tiny.made(name)
    base = tiny.denoised(pipe)
    handles = load(pipe, tmp_path)
    assert tuple(handles) == family(pipe).components
    found = tiny.denoised(pipe)
    assert not torch.allclose(found, base, atol=1e-3)
    if method == "odd-scale":  # B s is rounded once
        near(found, wanted)
    else:
        assert torch.equal(found, wanted)
    detach(handles)
    assert torch.equal(tiny.denoised(pipe), base)


@pytest.mark.parametrize("method", list(PLAIN))
@pytest.mark.parametrize("name", list(tiny.MADE))
def test_diffusers_computes_the_same_at_any_strength(tmp_path: Path, name: str, method: str) -> None:
    saved(name, tmp_path, PLAIN[method], encoders=method != "dora")  # of encoders: the next test
    ours, theirs = tiny.made(name), tiny.made(name)
    handles = load(ours, tmp_path)
    theirs.load_lora_weights(str(tmp_path), adapter_name="subject")
    near(tiny.denoised(theirs), tiny.denoised(ours))
    theirs.set_adapters(["subject"], 0.5)
    with strength(handles, 0.5):
        half = tiny.denoised(ours)
    near(tiny.denoised(theirs), half)
    assert not torch.allclose(half, tiny.denoised(ours), atol=1e-4)


@pytest.mark.parametrize("name", list(tiny.MADE))
def test_magnitudes_of_text_encoders_reach_transformers(tmp_path: Path, name: str) -> None:
    """Which drops them without a word where their keys do not end as a parameter's name does."""
    saved(name, tmp_path, PLAIN["dora"])
    ours, theirs = tiny.made(name), tiny.made(name)
    load(ours, tmp_path)
    theirs.load_lora_weights(str(tmp_path), adapter_name="subject")
    near(tiny.denoised(theirs), tiny.denoised(ours))


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("name", list(tiny.MADE))
def test_merged_it_is_diffusers_fused_to_the_bit(tmp_path: Path, name: str, factor: float) -> None:
    """Weights, predictions and pictures."""
    saved(name, tmp_path, lf.LoRA(r=4, alpha=8))
    ours, theirs = tiny.made(name), tiny.made(name)
    handles = load(ours, tmp_path, scale=factor)
    theirs.load_lora_weights(str(tmp_path), adapter_name="subject")
    theirs.fuse_lora(components=list(handles), lora_scale=factor)
    theirs.unload_lora_weights()
    for part, handle in handles.items():
        handle.merge_and_detach()
        mine, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert mine.keys() == other.keys()
        different = [key for key in mine if not torch.equal(mine[key], other[key])]
        assert different == [], f"{part}: {different[:3]}"
        # diffusers freezes what it loads; some processors' kernels differ in the last bit between frozen and not.
        getattr(ours, part).requires_grad_(False)
        getattr(theirs, part).requires_grad_(False)
    assert torch.equal(tiny.denoised(ours), tiny.denoised(theirs))
    mine, other = (draw(pipe, ["a disc"], seeds=[0, 1], steps=2, size=16) for pipe in (ours, theirs))
    assert [image.tobytes() for image in mine] == [image.tobytes() for image in other]


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("name", list(tiny.MADE))
def test_through_diffusers_and_back_to_the_bit(tmp_path: Path, name: str, factor: float) -> None:
    """Ours → file → diffusers → its own file → ours."""
    from peft.utils import get_peft_model_state_dict

    saved(name, tmp_path / "ours", lf.LoRA(r=4, alpha=8))
    theirs = tiny.made(name)
    theirs.load_lora_weights(str(tmp_path / "ours"), adapter_name="subject")
    options: dict[str, Any] = {}
    for part in family(theirs).components:
        model = getattr(theirs, part)
        options[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="subject")
        options[f"{part}_lora_adapter_metadata"] = model.peft_config["subject"].to_dict()
    type(theirs).save_lora_weights(str(tmp_path / "theirs"), **options)
    first, second = tiny.made(name), tiny.made(name)
    load(first, tmp_path / "ours", scale=factor)
    load(second, tmp_path / "theirs" / WEIGHTS, scale=factor)
    assert torch.equal(tiny.denoised(first), tiny.denoised(second))


def test_what_one_part_saves_by_itself_keeps_its_scale(tmp_path: Path) -> None:
    """`unet.save_lora_adapter` writes keys and settings without the part's name."""
    from peft import LoraConfig

    pipe = tiny.made("sd")
    pipe.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=1, target_modules=["to_q", "to_v"], init_lora_weights=False), "mine"
    )
    wanted = tiny.denoised(pipe)
    pipe.unet.save_lora_adapter(str(tmp_path), adapter_name="mine")
    other = tiny.made("sd")
    handles = load(other, tmp_path)
    assert list(handles) == ["unet"] and handles["unet"].method == lf.LoRA(r=4, alpha=1)
    near(tiny.denoised(other), wanted)


def test_convolutions_both_ways(tmp_path: Path) -> None:
    wanted = saved("sd", tmp_path, lf.LoRA(r=4, alpha=8), encoders=False, targets=["attention", "convolutions"])
    ours, theirs = tiny.made("sd"), tiny.made("sd")
    load(ours, tmp_path)
    assert torch.equal(tiny.denoised(ours), wanted)
    theirs.load_lora_weights(str(tmp_path))
    near(tiny.denoised(theirs), wanted)


@pytest.mark.parametrize("name", list(tiny.MADE))
def test_in_double_precision_the_two_agree_to_rounding(tmp_path: Path, name: str) -> None:
    saved(name, tmp_path, PLAIN["lora"])
    ours, theirs = (tiny.made(name).to(torch.float64) for _ in range(2))
    handles = load(ours, tmp_path)
    theirs.load_lora_weights(str(tmp_path), adapter_name="subject")
    for part in family(theirs).components:
        getattr(theirs, part).double()
    for factor in (1.0, 0.5):
        theirs.set_adapters(["subject"], factor)
        with strength(handles, factor):
            torch.testing.assert_close(tiny.denoised(ours), tiny.denoised(theirs), rtol=1e-9, atol=1e-11)


# Other methods


@pytest.mark.parametrize(
    "method",
    [lf.LoRAFA(r=4), lf.LoRAPlus(r=4), lf.VeRA(r=8), lf.AdaLoRA(init_r=4, target_r=2), lf.DeltaLoRA(r=2)],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("targets", [None, ["attention", "convolutions"]], ids=["attention", "convolutions"])
def test_what_is_low_rank_is_in_the_file_and_goes_on_by_its_method(tmp_path: Path, method: Any, targets: Any) -> None:
    wanted = saved("sd", tmp_path, method, encoders=False, targets=targets)
    assert (tmp_path / WEIGHTS).is_file() and (tmp_path / "unet" / "adapter_config.json").is_file()
    ours, plain, theirs = (tiny.made("sd") for _ in range(3))
    handles = load(ours, tmp_path, trainable=True)
    assert handles["unet"].method.name == method.name and handles["unet"].num_trainable > 0
    near(tiny.denoised(ours), wanted)
    read = load(plain, tmp_path / WEIGHTS)
    assert isinstance(read["unet"].method, lf.LoRA)
    near(tiny.denoised(plain), wanted)
    theirs.load_lora_weights(str(tmp_path))
    near(tiny.denoised(theirs), wanted)


@pytest.mark.parametrize("method", [lf.IntrinsicDimension(d=50), lf.DoRA(lf.VeRA(r=4))], ids=["intrinsic", "dora-vera"])
def test_what_no_lora_equals_is_in_its_folder_alone_and_said(tmp_path: Path, method: Any) -> None:
    with pytest.warns(lf.LorafitWarning, match="cannot hold the adapter of unet"):
        wanted = saved("sd", tmp_path, method, encoders=False)
    assert not (tmp_path / WEIGHTS).exists()
    pipe = tiny.made("sd")
    handles = load(pipe, tmp_path)
    assert handles["unet"].method.name == method.name
    near(tiny.denoised(pipe), wanted)


def test_a_named_adapter_and_a_card(tmp_path: Path) -> None:
    pipe = tiny.made("sd")
    kind = family(pipe)
    handles = {"unet": adapt(kind, lf.VeRA(r=4), seed=0, name="cat")}
    tiny.shaken(handles)
    save(handles, tmp_path, base="some/pipeline", prompt="a sks cat")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "a sks cat" in card and '"some/pipeline"' in card and "reads unet" in card
    other = tiny.made("sd")
    load(other, tmp_path, name="dog")
    near(tiny.denoised(other), tiny.denoised(pipe))
    with pytest.raises(lf.ConfigError, match="nothing to save"):
        save({}, tmp_path)


def test_the_files_metadata_is_what_diffusers_writes(tmp_path: Path) -> None:
    saved("sd", tmp_path, lf.LoRA(r=4, alpha=8))
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        settings = json.loads(file.metadata()[METADATA])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == settings["text_encoder.r"] == 4
    assert "unet.target_modules" in settings and settings["unet.use_dora"] is False


def test_nothing_of_another_adapter_is_left_beside_the_new_one(tmp_path: Path) -> None:
    saved("sd", tmp_path / "vera", lf.VeRA(r=4), encoders=False)
    with pytest.raises(lf.ConfigError, match="parts of another adapter") as error:
        saved("sd", tmp_path / "vera", lf.LoRA(r=4), encoders=False)
    assert error.value.found == "unet"
    saved("sd", tmp_path / "lora", lf.LoRA(r=4))
    with pytest.raises(lf.ConfigError, match="parts of another adapter") as error, warnings.catch_warnings():
        warnings.simplefilter("ignore", lf.LorafitWarning)
        saved("sd", tmp_path / "lora", lf.IntrinsicDimension(d=50), encoders=False)
    assert error.value.found == WEIGHTS and not (tmp_path / "lora" / "unet").exists()
    # What is written whole again may be.
    wanted = saved("sd", tmp_path / "lora", lf.LoRA(r=2), encoders=False)
    saved("sd", tmp_path / "vera", lf.VeRA(r=2), encoders=False)
    pipe = tiny.made("sd")
    assert list(load(pipe, tmp_path / "lora")) == ["unet"]
    assert torch.equal(tiny.denoised(pipe), wanted)


def test_several_adapters_of_one_part_are_not_chosen_among(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        handles = {"unet": adapt(family(tiny.made("sd")), lf.VeRA(r=4), seed=0, name=name)}
        tiny.shaken(handles)
        handles["unet"].save(tmp_path / "unet")
    with pytest.raises(lf.CheckpointError, match="several adapters of one part") as error:
        load(tiny.made("sd"), tmp_path)
    assert error.value.found == "cat, dog"
