"""Matrices as rows of 8-bit integers, each row with one scale: the plain mathematics.

    W ≈ diag(s) Q,   sᵢ = maxⱼ |Wᵢⱼ| / 127,   Q = round(W / s) in −127 … 127

A row's largest number is kept exactly, to rounding; no number is off by more than half of its row's scale. Everything
works on about `BLOCK` numbers at a time, which stay in the processor's cache and never make a second matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lorafit.kernels.frozen import Frozen
from lorafit.kernels.scratch import reusable, scratch

BLOCK = 2**18
LEVELS = 127


@dataclass(frozen=True, eq=False)
class Rows:
    """A packed matrix and what was lost.

    Attributes:
        values: Q, (out, in), int8.
        scale: s, (out, 1), float32.
        squares: ‖W‖² of what was packed.
        lost: ‖W − diag(s) Q‖².
    """

    values: Tensor
    scale: Tensor
    squares: float
    lost: float

    @property
    def error(self) -> float:
        """‖W − diag(s) Q‖ / ‖W‖; 0 for a matrix of zeros, not a number where W was not finite."""
        return math.sqrt(self.lost / self.squares) if self.squares else 0.0


def pack(matrix: Tensor) -> Rows:
    """Packs a matrix (out, in) of floating-point numbers; where it is not finite, `error` is not a number."""
    with torch.inference_mode(False), torch.no_grad():
        values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        scale = torch.empty(matrix.shape[0], 1, dtype=torch.float32, device=matrix.device)
        squares = lost = 0.0
        for rows in _blocks(*matrix.shape):
            part = matrix[rows].to(torch.float32)
            top = part.abs().amax(dim=1, keepdim=True) / LEVELS
            scale[rows] = top
            # A row of zeros, or of numbers so small that their scale is none, is a row of zeros.
            whole = torch.where(top > 0, part / top, 0.0).round_().clamp_(-LEVELS, LEVELS)
            values[rows] = whole.to(torch.int8)
            squares += float(part.double().square_().sum())
            lost += float(whole.mul_(top).sub_(part).double().square_().sum())
    return Rows(values, scale, squares, lost)


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, BLOCK // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


@final
@dataclass(frozen=True, eq=False)
class Int8Rows(Frozen):
    """A weight (out, in) as int8 values and scales.

    Attributes:
        values: (out, in), or its transpose if `transposed`.
        scale: (out, 1), or (1, out) if `transposed`; float32.
        work: the type in which the layer works.
        transposed: the layer's own layout is (in, out).
    """

    values: Tensor
    scale: Tensor
    work: torch.dtype
    transposed: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.values.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        return self.work

    @property
    def addable(self) -> bool:
        return False  # a sum would be a second matrix, to be kept or formed twice

    def form(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        values, scale = tensors
        if reusable(values.device):
            matrix = fill(scratch("frozen", tuple(values.shape), dtype, values.device), values, scale)
        else:
            matrix = (values * scale.to(torch.promote_types(dtype, torch.float32))).to(dtype)
        return matrix.t() if self.transposed else matrix


@torch.no_grad()
def fill(matrix: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Writes values · scale into `matrix`, from at least single precision; all of one layout."""
    rowwise = scale.shape[0] == matrix.shape[0]
    wide = torch.promote_types(matrix.dtype, torch.float32) == matrix.dtype
    for rows in _blocks(*matrix.shape):
        factor = scale[rows] if rowwise else scale
        part = matrix[rows]
        # Converting and scaling in place is four times faster than one product of int8 and float32.
        if wide:
            part.copy_(values[rows]).mul_(factor)
        else:
            part.copy_(values[rows].to(torch.float32).mul_(factor))
    return matrix
