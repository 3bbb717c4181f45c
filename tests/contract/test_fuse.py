"""`Handle.fuse`: layers that read the same input are computed as one, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafit as lf
from lorafit import together
from lorafit.errors import StateError
from lorafit.kernels import siblings as kernel

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(4))
METHODS = {
    "lora": lambda: lf.LoRA(r=4),
    "rslora": lambda: lf.LoRA(r=4, rslora=True, init="gaussian"),
    "lora-plus": lambda: lf.LoRAPlus(r=4),
    "lora-fa": lambda: lf.LoRAFA(r=4),
    "vera": lambda: lf.VeRA(r=8),
    "adalora": lambda: lf.AdaLoRA(init_r=4, target_r=2, total_steps=20, warmup=1, final=2, interval=1),
    "dora": lambda: lf.DoRA(lf.LoRA(r=4)),
    "delta-lora": lambda: lf.DeltaLoRA(r=4, start=2),
    "pissa": lambda: lf.LoRA(r=4, init="pissa"),
    "intrinsic": lambda: lf.IntrinsicDimension(d=20),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).double()


class Three(nn.Module):
    """q, k and v of one input, or of several."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = x if other is None else other
        return torch.cat([self.q(x), self.k(y), self.v(y)], dim=-1)


def three(fused: bool = True, method: lf.Method | None = None) -> tuple[Three, lf.Handle]:
    torch.manual_seed(0)
    model = Three()
    handle = lf.attach(model, lf.LoRA(r=2, init="gaussian") if method is None else method, seed=1)
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter)
    if fused:
        assert handle.fuse(torch.zeros(1, 6)) == [("q", "k", "v")]
    return model, handle


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many layers each joint computation had."""
    sizes: list[int] = []
    real = kernel.siblings

    def seen(x: Tensor, members: Any) -> Any:
        sizes.append(len(members))
        return real(x, members)

    monkeypatch.setattr(together, "siblings", seen)
    return sizes


def trained(method: lf.Method, *, fused: bool, steps: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    model = llama()
    handle = lf.attach(model, method, "all-linear", seed=1)
    if fused:
        handle.fuse(input_ids=IDS[:1, :4])
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.05, total_steps=20)
    model.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in handle.named_parameters()}


@pytest.mark.parametrize("method", list(METHODS))
def test_training_is_what_it_is_without(method):
    losses, values = trained(METHODS[method](), fused=False)
    mine, found = trained(METHODS[method](), fused=True)
    assert mine == pytest.approx(losses, rel=1e-9)
    for name, expected in values.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9)


def test_the_groups_of_a_language_model(computed):
    model = llama()
    handle = lf.attach(model, lf.LoRA(r=4), "all-linear")
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    assert handle.fuse(input_ids=IDS) == [
        group
        for layer in range(2)
        for group in (
            tuple(f"model.layers.{layer}.self_attn.{name}" for name in attention),
            tuple(f"model.layers.{layer}.mlp.{name}" for name in mlp),
        )
    ]
    model(input_ids=IDS)
    assert computed == [3, 2, 3, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant, computed):
    def gradients(fused: bool) -> list[Tensor]:
        model, handle = three(fused)
        x = torch.ones(5, 6).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        return [parameter.grad for parameter in handle.parameters()]

    for mine, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, expected)
    assert computed == [3, 3]  # and again in the backward pass


def test_a_layer_with_another_input_computes_by_itself(computed):
    (model, handle), (plain, _) = three(), three(fused=False)
    x, other = torch.randn(5, 6), torch.randn(5, 6)
    for _ in range(together.MISSES - 1):
        torch.testing.assert_close(model(x, other), plain(x, other))
    with pytest.warns(UserWarning, match="do not any more"):
        for _ in range(together.MISSES):
            torch.testing.assert_close(model(x, other), plain(x, other))
    computed.clear()
    torch.testing.assert_close(model(x), plain(x))
    assert computed == []
    assert handle.fuse(x, other) == [("k", "v")]
    torch.testing.assert_close(model(x, other), plain(x, other))
    assert computed == [2]


def test_an_input_that_changed_in_between_is_another_one():
    (model, _), (plain, _) = three(), three(fused=False)
    x = torch.randn(5, 6)
    for module in (model, plain):
        x.fill_(1)
        first = module.q(x)
        x.mul_(2)
        module.out = (first, module.k(x), module.v(x))
    for mine, expected in zip(model.out, plain.out, strict=True):
        torch.testing.assert_close(mine, expected)


def test_what_was_computed_without_gradients_is_not_handed_out_with_them():
    model, handle = three()
    x = torch.randn(5, 6)
    with torch.no_grad():
        model.q(x)
    model.k(x).sum().backward()
    assert handle.adapter("k").B.grad is not None


def test_adapters_that_stop_acting_and_act_again(computed):
    (model, handle), (plain, other) = three(), three(fused=False)
    x = torch.randn(5, 6)
    with handle.disabled(), other.disabled():
        assert torch.equal(model(x), plain(x))
    assert computed == []
    handle.merge()
    torch.testing.assert_close(model(x), plain(x))
    handle.unmerge()
    torch.testing.assert_close(model(x), plain(x))
    assert computed == [3]
    for each in (model, plain):
        lf.attach(each, lf.LoRA(r=2, init="gaussian"), ["k"], name="second", seed=5)
    handle.activate(["default", "second"])
    other.activate(["default", "second"])
    torch.testing.assert_close(model(x), plain(x))
    assert computed == [3, 2]  # k has two adapters: it computes by itself
    handle.detach()
    other.detach()
    torch.testing.assert_close(model(x), plain(x))


def test_sites_that_are_taken_away_leave_the_others_together(computed):
    model = Three()
    lf.attach(model, lf.LoRA(r=2, init="gaussian"), ["q", "v"], seed=1).fuse(torch.zeros(1, 6))
    x = torch.randn(5, 6)
    assert model(x).shape == (5, 16)
    assert computed == [2]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_a_group_of_its_own(way, computed):
    model, _ = three()
    x = torch.randn(5, 6)
    model.q(x)  # two outputs wait
    computed.clear()
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), three(fused=False)[0](x))
    assert not torch.allclose(twin(x), model(x))
    assert computed == [3, 3, 3]


def test_hooks_on_the_layers_are_called_and_offloading_is_respected(computed):
    model, _ = three()
    seen: list[str] = []
    model.k.register_forward_hook(lambda module, args, output: seen.append("k"))
    x = torch.randn(5, 6)
    model(x)
    assert (computed, seen) == ([3], ["k"])
    model.k.register_forward_pre_hook(lambda module, args: seen.append("before"))  # it may put the weight in place
    model(x)
    assert computed == [3, 2]
    assert seen == ["k", "before", "k"]


def test_nothing_is_held_after_a_pass():
    model, handle = three()
    x = torch.randn(5, 6)
    y = model(x)
    held = [weakref.ref(y), weakref.ref(x)]
    y.sum().backward()
    del x, y
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert all(parameter.grad is not None for parameter in handle.parameters())


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_models_compute_each_layer_by_itself(computed):
    (model, _), (plain, _) = three(), three(fused=False)
    x = torch.randn(5, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    assert computed == []


def test_autocast_is_part_of_what_an_output_is_for(computed):
    model, _ = three()
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q(x).dtype == torch.bfloat16
    assert model.k(x).dtype == torch.float32
    assert computed == [3, 2]


@pytest.mark.parametrize("call", [lambda model: model.fuse(), lambda model: model.fuse(torch.zeros(1, 5))])
def test_a_batch_that_the_model_does_not_take_leaves_it_as_it_was(call: Callable[[Any], object]):
    model, handle = three(fused=False)
    model.train()
    with pytest.raises((TypeError, RuntimeError)):
        call(handle)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_batch_that_reaches_no_layer_is_an_error():
    class Empty(Three):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return x

    handle = lf.attach(Empty(), lf.LoRA(r=2))
    with pytest.raises(StateError, match="no layer of the adapter was called"):
        handle.fuse(torch.zeros(1, 6))


def test_a_layer_that_is_called_twice_is_in_no_group():
    class Twice(Three):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.q(x) + self.q(x) + torch.cat([self.k(x), self.v(x)], dim=-1)

    handle = lf.attach(Twice(), lf.LoRA(r=2))
    assert handle.fuse(torch.zeros(1, 6)) == [("k", "v")]


CHANGES: dict[str, Callable[[Any, lf.Handle], object]] = {
    "factor": lambda model, handle: torch.nn.init.ones_(handle.adapter("k").B),
    "weight": lambda model, handle: torch.nn.init.ones_(model.k.weight),
    "acting": lambda model, handle: handle.activate(None),
    "mode": lambda model, handle: model.eval(),
    "inference": lambda model, handle: torch.inference_mode(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_layer_that_changed_in_between_computes_anew(change):
    def outputs(fused: bool) -> Tensor:
        model, handle = three(fused, lf.LoRA(r=2, dropout=0.5))
        model.train()
        x = torch.randn(500, 6, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            model.q(x)
            inside = CHANGES[change](model, handle)
            if change in ("factor", "weight", "mode"):
                model.eval()
            with inside if change == "inference" else torch.no_grad():
                y = model.k(x)
        if change == "inference":
            assert y.is_inference()
            return y[:0]
        return y

    torch.testing.assert_close(outputs(True), outputs(False))


def test_backward_passes_of_their_own():
    def gradients(fused: bool) -> list[Tensor]:
        model, handle = three(fused)
        x = torch.ones(5, 6)
        for layer in (model.q, model.k, model.v):
            layer(x).square().sum().backward()
        return [parameter.grad for parameter in handle.parameters()]

    for mine, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, expected)


class Blocks(nn.Module):
    """Layers of several blocks that read one encoder's output, as in cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Three() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(checkpoint(block, x, use_reentrant=False).square().sum() for block in self.blocks)


