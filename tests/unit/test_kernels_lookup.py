"""The fused table of vectors against its plain twin, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import lorafit as lf
from lorafit.delta import LowRank, Update
from lorafit.kernels.lookup import lookup
from lorafit.layers import Acting, EmbeddingSite, apply

SCALE, NUM, DIM, R = 1.7, 11, 8, 3
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "padding-from-the-end": {"padding_idx": -1},
    "frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 0, "scale_grad_by_freq": True},
}
IDS = {
    "matrix": torch.randint(NUM, (4, 9), generator=torch.Generator().manual_seed(1)),
    "one": torch.tensor(5),
    "int32": torch.tensor([3, 3, 0, 7], dtype=torch.int32),
    "strided": torch.arange(22).view(11, 2).t()[:, ::3] % NUM,
    "none": torch.zeros(0, 4, dtype=torch.long),
}


class Case:
    """A table and an update of it with values of usual size, all in float64."""

    def __init__(self, options: dict[str, Any] | None = None, *, gain: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.layer = nn.Embedding(NUM, DIM, **(options or {})).double().requires_grad_(False)
        self.layer.weight.copy_(make(NUM, DIM))
        self.leaves = [make(R, NUM), make(DIM, R), *([1 + 0.3 * make(DIM)] if gain else [])]

    def to(self, dtype: torch.dtype) -> Case:
        self.layer, self.leaves = self.layer.to(dtype), [leaf.to(dtype) for leaf in self.leaves]
        return self

    def acting(self, leaves: tuple[Tensor, ...], dropout: float) -> list[Acting]:
        down, up, *gain = leaves
        return [Acting(Update(LowRank(up, down, scale=SCALE), gain[0] if gain else None), dropout)]

    def fused(self, ids: Tensor, *leaves: Tensor, dropout: float = 0.0) -> Tensor:
        return EmbeddingSite(self.layer).forward(ids, nn.Embedding.forward, self.acting(leaves, dropout))

    def plain(self, ids: Tensor, *leaves: Tensor, dropout: float = 0.0) -> Tensor:
        return apply(EmbeddingSite(self.layer), ids, self.layer(ids), self.acting(leaves, dropout))


def outputs_and_gradients(function: Callable[..., Tensor], ids: Tensor, case: Case, **options: float) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in case.leaves]
    torch.manual_seed(2)
    y = function(ids, *leaves, **options)
    weights = torch.linspace(-1, 1, max(y.numel(), 1)).to(y.dtype)[: y.numel()].view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


def assert_near(found: list[Tensor], exact: list[Tensor], bound: float) -> None:
    for name, one, truth in zip(("y", "dA", "dE", "dg"), found, exact, strict=False):
        assert one.shape == truth.shape, name
        assert (one.double() - truth.double()).norm() <= bound * truth.double().norm(), name


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("ids", list(IDS))
@pytest.mark.parametrize("options", list(OPTIONS))
def test_it_agrees_with_the_plain_twin(options, ids, gain, dropout, dtype):
    case = Case(OPTIONS[options], gain=gain).to(DTYPES[dtype])
    found = outputs_and_gradients(case.fused, IDS[ids], case, dropout=dropout)
    twin = outputs_and_gradients(case.plain, IDS[ids], case, dropout=dropout)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in twin] == [DTYPES[dtype]] * len(found)
    case.to(torch.float64)
    exact = outputs_and_gradients(case.plain, IDS[ids], case, dropout=dropout)  # the same draws in every type
    bound = {"float64": 1e-14, "float32": 1e-6}.get(dtype, 6 * torch.finfo(DTYPES[dtype]).eps)
    assert_near(found, exact, bound)


@pytest.mark.parametrize("trained", ["A", "E", "g", "A E", "A E g"])
def test_gradients_are_those_of_differences(trained):
    case = Case(gain="g" in trained)
    for leaf, name in zip(case.leaves, "AEg", strict=False):
        leaf.requires_grad_(name in trained)
    inputs = [leaf for leaf in case.leaves if leaf.requires_grad]

    def function(*_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return case.fused(IDS["matrix"], *case.leaves, dropout=0.3)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_dropout_drops_whole_tokens():
    case = Case()
    ids = torch.arange(NUM).repeat(2000)
    base, full = case.layer(ids), case.fused(ids, *case.leaves)
    found = case.fused(ids, *case.leaves, dropout=0.3)
    dropped = (found == base).all(dim=1)
    assert torch.equal((found == base).any(dim=1), dropped)
    torch.testing.assert_close(found[~dropped] - base[~dropped], (full - base)[~dropped] / 0.7)
    assert abs(dropped.double().mean() - 0.3) < 6 * (0.3 * 0.7 / len(ids)) ** 0.5


def saved(function: Callable[[], object]) -> list[tuple[int, ...]]:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
def test_the_tokens_and_h_are_kept_and_nothing_of_the_outputs_size(gain):
    case, ids = Case(gain=gain), IDS["matrix"]
    for leaf in case.leaves:
        leaf.requires_grad_()
    own = [(R, NUM), (DIM, R), (NUM, DIM), *([(DIM,)] if gain else [])]
    assert sorted(saved(lambda: case.fused(ids, *case.leaves))) == sorted([(36, R), (4, 9), *own])
    case.leaves[1].requires_grad_(False)
    if not gain:
        assert (36, R) not in saved(lambda: case.fused(ids, *case.leaves))
    with torch.no_grad():
        assert saved(lambda: case.fused(ids, *case.leaves)) == []


def test_of_a_large_a_only_what_is_looked_up_changes_its_type():
    model = nn.Sequential(nn.Embedding(5000, DIM)).bfloat16()
    handle = lf.attach(model, lf.LoRA(r=R), ["0"])
    made, own = [], {tensor.untyped_storage().data_ptr() for tensor in (model[0].weight, *handle.parameters())}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if result.numel() >= 5000 and result.untyped_storage().data_ptr() not in own:
                made.append(tuple(result.shape))
            return result

    with Watch():
        y = model(torch.tensor([1, 2]))
    assert y.dtype == torch.bfloat16 and made == []


@pytest.mark.parametrize("method", [lf.LoRA(r=2), lf.LoRA(r=2, dropout=0.2), lf.DoRA(lf.LoRA(r=2))], ids=str)
def test_what_comes_after_may_write_to_the_output(method, fill):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(NUM, DIM), nn.ReLU(inplace=inplace))
        handle = lf.attach(model, method, ["0"], seed=0)
        fill(handle)
        model(IDS["matrix"]).square().sum().backward()
        found.append([parameter.grad for parameter in handle.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_leaves_a_table_in_its_own_type_as_torch_does():
    case = Case(gain=True).to(torch.float32)
    expected = outputs_and_gradients(case.fused, IDS["matrix"], case)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.layer(IDS["matrix"]).dtype == torch.float32
        found = outputs_and_gradients(case.fused, IDS["matrix"], case)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_token_that_is_not_there_is_torchs_own_error():
    case = Case()
    for ids in (torch.tensor([NUM]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="out of range"):
            case.fused(ids, *case.leaves)


def test_shapes_can_be_asked_of_meta_tensors():
    case = Case(gain=True)
    case.layer.to("meta")
    leaves = [leaf.to("meta").requires_grad_() for leaf in case.leaves]
    y = case.fused(IDS["matrix"].to("meta"), *leaves, dropout=0.1)
    assert y.shape == (4, 9, DIM)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_the_fused_path_is_taken_only_where_it_is_right(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lorafit.layers.lookup.lookup", lambda *args, **options: calls.append(1) or lookup(*args, **options)
    )

    def count(change: Callable[[nn.Module, lf.Handle], object], method: lf.Method | None = None) -> int:
        calls.clear()
        model = nn.Sequential(nn.Embedding(NUM, DIM))
        handle = lf.attach(model, method or lf.LoRA(r=2), ["0"])
        change(model[0], handle)
        model(IDS["matrix"]).sum().backward()
        return len(calls)

    assert count(lambda layer, handle: None) == 1
    assert count(lambda layer, handle: None, lf.LoRA(r=2, dropout=0.5)) == 1
    assert count(lambda layer, handle: None, lf.DoRA(lf.LoRA(r=2))) == 1
    assert count(lambda layer, handle: None, lf.IntrinsicDimension(d=3)) == 0  # its change is dense
    assert count(lambda layer, handle: layer.weight.requires_grad_()) == 0  # the kernel has no gradient for W
    both = ["default", "b"]
    assert count(lambda _, handle: lf.attach(handle.model, lf.LoRA(r=2), ["0"], name="b").activate(both)) == 0
