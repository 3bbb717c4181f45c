"""Every method of the household through every format of `lorafit export` and through `resize`: done, or refused why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafit as lf
from lorafit.methods import METHODS

Run = Callable[..., Any]
TARGETS = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2},
    "intrinsic": {"d": 40},
    "lora-drop": {"inner": {"method": "lora", "r": 4}, "keep": ["model.layers.1.mlp.down_proj"]},
    "dora": {"r": 4},
    "vera": {"r": 4},
}
EXPECTED: dict[str, dict[str, str]] = {
    "dora": {"vllm": "vLLM has no DoRA", "gguf": "a GGUF adapter has no DoRA"},
    "intrinsic": {"vllm": "--r 16", "gguf": "--r 16", "diffusers": "depends on the model"},
}
"""Method → command → what it says when it refuses; what is not named here is done."""


@pytest.fixture(scope="module")
def adapters(place: Path, llama: Path) -> Callable[[str], Path]:
    """Saves an adapter of a method over the tiny base, once each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def made(name: str) -> Path:
        folder = place / "matrix" / name
        if folder.exists():
            return folder
        model = AutoModelForCausalLM.from_pretrained(llama)
        options = OPTIONS.get(name, {"r": 4})
        handle = lf.attach(model, lf.methods.build(name, options), targets=TARGETS)
        torch.manual_seed(1)
        for parameter in handle.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        handle.save(folder)
        AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
        return folder

    return made


WORDS: dict[str, list[str]] = {
    "hf": ["export", "--to", "hf"],
    "vllm": ["export", "--to", "vllm"],
    "gguf": ["export", "--to", "gguf"],
    "merged": ["export", "--to", "gguf", "--merged"],
    "diffusers": ["export", "--to", "diffusers", "--component", "text_encoder"],
    "resize": ["resize", "--r", "2"],
}


@pytest.mark.parametrize("to", WORDS)
@pytest.mark.parametrize("name", METHODS)
def test_it_is_done_or_refused_with_the_reason(
    lorafit: Run, adapters: Callable[[str], Path], llama: Path, tmp_path: Path, name: str, to: str
) -> None:
    command, *words = WORDS[to]
    base = [] if to == "diffusers" else ["--model", llama]
    result = lorafit(command, adapters(name), *words, *base, "--output-dir", "out", "--json")
    why = EXPECTED.get(name, {}).get(to, "")
    if why:
        assert result.status == 1 and why in result.err, result.err
        assert not list(tmp_path.iterdir())
        return
    assert result.status == 0, result.err
    assert result.json["difference"] <= 1e-4
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
