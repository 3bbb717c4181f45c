"""The fused linear operations against their plain twin, what they keep for the backward pass, and what they cost."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import lorafit as lf
from lorafit.delta import LowRank, Update
from lorafit.errors import StateError
from lorafit.kernels import linear as kernel
from lorafit.kernels import products
from lorafit.kernels.frozen import Plain
from lorafit.kernels.masks import keep_mask
from lorafit.kernels.scratch import scratch
from lorafit.layers import Acting, LinearSite, apply

SCALE = 1.7
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = {"low-rank": (False, False), "merged": (False, True), "merged-kept": (True, True)}
EXTRAS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "vectors": ("mid", "out"),
    "gain": ("gain",),
    "all": ("mid", "out", "gain"),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(5, 6),
    "batched": lambda: torch.randn(2, 3, 5, 6),
    "few": lambda: torch.randn(2, 1, 6),
    "vector": lambda: torch.randn(6),
    "transposed": lambda: torch.randn(6, 5).t(),
    "permuted": lambda: torch.randn(4, 6, 3).permute(2, 0, 1),
    "strided": lambda: torch.randn(4, 10, 12)[:, ::2, ::2],
    "expanded": lambda: torch.randn(1, 6).expand(7, 6),
    "no-rows": lambda: torch.randn(0, 6),
    "no-rows-batched": lambda: torch.randn(3, 0, 6),
}
TRAINED = ("down", "up", "mid", "out", "gain")


@pytest.fixture(params=list(ORDERS))
def order(request, monkeypatch) -> str:
    """Each order in turn, whatever would be chosen."""
    monkeypatch.setattr(kernel, "order", lambda *_: ORDERS[request.param])
    return request.param


def factors(dtype: torch.dtype = torch.float64, r: int = 3, extras: tuple[str, ...] = ()) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parts = {"weight": make(8, 6), "bias": make(8), "down": make(r, 6), "up": make(8, r)}
    vectors = {"mid": make(r), "out": make(8), "gain": make(8).abs() + 0.5}
    return {**parts, **{name: vectors[name] if name in extras else None for name in vectors}}


def delta(parts: dict[str, Any]) -> LowRank:
    return LowRank(parts["up"], parts["down"], parts["mid"], parts["out"], SCALE)


def fused(x: Tensor, parts: dict[str, Any], dropout: float = 0.0) -> Tensor:
    weight, up = Plain(parts["weight"]), delta(parts).upward()
    return kernel.linear(x, weight, parts["bias"], parts["down"], up, SCALE, gain=parts["gain"], dropout=dropout)


def plain(x: Tensor, parts: dict[str, Any]) -> Tensor:
    layer = nn.Linear(6, 8, bias=parts["bias"] is not None)
    layer.weight = nn.Parameter(parts["weight"], requires_grad=False)
    if parts["bias"] is not None:
        layer.bias = nn.Parameter(parts["bias"], requires_grad=False)
    return apply(LinearSite(layer), x, layer(x), [Acting(Update(delta(parts), parts["gain"]), 0.0)])


def outputs_and_gradients(function: Callable[..., Tensor], x: Tensor, parts: dict[str, Any]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    leaves = {name: parts[name].clone().requires_grad_() for name in TRAINED if parts[name] is not None}
    y = function(x, {**parts, **leaves})
    weights = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *leaves.values()))]


def converted(parts: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: None if value is None else value.to(dtype) for name, value in parts.items()}


def widened(parts: dict[str, Any]) -> dict[str, Any]:
    return converted(parts, torch.float64)


@pytest.mark.parametrize("extras", list(EXTRAS))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", list(INPUTS))
def test_it_agrees_with_the_plain_twin(kind, dtype, bias, extras, order):
    x, parts = INPUTS[kind]().to(dtype), factors(dtype, extras=EXTRAS[extras])
    parts["bias"] = parts["bias"] if bias else None
    exact = outputs_and_gradients(plain, x.double(), widened(parts))
    mine, twin = outputs_and_gradients(fused, x, parts), outputs_and_gradients(plain, x, parts)
    assert [tensor.dtype for tensor in mine] == [tensor.dtype for tensor in twin] == [dtype] * len(exact)
    # In float32 to 1e-6; a merged weight of lower precision, which nobody forms, would be rounded once more.
    roundings = 8 if extras == "plain" else 16
    assert_near(mine, exact, dtype, roundings)
    assert_near(twin, exact, dtype, roundings)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("trained", ["x A B", "A B", "x B", "B", "x A", "A", "x", "x A B g", "g", "B g"])
@pytest.mark.parametrize("kind", ["few", "vector"])
def test_gradients_are_those_of_differences(kind, trained, dropout, order):
    if dropout and order != "low-rank":
        return  # never chosen: see `test_the_order_is_that_of_the_least_work`
    parts = factors(extras=("gain",))
    names = {"A": "down", "B": "up", "g": "gain"}
    x = INPUTS[kind]().double().clone().requires_grad_("x" in trained)
    leaves = {names[key]: parts[names[key]].requires_grad_() for key in trained.split() if key != "x"}
    inputs = [tensor for tensor in (x, *leaves.values()) if tensor.requires_grad]

    def function(*_: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask each time
        return fused(x, {**parts, **leaves}, dropout)

    assert gradcheck(function, inputs)
    if "A" in trained:
        assert gradgradcheck(function, inputs)


def test_a_layer_used_twice_has_second_derivatives(order):
    # x of the second use is a function of A and B: the gradient of one use must not count the other's.
    parts = factors()
    parts["weight"], parts["up"] = parts["weight"][:6], parts["up"][:6].clone().requires_grad_()
    parts["bias"], down = None, parts["down"].requires_grad_()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda *_: fused(fused(x, parts).tanh(), parts), [x, down, parts["up"]])


def test_second_derivatives_through_a_frozen_a_are_refused_not_wrong(order):
    parts = factors()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    up = parts["up"].requires_grad_()
    y = fused(x, {**parts, "up": up})
    with pytest.raises(StateError, match="second derivatives") as caught:
        torch.autograd.grad(y.square().sum(), (x, up), create_graph=True)
    assert "A" in str(caught.value.fix)


def assert_near(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype, roundings: int = 8) -> None:
    """Each tensor as near to its float64 value as a few roundings in `dtype` allow, by norm."""
    for place, (one, truth) in enumerate(zip(found, exact, strict=True)):
        assert one.shape == truth.shape, place
        bound = roundings * torch.finfo(dtype).eps * truth.double().norm()
        assert (one.double() - truth.double()).norm() <= bound, place


def test_a_gain_of_one_changes_no_bit():
    # y = g ∘ (x Wᵀ) + b must be the layer's own output, which adds b inside of the product.
    parts = factors(torch.float32, extras=("gain",))
    parts["gain"], parts["up"] = torch.ones(8), torch.zeros(8, 3)
    x = torch.randn(64, 6)
    for trained in (False, True):
        y = fused(x.clone().requires_grad_(trained), parts)
        assert torch.equal(y, F.linear(x, parts["weight"], parts["bias"]))


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (6,)], ids=["matrix", "batched", "vector"])
@pytest.mark.parametrize("extras", ["plain", "gain"])
def test_what_follows_may_change_the_output_in_place(shape, extras, order):
    parts = factors(extras=EXTRAS[extras])
    x = torch.randn(shape, dtype=torch.float64)
    expected = outputs_and_gradients(lambda x, parts: plain(x, parts).relu(), x, parts)
    found = outputs_and_gradients(lambda x, parts: fused(x, parts).relu_(), x, parts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# Dropout


def test_dropout_acts_on_the_low_rank_path_alone(monkeypatch):
    parts = factors(extras=("gain", "mid"))
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.uint8)
    monkeypatch.setattr("lorafit.kernels.parts.keep_mask", lambda rows, dropout: mask)
    x = torch.randn(2, 6, dtype=torch.float64)

    def by_hand(x: Tensor, parts: dict[str, Any]) -> Tensor:
        low = (x * mask / (1 - 0.4)) @ parts["down"].t() * parts["mid"] @ parts["up"].t() * SCALE
        return (x @ parts["weight"].t() + low) * parts["gain"] + parts["bias"]

    expected = outputs_and_gradients(by_hand, x, parts)
    found = outputs_and_gradients(lambda x, parts: fused(x, parts, 0.4), x, parts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1e-4])
def test_a_mask_keeps_each_number_with_the_probability_that_was_asked_for(dropout):
    torch.manual_seed(0)
    n, k = 1500, 1003
    mask = keep_mask(torch.empty(n, k), dropout)
    assert mask.shape == (n, k) and mask.dtype == torch.uint8 and set(mask.unique().tolist()) <= {0, 1}
    spread = (dropout * (1 - dropout) / (n * k)) ** 0.5
    assert abs((mask == 0).double().mean().item() - dropout) < 5 * spread
    # By columns and by rows: not a part of the mask that is always kept.
    columns = (mask == 0).double().mean(dim=0)
    assert (columns - dropout).abs().max() < 6 * (dropout * (1 - dropout) / n) ** 0.5 + 1e-3
    if 0.01 < dropout < 0.99:
        neighbours = torch.stack([mask[:, :-1].flatten(), mask[:, 1:].flatten()]).double()
        assert torch.corrcoef(neighbours)[0, 1].abs() < 0.01


def test_masks_follow_the_seed_and_differ_from_call_to_call():
    x = torch.empty(20, 30)
    torch.manual_seed(1)
    first, second = keep_mask(x, 0.5), keep_mask(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(keep_mask(x, 0.5), first) and not torch.equal(first, second)


# What is kept, and what it costs


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Memory → bytes of what autograd keeps within it."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield held


QKV = {"q": 48, "k": 16, "v": 16}
TOKENS, INN = 40, 64


def kept_of(method: lf.Method, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that autograd keeps of three layers which read the same x, beside their weights and adapters."""
    model = nn.ModuleDict({name: nn.Linear(INN, out, bias=False) for name, out in QKV.items()}).to(dtype)
    handle = lf.attach(model, method, list(QKV), seed=0)
    x = torch.randn(TOKENS, INN, dtype=dtype)
    for path in handle.sites:  # what a method computes once per step of its parameters is no activation
        handle.adapter(path).update(handle.sites[path].weight)
    with kept_bytes() as held:
        outputs = [layer(x) for layer in model.values()]
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    assert len(outputs) == 3
    small = 4 * max(out * 300 for out in QKV.values())
    activations = {place: size for place, size in held.items() if place not in own}
    return sum(size for size in activations.values() if size % TOKENS == 0 and size >= TOKENS and size <= small * 99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kept_bytes_are_those_of_the_formula(dtype):
    size, r = torch.finfo(dtype).bits // 8, 4
    x, h = TOKENS * INN * size, 3 * TOKENS * r * size
    whole = sum(TOKENS * out * size for out in QKV.values())
    assert kept_of(lf.LoRA(r=r), dtype) == x + h  # x once, whoever reads it
    assert kept_of(lf.LoRAPlus(r=r), dtype) == x + h
    assert kept_of(lf.LoRAFA(r=r), dtype) == h  # H alone
    assert kept_of(lf.LoRA(r=r, dropout=0.5), dtype) == x + h + 3 * TOKENS * INN  # a byte a number
    assert kept_of(lf.DoRA(lf.LoRA(r=r)), dtype) == x + h + whole  # m's gradient takes y
    assert kept_of(lf.AdaLoRA(init_r=r, target_r=2), dtype) == x + h
    assert kept_of(lf.VeRA(r=r), dtype) == h // 3  # one A for all three: one H


def test_flops_are_those_of_the_formula(monkeypatch):
    tokens, inn, out, r = 24, 64, 48, 4
    base, adapter, forming = 2 * tokens * inn * out, 2 * tokens * r * (inn + out), 2 * inn * out * r

    def flops(order: str, *, lowest: bool = False) -> int:
        monkeypatch.setattr(kernel, "order", lambda *_: ORDERS[order])
        model = nn.Sequential(nn.Linear(inn, out))
        lf.attach(model, lf.LoRA(r=r), ["0"])
        x = torch.randn(tokens, inn, requires_grad=not lowest)
        with FlopCounterMode(display=False) as counter:
            model(x).square().sum().backward()
        return counter.get_total_flops()

    frozen = 2 * base  # forward, and the gradient of x
    assert flops("low-rank") == frozen + 3 * adapter
    # H for B, dB, dH for A, dA: two thirds are left of the adapter, and W + s B A is formed in each direction.
    assert flops("merged") == frozen + 2 * adapter + 2 * forming
    assert flops("merged-kept") == frozen + 2 * adapter + forming
    # Nobody asks for the gradient of the lowest layer's input.
    assert flops("low-rank", lowest=True) == base + 3 * adapter - 2 * tokens * r * inn


def test_the_order_is_that_of_the_least_work():
    weight, half = Plain(torch.empty(576, 576)), Plain(torch.empty(576, 576, dtype=torch.bfloat16))

    def chosen(tokens: int, r: int, frozen: Plain = weight, dropout: float = 0.0) -> str:
        picked = kernel.order(frozen, tokens, r, frozen.dtype, dropout)
        return next(name for name, order in ORDERS.items() if order == picked)

    assert chosen(256, 16) == chosen(1024, 16) == "low-rank"
    assert chosen(4096, 16) == "merged"
    assert chosen(1024, 256) == "merged-kept"  # VeRA
    assert chosen(1, 256) == chosen(1, 16) == "low-rank"  # generating token by token
    # Rounded to bfloat16 a merged weight would lose the update; with dropout there is none.
    assert chosen(4096, 256, half) == chosen(4096, 256, dropout=0.1) == "low-rank"


# What is shared


def test_one_product_for_layers_that_read_the_same_input():
    x, down, users = torch.randn(5, 6), torch.randn(3, 6), [torch.empty(1) for _ in range(9)]

    def product(user: int, x: Tensor = x, down: Tensor = down) -> Tensor:
        found = products.shared_product(x, x, down, users[user])
        torch.testing.assert_close(found, x @ down.t())
        return found

    first = product(0)
    assert product(1) is first and product(2) is first
    x.data.add_(1)  # shows in no version
    again = product(1)
    assert again is not first and product(2) is again
    assert product(3, down=down[:2]) is not again
    x.add_(1)
    assert product(4) is not again
    down.add_(1)
    assert product(5) is not product(6, x=x.clone())
    with torch.inference_mode():
        other = torch.randn(5, 6)
        assert product(7, x=other) is not product(8, x=other)


@pytest.mark.parametrize("method", [lf.LoRA(r=16), lf.LoRAFA(r=16), lf.VeRA(r=16)], ids=["lora", "lora-fa", "vera"])
@pytest.mark.parametrize("graph", [True, False], ids=["gradients", "none"])
def test_an_adapter_that_comes_to_lie_where_another_one_was_is_not_taken_for_it(method, graph):
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 64)}), torch.randn(40, 64)
    for turn in range(10):
        name = "qk"[turn % 2]
        handle = lf.attach(model, method, [name], seed=turn)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.fill_(0.5)
        with torch.set_grad_enabled(graph):
            y = model[name](x)
        expected = F.linear(x, model[name].weight + handle.delta(name), model[name].bias)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        del expected
        handle.detach()
        del handle


