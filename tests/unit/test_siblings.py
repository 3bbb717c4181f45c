"""Layers computed together against the same layers one by one: numbers, gradients, what is kept, what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lorafit.errors import StateError
from lorafit.kernels import siblings as kernel
from lorafit.kernels.frozen import Plain
from lorafit.kernels.siblings import Member, siblings

INN, OUTS, SCALE = 6, (8, 4, 4), 1.7
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = {"low-rank": (False, False), "merged": (False, True), "merged-kept": (True, True)}
SHAPES = {"matrix": (5, INN), "batched": (2, 3, 5, INN), "vector": (INN,), "none": (3, 0, INN)}
KINDS = ("plain", "gain", "shared", "ranks")
"""What the members have: nothing more, a gain, one frozen A, or a rank each."""


@pytest.fixture(params=list(ORDERS))
def order(request, monkeypatch) -> str:
    """Each order in turn, whatever would be chosen."""
    monkeypatch.setattr(kernel, "order", lambda *_: ORDERS[request.param])
    return request.param


def members(
    dtype: torch.dtype, kind: str = "plain", *, dropout: float = 0.0, bias: bool = True, grad: bool = True
) -> list[Member]:
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    shared, made = make(3, INN), []
    for place, out in enumerate(OUTS):
        r = place + 1 if kind == "ranks" else 3
        down = shared if kind == "shared" else make(r, INN, grad=grad)
        gain = make(out, grad=grad) if kind == "gain" else None
        frozen, up = Plain(make(out, INN)), make(out, r, grad=grad)
        made.append(Member(frozen, make(out) if bias else None, down, up, SCALE, gain, dropout))
    return made


def leaves(x: Tensor, layers: list[Member]) -> list[Tensor]:
    found = [x, *(each for one in layers for each in (one.down, one.up, one.gain) if each is not None)]
    return [each for each in found if each.requires_grad]


def results(x: Tensor, layers: list[Member], *, together: bool) -> list[Tensor]:
    torch.manual_seed(7)  # masks
    outputs = siblings(x, layers) if together else [one.alone(x) for one in layers]
    assert outputs is not None
    weights = [torch.linspace(-1, 1, max(1, y.numel()), dtype=y.dtype)[: y.numel()].view_as(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves(x, layers), weights)
    return [*(y.detach() for y in outputs), *gradients]


def converted(layers: list[Member], dtype: torch.dtype) -> list[Member]:
    def to(value: Any) -> Any:
        if isinstance(value, Plain):
            return Plain(value.matrix.to(dtype))
        return value.detach().to(dtype).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return [Member(*(to(value) for value in one)) for one in layers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_they_are_what_each_is_alone(dtype, shape, kind, order):
    layers, x = members(dtype, kind), torch.randn(SHAPES[shape]).to(dtype).requires_grad_()
    exact = results(x.detach().double().requires_grad_(), converted(layers, torch.float64), together=False)
    mine = results(x, layers, together=True)
    assert [(each.dtype, each.shape) for each in mine] == [(dtype, each.shape) for each in exact]
    tolerance = 16 * torch.finfo(dtype).eps
    for found, expected in zip(mine, exact, strict=True):
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * max(1.0, size))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_drops_x_once_for_all(kind, monkeypatch):
    draw = torch.Generator().manual_seed(2)
    mask = torch.randint(0, 2, (40, INN), generator=draw, dtype=torch.uint8)
    drawn: list[float] = []
    for module in ("siblings", "parts"):
        monkeypatch.setattr(f"lorafit.kernels.{module}.keep_mask", lambda rows, p: drawn.append(p) or mask)
    layers, x = members(torch.float64, kind, dropout=0.4), torch.randn(40, INN, dtype=torch.float64).requires_grad_()
    mine = results(x, layers, together=True)
    assert drawn == [0.4]
    for found, alone in zip(mine, results(x, layers, together=False), strict=True):
        torch.testing.assert_close(found, alone)


def test_layers_with_different_dropout_are_not_computed_together():
    first, *rest = members(torch.float64)
    assert siblings(torch.randn(4, INN, dtype=torch.float64), [first._replace(dropout=0.3), *rest]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind, order):
    layers, x = members(torch.float64, kind), torch.randn(4, INN, dtype=torch.float64).requires_grad_()
    inputs = leaves(x, layers)

    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(siblings(x, layers) or ())

    assert gradcheck(outputs, inputs, fast_mode=True)
    if kind != "shared":
        assert gradgradcheck(outputs, inputs, fast_mode=True)


def test_second_derivatives_through_frozen_as_are_refused_not_wrong():
    layers, x = members(torch.float64, "shared"), torch.randn(4, INN, dtype=torch.float64).requires_grad_()
    outputs = siblings(x, layers)
    with pytest.raises(StateError, match="second derivatives"):
        torch.autograd.grad([y.sum() for y in outputs], [x], create_graph=True)


@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_nobody_uses_give_no_gradient(kind, used, order):
    layers, x = members(torch.float64, kind), torch.randn(4, INN, dtype=torch.float64).requires_grad_()

    def gradients(outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        total = sum(outputs[place].square().sum() for place in used)
        return torch.autograd.grad(total, leaves(x, layers), allow_unused=True)

    for mine, alone in zip(gradients(siblings(x, layers)), gradients([one.alone(x) for one in layers]), strict=True):
        assert (mine is None) == (alone is None)
        if mine is not None:
            torch.testing.assert_close(mine, alone)


@pytest.mark.parametrize("trained", ["x", "down", "up", "gain"])
def test_only_what_is_trained_gets_a_gradient(trained, order):
    layers = converted(members(torch.float64, "gain", grad=False), torch.float64)
    x = torch.randn(4, INN, dtype=torch.float64).requires_grad_(trained == "x")
    for one in layers:
        if trained != "x":
            getattr(one, trained).requires_grad_()
    for mine, alone in zip(results(x, layers, together=True), results(x, layers, together=False), strict=True):
        torch.testing.assert_close(mine, alone)


def test_what_follows_may_change_an_output_in_place(order):
    layers, x = members(torch.float64, "gain"), torch.randn(2, 4, INN, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(sum((2 * one.alone(x)).square().sum() for one in layers), leaves(x, layers))
    found = torch.autograd.grad(sum(y.mul_(2).square().sum() for y in siblings(x, layers)), leaves(x, layers))
    for mine, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, alone)


def test_with_and_without_gradients_the_result_is_the_same_to_the_bit(order):
    layers, x = members(torch.float32), torch.randn(40, INN)
    with torch.no_grad():
        expected = siblings(x, layers)
    assert all(torch.equal(mine, other) for mine, other in zip(siblings(x, layers), expected, strict=True))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_gives_the_type_and_the_numbers_of_each_alone(kept):
    layers, x = converted(members(torch.float32), kept), torch.randn(40, INN).to(kept).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mine = results(x, layers, together=True)
        alone = results(x, layers, together=False)
    for found, expected in zip(mine, alone, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=4e-2, atol=0.2)


def test_layers_that_work_in_different_types_are_not_computed_together():
    first, *rest = members(torch.float32)
    assert siblings(torch.randn(4, INN), [first, *converted(rest, torch.float64)]) is None


def test_x_is_kept_once_and_a_frozen_a_keeps_h_alone(monkeypatch):
    monkeypatch.setattr(kernel, "order", lambda *_: ORDERS["low-rank"])

    def kept(layers: list[Member]) -> int:
        x, sizes = torch.randn(32, INN).requires_grad_(), {}
        own = {each.data_ptr() for one in layers for each in (one.down, one.up, one.frozen.matrix)}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = siblings(x, layers)
        assert outputs is not None
        return sum(sizes.values())

    assert kept(members(torch.float32, bias=False)) == 4 * 32 * (INN + 3 * 3)
    assert kept(members(torch.float32, "shared", bias=False)) == 4 * 32 * 3  # one A: one H


def test_flops_are_those_of_the_formula(monkeypatch):
    tokens, r = 24, 3
    base = sum(2 * tokens * INN * out for out in OUTS)
    adapter = sum(2 * tokens * r * (INN + out) for out in OUTS)

    def flops(kind: str, order: str = "low-rank") -> int:
        monkeypatch.setattr(kernel, "order", lambda *_: ORDERS[order])
        layers, x = members(torch.float32, kind), torch.randn(tokens, INN).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward([y.sum() for y in siblings(x, layers)])
        return counter.get_total_flops()

    forming = sum(2 * r * INN * out for out in OUTS)
    ups = sum(2 * tokens * r * out for out in OUTS)
    assert flops("plain") == 2 * base + 3 * adapter
    assert flops("plain", "merged") == 2 * base + 2 * adapter + 2 * forming
    assert flops("plain", "merged-kept") == 2 * base + 2 * adapter + forming
    # One frozen A: H once, dH A once, and no dA.
    assert flops("shared") == 2 * base + 3 * ups + 2 * (2 * tokens * r * INN)


def test_the_order_is_that_of_the_least_work():
    def chosen(tokens: int, r: int, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> str:
        outs = (576, 192, 192)
        layers = [
            Member(
                Plain(torch.empty(o, 576, dtype=dtype)), None, torch.empty(r, 576), torch.empty(o, r), 1, None, dropout
            )
            for o in outs
        ]
        columns = [slice(start, start + r) for start in range(0, 3 * r, r)]
        picked = kernel.order(columns, layers, tokens, dtype)
        return next(name for name, order in ORDERS.items() if order == picked)

    assert chosen(1, 16) == chosen(1024, 16) == "low-rank"
    assert chosen(8192, 16) == "merged"
    assert chosen(1024, 256) == "merged-kept"
    assert chosen(8192, 16, torch.bfloat16) == chosen(8192, 16, dropout=0.1) == "low-rank"
