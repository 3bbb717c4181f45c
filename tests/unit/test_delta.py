"""Deltas and updates as mathematics, and their action inside every layer type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lorafit as lf
from lorafit.delta import Dense, LowRank, Update
from lorafit.layers import Acting, Site, apply

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_a_low_rank_delta_is_the_product_it_stands_for():
    up, down, mid, out = random(5, 2), random(2, 4), random(2), random(5)
    delta = LowRank(up, down, mid=mid, out=out, scale=1.5)
    expected = 1.5 * torch.diag(out) @ up @ torch.diag(mid) @ down
    torch.testing.assert_close(delta.dense(), expected)
    folded_up, folded_down = delta.fold()
    torch.testing.assert_close(folded_up @ folded_down, expected)
    assert LowRank(up, down).dense().equal(up @ down)


def test_groups_are_blocks():
    up, down = random(6, 2), random(4, 5)  # two groups: 3 rows of up with 2 rows of down each
    expected = torch.cat([up[:3] @ down[:2], up[3:] @ down[2:]])
    torch.testing.assert_close(LowRank(up, down, groups=2).dense(), expected)


def test_other_types_are_other_tensors_only_where_needed():
    delta = LowRank(random(5, 2), random(2, 4), mid=random(2), out=random(5), scale=2.0, groups=1)
    same, half = delta.to(F64), delta.to(torch.float16)
    assert same.up is delta.up and same.mid is delta.mid
    assert {tensor.dtype for tensor in (half.up, half.down, half.mid, half.out)} == {torch.float16}
    assert (half.scale, half.groups) == (2.0, 1)
    dense = Dense(random(3, 3))
    assert dense.to(F64).matrix is dense.matrix and dense.to(torch.float32).matrix.dtype == torch.float32
    assert dense.dense() is dense.matrix


def test_an_update_is_the_change_of_the_weight():
    weight, delta, gain = random(5, 4), Dense(random(5, 4, seed=1)), random(5, seed=2)
    torch.testing.assert_close(Update(delta).change(weight), delta.matrix)
    expected = torch.diag(gain) @ (weight + delta.matrix) - weight
    torch.testing.assert_close(Update(delta, gain).change(weight), expected)
    assert Update(Dense(delta.matrix.bfloat16())).change(weight.bfloat16()).dtype == torch.float32


def test_a_gain_close_to_one_keeps_its_digits():
    weight = torch.full((1, 1), 1000.0)
    update = Update(Dense(torch.full((1, 1), 1e-3)), torch.tensor([1.0]))
    assert update.change(weight).item() == pytest.approx(1e-3, rel=1e-6)  # (1000.001 − 1000) in float32 is 0.00098


def site_of(layer) -> tuple[Site, Tensor]:
    model = layer.model().double().eval()
    handle = lf.attach(model, lf.LoRA(r=layer.rank(2)), ["layer"])
    site = handle.sites["layer"]
    handle.detach()
    x = layer.input()
    return site, x.double() if x.is_floating_point() else x


def check(site: Site, x: Tensor, updates: list[Update]) -> None:
    """The plain path on activations is the layer with its weight changed."""
    with torch.no_grad():
        y = site.module(x)
        found = apply(site, x, y, [Acting(update, 0.0) for update in updates])
        assert found.dtype == y.dtype
        change = sum(update.change(site.weight()) for update in updates)
        site.raw_weight.add_(site.unfold(change))
        torch.testing.assert_close(found, site.module(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parts", ["plain", "mid", "out", "mid-out", "gain", "gain-mid-out"])
def test_every_part_of_an_update_acts_in_every_layer(layer, parts):
    site, x = site_of(layer)
    shape, r = site.shape, layer.rank(2)
    delta = LowRank(
        random(shape.out, r // shape.groups, seed=1),
        random(r, shape.inn, seed=2),
        mid=random(r, seed=3) if "mid" in parts else None,
        out=random(shape.out, seed=4) if "out" in parts else None,
        scale=0.7,
        groups=shape.groups,
    )
    check(site, x, [Update(delta, random(shape.out, seed=5) if "gain" in parts else None)])


@pytest.mark.parametrize("gain", [False, True], ids=["nogain", "gain"])
def test_dense_changes_act_in_every_layer(layer, gain):
    site, x = site_of(layer)
    matrix = Dense(random(site.shape.out, site.shape.inn, seed=1))
    check(site, x, [Update(matrix, random(site.shape.out, seed=5) if gain else None)])


def test_several_updates_are_each_relative_to_the_base(some_layer):
    site, x = site_of(some_layer)
    shape, r = site.shape, some_layer.rank(2)
    updates = [
        Update(Dense(random(shape.out, shape.inn, seed=1)), random(shape.out, seed=2)),
        Update(LowRank(random(shape.out, r // shape.groups), random(r, shape.inn, seed=4), groups=shape.groups)),
        Update(Dense(random(shape.out, shape.inn, seed=5)), random(shape.out, seed=6)),
    ]
    check(site, x, updates)


def test_a_matrix_and_its_place_in_the_weight(layer):
    site, _ = site_of(layer)
    assert site.weight().shape == (site.shape.out, site.shape.inn)
    assert torch.equal(site.unfold(site.weight()), site.raw_weight)
    assert site.weight().untyped_storage().data_ptr() == site.raw_weight.untyped_storage().data_ptr()  # a view
    assert site.objection("layer") is None
