"""The model's own buffers in a loop with a journal: what moves goes on, is told, and is put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafit as lf
from lorafit.journal import buffers
from lorafit.journal.buffers import Buffers


class Centred(nn.Module):
    """Keeps a running mean of its own, as many libraries do, past torch's count of changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("constant", torch.arange(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.data.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Growing(nn.Module):
    """Makes a buffer anew in every forward pass in training, longer each time, and another one the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(1), persistent=False)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.past = torch.cat([self.past, x.detach().mean()[None]])
            self.scale = self.past.abs().mean() if self.scale is None else self.scale * 1.01
        return x + self.past.mean() * (1.0 if self.scale is None else self.scale)


class Counting(nn.Module):
    """A head that counts its calls, and whose state dict does not say how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.linear(x) * (1 + 0.1 * self.calls)


class Remembering(nn.Module):
    """A head with a buffer that is longer after each call, and no part of its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)
        self.register_buffer("past", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.past = torch.cat([self.past, x.detach().mean()[None]])
        return self.linear(x) + self.past.mean()


def old_spectral(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(layer)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "custom": lambda: Centred(8),
    "growing": Growing,
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old-spectral": lambda: old_spectral(nn.Linear(8, 8)),
    "batch-norm": lambda: nn.BatchNorm1d(8),
}
LEARNT = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)) + 1


class Stop(BaseException):
    """Stands for a kill."""


def made(layer: nn.Module, head: nn.Module | None = None) -> tuple[nn.Module, lf.Handle, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.ReLU(), head or nn.Linear(8, 2))
    handle = lf.attach(model, lf.LoRA(r=2), targets=["0"], modules_to_save=["3"] if head else (), seed=0)
    return model, handle, handle.optimizer(torch.optim.AdamW, lr=1e-2)


def loop(
    folder: Path, kind: str, stop: int | None = None, head: type[nn.Module] | None = None
) -> tuple[list[Tensor], list[str]]:
    """Everything that a loop ends with, and what was said."""
    torch.manual_seed(0)
    model, handle, optimizer = made(LAYERS[kind](), head and head())
    lines: list[str] = []
    with lf.Journal(folder, handle, optimizer, epochs=4, say=lines.append) as journal:
        for epoch in journal:
            model.train()
            for _ in range(2):
                loss = F.cross_entropy(model(LEARNT), (LEARNT[:, 0] > 1).long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                journal.step(loss.detach())
            if epoch == stop:
                raise Stop
    return [each.detach().clone() for each in (*handle.parameters(), *model.buffers())], lines


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_buffers_of_all_kinds_go_on(tmp_path: Path, kind: str) -> None:
    expected, lines = loop(tmp_path / "whole", kind)
    with pytest.raises(Stop):
        loop(tmp_path / "cut", kind, stop=2)
    found, again = loop(tmp_path / "cut", kind)
    assert same(found, expected)
    for said in (lines, again):
        (line,) = [each for each in said if "the adapter's file does not hold them" in each]
        assert "of 1 layers changed in training ('1" in line


@pytest.mark.parametrize("head", [Counting, Remembering])
def test_what_a_state_dict_leaves_out_of_a_full_copy_goes_on(tmp_path: Path, head: type[nn.Module]) -> None:
    expected, _ = loop(tmp_path / "whole", "batch-norm", head=head)
    with pytest.raises(Stop):
        loop(tmp_path / "cut", "batch-norm", stop=2, head=head)
    found, _ = loop(tmp_path / "cut", "batch-norm", head=head)
    assert same(found, expected)


def test_constants_are_neither_kept_nor_told(tmp_path: Path) -> None:
    model, handle, optimizer = made(Centred(8))
    lines: list[str] = []
    with lf.Journal(tmp_path / "run", handle, optimizer, epochs=1, say=lines.append) as journal:
        for _ in journal:
            journal.step(model.eval()(LEARNT).mean())
        kept = Buffers(model)
        assert kept.state()["values"] == {}
        model[1].mean += 1
        assert set(kept.state()["values"]) == {"1|mean"}
        model[1].mean -= 1
    assert not any("changed in training" in line for line in lines)


@pytest.mark.parametrize("small", [1 << 24, 0], ids=["copied", "too-large"])
def test_what_had_not_moved_yet_is_put_back(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(buffers, "SMALL", small)
    model, _, _ = made(Centred(8))
    kept = Buffers(model)
    state = kept.state()
    model[1].mean += 1
    lines: list[str] = []
    kept.put(state, lines.append)
    if small:
        assert not model[1].mean.any() and lines == []
    else:
        assert model[1].mean.all() and "1 buffers of the model are not what they were" in lines[0]


def test_another_model_is_told_or_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        loop(tmp_path / "run", "custom", stop=2)

    def goes_on(layer: nn.Module) -> list[str]:
        _, handle, optimizer = made(layer)
        lines: list[str] = []
        with pytest.raises(Stop), lf.Journal(tmp_path / "run", handle, optimizer, epochs=4, say=lines.append):
            raise Stop
        return lines

    for layer in (nn.BatchNorm1d(8), nn.ReLU(), Centred(4)):
        with pytest.raises(lf.CheckpointError, match="buffers that the model has not"):
            goes_on(layer)
    other = Centred(8)
    other.constant += 1
    assert any("1.constant" in line and "stay as they are" in line for line in goes_on(other))


def test_a_buffer_is_told_by_its_bytes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("low", torch.ones(3, dtype=torch.bfloat16)[::2])
            self.register_buffer("none", torch.full((2,), torch.nan))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("far", torch.zeros(3, device="meta"))

    model: Any = nn.Sequential(Odd())
    kept = Buffers(model)
    assert kept.state()["values"] == {}
    model[0].low[1] = 2
    model[0].none[0] = 0
    assert set(kept.state()["values"]) == {"0|low", "0|none"}


def test_torchs_spectral_norms_are_kept_by_a_suggestion() -> None:
    for kind in ("spectral", "old-spectral"):
        model = nn.Sequential(nn.Linear(8, 8), LAYERS[kind](), nn.Linear(8, 8))
        suggestion = lf.suggest(model)
        assert any("keep running statistics" in remark for remark in suggestion.remarks)
        suggestion.train(model)
        before = [buffer.clone() for buffer in model.buffers()]
        model(LEARNT)
        assert same(list(model.buffers()), before) and model[0].training