def test_a_group_lies_in_one_module():
    model = Blocks()
    handle = lf.attach(model, lf.LoRA(r=2), "all-linear")
    x = torch.randn(5, 6)
    assert handle.fuse(x) == [tuple(f"blocks.{block}.{name}" for name in "qkv") for block in range(2)]
    model(x).backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_a_second_adapter_that_takes_layers_away_ends_the_first_group(computed):
    model, _ = three()
    other = lf.attach(model, lf.LoRA(r=2), ["k", "v"], name="b")
    assert other.fuse(torch.zeros(1, 6)) == [("k", "v")]
    x = torch.randn(5, 6)
    other.activate("b")
    model(x)
    assert computed == [2]


def test_fuse_in_inference_mode_sees_what_is_written():
    class Changed(Three):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            x = x * 1
            y = self.q(x)
            x += 1
            return torch.cat([y, self.k(x), self.v(x)], dim=-1)

    handle = lf.attach(Changed(), lf.LoRA(r=2))
    with torch.inference_mode():
        assert handle.fuse(torch.zeros(1, 6)) == [("k", "v")]


def test_second_derivatives_where_a_layer_is_frozen():
    model, handle = three()
    for parameter in handle.adapter("q").parameters():
        parameter.requires_grad_(False)
    (total,) = torch.autograd.grad(model(torch.ones(5, 6)).square().sum(), [handle.adapter("k").B], create_graph=True)
    total.sum().backward()
    assert handle.adapter("k").A.grad is not None


def test_shapes_can_be_asked_of_meta_tensors_and_models_traced(computed):
    model, _ = three()
    assert copy.deepcopy(model).to("meta")(torch.empty(5, 6, device="meta")).shape == (5, 16)
    computed.clear()
    x = torch.randn(5, 6)
    with pytest.warns(Warning):  # torch.jit.trace is deprecated, and says so
        traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), model(x))
    assert computed == [3]