def test_inference_before_training_on_the_same_input():
    model, x = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}), torch.randn(5, 8)
    handle = lf.attach(model, lf.VeRA(r=4), ["q", "k"])
    with torch.inference_mode():
        model["q"](x)
    model["k"](x).sum().backward()
    assert handle.adapter("k").b.grad is not None


def test_with_and_without_gradients_the_result_is_the_same_to_the_bit():
    for tokens in (1, 2, 3, 7, 40):
        for inn, out, r in ((31, 32, 2), (31, 32, 4), (64, 48, 4), (576, 192, 16)):
            model = nn.Sequential(nn.Linear(inn, out))
            handle = lf.attach(model, lf.LoRA(r=r), ["0"])
            nn.init.normal_(handle.adapter("0").B)
            x = torch.randn(tokens, inn)
            with torch.no_grad():
                expected = model(x)
            assert torch.equal(model(x), expected), (tokens, inn, out, r)


def test_a_mask_is_drawn_in_one_way_whether_or_not_operations_are_seen():
    # Checkpoints draw again in the backward pass, where a mode around the forward pass is gone.
    x = torch.empty(20, 30)
    torch.manual_seed(1)
    expected = keep_mask(x, 0.3)
    torch.manual_seed(1)
    with FlopCounterMode(display=False):
        assert torch.equal(keep_mask(x, 0.3), expected)


