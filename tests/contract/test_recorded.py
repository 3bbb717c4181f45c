"""Passes that others watch, repeat or transform: selective checkpoints, replicas, torch.func, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import lorafit as lf

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")  # torch's own

aten = torch.ops.aten
PRODUCTS = (aten.convolution.default, aten.embedding.default, aten.mm.default, aten.addmm.default, aten.bmm.default)
PRODUCTS = (*PRODUCTS, aten.baddbmm.default, aten.mul.Tensor)

METHODS: dict[str, Callable[[Any], lf.Method]] = {
    "lora": lambda layer: lf.LoRA(r=layer.rank(4)),
    "dropout": lambda layer: lf.LoRA(r=layer.rank(4), dropout=0.3),
    "dora": lambda layer: lf.DoRA(lf.LoRA(r=layer.rank(4))),
    "dora-dropout": lambda layer: lf.DoRA(lf.LoRA(r=layer.rank(4), dropout=0.3)),
    "lora-fa": lambda layer: lf.LoRAFA(r=layer.rank(4)),
    "delta-lora": lambda layer: lf.DeltaLoRA(r=layer.rank(4), start=0),
    "intrinsic": lambda layer: lf.IntrinsicDimension(d=9),
}


@pytest.fixture(params=list(METHODS))
def make(request: pytest.FixtureRequest) -> Callable[[Any], lf.Method]:
    return METHODS[request.param]


def attached(layer: Any, method: lf.Method, *, last: bool = False, low: bool = False) -> tuple[Any, lf.Handle, Tensor]:
    """(model, handle, x) of the layer alone, away from where it starts."""
    model, x = nn.Sequential(layer.model().layer), layer.input()
    model, x = (model.bfloat16(), x.bfloat16() if x.is_floating_point() else x) if low else (model, x)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    handle = lf.attach(model, method, ["0"], seed=0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, handle, x.requires_grad_() if x.is_floating_point() else x


def results(handle: lf.Handle, x: Tensor, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    y = forward(x)
    leaves = [*handle.parameters(), *([x] if x.requires_grad else [])]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def saving(kept: Callable[[Any], bool], model: nn.Module) -> Callable[[Tensor], Any]:
    """The model in a checkpoint that keeps the outputs of these operations."""

    def policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_products_that_a_checkpoint_keeps_are_not_written_to(layer, make, low):
    model, handle, x = attached(layer, make(layer), low=low)
    expected = results(handle, x, model)
    same(results(handle, x, saving(lambda operation: operation in PRODUCTS, model)), expected)


@pytest.mark.parametrize("last", [False, True], ids=["in-order", "channels-last"])
@pytest.mark.parametrize("method", ["lora", "dropout", "dora", "dora-dropout"])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"kernel_size": 1}], ids=str)
def test_convolutions_write_to_nothing_that_is_kept(method, options, last):
    layer = _Layer(nn.Conv2d, (8, 8), (2, 8, 6, 5), {"kernel_size": 3, **options})
    model, handle, x = attached(layer, METHODS[method](layer), last=last)
    same(results(handle, x, saving(lambda _: True, model)), results(handle, x, model))
    with FlopCounterMode(display=False):
        y = model(x)
        assert y.stride() == model(x).stride()
        y.mul_(2).sum().backward()  # what comes after may write to the output, which is no view


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "delta-lora"])
def test_tables_write_to_nothing_that_is_kept(method):
    layer = _Layer(nn.Embedding, (11, 8), (3, 5))
    model, handle, x = attached(layer, METHODS[method](layer))
    same(results(handle, x, saving(lambda _: True, model)), results(handle, x, model))
    with FlopCounterMode(display=False):
        model(x).mul_(2).sum().backward()


@pytest.mark.parametrize("moved", [True, False])
def test_a_checkpoint_of_which_a_mode_sees_the_first_pass_only(some_layer, make, moved):
    model, handle, x = attached(some_layer, make(some_layer))
    adapter: Any = handle.adapter("0")
    if isinstance(handle.method, lf.DeltaLoRA) and moved:
        adapter.lam.zero_()
        adapter.depart(2.0)  # from another point than 0: the rank is doubled
        with torch.no_grad():
            adapter.A.mul_(1.5)
    elif isinstance(handle.method, lf.DeltaLoRA):
        adapter.lam.zero_()
    expected = results(handle, x, model)

    def counted(x: Tensor) -> Any:
        with FlopCounterMode(display=False):
            return checkpoint(model, x, use_reentrant=False)

    same(results(handle, x, counted), expected)


# Replicas ---------------------------------------------------------------------


def replica(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """As torch.nn.parallel.replicate makes one: what were parameters are attributes."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(made, name, replica(child, change))
    for name, value in module._parameters.items():
        if value is None:
            made._parameters[name] = None
        else:
            setattr(made, name, change(value) if value.requires_grad else value.detach().clone())
    return made


