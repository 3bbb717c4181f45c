"""Files of type LORAFIT_LORA where PEFT's form of A, for convolutions in groups, would be nearly all zeros."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafit as lf
from lorafit.layouts import pairs

KEY = "base_model.model.deep.lora_A.weight"
METHODS = {
    "lora": lf.LoRA(r=2),
    "pissa": lf.LoRA(r=2, init="pissa"),
    "dora": lf.DoRA(lf.LoRA(r=2)),
    "lora-fa": lf.LoRAFA(r=2),
    "delta-lora": lf.DeltaLoRA(r=2, start=2),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    return nn.Sequential(OrderedDict(deep=deep, point=nn.Conv2d(32, 8, 1))).eval()


def attached(method: lf.Method) -> tuple[nn.Sequential, lf.Handle]:
    model = network()
    handle = lf.attach(model, method, ["deep", "point"], rank_pattern={"deep": 32}, seed=0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, handle


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "LEAST", 1000)


def saved(handle: lf.Handle, folder: Path) -> Path:
    with pytest.warns(lf.LorafitWarning, match="of zeros beside") as told:
        written = handle.save(folder)
    assert len(told) == 1 and "deep" in str(told[0].message) and "convert" in str(told[0].message)
    return written


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", list(METHODS))
def test_an_adapter_is_as_large_as_its_numbers_and_comes_back(name, tmp_path):
    model, handle = attached(METHODS[name])
    x = torch.randn(2, 32, 5, 5)
    expected, delta = model(x), handle.delta("deep")
    folder = saved(handle, tmp_path)
    assert config(folder)["peft_type"] == "LORAFIT_LORA"
    assert tensors(folder)[KEY].shape[1:] == (1, 3, 3)
    assert "library_name: lorafit" in (folder / "README.md").read_text(encoding="utf-8")
    fresh = network()
    again = lf.load(fresh, folder, trainable=True)
    assert again.method == handle.method and again.method_at("deep") == handle.method_at("deep")
    torch.testing.assert_close(again.delta("deep"), delta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-5)


def test_a_small_one_stays_pefts(tmp_path):
    _, handle = attached(lf.LoRA(r=2))
    folder = handle.save(tmp_path)
    assert config(folder)["peft_type"] == "LORA" and "lorafit" not in config(folder)
    assert tensors(folder)[KEY].shape == (32, 32, 3, 3)


@pytest.mark.usefixtures("_small")
def test_one_of_few_groups_stays_pefts_however_large(tmp_path):
    model = nn.Sequential(OrderedDict(deep=nn.Conv2d(32, 32, 3, groups=4)))
    folder = lf.attach(model, lf.LoRA(r=8), ["deep"]).save(tmp_path)
    assert config(folder)["peft_type"] == "LORA"


@pytest.mark.usefixtures("_small")
def test_with_the_model_it_is_converted_to_pefts_form(tmp_path):
    model, handle = attached(lf.LoRA(r=2))
    delta, folder = handle.delta("deep"), saved(handle, tmp_path / "own")
    handle.detach()
    with pytest.raises(lf.CheckpointError, match="channels of its own group") as caught:
        lf.convert(folder)
    assert "model=model" in caught.value.fix
    plain = lf.convert(folder, output=tmp_path / "plain", model=model)
    assert config(plain)["peft_type"] == "LORA" and tensors(plain)[KEY].shape == (32, 32, 3, 3)
    torch.testing.assert_close(lf.load(network(), plain).delta("deep"), delta)


@pytest.mark.usefixtures("_small")
def test_pefts_form_of_a_is_read_too_and_another_shape_is_not(tmp_path):
    _, handle = attached(lf.LoRA(r=2))
    folder = saved(handle, tmp_path)
    weights = folder / "adapter_model.safetensors"
    held, full = load_file(weights), handle.sites["deep"].down_to_file(handle.adapter("deep").A.detach())
    save_file({**held, KEY: full.contiguous()}, weights, {"format": "pt"})
    assert torch.equal(lf.load(network(), folder).delta("deep"), handle.delta("deep"))
    save_file({**held, KEY: torch.zeros(32, 2, 3, 3)}, weights, {"format": "pt"})
    with pytest.raises(lf.CheckpointError, match="wrong shape"):
        lf.load(network(), folder)
