"""What every method and composition promises on every layer type and setting."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lorafit as lf
from lorafit.state import load_state, save_state

TARGETS = ["layer"]
LOW = [torch.bfloat16, torch.float16]


def attached(model: nn.Module, member, layer, **options) -> lf.Handle:
    return lf.attach(model, member.make(layer), TARGETS, **options)


def formula(handle: lf.Handle) -> int:
    """The method's count for the handle's sites; that of a choice among sites needs their paths."""
    method = handle.method
    if isinstance(method, lf.LoRADrop) and method.keep is not None:
        return method.count({path: site.shape for path, site in handle.sites.items()})
    return method.num_trainable(handle.shapes())


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


@pytest.fixture
def fill() -> Callable[..., None]:
    """Values of usual size for all that an adapter trains, and for what a schedule would have put beside it."""

    def fill(handle: lf.Handle, seed: int = 7, std: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in handle.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator).mul(std)
                # A magnitude or a layer's scale is far from zero.
                parameter.copy_(parameter + noise / 4 if key.endswith((".m", ".lam")) else noise)
            for adapter in (handle.adapter(path) for path in handle.sites):
                for key, buffer in adapter.named_buffers():
                    if key in ("A_K", "B_K"):
                        buffer.copy_(torch.randn(buffer.shape, generator=generator).mul(std))
                    elif key == "lam":
                        buffer.fill_(0.5)

    return fill


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_new_adapter_changes_nothing(layer, member, mode):
    model = layer.model().train(mode == "train")
    expected = model(layer.input())
    attached(model, member, layer)
    if member.exact:
        assert torch.equal(model(layer.input()), expected)
    torch.testing.assert_close(model(layer.input()), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_is_declared_and_nothing_else(layer, member, fill):
    model = layer.model()
    handle = attached(model, member, layer)
    fill(handle)
    model(layer.input()).square().sum().backward()
    trained = {id(parameter) for parameter in handle.parameters()}
    assert trained
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name


def test_outputs_and_gradients_are_those_of_the_changed_weight(layer, member, fill):
    # The layer with W' = W + change(W) in its place, by autograd alone, is what the adapter stands for.
    model, plain = layer.model().double().eval(), layer.model().double().eval()
    handle = attached(model, member, layer)
    fill(handle)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".adapters." not in key})
    site, adapter = handle.sites["layer"], handle.adapter("layer")
    x = layer.input() if site.shape.lookup else layer.input().double().requires_grad_()
    expected = functional_call(
        plain,
        {"layer.weight": plain.layer.weight.detach() + site.unfold(adapter.update(site.weight).change(site.weight()))},
        (x,),
    )
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if "scale_grad_by_freq" in layer.options or "padding_idx" in layer.options:
        return  # options that change gradients on purpose
    inputs = [*handle.parameters(), *([] if site.shape.lookup else [x])]
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        rtol=1e-8,
        atol=1e-9,
    )


def test_merged_and_unmerged_agree_and_unmerge_is_exact(layer, member, fill):
    model = layer.model().eval()
    base = model(layer.input())
    handle = attached(model, member, layer)
    fill(handle)
    before = values(model)
    expected = model(layer.input())
    assert not torch.allclose(base, expected, atol=1e-3)
    handle.merge()
    torch.testing.assert_close(model(layer.input()), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model.layer.weight - before["layer.weight"], handle.delta("layer"), rtol=0, atol=2e-6)
    with handle.disabled():
        assert torch.equal(model(layer.input()), base)
    handle.unmerge()
    assert_same(model.state_dict(), before)
    assert torch.equal(model(layer.input()), expected)


def test_detach_restores_the_model(layer, member):
    model = layer.model()
    before = values(model)
    handle = attached(model, member, layer)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1, total_steps=12)
    for _ in range(3):
        optimizer.zero_grad()
        model(layer.input()).square().mean().backward()
        optimizer.step()
    handle.detach()
    assert type(model.layer) is layer.kind
    assert_same(model.state_dict(), before)


def test_methods_add_up_on_one_layer(some_layer, member, fill):
    model = some_layer.model().eval()
    base = model.layer(some_layer.input())
    handles = [
        attached(model, member, some_layer, name="one"),
        lf.attach(model, lf.LoRA(r=some_layer.rank(2)), TARGETS, name="two"),
    ]
    apart = []
    for seed, handle in enumerate(handles):
        fill(handle, seed)
        handle.activate(handle.name)
        apart.append(model.layer(some_layer.input()) - base)
    handles[0].activate(["one", "two"])
    torch.testing.assert_close(model.layer(some_layer.input()), base + sum(apart), rtol=1e-4, atol=1e-4)


def test_training_moves_all_of_it_and_nothing_of_the_base(layer, member):
    model = layer.model()
    base = values(model)
    handle = attached(model, member, layer)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.0, total_steps=12)
    start = {key: parameter.detach().clone() for key, parameter in handle.named_parameters()}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(layer.input()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]
    for key, parameter in handle.named_parameters():
        assert parameter.shape != start[key].shape or not torch.equal(parameter, start[key]), key
    assert_same({name: model.state_dict()[name] for name in base}, base)


def test_the_count_is_the_formula(layer, member):
    model = layer.model()
    handle = attached(model, member, layer)
    assert handle.num_trainable == formula(handle)
    assert handle.num_trainable == sum(parameter.numel() for parameter in handle.parameters())


# PEFT has VeRA and AdaLoRA for linear layers only, which is said.
@pytest.mark.filterwarnings(
    "ignore:PEFT has no:lorafit.LorafitWarning", "ignore:PEFT cannot compute DoRA:lorafit.LorafitWarning"
)
def test_save_and_load_give_the_same_outputs(layer, member, fill, tmp_path):
    model = layer.model().eval()
    handle = attached(model, member, layer, seed=3)
    fill(handle)
    expected = model(layer.input())
    folder = handle.save(tmp_path / "adapter")
    handle.detach()
    again = lf.load(model, folder)
    torch.testing.assert_close(model(layer.input()), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if not member.restored:
        assert isinstance(again.method, lf.LoRA)
        return
    assert again.method == handle.method
    again.detach()
    trainable = lf.load(model, folder, trainable=True)
    assert trainable.num_trainable == formula(trainable)
    model(layer.input()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable.parameters())


def test_copies_are_apart_and_the_same(some_layer, member, fill):
    model = some_layer.model().eval()
    handle = attached(model, member, some_layer)
    fill(handle)
    expected = model(some_layer.input())
    pickled: lf.Handle = pickle.loads(pickle.dumps(handle))
    copied = copy.deepcopy(handle)
    for other in (pickled, copied):
        assert torch.equal(other.model(some_layer.input()), expected)
        fill(other, seed=99)
        assert not torch.allclose(other.model(some_layer.input()), expected)
        assert torch.equal(model(some_layer.input()), expected)
        other.detach()
        assert type(other.model.layer) is some_layer.kind


def test_the_state_dict_goes_round(some_layer, member, fill):
    first, second = some_layer.model().eval(), some_layer.model().eval()
    for seed, model in enumerate((first, second)):
        fill(attached(model, member, some_layer, seed=seed), seed)
    state = first.state_dict()
    assert len({value.data_ptr() for value in state.values() if value.numel()}) == sum(
        1 for value in state.values() if value.numel()
    )  # what is shared is there once, as safetensors wants it
    second.load_state_dict(state, strict=True)
    assert_same(second.state_dict(), state)
    assert torch.equal(first(some_layer.input()), second(some_layer.input()))


def test_gradient_checkpointing_gives_the_same_gradients(some_layer, member, fill):
    model = some_layer.model()
    handle = attached(model, member, some_layer)
    fill(handle)
    found = []
    for step in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        step(some_layer.input()).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in handle.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-6)


def test_accumulated_batches_are_one_large_one(some_layer, member):
    if "scale_grad_by_freq" in some_layer.options:
        some_layer = replace(some_layer, options={"padding_idx": 3})  # frequencies are those of one forward pass
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = some_layer.model()
        handle = attached(model, member, some_layer, seed=0)
        optimizer = handle.optimizer(torch.optim.SGD, lr=0.1, total_steps=12)
        for _ in range(6):
            optimizer.zero_grad()
            for batch in some_layer.input().repeat_interleave(2, dim=0).chunk(parts):
                (model(batch).square().sum() / 100).backward()
            nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in handle.parameters()])
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("low", LOW, ids=["bfloat16", "float16"])
def test_a_low_precision_base(some_layer, member, low, fill):
    if some_layer.kind in (nn.Conv3d,) and low is torch.float16:
        pytest.skip("torch has no float16 Conv3d on a CPU")
    model = some_layer.model().to(low).eval()
    x = some_layer.input()
    x = x if some_layer.kind is nn.Embedding else x.to(low)
    handle = attached(model, member, some_layer)
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float32}
    fill(handle)
    before = values(model)
    y = model(x)
    assert y.dtype == low
    y.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in handle.parameters())
    handle.merge()
    torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.1)
    handle.unmerge()
    assert_same(model.state_dict(), before)


def test_autocast_agrees_with_full_precision(some_layer, member, fill):
    model = some_layer.model().eval()
    handle = attached(model, member, some_layer)
    fill(handle)
    expected = model(some_layer.input())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(some_layer.input())
        found.float().square().mean().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert all(parameter.grad.dtype == torch.float32 for parameter in handle.parameters())


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_whole_graph_with_the_same_numbers(some_layer, member, fill):
    model = some_layer.model()
    handle = attached(model, member, some_layer)
    fill(handle)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        model.zero_grad()
        y = function(some_layer.input())
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in handle.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_bit_for_bit_the_same(some_layer, member, tmp_path):
    def start():
        torch.manual_seed(0)
        model = some_layer.model()
        handle = attached(model, member, some_layer, seed=0)
        return model, handle, handle.optimizer(torch.optim.AdamW, lr=0.05, total_steps=12)

    def go(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(some_layer.input(seed=step)).square().mean().backward()
            optimizer.step()

    model, whole, optimizer = start()
    go(model, optimizer, range(12))
    for killed in (1, 3, 5, 8, 11):
        model, handle, optimizer = start()
        go(model, optimizer, range(killed))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        save_state(handle, tmp_path)
        model, handle, optimizer = start()
        load_state(handle, tmp_path)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        go(model, optimizer, range(killed, 12))
        for (key, expected), (_, found) in zip(whole.named_parameters(), handle.named_parameters(), strict=True):
            assert torch.equal(expected, found), (killed, key)
