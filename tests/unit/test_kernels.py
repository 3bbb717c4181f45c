"""The fused linear operation against its plain twin, and what it keeps for the backward pass."""

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
from lorafit.errors import StateError
from lorafit.kernels import low_rank_linear
from lorafit.layers import Acting, LinearSite, apply

SCALE = 1.7
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INPUTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(5, 6),
    "batched": lambda: torch.randn(2, 3, 5, 6),
    "vector": lambda: torch.randn(6),
    "transposed": lambda: torch.randn(6, 5).t(),
    "permuted": lambda: torch.randn(4, 6, 3).permute(2, 0, 1),
    "strided": lambda: torch.randn(4, 10, 12)[:, ::2, ::2],
    "expanded": lambda: torch.randn(1, 6).expand(7, 6),
    "no-rows": lambda: torch.randn(0, 6),
    "no-rows-batched": lambda: torch.randn(3, 0, 6),
}


def factors(dtype: torch.dtype = torch.float64, r: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {"weight": make(8, 6), "bias": make(8), "down": make(r, 6), "up": make(8, r)}


def fused(x: Tensor, parts: dict[str, Any]) -> Tensor:
    return low_rank_linear(x, parts["weight"], parts["bias"], parts["down"], parts["up"], SCALE)


def plain(x: Tensor, parts: dict[str, Any]) -> Tensor:
    layer = nn.Linear(6, 8, bias=parts["bias"] is not None)
    layer.weight = nn.Parameter(parts["weight"], requires_grad=False)
    if parts["bias"] is not None:
        layer.bias = nn.Parameter(parts["bias"], requires_grad=False)
    update = Update(LowRank(parts["up"], parts["down"], scale=SCALE))
    return apply(LinearSite(layer), x, layer(x), [Acting(update, 0.0)])


def outputs_and_gradients(function: Callable[..., Tensor], x: Tensor, parts: dict[str, Any]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    parts = {**parts, "down": parts["down"].clone().requires_grad_(), "up": parts["up"].clone().requires_grad_()}
    y = function(x, parts)
    weights = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, parts["down"], parts["up"]))]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", list(INPUTS))
def test_it_agrees_with_the_plain_twin(kind, dtype, bias):
    x, parts = INPUTS[kind]().to(dtype), factors(dtype)
    parts["bias"] = parts["bias"] if bias else None
    wide = {name: None if value is None else value.double() for name, value in parts.items()}
    exact = outputs_and_gradients(plain, x.double(), wide)
    mine, twin = outputs_and_gradients(fused, x, parts), outputs_and_gradients(plain, x, parts)
    assert [tensor.dtype for tensor in mine] == [tensor.dtype for tensor in twin] == [dtype] * 4
    assert_near(mine, exact, dtype)
    assert_near(twin, exact, dtype)


@pytest.mark.parametrize("trained", ["x A B", "A B", "x B", "B", "x A", "A", "x"])
@pytest.mark.parametrize("kind", ["matrix", "batched", "vector", "transposed"])
def test_gradients_are_those_of_differences(kind, trained):
    parts = factors()
    x = INPUTS[kind]().double().clone().requires_grad_("x" in trained)
    down = parts["down"].requires_grad_("A" in trained)
    up = parts["up"].requires_grad_("B" in trained)
    inputs = [tensor for tensor in (x, down, up) if tensor.requires_grad]

    def function(*_: Tensor) -> Tensor:
        return fused(x, {**parts, "down": down, "up": up})

    assert gradcheck(function, inputs)
    if "A" in trained:
        assert gradgradcheck(function, inputs)


def test_second_derivatives_through_a_frozen_a_are_refused_not_wrong():
    parts = factors()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    up = parts["up"].requires_grad_()
    y = fused(x, {**parts, "up": up})
    with pytest.raises(StateError, match="second derivatives") as caught:
        torch.autograd.grad(y.square().sum(), (x, up), create_graph=True)
    assert "A" in str(caught.value.fix)