def test_replicas_whose_weights_are_no_parameters():
    # As torch.nn.parallel.replicate makes them.
    model = nn.Sequential(nn.Linear(6, 8))
    lf.attach(model, lf.LoRA(r=2), ["0"])

    def replica(module: nn.Module) -> nn.Module:
        made = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(made, name, replica(child))
        for name, value in module._parameters.items():
            setattr(made, name, value * 1 if value.requires_grad else value.detach().clone())
        return made

    x = torch.randn(4, 6)
    torch.testing.assert_close(replica(model)(x), model(x))


def test_what_follows_a_dense_change_may_change_the_output_in_place():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    lf.attach(model, lf.IntrinsicDimension(d=20), ["0"])
    y = model(torch.randn(2, 3, 8, dtype=torch.float64)).relu_()
    y.sum().backward()
    assert y.shape == (2, 3, 8)


def test_a_product_is_let_go_of_with_its_input():
    x, down = torch.randn(5, 6), torch.randn(3, 6)
    products.shared_product(x, x, down, down)
    del x
    gc.collect()
    assert products._LAST.known is None


def test_two_threads_do_not_share_scratch():
    here = scratch("test", (4,), torch.float32, torch.device("cpu"))
    assert scratch("test", (2, 2), torch.float32, torch.device("cpu")).data_ptr() == here.data_ptr()
    there: list[int] = []
    thread = threading.Thread(
        target=lambda: there.append(scratch("test", (4,), torch.float32, torch.device("cpu")).data_ptr())
    )
    thread.start()
    thread.join()
    assert there != [here.data_ptr()]
    with FlopCounterMode(display=False):  # a mode may keep what it sees
        assert scratch("test", (4,), torch.float32, torch.device("cpu")).data_ptr() != here.data_ptr()


def test_scratch_is_memory_whatever_the_default_device_is():
    found: list[bool] = []

    def inside() -> None:  # a thread of its own has no buffers yet
        x = torch.ones(3, 4)
        with torch.device("meta"):
            found.append(scratch("test", (4,), torch.float32, torch.device("cpu")).is_meta)
            found.append(keep_mask(x, 0.5).is_meta)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False, False]


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
    own = kernel.linear
    monkeypatch.setattr("lorafit.kernels.siblings.linear", lambda *args, **more: calls.append(1) or own(*args, **more))
    x = torch.randn(2, 6)

    def count(change: Callable[[nn.Linear, lf.Handle], object], **options: Any) -> int:
        calls.clear()
        model = nn.Sequential(nn.Linear(6, 8))
        handle = lf.attach(model, lf.LoRA(r=2, **options), ["0"])
        change(model[0], handle)
        model(x)
        return len(calls)

    assert count(lambda layer, handle: None) == 1
    assert count(lambda layer, handle: None, dropout=0.5) == 1
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
    exact = widened(parts)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = [outputs_and_gradients(function, x.to(base), converted(parts, base)) for function in (fused, plain)]
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
    parts = converted(factors(), torch.float32)
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
