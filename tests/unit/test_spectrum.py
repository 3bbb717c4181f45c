"""Singular values from factors, against those of the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from lorafit.delta import Dense, LowRank
from lorafit.spectrum import Spectrum, likeness, row_norms, spectrum


def low_rank(seed: int = 0, r: int = 4, groups: int = 1) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(12, r // groups, generator=draw),
        torch.randn(r, 9, generator=draw),
        mid=torch.randn(r, generator=draw),
        out=torch.randn(12, generator=draw),
        scale=1.7,
        groups=groups,
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_the_values_are_those_of_the_whole_matrix(groups: int) -> None:
    delta = low_rank(groups=groups)
    blocks = delta.dense().double().view(groups, -1, 9)
    expected = torch.linalg.svdvals(blocks).flatten().sort(descending=True).values
    found = torch.tensor(spectrum(delta).values, dtype=torch.float64)
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-5, atol=1e-6)
    assert spectrum(delta).norm == pytest.approx(float(delta.dense().norm()), rel=1e-5)
    torch.testing.assert_close(row_norms(delta), delta.dense().double().norm(dim=1), rtol=1e-5, atol=1e-6)


def test_a_dense_change_and_the_same_one_in_factors() -> None:
    delta = low_rank()
    dense = Dense(delta.dense())
    assert spectrum(dense).values[:4] == pytest.approx(spectrum(delta).values[:4], rel=1e-5)
    found = likeness(delta, dense)
    assert found is not None
    assert (found.outputs, found.inputs, found.cosine) == pytest.approx((1, 1, 1), abs=1e-5)


def test_ranks() -> None:
    flat, steep = Spectrum((2.0, 2.0, 2.0)), Spectrum((10.0, 0.1, 0.1))
    assert (flat.stable_rank, flat.effective_rank) == pytest.approx((3, 3))
    assert steep.stable_rank == pytest.approx(1.0002) and 1 < steep.effective_rank < 1.2
    assert (flat.rank_for(0.6), flat.rank_for(1.0), steep.rank_for(0.99)) == (2, 3, 1)
    nothing = Spectrum((0.0, 0.0))
    assert (nothing.norm, nothing.stable_rank, nothing.effective_rank) == (0, 0, 0)


def test_likeness_of_changes_that_share_some_directions() -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    rows = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    first = LowRank(basis[:, :2], rows[:, :2].T)
    second = LowRank(basis[:, 1:3], rows[:, 3:5].T)
    found = likeness(first, second)
    assert found is not None
    assert (found.outputs, found.inputs, found.cosine) == pytest.approx((0.5, 0, 0), abs=1e-9)
    angle = math.pi / 3
    turned = LowRank((basis[:, :1] * math.cos(angle) + basis[:, 5:6] * math.sin(angle)), rows[:, :1].T)
    found = likeness(LowRank(basis[:, :1], rows[:, :1].T), turned)
    assert found is not None
    assert (found.outputs, found.inputs, found.cosine) == pytest.approx((0.25, 1, 0.5), abs=1e-9)


def test_nothing_is_like_no_change() -> None:
    delta = low_rank()
    assert likeness(delta, LowRank(torch.zeros(12, 2), torch.randn(2, 9))) is None
