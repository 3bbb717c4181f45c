"""Whether all numbers are finite, asked of the sum first."""

from __future__ import annotations

import math

import pytest
import torch

from lorafit.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite(dtype):
    values = torch.ones(5, 3, dtype=dtype)
    assert all_finite(values) and all_finite(values[:, 1]) and all_finite(values[:0])
    for bad in (math.inf, -math.inf, math.nan):
        spoilt = values.clone()
        spoilt[3, 2] = bad
        assert not all_finite(spoilt)
    both = values.clone()
    both[0, 0], both[1, 1] = math.inf, -math.inf
    assert not all_finite(both)


def test_large_numbers_whose_sum_overflows_are_finite():
    assert all_finite(torch.full((9,), torch.finfo(torch.float16).max, dtype=torch.float16))
    assert all_finite(torch.full((9,), torch.finfo(torch.float32).max))


def test_whole_numbers_are_finite():
    assert all_finite(torch.arange(3)) and all_finite(torch.tensor([True]))


def test_numbers_of_eight_bits():
    assert all_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not all_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
