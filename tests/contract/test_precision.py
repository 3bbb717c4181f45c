"""Bases in other precisions than float32, with and without autocast."""

from __future__ import annotations

import pytest
import torch

import lorafit as lf

LOW = [torch.bfloat16, torch.float16]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=LOW, ids=name)
def low(request, some_layer):
    return request.param


def model_and_input(layer, dtype):
    model, x = layer.model().to(dtype), layer.input()
    return model, x.to(dtype) if x.is_floating_point() else x


def test_a_low_precision_base_trains_float32_adapters(some_layer, low, fill):
    model, x = model_and_input(some_layer, low)
    base = model(x)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float32}
    assert torch.equal(model(x), base)
    fill(handle)
    y = model(x)
    assert y.dtype == low
    y.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in handle.parameters()} == {torch.float32}
    exact = some_layer.model().double()
    exact.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        exact.layer.weight += handle.delta("layer").double()
        truth = exact(x.double() if x.is_floating_point() else x)
    assert (y.double() - truth).norm() <= 8 * torch.finfo(low).eps * truth.norm()


def test_a_tiny_step_is_not_lost_in_a_low_precision_base(some_layer, low, fill):
    model, x = model_and_input(some_layer, low)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    before = [parameter.detach().clone() for parameter in handle.parameters()]
    optimizer = handle.optimizer(torch.optim.SGD, lr=1e-6)
    model(x).float().square().mean().backward()
    optimizer.step()
    for old, new in zip(before, handle.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_merging_into_low_precision_is_undone_bit_for_bit(some_layer, low, fill):
    model, x = model_and_input(some_layer, low)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    weight, y = model.layer.weight.clone(), model(x)
    assert handle.delta("layer").dtype == torch.float32
    for _ in range(20):
        handle.merge()
        assert torch.equal(model.layer.weight, (weight.float() + handle.delta("layer")).to(low))
        handle.unmerge()
    assert torch.equal(model.layer.weight, weight)
    assert torch.equal(model(x), y)


def test_a_double_base_has_double_adapters(some_layer, fill):
    model, x = model_and_input(some_layer, torch.float64)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float64}
    y = model(x)
    assert y.dtype == torch.float64
    handle.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["fused", "plain"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_under_autocast_the_output_has_the_type_it_has_without_adapters(some_layer, base, dropout, fill):
    model, x = model_and_input(some_layer, base)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2), dropout=dropout), ["layer"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), before)
        fill(handle)
        y = model(x)
        loss = y.float().square().mean()
    assert y.dtype == before.dtype
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in handle.parameters())
    assert all(parameter.grad.any() and parameter.grad.isfinite().all() for parameter in handle.parameters())


def test_autocast_agrees_with_full_precision(some_layer, fill):
    model, x = model_and_input(some_layer, torch.float32)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = model(x)
            y.float().sin().sum().backward()
        results.append([y, *(parameter.grad for parameter in handle.parameters())])
    for exact, found in zip(*results, strict=True):
        assert (found.float() - exact).norm() <= 0.05 * exact.norm()


def test_moving_the_model_moves_its_adapters(some_layer, fill, tmp_path):
    model, x = model_and_input(some_layer, torch.float32)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    y = model(x)
    model.double()
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float64}
    wide = model(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(wide.float(), y, rtol=1e-4, atol=1e-5)
    handle.save(tmp_path)
    handle.detach()
    lf.load(model, tmp_path)
    assert torch.equal(model(x.double() if x.is_floating_point() else x), wide)


def test_a_merge_that_would_overflow_is_refused_before_anything_changes(some_layer, fill):
    model, _ = model_and_input(some_layer, torch.float16)
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(1), alpha=1e6), ["layer"])
    fill(handle, std=10.0)
    weight = model.layer.weight.clone()
    with pytest.raises(lf.MergeError, match="not finite") as caught:
        handle.merge()
    assert caught.value.where == "layer.weight" and "float16" in str(caught.value.found) and caught.value.fix
    assert torch.equal(model.layer.weight, weight)
    assert not handle.merged
