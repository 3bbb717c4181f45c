"""What every adapter owes every layer type, whatever the method's settings."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafit as lf

TARGETS = ["layer"]


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that `detach` must bring back."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "keys": list(model.state_dict()),
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "ids": {name: id(parameter) for name, parameter in model.named_parameters()},
        "order": [name for name, _ in model.named_modules()],
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_new_adapter_changes_nothing(layer, method, mode):
    model = layer.model().train(mode == "train")
    expected = model(layer.input())
    lf.attach(model, method, TARGETS)
    assert torch.equal(model(layer.input()), expected)


def test_gradients_reach_what_is_declared_and_nothing_else(layer, method, fill):
    model = layer.model()
    handle = lf.attach(model, method, TARGETS)
    fill(handle)
    model(layer.input()).square().sum().backward()
    trained = {id(parameter) for parameter in handle.parameters()}
    assert len(trained) == 2
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in handle.parameters())


def test_gradients_are_those_of_the_weights_gradient(layer, method, fill):
    # W' = W + Δ(A, B): with G = dL/dW' of a plain layer, dL/dA and dL/dB follow by the chain rule through Δ alone.
    model, plain = layer.model().double().eval(), layer.model().double().eval()
    handle = lf.attach(model, method, TARGETS)
    fill(handle)
    site, adapter = handle.sites["layer"], handle.adapter("layer")
    padding = layer.options.get("padding_idx")
    if padding is not None:
        with torch.no_grad():
            adapter.A[:, padding] = 0  # where it starts, and stays, for want of a gradient
    x = layer.input() if site.shape.lookup else layer.input().double()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        plain.layer.weight += handle.delta("layer")
    plain(x).sin().sum().backward()
    model(x).sin().sum().backward()
    change = site.unfold(adapter.update(site.weight).delta.dense())
    expected = torch.autograd.grad((change * plain.layer.weight.grad).sum(), (adapter.A, adapter.B))
    torch.testing.assert_close(adapter.A.grad, expected[0], rtol=1e-9, atol=1e-9)
    if "scale_grad_by_freq" not in layer.options:  # that option rescales the rows of a table, and B is none
        torch.testing.assert_close(adapter.B.grad, expected[1], rtol=1e-9, atol=1e-9)
    if padding is not None:
        assert padding in x and not adapter.A.grad[:, padding].any()


def test_at_the_start_only_one_factor_has_a_gradient(layer):
    # dL/dA = s Bᵀ G = 0 while B = 0 (embeddings: roles swapped), and dL/dB is not.
    model = layer.model()
    handle = lf.attach(model, lf.LoRA(r=layer.rank(2)), TARGETS)
    model(layer.input()).square().sum().backward()
    adapter = handle.adapter("layer")
    zero, moving = (adapter.B, adapter.A) if handle.sites["layer"].shape.lookup else (adapter.A, adapter.B)
    assert not zero.grad.any()
    assert moving.grad.any()


def test_merged_and_unmerged_outputs_agree_and_unmerge_is_exact(layer, method, fill):
    model = layer.model().eval()
    handle = lf.attach(model, method, TARGETS)
    fill(handle)
    before = values(model)
    expected = model(layer.input())
    plain = layer.model().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(layer.input()), expected, atol=1e-2)  # the adapter does something
    handle.merge()
    torch.testing.assert_close(model(layer.input()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.layer.weight - before["layer.weight"], handle.delta("layer"), rtol=0, atol=1e-6)
    handle.unmerge()
    assert_same(model.state_dict(), before)
    assert torch.equal(model(layer.input()), expected)


def test_several_adapters_add_up(layer, method, fill):
    model = layer.model().eval()
    base = model.layer(layer.input())
    handles = [lf.attach(model, method, TARGETS, name=name) for name in ("one", "two", "three")]
    apart = []
    for seed, handle in enumerate(handles):
        fill(handle, seed)
        handle.activate(handle.name)
        apart.append(model.layer(layer.input()) - base)
    handles[0].activate(["one", "two", "three"])
    together = model.layer(layer.input())
    torch.testing.assert_close(together, base + sum(apart), rtol=1e-4, atol=1e-4)
    handles[1].merge()
    torch.testing.assert_close(model.layer(layer.input()), together, rtol=1e-4, atol=1e-4)
    handles[1].unmerge()
    assert torch.equal(model.layer(layer.input()), together)
    handles[0].activate(None)
    assert torch.equal(model.layer(layer.input()), base)


def test_detach_restores_the_model(layer, method, fill):
    model = layer.model()
    model.layer.weight.requires_grad_(False)  # one parameter that was frozen before stays frozen after
    before, kept = snapshot(model), values(model)
    handles = [lf.attach(model, method, TARGETS, name=name) for name in ("one", "two")]
    assert isinstance(model.layer, layer.kind)
    optimizer = handles[1].optimizer(torch.optim.AdamW, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(layer.input()).square().mean().backward()
        optimizer.step()
    handles[1].merge()
    handles[1].detach()
    assert handles[0].active == ()
    handles[0].detach()
    assert snapshot(model) == before
    assert_same(model.state_dict(), kept)


def test_merge_and_detach_leaves_a_plain_model(layer, fill):
    model = layer.model().eval()
    before = snapshot(model)
    handle = lf.attach(model, lf.LoRA(r=layer.rank(2)), TARGETS)
    fill(handle)
    expected = model(layer.input())
    handle.merge_and_detach()
    assert snapshot(model) == before
    torch.testing.assert_close(model(layer.input()), expected, rtol=1e-5, atol=1e-5)


def test_training_moves_the_adapter_and_keeps_the_base_bit_for_bit(layer, method):
    model = layer.model()
    base = values(model)
    handle = lf.attach(model, method, TARGETS)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.0)
    start = [parameter.detach().clone() for parameter in handle.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(layer.input()).square().mean().backward()
        optimizer.step()
    for old, new in zip(start, handle.parameters(), strict=True):
        assert not torch.equal(old, new)
    assert_same({name: model.state_dict()[name] for name in base}, base)


def test_the_count_is_the_formula(layer, method):
    model = layer.model()
    handle = lf.attach(model, method, TARGETS)
    assert handle.num_trainable == method.num_trainable(handle.shapes())
    assert handle.num_trainable == sum(parameter.numel() for parameter in handle.parameters())
    assert handle.num_total == sum(parameter.numel() for parameter in layer.model().parameters())
    rows, columns = model.layer.weight.shape[0], model.layer.weight[0].numel()
    assert handle.num_trainable == method.r * columns + rows * method.r // layer.groups
    assert f"{handle.num_trainable:,} of {handle.num_total:,}" in handle.summary()


def test_save_and_load_give_the_same_outputs_bit_for_bit(layer, method, fill, tmp_path):
    model = layer.model().eval()
    handle = lf.attach(model, method, TARGETS)
    fill(handle)
    expected = model(layer.input())
    folder = handle.save(tmp_path / "adapter")
    handle.detach()
    again = lf.load(model, folder)
    assert torch.equal(model(layer.input()), expected)
    assert again.method == method
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again.detach()
    trainable = lf.load(model, folder, trainable=True)
    assert len(trainable.parameters()) == 2


def test_a_deep_copy_is_apart_and_the_same(some_layer, fill):
    model = some_layer.model().eval()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), TARGETS)
    fill(handle)
    expected = model(some_layer.input())
    handle_copy = copy.deepcopy(handle)
    assert handle_copy.model is not model
    assert type(handle_copy.model.layer) is type(model.layer)
    assert torch.equal(handle_copy.model(some_layer.input()), expected)
    fill(handle_copy, seed=99)
    assert torch.equal(model(some_layer.input()), expected)
    assert not torch.allclose(handle_copy.model(some_layer.input()), expected)
    assert handle_copy.sites["layer"].module is handle_copy.model.layer
    handle_copy.detach()
    assert type(handle_copy.model.layer) is some_layer.kind


@pytest.mark.parametrize("protocol", [1, 2, 5])
def test_pickle_keeps_model_and_handle(some_layer, fill, protocol):
    model = some_layer.model().eval()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), TARGETS)
    fill(handle)
    handle.merge()
    back: lf.Handle = pickle.loads(pickle.dumps(handle, protocol=protocol))
    assert torch.equal(back.model(some_layer.input()), model(some_layer.input()))
    assert isinstance(back.model.layer, some_layer.kind)
    handle.unmerge()
    back.unmerge()
    assert torch.equal(back.model(some_layer.input()), model(some_layer.input()))
    back.detach()
    assert type(back.model.layer) is some_layer.kind
    assert "layer.adapters.default.A" in model.state_dict()  # the first one is untouched


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(some_layer, fill, dropout):
    model = some_layer.model()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2), dropout=dropout), TARGETS)
    fill(handle)
    found = []
    for step in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        step(some_layer.input()).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in handle.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_dropout_acts_in_training_on_the_adapter_alone(some_layer, fill):
    model = some_layer.model().train()
    base = model(some_layer.input())
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2), dropout=0.5), TARGETS)
    assert torch.equal(model(some_layer.input()), base)  # B A = 0: the base's path has no dropout
    fill(handle)
    first, second = model(some_layer.input()), model(some_layer.input())
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(some_layer.input()), model(some_layer.input()))
    # Dropout keeps the expectation: the mean of many draws approaches the output without it.
    model.train()
    model.gate = nn.Identity()
    draws = torch.stack([model(some_layer.input()) for _ in range(400)])
    model.eval()
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - model(some_layer.input())).abs() <= 5 * error + 1e-5).all()


def test_hooks_and_identity_of_the_module_survive(some_layer, fill):
    model = some_layer.model()
    module, weight = model.layer, model.layer.weight
    seen = []
    model.layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    lf.attach(model, lf.LoRA(r=some_layer.rank(2)), TARGETS)
    model(some_layer.input())
    assert model.layer is module and model.layer.weight is weight
    assert isinstance(model.layer, some_layer.kind) and len(seen) == 1
    assert type(model.layer).__name__ == f"Adapted[{some_layer.kind.__name__}]"


def test_a_vanilla_checkpoint_loads_strictly_after_attach(some_layer, fill):
    model, other = some_layer.model(), some_layer.model()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), TARGETS)
    fill(handle)
    mine = [parameter.clone() for parameter in handle.parameters()]
    ids = [id(parameter) for parameter in handle.parameters()]
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.layer.weight, other.layer.weight)
    model.load_state_dict(other.state_dict(), strict=True, assign=True)
    for old, new in zip(mine, handle.parameters(), strict=True):
        assert torch.equal(old, new)
    assert [id(parameter) for parameter in handle.parameters()] == ids  # the optimizer's
    handle.detach()
    assert_same(model.state_dict(), other.state_dict())


def test_the_whole_state_dict_goes_round(some_layer, fill):
    first, second = some_layer.model(), some_layer.model()
    for seed, model in enumerate((first, second)):
        for name in ("one", "two"):
            fill(lf.attach(model, lf.LoRA(r=some_layer.rank(2)), TARGETS, name=name), seed)
    state = first.state_dict()
    second.load_state_dict(state, strict=True)
    assert_same(second.state_dict(), state)
    # One adapter of two: the other stays; a half adapter is an error, as ever.
    half = {key: value + 1 for key, value in state.items() if ".two." not in key}
    second.load_state_dict(half, strict=True)
    assert torch.equal(second.layer.adapters["two"].A, first.layer.adapters["two"].A)
    assert torch.equal(second.layer.adapters["one"].A, first.layer.adapters["one"].A + 1)
    del half["layer.adapters.one.A"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer.adapters.one.A"):
        second.load_state_dict(half, strict=True)


def test_a_model_that_is_one_layer(some_layer, fill, tmp_path):
    model = some_layer.model().layer
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ".*|")
    assert list(handle.sites) == [""]
    fill(handle)
    expected = model(some_layer.input())
    folder = handle.save(tmp_path)
    handle.detach()
    assert type(model) is some_layer.kind
    lf.load(model, folder)
    assert torch.equal(model(some_layer.input()), expected)


@pytest.mark.filterwarnings("ignore:first is the same module as second")  # said when saved: PEFT does otherwise
def test_a_module_used_twice_has_one_adapter(some_layer, fill, tmp_path):
    layer = some_layer.model().layer
    model = nn.ModuleDict(OrderedDict(first=layer, second=layer))
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["second"])
    assert list(handle.sites) == ["first"]
    fill(handle)
    x = some_layer.input()
    expected = model["second"](x)
    assert torch.equal(model["first"](x), expected)
    handle.merge()  # the same weight, wanted in both places: nothing to untie
    torch.testing.assert_close(model["second"](x), expected, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    folder = handle.save(tmp_path)
    handle.detach()
    lf.load(model, folder)
    assert torch.equal(model["second"](x), expected)
