"""Resized adapters: the best change of their size, on every layer type, from files of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorafit as lf
from lorafit import resizing, store


class Layers(nn.Module):
    """One layer of each type that has an orientation of its own."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.line = nn.Linear(12, 9)
        self.grid = nn.Conv2d(4, 6, 3, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.line(self.table(x)).flatten(1).sum(1)
        return flat + self.grid(self.table(x)[:, None, :, :].expand(-1, 4, -1, -1)).flatten(1).sum(1)


def trained(folder: Path, method: Any, *, groups: int = 1) -> tuple[nn.Module, Path]:
    """A model without an adapter, and the folder of one that changes it."""
    torch.manual_seed(0)
    model = Layers(groups)
    handle = lf.attach(model, method, targets=["table", "line", "grid"])
    for parameter in handle.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    place = folder / "adapter"
    handle.save(place)
    handle.detach()
    return model, place


def flat(delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(1).double()


def best(delta: torch.Tensor, r: int) -> torch.Tensor:
    """The truncated singular value decomposition, of the whole matrix."""
    u, s, vh = torch.linalg.svd(flat(delta), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


def deltas(model: nn.Module, place: Path) -> dict[str, torch.Tensor]:
    handle = lf.load(model, place)
    found = {path: handle.delta(path).clone() for path in handle.sites}
    handle.detach()
    return found


def test_a_lower_rank_is_the_truncated_change_on_every_layer_type(tmp_path: Path) -> None:
    model, place = trained(tmp_path, lf.LoRA(r=4, alpha=6, rslora=True))
    source = resizing.opened(place)
    size = resizing.by_rank(source, 2)
    small = resizing.resize(source, size, tmp_path / "small")
    before, after = deltas(model, place), deltas(model, small)
    assert set(after) == {"table", "line", "grid"}
    lost = total = 0.0
    for path, delta in before.items():
        torch.testing.assert_close(flat(after[path]), best(delta, 2), rtol=0, atol=1e-5)
        lost += float((flat(after[path]) - flat(delta)).square().sum())
        total += float(flat(delta).square().sum())
    assert size.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert size.energy == pytest.approx(1 - lost / total, rel=1e-4)
    assert size.share == pytest.approx(0.5) and size.layers == 3
    assert resizing.difference(source, size, store.read(small)) < 1e-6
    config = store.read(small).config
    assert config["r"] == 2 and config["use_rslora"] is False and "lorafit" not in config


def test_a_share_of_the_energy_gives_each_layer_its_own_rank(tmp_path: Path) -> None:
    model, place = trained(tmp_path, lf.LoRA(r=4))
    handle = lf.load(model, place)
    with torch.no_grad():
        handle.adapter("line").B[:, 1:] *= 1e-3  # type: ignore[union-attr,index,operator]
    handle.save(tmp_path / "uneven")
    handle.detach()
    source = resizing.opened(tmp_path / "uneven")
    size = resizing.by_energy(source, 0.95)
    assert size.ranks["line"] == 1 and size.ranks["grid"] > 1
    assert size.energy >= 0.95
    small = resizing.resize(source, size, tmp_path / "small")
    assert "line" in {**store.read(small).config["rank_pattern"], "line": 0}
    after = deltas(model, small)
    for path, delta in deltas(model, tmp_path / "uneven").items():
        assert float((flat(after[path]) - flat(delta)).norm() / flat(delta).norm()) <= 0.05**0.5 + 1e-6
    everything = resizing.by_energy(source, 1.0)
    assert everything.energy == pytest.approx(1.0)


def test_the_layers_that_count_least_are_left_out(tmp_path: Path) -> None:
    model, place = trained(tmp_path, lf.LoRA(r=4))
    source = resizing.opened(place)
    size = resizing.by_importance(source, {"table": 0.1, "line": 0.7, "grid": 0.2}, 0.34)
    small = resizing.resize(source, size, tmp_path / "small")
    before, after = deltas(model, place), deltas(model, small)
    assert set(after) == {"line", "grid"} and all(torch.equal(after[path], before[path]) for path in after)
    least = resizing.by_importance(source, {"table": 0.1, "line": 0.7, "grid": 0.2}, 0.99)
    assert least.layers == 1 and least.ranks["line"] == 4


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    model, place = trained(tmp_path, lf.DoRA(lf.LoRA(r=4)))
    source = resizing.opened(place)
    assert any("magnitudes are kept" in note for note in source.notes)
    small = resizing.resize(source, resizing.by_rank(source, 2), tmp_path / "small")
    old, new = store.read(place).tensors, store.read(small).tensors
    vectors = [key for key in old if "magnitude" in key]
    assert len(vectors) == 3 and all(torch.equal(old[key], new[key]) for key in vectors)
    again = lf.load(model, small)
    assert isinstance(again.method, lf.DoRA)


@pytest.mark.filterwarnings("ignore:PEFT has no (VeRA|AdaLoRA) for layers of this type:lorafit.LorafitWarning")
@pytest.mark.parametrize(
    "method",
    [
        lf.VeRA(r=5),
        lf.AdaLoRA(init_r=4, target_r=3),
        lf.LoRAFA(r=4),
        lf.DoRA(lf.VeRA(r=3)),
        lf.IntrinsicDimension(d=20),
    ],
    ids=["vera", "adalora", "lora-fa", "dora-of-vera", "intrinsic"],
)
def test_every_other_method_becomes_plain_lora_exactly_and_is_cut_then(tmp_path: Path, method: Any) -> None:
    model, place = trained(tmp_path, method)
    source = resizing.opened(place, model)
    before = deltas(model, place)
    whole = resizing.sized(source, {path: each.r for path, each in source.layers.items()})
    same = deltas(model, resizing.resize(source, whole, tmp_path / "same"))
    cut = deltas(model, resizing.resize(source, resizing.by_rank(source, 2), tmp_path / "cut"))
    for path, delta in before.items():
        torch.testing.assert_close(flat(same[path]), flat(delta), rtol=0, atol=2e-6)
        torch.testing.assert_close(flat(cut[path]), best(delta, 2), rtol=0, atol=1e-5)


def test_what_depends_on_the_weights_needs_the_model(tmp_path: Path) -> None:
    _, place = trained(tmp_path, lf.IntrinsicDimension(d=20))
    with pytest.raises(lf.CheckpointError, match="depends on the model"):
        resizing.opened(place)


def test_a_grouped_convolution_keeps_its_rank_and_that_is_said(tmp_path: Path) -> None:
    model, place = trained(tmp_path, lf.LoRA(r=4), groups=2)
    source = resizing.opened(place)
    assert any("grid keeps its rank" in note for note in source.notes)
    size = resizing.by_rank(source, 2)
    assert size.ranks == {"table": 2, "line": 2, "grid": 4}
    after = deltas(model, resizing.resize(source, size, tmp_path / "small"))
    torch.testing.assert_close(after["grid"], deltas(model, place)["grid"])


def test_sizes_that_are_none(tmp_path: Path) -> None:
    _, place = trained(tmp_path, lf.LoRA(r=4))
    source = resizing.opened(place)
    for make in (lambda: resizing.by_energy(source, 1.5), lambda: resizing.by_importance(source, {}, 1.0)):
        with pytest.raises(lf.ConfigError, match="is a share"):
            make()
    with pytest.raises(lf.ConfigError):
        resizing.by_rank(source, 0)
    nothing = resizing.sized(source, dict.fromkeys(source.layers, 0))
    with pytest.raises(lf.CheckpointError, match="no layer would be left"):
        resizing.resize(source, nothing, tmp_path / "none")
