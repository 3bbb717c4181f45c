"""LoRA's settings, its counts in the literature, its start, and the law that ties its settings together."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn

import lorafit as lf
from lorafit.layers import Shape
from lorafit.method import Spot
from lorafit.methods.initialisers import INITIALISERS


@pytest.mark.parametrize(
    ("options", "where", "parts"),
    [
        ({"r": 0}, "LoRA.r", ["0", "at least 1"]),
        ({"r": -3}, "LoRA.r", ["-3"]),
        ({"r": 2.0}, "LoRA.r", ["2.0", "whole number"]),
        ({"r": True}, "LoRA.r", ["True"]),
        ({"r": "8"}, "LoRA.r", ["'8'"]),
        ({"r": None}, "LoRA.r", ["None"]),
        ({"alpha": 0}, "LoRA.alpha", ["0", "greater than 0"]),
        ({"alpha": -1.5}, "LoRA.alpha", ["-1.5"]),
        ({"alpha": math.inf}, "LoRA.alpha", ["inf", "finite"]),
        ({"alpha": math.nan}, "LoRA.alpha", ["nan"]),
        ({"alpha": "16"}, "LoRA.alpha", ["'16'"]),
        ({"alpha": True}, "LoRA.alpha", ["True"]),
        ({"dropout": 1.0}, "LoRA.dropout", ["1.0", "less than 1"]),
        ({"dropout": -0.1}, "LoRA.dropout", ["-0.1"]),
        ({"dropout": math.nan}, "LoRA.dropout", ["nan"]),
        ({"dropout": None}, "LoRA.dropout", ["None"]),
        ({"dropout": False}, "LoRA.dropout", ["False"]),
        ({"rslora": 1}, "LoRA.rslora", ["1", "true or false"]),
        ({"init": "gausian"}, "LoRA.init", ["'gausian'", "default, gaussian", "nearest:  gaussian"]),
        ({"init": True}, "LoRA.init", ["True"]),
        ({"init": ["default"]}, "LoRA.init", ["['default']"]),
    ],
    ids=str,
)
def test_values_out_of_range(options, where, parts):
    with pytest.raises(lf.ConfigError) as caught:
        lf.LoRA(**options)
    assert caught.value.where == where and caught.value.fix
    for part in parts:
        assert part in str(caught.value)


def test_defaults_and_scale():
    method = lf.LoRA()
    assert (method.r, method.alpha, method.dropout, method.rslora, method.init) == (16, None, 0.0, False, "default")
    assert method.resolved_alpha == 32 and method.scale == 2.0
    assert lf.LoRA(r=64, alpha=16, rslora=True).scale == 2.0
    assert method.settings() == {
        "r": 16,
        "alpha": 32,
        "scale": 2.0,
        "rslora": False,
        "dropout": 0.0,
        "init": "default",
    }
    assert lf.LoRA(r=4).at(r=8) == lf.LoRA(r=8) and lf.LoRA(r=4).at(alpha=3) == lf.LoRA(r=4, alpha=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.r = 3
    assert pickle.loads(pickle.dumps(method)) == method and hash(method) == hash(lf.LoRA())


@pytest.mark.parametrize(
    ("model", "r", "sites", "expected"),
    [
        ("GPT-3", 1, [(12288, 12288)] * 192, 4_718_592),
        ("GPT-3", 4, [(12288, 12288)] * 192, 18_874_368),
        ("GPT-3", 16, [(12288, 12288)] * 192, 75_497_472),
        ("RoBERTa-base", 8, [(768, 768)] * 24, 294_912),
        ("RoBERTa-large", 8, [(1024, 1024)] * 48, 786_432),
        ("DeBERTa-XXL", 16, [(1536, 1536)] * 96, 4_718_592),
    ],
)
def test_the_counts_of_the_literature(model, r, sites, expected):
    assert lf.LoRA(r=r).num_trainable(sites) == expected, model


def drawn_by(init: str, shape: Shape, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    spot = Spot("layer", shape, lambda: torch.zeros(shape.out, shape.inn), lf.LoRA(r=r))
    return INITIALISERS[init].draw(spot, r, 2.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("init", ["default", "gaussian"])  # of the others: tests/papers/test_initialisers.py
@pytest.mark.parametrize(
    "shape", [Shape(48, 64), Shape(32, 64, lookup=True), Shape(48, 27, groups=4)], ids=["matrix", "lookup", "grouped"]
)
def test_initial_values(init, shape):
    r = 16
    a, b = drawn_by(init, shape, r, 1)
    assert a.shape == (r, shape.inn) and b.shape == (shape.out, r // shape.groups)
    assert a.dtype == b.dtype == torch.float32
    drawn, zero = (b, a) if shape.lookup else (a, b)
    assert not zero.any() and drawn.any(dim=-1).all()
    again = drawn_by(init, shape, r, 1)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    deviation = drawn.std().item()
    if init == "gaussian":
        assert deviation == pytest.approx(1 / r, rel=0.1)
    elif shape.lookup:
        assert deviation == pytest.approx(1, rel=0.1)
    else:
        assert drawn.abs().max() <= 1 / math.sqrt(shape.inn)
        assert deviation == pytest.approx(1 / math.sqrt(3 * shape.inn), rel=0.1)


def test_the_default_start_is_torchs_own_for_a_linear_layer():
    a, _ = drawn_by("default", Shape(7, 12), 5, 3)
    expected = torch.empty(5, 12)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(a, expected)


def train(alpha: float, a0: float, lr_a: float, lr_b: float, *, rslora: bool = False) -> torch.Tensor:
    """ΔW after some steps of Adam from B = 0 and a scaled A."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    handle = lf.attach(model, lf.LoRA(r=4, alpha=alpha, rslora=rslora), seed=1)
    adapter = handle.adapter("0")
    with torch.no_grad():
        adapter.A.mul_(a0)
    groups = [{"params": [adapter.A], "lr": lr_a}, {"params": [adapter.B], "lr": lr_b}]
    optimizer = handle.bind(torch.optim.Adam(groups, eps=1e-30))  # not 0: A's first gradient is
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)
    for _ in range(12):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return handle.delta("0")