def assert_near(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Each tensor as near to its float64 value as a few roundings in `dtype` allow, by norm."""
    for name, one, truth in zip(("y", "dx", "dA", "dB"), found, exact, strict=True):
        assert one.shape == truth.shape, name
        bound = 8 * torch.finfo(dtype).eps * truth.double().norm()
        assert (one.double() - truth.double()).norm() <= bound, name


def saved_shapes(function: Callable[[], Tensor]) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
    kept: list[tuple[tuple[int, ...], torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype, tensor.untyped_storage().data_ptr()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


def adapted_linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, lf.Handle]:
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    return model, lf.attach(model, lf.LoRA(r=4), ["0"])


def test_x_is_kept_once_and_nothing_else_of_its_size():
    model, _ = adapted_linear()
    x = torch.randn(32, 64)
    kept = saved_shapes(lambda: model(x))
    assert [shape for shape, _, _ in kept].count((32, 64)) == 1
    assert next(pointer for shape, _, pointer in kept if shape == (32, 64)) == x.untyped_storage().data_ptr()
    assert sorted(shape for shape, _, _ in kept) == sorted([(32, 64), (32, 4), (48, 64), (4, 64), (48, 4)])


def test_a_frozen_a_keeps_h_and_never_x():
    model, handle = adapted_linear()
    handle.adapter("0").A.requires_grad_(False)
    kept = saved_shapes(lambda: model(torch.randn(32, 64)))
    assert (32, 64) not in [shape for shape, _, _ in kept]
    assert (32, 4) in [shape for shape, _, _ in kept]
    model(torch.randn(32, 64)).square().sum().backward()
    assert handle.adapter("0").A.grad is None and handle.adapter("0").B.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_low_precision_base_keeps_no_float32_copy_of_x(dtype):
    model, handle = adapted_linear(dtype)
    kept = saved_shapes(lambda: model(torch.randn(32, 64, dtype=dtype)))
    assert all(parameter.dtype == torch.float32 for parameter in handle.parameters())
    assert [kind for shape, kind, _ in kept if shape[0] == 32] == [dtype, dtype]
    assert not [shape for shape, kind, _ in kept if kind == torch.float32 and shape[0] == 32]


def test_nothing_is_kept_without_gradients():
    model, _ = adapted_linear()
    with torch.no_grad():
        assert saved_shapes(lambda: model(torch.randn(32, 64))) == []


def test_the_fused_path_is_taken_only_where_it_is_right(monkeypatch):
    calls = []
    monkeypatch.setattr("lorafit.layers.low_rank_linear", lambda *args: calls.append(1) or low_rank_linear(*args))
    x = torch.randn(2, 6)

    def count(change: Callable[[nn.Linear, lf.Handle], object], **options: Any) -> int:
        calls.clear()
        model = nn.Sequential(nn.Linear(6, 8))
        handle = lf.attach(model, lf.LoRA(r=2, **options), ["0"])
        change(model[0], handle)
        model(x)
        return len(calls)

    assert count(lambda layer, handle: None) == 1
    assert count(lambda layer, handle: None, dropout=0.5) == 0
    assert count(lambda layer, handle: handle.model.eval(), dropout=0.5) == 1
    assert count(lambda layer, handle: layer.weight.requires_grad_()) == 0  # the kernel has no gradient for W
    assert count(lambda layer, handle: layer.bias.requires_grad_()) == 0
    assert (
        count(lambda layer, handle: lf.attach(handle.model, lf.LoRA(r=2), ["0"], name="b").activate(["default", "b"]))
        == 0
    )


def test_a_base_that_is_trained_too_gets_its_gradients():
    model = nn.Sequential(nn.Linear(6, 8)).double()
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    model.requires_grad_(True)
    parameters = list(model.parameters())
    x = torch.randn(4, 6, dtype=torch.float64)
    grads = torch.autograd.grad(model(x).square().sum(), parameters)
    with torch.no_grad():
        weight = model[0].weight + handle.delta("0")
    twin = nn.functional.linear(x, weight.requires_grad_(), model[0].bias)
    expected = torch.autograd.grad(twin.square().sum(), (weight, model[0].bias))
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_gives_the_type_and_the_numbers_of_the_plain_path(base):
    parts = factors(torch.bfloat16)
    exact = {name: value.double() for name, value in parts.items()}
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            outputs_and_gradients(function, x.to(base), {name: value.to(base) for name, value in parts.items()})
            for function in (fused, plain)
        ]
    truth = outputs_and_gradients(plain, x.double(), exact)
    for tensors in found:
        assert [tensor.dtype for tensor in tensors] == [torch.bfloat16, base, base, base]
        assert_near(tensors, truth, torch.bfloat16)


def test_autocast_leaves_float64_alone_as_torch_does():
    parts = factors()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, parts["weight"]).dtype == torch.float64
        inside = fused(x, parts)
    assert torch.equal(inside, fused(x, parts))


def test_backward_inside_autocast_is_that_of_the_forward_pass():
    parts = {name: value.float() for name, value in factors().items()}
    x = torch.randn(5, 6)
    leaves = [x.clone().requires_grad_(), parts["down"].clone().requires_grad_(), parts["up"].clone().requires_grad_()]

    def loss() -> Tensor:
        return fused(leaves[0], {**parts, "down": leaves[1], "up": leaves[2]}).square().sum()

    expected = torch.autograd.grad(loss(), leaves)
    outside = loss()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(outside, leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_shapes_can_be_asked_of_meta_tensors():
    model, _ = adapted_linear()
    model.to("meta")
    assert model(torch.empty(3, 64, device="meta")).shape == (3, 48)