@pytest.mark.parametrize("method", ["dora", "delta-lora"])
def test_replicas_remember_nothing_for_each_other(some_layer, method):
    model, _, x = attached(some_layer, METHODS[method](some_layer))
    model(x)
    double = replica(model, lambda value: value * 2)
    with torch.no_grad():
        expected = {name: value * 2 for name, value in model.named_parameters() if value.requires_grad}
        torch.testing.assert_close(double(x), functional_call(model, expected, (x,)))
        torch.testing.assert_close(replica(model, lambda value: value * 1)(x), model(x))
        kept = [vars(each.get_submodule("0.adapters.default")) for each in (model, double)]
    memos = [name for name, value in kept[0].items() if type(value).__name__ == "Memo"]
    assert memos and all(kept[0][name] is not kept[1][name] for name in memos)


def test_a_replica_of_a_packed_layer():
    layer = _Layer(nn.Linear, (6, 8), (3, 6))
    model, x = nn.Sequential(layer.model().layer), layer.input()
    lf.quantise(model, targets=["0"])
    lf.attach(model, lf.DoRA(lf.LoRA(r=2)), ["0"])
    torch.testing.assert_close(replica(model, lambda value: value * 1)(x), model(x))


@pytest.mark.parametrize("change", ["in-place", "another"])
def test_a_replica_that_is_written_to_is_not_taken_for_what_it_was(change):
    layer = _Layer(nn.Linear, (6, 8), (3, 6))
    model, _, x = attached(layer, METHODS["dora"](layer))
    with torch.no_grad():
        again = replica(model, lambda value: value * 1)
        again(x)
        inner = again.get_submodule("0.adapters.default.inner")
        if change == "in-place":
            inner.B.mul_(3)
        else:
            inner.B = inner.B * 3
        model[0].adapters["default"].inner.B.mul_(3)
        torch.testing.assert_close(again(x), model(x))


# Transforms -------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "Linear": (nn.Linear, (6, 8), (3, 5, 6)),
    "int8": (nn.Linear, (6, 8), (3, 5, 6)),
    "Conv1D": (Conv1D, (8, 6), (3, 5, 6)),
    "Conv1d": (nn.Conv1d, (4, 8), (3, 4, 9), {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "Conv2d": (nn.Conv2d, (4, 8), (2, 4, 7, 6), {"kernel_size": 3, "groups": 2}),
    "Embedding": (nn.Embedding, (11, 8), (3, 5)),
}
TRANSFORMED = [name for name in METHODS if "dropout" not in name and name != "intrinsic"]


def tuned(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("kind", ["Linear", "int8", "Conv1D", "Conv1d", "Conv2d", "Embedding"])
@pytest.mark.parametrize("method", TRANSFORMED)
def test_transforms_go_through_adapted_layers(kind, method):
    layer = _Layer(*KINDS[kind])
    model, x = nn.Sequential(layer.model().layer), layer.input()
    if kind == "int8":
        lf.quantise(model, targets=["0"])
    handle = lf.attach(model, METHODS[method](layer), ["0"], seed=0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    values = tuned(model)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    def plain(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(handle.parameters())))

    expected = plain(x)
    same(list(grad(loss)(values, x).values()), expected)
    # Forward mode takes the same derivatives: what is constant in one (the norm of DoRA) is in the other.
    way = {name: torch.randn_like(value) for name, value in values.items()}
    rise = sum(((a * b).sum() for a, b in zip(way.values(), expected, strict=True)), torch.zeros(()))
    torch.testing.assert_close(jvp(lambda v: loss(v, x), (values,), (way,))[1], rise, rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, way[name]) for name, value in values.items()}
        tangent = forward_ad.unpack_dual(loss(dual, x)).tangent
    torch.testing.assert_close(tangent, rise, rtol=1e-3, atol=1e-3)
    each = vmap(grad(loss), in_dims=(None, 0))(values, x[:, None])
    for place, row in enumerate(x):
        same([gradient[place] for gradient in each.values()], plain(row[None]))
    same(plain(x), expected)  # and nothing of it stays


def test_a_packed_layer_without_an_adapter():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    lf.quantise(model, targets=["0"])
    torch.testing.assert_close(vmap(model)(x), model(x))
    y, tangent = jvp(model, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, model(x + 1) - model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, model(x))


class _Layer:
    """A layer of a case, where conftest's own are not what is looked at."""

    def __init__(
        self, kind: Callable[..., nn.Module], args: tuple[int, ...], shape: tuple[int, ...], options: Any = None
    ) -> None:
        self.kind, self.args, self.shape, self.options = kind, args, shape, options or {}

    def rank(self, r: int) -> int:
        return r

    def model(self) -> Any:
        model = nn.Sequential()
        model.add_module("layer", self.kind(*self.args, **self.options))
        return model

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.kind is nn.Embedding:
            return torch.randint(self.args[0], self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)
