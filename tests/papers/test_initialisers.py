"""Initialisers: each against its paper's formula written plainly, against PEFT, and on every layer type."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.delta import LowRank
from lorafit.layers import Shape
from lorafit.method import Sample, Spot
from lorafit.methods.initialisers import GAMMA, INITIALISERS

WITHOUT_DATA = [name for name, scheme in INITIALISERS.items() if scheme.evidence is None]
EXACT = ("default", "gaussian", "eva")
"""Those of which one factor is zero."""


def spot_of(weight: Tensor, *, groups: int = 1, lookup: bool = False, evidence: Tensor | None = None) -> Spot:
    shape = Shape(weight.shape[0], weight.shape[1], groups, lookup)
    return Spot("layer", shape, lambda: weight, lf.LoRA(), dtype=weight.dtype, evidence=evidence)


def draw(name: str, spot: Spot, r: int, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return INITIALISERS[name].draw(spot, r, scale, torch.Generator().manual_seed(seed))


def product(a: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    return LowRank(b, a, groups=groups).dense()


def top(matrix: Tensor, r: int) -> Tensor:
    """The best approximation of rank r, as Eckart and Young have it."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] @ torch.diag(s[:r]) @ v[:r]


def rank_for(name: str, layer: Any) -> int:
    """A rank that the layer can take under this scheme, 0 for none."""
    site = lf.layers.site_class(layer.kind)(layer.kind(*layer.args, **layer.options))
    for k in (2, 1):
        r = k * layer.groups
        spot = Spot("layer", site.shape, site.weight, lf.LoRA())
        if lf.LoRA(r=r, init=name).wasteful(spot) is None:
            return r
    return 0


