"""Files of older releases and of other scripts, and wrong ones: read to the last key, or named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from lorafit.diffusion.reading import load
from lorafit.exporting.diffusers import WEIGHTS
from tests.diffusion import tiny
from tests.diffusion.tiny import near, saved

pytestmark = pytest.mark.filterwarnings("ignore", "error::lorafit.errors.LorafitWarning")  # diffusers warns a lot


# Older files


def old_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As releases before 0.25 named them: attention in processors, without settings."""
    found = {}
    for key, value in tensors.items():
        text = key.startswith("text_encoder")
        for new, old in (("lora_A", "down"), ("lora_B", "up")):
            key = key.replace(f".to_out.0.{new}", f".processor.to_out_lora.{old}")
            for letter in "qkv":
                key = key.replace(f".to_{letter}.{new}", f".processor.to_{letter}_lora.{old}")
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                key = key.replace(f".{projection}.{new}", f".{projection}.lora_linear_layer.{old}")
        found[key.replace("text_encoder.encoder.", "text_encoder.text_model.encoder.") if text else key] = value
    return found


def test_keys_of_older_releases(tmp_path: Path) -> None:
    wanted = saved("sd", tmp_path, lf.LoRA(r=4, alpha=4))
    tensors = old_keys(load_file(tmp_path / WEIGHTS))
    assert any("processor.to_out_lora.down" in key for key in tensors)
    assert any("text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up" in key for key in tensors)
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    pipe = tiny.made("sd")
    assert list(load(pipe, tmp_path / "old")) == ["unet", "text_encoder"]
    assert torch.equal(tiny.denoised(pipe), wanted)


def test_keys_without_a_part_are_the_denoisers(tmp_path: Path) -> None:
    wanted = saved("sd", tmp_path, lf.LoRA(r=4, alpha=4), encoders=False)
    tensors = {key.removeprefix("unet."): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / "bare.safetensors")
    pipe = tiny.made("sd")
    load(pipe, tmp_path / "bare.safetensors")
    assert torch.equal(tiny.denoised(pipe), wanted)


@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_keys_of_the_scripts_and_their_alphas(tmp_path: Path, alpha: float) -> None:
    saved("sd", tmp_path, lf.LoRA(r=4, alpha=4))
    tensors: dict[str, torch.Tensor] = {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        part, _, rest = key.partition(".")
        layer, _, letter = rest.removesuffix(".weight").rpartition(".")
        begin = "lora_unet_" if part == "unet" else "lora_te_text_model_"
        flat = begin + layer.replace(".", "_")
        tensors[f"{flat}.{'lora_down' if letter == 'lora_A' else 'lora_up'}.weight"] = value
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "scripts.safetensors")
    ours, theirs = tiny.made("sd"), tiny.made("sd")
    handles = load(ours, tmp_path / "scripts.safetensors")
    assert list(handles) == ["unet", "text_encoder"] and handles["unet"].method == lf.LoRA(r=4, alpha=alpha)
    load(theirs, tmp_path, scale=alpha / 4)
    near(tiny.denoised(ours), tiny.denoised(theirs))


# Wrong files


def written(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Path:
    saved("sd", tmp_path / "good", lf.LoRA(r=4, alpha=4))
    tensors = load_file(tmp_path / "good" / WEIGHTS)
    with safe_open(tmp_path / "good" / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / name, metadata)
    return tmp_path / "bad"


FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_A.weight"), ["missing key", "to_q"]),
        (lambda t: t.update({f"{FIRST}.lora_C.weight": torch.ones(1)}), ["unexpected key", "lora_C"]),
        (lambda t: t.update({"unet.nowhere.lora_A.weight": torch.ones(4, 4)}), ["nowhere"]),
        (lambda t: t.update({f"{FIRST}.lora_B.weight": torch.ones(9, 4)}), ["wrong shape", "to_q"]),
        (lambda t: t.update({f"{FIRST}.lora_B.weight": torch.full((8, 4), float("nan"))}), ["not a number"]),
        (lambda t: t.update({"text_encoder_2.x.lora_A.weight": torch.ones(4, 4)}), ["does not have", "text_encoder_2"]),
        (lambda t: t.update({f"{FIRST}.lora.down.weight": torch.ones(4, 8)}), ["another spelling"]),
        (lambda t: t.update({f"{FIRST}.alpha": torch.tensor(1.0)}), ["twice how strongly"]),
        (lambda t: t.update({"lora_unet_input_blocks_1.alpha": torch.tensor(1.0)}), ["save_lora_weights"]),
        (lambda t: t.update({f"{FIRST}.lokr_w1": torch.ones(1)}), ["LoKr"]),
    ],
    ids=["missing", "unexpected", "nowhere", "shape", "nan", "part", "double", "alpha", "sgm", "lokr"],
)
def test_a_wrong_file_is_named_and_the_pipeline_stays(tmp_path: Path, change: Any, words: list[str]) -> None:
    place = written(tmp_path, change)
    pipe = tiny.made("sd")
    base = tiny.denoised(pipe)
    with pytest.raises(lf.CheckpointError) as error:
        load(pipe, place)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert str(place / WEIGHTS) in text and "base_model.model" not in text, text
    assert torch.equal(tiny.denoised(pipe), base)
    assert not any("adapters" in key for key in pipe.unet.state_dict())


def test_what_is_no_file_of_adapters_is_named(tmp_path: Path) -> None:
    pipe = tiny.made("sd")
    with pytest.raises(lf.CheckpointError, match="no such file"):
        load(pipe, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lf.CheckpointError, match="no adapter of a pipeline"):
        load(pipe, tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_lora_weights.bin").write_bytes(b"x")
    with pytest.raises(lf.CheckpointError, match="pickle"):
        load(pipe, tmp_path / "empty")
    with pytest.raises(lf.CheckpointError, match="pickle"):
        load(pipe, tmp_path / "empty" / "pytorch_lora_weights.bin")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(lf.CheckpointError, match="damaged"):
        load(pipe, tmp_path / "cut.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"unet.x": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(lf.CheckpointError, match="several files"):
        load(pipe, tmp_path / "two")
    (tmp_path / "checkpoint-2").mkdir()
    for name in ("optimizer.pt", "complete.json"):
        (tmp_path / "checkpoint-2" / name).write_bytes(b"x")
    with pytest.raises(lf.CheckpointError, match="a run that has not ended"):
        load(pipe, tmp_path / "checkpoint-2")
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(lf.CheckpointError, match="no adapter"):
        load(pipe, tmp_path / "none.safetensors")