def test_adam_reparametrisation_law():
    """With B₀ = 0 and eps → 0: (α, A₀, ηA, ηB) ≡ (α / (p q), p A₀, p ηA, q ηB)."""
    expected = train(8.0, 1.0, 0.01, 0.02)
    for p, q in ((2.0, 1.0), (1.0, 4.0), (0.5, 8.0)):
        found = train(8.0 / (p * q), p, p * 0.01, q * 0.02)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rslora_is_lora_of_another_alpha():
    torch.testing.assert_close(train(8.0, 1.0, 0.01, 0.01, rslora=True), train(16.0, 1.0, 0.01, 0.01))


def test_the_rank_of_the_change_is_at_most_r(some_layer, fill):
    model = some_layer.model().double()
    r = some_layer.rank(2)
    handle = lf.attach(model, lf.LoRA(r=r), ["layer"])
    fill(handle)
    site = handle.sites["layer"]
    matrix = handle.delta("layer").reshape(site.raw_weight.shape[0], -1)
    assert torch.linalg.matrix_rank(matrix) <= r
    a, b = handle.adapter("layer").A.detach(), handle.adapter("layer").B.detach()
    if site.shape.groups == 1:
        torch.testing.assert_close(site.unfold(2.0 * b @ a), handle.delta("layer"))


def test_the_table_of_methods():
    assert lf.METHODS["lora"] is lf.LoRA and list(lf.METHODS) == [method.name for method in lf.METHODS.values()]
    with pytest.raises(TypeError):
        lf.METHODS["other"] = lf.LoRA
    for method in lf.METHODS.values():
        assert method.paper and method.trains and issubclass(method, lf.Method)


def test_at_the_start_the_change_is_zero_and_b_alone_has_a_gradient():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5))
    handle = lf.attach(layer, lf.LoRA(r=3), seed=0)
    assert not handle.delta("0").any()
    layer(torch.randn(4, 6)).square().sum().backward()
    adapter = handle.adapter("0")
    assert not adapter.A.grad.any() and adapter.B.grad.any()


def test_gradients_are_those_of_the_paper():
    """dL/dB = s G Aᵀ and dL/dA = s Bᵀ G, with G = dL/dW of the layer whose weight is W + s B A."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5).double())
    x = torch.randn(4, 6, dtype=torch.float64)
    handle = lf.attach(layer, lf.LoRA(r=3, alpha=5.0), seed=0)
    adapter, s = handle.adapter("0"), 5.0 / 3
    nn.init.normal_(adapter.B)
    layer(x).sin().sum().backward()
    w = (layer[0].weight + handle.delta("0")).detach().requires_grad_()
    nn.functional.linear(x, w, layer[0].bias).sin().sum().backward()
    torch.testing.assert_close(adapter.B.grad, s * w.grad @ adapter.A.T)
    torch.testing.assert_close(adapter.A.grad, s * adapter.B.T @ w.grad)


def test_concatenated_adapters_add_up_exactly():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5).double())
    handles = [lf.attach(layer, lf.LoRA(r=r), name=name, seed=r) for name, r in (("one", 1), ("two", 3))]
    for handle in handles:
        nn.init.normal_(handle.adapter("0").B)
    total = sum(handle.delta("0") for handle in handles)
    both = lf.combine(handles[0], {"one": 1.0, "two": 1.0}, name="both")
    assert both.adapter("0").A.shape[0] == 4
    torch.testing.assert_close(both.delta("0"), total, rtol=1e-14, atol=1e-14)