@pytest.mark.parametrize("name", INITIALISERS)
def test_the_model_starts_as_it_was_on_every_layer_type(layer, name):
    model, x = layer.model(), layer.input()
    r = rank_for(name, layer)
    method = lf.LoRA(r=r or layer.groups, alpha=3.0, init=name)
    sample = None
    if INITIALISERS[name].evidence is not None:
        sample = Sample([x], loss=lambda model, batch: model(batch).square().sum())
    if not r:
        with pytest.raises(lf.ConfigError, match=r"rank|directions"):
            lf.attach(model, method, ["layer"], sample=sample)
        return
    before, weight = model(x), model.layer.weight.clone()
    lf.attach(model, method, ["layer"], seed=3, sample=sample)
    assert torch.equal(model.layer.weight, weight)
    if name in EXACT:
        assert torch.equal(model(x), before)
    else:
        torch.testing.assert_close(model(x), before, atol=2e-5, rtol=1e-5)
    adapter = model.layer.adapters["default"]
    assert adapter.A.any() or adapter.B.any()
    # It learns: the second factor to move follows the first one.
    optimizer = torch.optim.SGD([adapter.A, adapter.B], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_the_seed_alone_decides(name):
    weight = torch.randn(8, 12)
    first, again, other = (draw(name, spot_of(weight), 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    drawn = name in ("default", "gaussian", "orthogonal")
    assert torch.equal(first[0], other[0]) is not drawn


# ---------------------------------------------------------------------------------------------------- orthogonal


@pytest.mark.parametrize("groups", [1, 2])
def test_orthogonal_has_both_factors_and_no_product(groups):
    spot = spot_of(torch.zeros(12, 10, dtype=torch.float64), groups=groups)
    a, b = draw("orthogonal", spot, 4)
    assert a.shape == (4, 10) and b.shape == (12, 4 // groups)
    assert product(a, b, groups).abs().max() < 1e-15
    assert torch.linalg.matrix_rank(a) == 2 and b.abs().max() > 0.01
    # Entries of a random projection of r / 2 normal numbers, times a tenth.
    big, _ = draw("orthogonal", spot_of(torch.zeros(4, 4000)), 4)
    assert 0.06 < float(big.std()) < 0.08  # 0.1 · √(2 / 4)


@pytest.mark.parametrize(("r", "groups"), [(3, 1), (2, 2), (6, 2)])
def test_orthogonal_needs_even_ranks(r, groups):
    spot = spot_of(torch.zeros(12, 12), groups=groups)
    assert "odd" in lf.LoRA(r=r, init="orthogonal").wasteful(spot)
    assert lf.LoRA(r=4 * groups, init="orthogonal").wasteful(spot) is None


# --------------------------------------------------------------------------------------------------------- PiSSA


@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (12, 7), (6, 300), (300, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pissa_is_the_top_of_the_weight_in_equal_halves(shape, dtype):
    weight = torch.randn(shape, dtype=dtype)
    a, b = draw("pissa", spot_of(weight), 3, scale=0.5)
    assert a.dtype == b.dtype == dtype
    # Compared with float64: what float32 makes of it is off by some ε |W| / (gap between singular values) itself.
    small = 5e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(0.5 * b @ a, top(weight.double(), 3).to(dtype), atol=small, rtol=small)
    # A Aᵀ = Bᵀ B = S_r / s
    s = torch.linalg.svdvals(weight)[:3] / 0.5
    torch.testing.assert_close(a @ a.T, torch.diag(s), atol=10 * small, rtol=small)
    torch.testing.assert_close(b.T @ b, torch.diag(s), atol=10 * small, rtol=small)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


def test_pissa_takes_each_group_for_itself():
    weight = torch.randn(8, 6, dtype=torch.float64)
    a, b = draw("pissa", spot_of(weight, groups=2), 4, scale=2.0)
    whole = 2.0 * product(a, b, 2)
    for rows in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(whole[rows], top(weight[rows], 2))


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("weight", [torch.zeros(6, 9), torch.ones(6, 9), torch.ones(9, 6), torch.eye(6, 9)])
def test_a_weight_of_low_rank_gives_numbers_and_can_learn(name, weight):
    a, b = draw(name, spot_of(weight), 3)
    assert a.isfinite().all() and b.isfinite().all()
    if name == "pissa":
        best = top(weight, 3) if weight.any() else weight
        if torch.linalg.matrix_rank(weight) < 3:  # the best approximation is the weight itself
            torch.testing.assert_close(2.0 * b @ a, best, atol=1e-5, rtol=1e-5)
    # No row of A is zero together with its column of B: such a pair would have no gradient, ever.
    assert (a.norm(dim=1) + b.norm(dim=0) > 0.1).all()


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.ones(4, 4)
    weight[1, 2] = math.nan
    with pytest.raises(lf.ConfigError, match="not finite") as error:
        draw("pissa", spot_of(weight), 2)
    assert error.value.where == "layer"


def test_weights_in_half_precision_are_taken_apart_in_single():
    weight = torch.randn(8, 8).bfloat16()
    a, b = draw("pissa", spot_of(weight), 4)
    assert a.dtype == torch.float32
    torch.testing.assert_close(2.0 * b @ a, top(weight.float(), 4), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- OLoRA


@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (12, 7)])
def test_olora_is_the_start_of_the_qr_decomposition(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    a, b = draw("olora", spot_of(weight), 3)
    q, r = torch.linalg.qr(weight)
    torch.testing.assert_close(b @ a, q[:, :3] @ r[:3])
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(a[:, :3].tril(-1), torch.zeros(3, 3, dtype=torch.float64))
    assert (a.diagonal() > 0).all()


# ---------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize(("inn", "out"), [(10, 7), (7, 10)])
def test_pissa_and_olora_are_pefts(name, inn, out):
    peft = pytest.importorskip("peft")
    weight = torch.randn(out, inn)
    theirs = nn.Sequential(nn.Linear(inn, out))
    theirs[0].weight.data = weight.clone()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=name)
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    a, b = draw(name, spot_of(weight), 3, scale=2.0)
    their_a, their_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(b @ a, their_b @ their_a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.abs(), their_a.abs(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b.abs(), their_b.abs(), atol=1e-5, rtol=1e-4)
    # Anchored: W stays here what it was, and their residual is what an adapter takes off.
    torch.testing.assert_close(weight - 2.0 * b @ a, layer.base_layer.weight.data, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- LoRA-GA


def test_lora_ga_has_the_gradients_directions_and_the_stable_size():
    gradient = torch.randn(16, 9, dtype=torch.float64)
    a, b = draw("lora_ga", spot_of(torch.zeros_like(gradient), evidence=gradient), 3)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    size = 16**0.25 / math.sqrt(GAMMA)
    assert size == 0.25
    torch.testing.assert_close(a.abs(), size * v[:3].abs())
    torch.testing.assert_close(b.abs(), size * u[:, 3:6].abs())


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_ga_first_step_is_the_best_of_rank_2r(groups):
    """Theorem 3.1: −η s² (G AᵀA + B Bᵀ G), the first step's change of W, is −η (s c)² times the best of rank 2 r."""
    gradient = torch.randn(8 * groups, 9, dtype=torch.float64)
    scale, rate, r = 1.5, 1e-9, 2 * groups
    a, b = draw("lora_ga", spot_of(torch.zeros_like(gradient), groups=groups, evidence=gradient), r, scale)
    a, b = a.requires_grad_(), b.requires_grad_()
    (scale * product(a, b, groups) * gradient).sum().backward()  # L with ∂L/∂W = G
    change = scale * (product(a - rate * a.grad, b - rate * b.grad, groups) - product(a, b, groups)).detach()
    size = 8**0.25 / math.sqrt(GAMMA)
    best = torch.cat([top(block, 4) for block in gradient.view(groups, 8, 9)])
    torch.testing.assert_close(change, -rate * (scale * size) ** 2 * best, atol=1e-16, rtol=1e-6)


def test_lora_ga_first_step_of_a_model():
    """The theorem from end to end: attach, one step of gradient descent, and the change of the layer's weight."""
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)).double()
    x, y = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 9, dtype=torch.float64)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    loss(model, (x, y)).backward()
    gradients = {path: model.get_submodule(path).weight.grad.clone() for path in ("0", "2")}
    method = lf.LoRA(r=3, alpha=4, rslora=True, init="lora_ga")
    handle = lf.attach(model, method, sample=Sample([(x[:32], y[:32]), (x[32:], y[32:])], loss))
    rate = 1e-7
    loss(model, (x, y)).backward()
    torch.optim.SGD(handle.parameters(), lr=rate).step()
    for path, gradient in gradients.items():
        size = gradient.shape[0] ** 0.25 / math.sqrt(GAMMA)
        expected = -rate * (method.scale * size) ** 2 * top(gradient, 6)
        torch.testing.assert_close(handle.delta(path), expected, atol=1e-14, rtol=1e-5)


def test_lora_ga_needs_twice_the_rank():
    spot = spot_of(torch.zeros(8, 6))
    assert "needs 2 r = 8" in lf.LoRA(r=4, init="lora_ga").wasteful(spot)
    assert lf.LoRA(r=3, init="lora_ga").wasteful(spot) is None
    grouped = spot_of(torch.zeros(8, 3), groups=4)  # blocks of 2 × 3
    assert lf.LoRA(r=4, init="lora_ga").wasteful(grouped) is None
    assert "needs" in lf.LoRA(r=8, init="lora_ga").wasteful(grouped)


# ----------------------------------------------------------------------------------------------------------- EVA


def test_eva_takes_the_directions_it_is_given():
    directions = torch.linalg.qr(torch.randn(6, 2)).Q.T
    a, b = draw("eva", spot_of(torch.zeros(5, 6), evidence=directions), 2)
    assert torch.equal(a, directions) and a.data_ptr() != directions.data_ptr()
    assert b.shape == (5, 2) and not b.any()


def test_eva_says_where_it_has_nothing_to_find():
    method = lf.LoRA(r=2, init="eva")
    assert "tokens" in method.wasteful(spot_of(torch.zeros(6, 20), lookup=True))
    assert "group" in method.wasteful(spot_of(torch.zeros(6, 6), groups=2))
    with pytest.raises(lf.ConfigError, match="tokens"):
        lf.attach(nn.Sequential(nn.Embedding(9, 4)), method, ["0"], sample=Sample([torch.tensor([1, 2])]))


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_without_data_there_is_nothing_to_learn_from(name):
    with pytest.raises(lf.ConfigError, match="data first") as error:
        draw(name, spot_of(torch.zeros(8, 8)), 2)
    assert "sample=Sample" in error.value.fix


# ------------------------------------------------------------------------------------------------- other methods


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal"])
def test_other_methods_take_initialisers_as_they_are(name):
    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    before = model(x)
    handle = lf.attach(model, lf.DoRA(lf.LoRA(r=2, init=name)), ["0"], seed=0)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_around_another_method_eva_changes_the_rank_inside():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    x = torch.randn(40, 8)
    before = model(x)
    handle = lf.attach(model, lf.DoRA(lf.LoRA(r=2, alpha=3, init="eva")), seed=0, sample=Sample([x]))
    ranks = {path: model.get_submodule(path).adapters["default"].inner.A.shape[0] for path in handle.sites}
    assert sum(ranks.values()) == 4
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)
