"""Whether all numbers of a tensor are finite, in one pass and without a second tensor of its size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or not a number; True for what is no floating-point tensor."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no sums
        tensor = tensor.float()
    # A number that is not finite makes a sum that is not. The other way round a sum of large ones may overflow.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
