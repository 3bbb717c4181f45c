"""Dropout of the low-rank path alone: a mask of one byte a number, and products with what it leaves.

torch's own dropout draws a float32 for each number and keeps a mask and a dropped copy of x. Here eight numbers share
one draw of 64 bits, x is kept undropped (it is the same for all layers that read it), and what the mask leaves of x
lives piece by piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.kernels.scratch import pieces, recorded, reusable, scratch


def by_bytes(device: torch.device) -> bool:
    """Whether masks are drawn eight numbers at a time: wherever a pass may be repeated, in the same way each time."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def keep_mask(rows: Tensor, dropout: float) -> Tensor:
    """A mask like `rows` (n, k), uint8: 0 with probability `dropout`, else 1.

    A byte of a random number is less than 256 `dropout` rounded down or up. Which of the two is drawn for each row,
    such that the probability is exactly `dropout` for each number.
    """
    n, k = rows.shape
    if not by_bytes(rows.device):
        return (torch.rand(n, k, dtype=torch.float32, device=rows.device) >= dropout).to(torch.uint8)
    drawn = torch.empty((n * k + 7) // 8, dtype=torch.int64, device="cpu")
    kept = recorded()  # what is recorded is not written to; the numbers are the same
    drawn = torch.ops.aten.random(drawn, -(2**63), None) if kept else drawn.random_(-(2**63), None)
    mask = drawn.view(torch.uint8)[: n * k].view(n, k)
    least = int(256 * dropout)
    bound = (torch.rand(n, 1, dtype=torch.float32, device="cpu") < 256 * dropout - least).add(least)
    if kept or least == 255:
        return (mask >= bound).to(torch.uint8)
    return mask.ge_(bound.to(torch.uint8))


def masked_product(x: Tensor, mask: Tensor, matrix: Tensor) -> Tensor:
    """(x ∘ mask) matrixᵀ for x (n, k), mask like it and matrix (r, k): (n, r)."""
    n, k = x.shape
    if not reusable(x.device):
        return (x * mask) @ matrix.t()
    result = x.new_empty(n, matrix.shape[0])
    for rows in pieces(n, k, x.device):
        part = torch.mul(x[rows], mask[rows], out=scratch("masked", tuple(x[rows].shape), x.dtype, x.device))
        torch.mm(part, matrix.t(), out=result[rows])
    return result


def masked_outer(left: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """leftᵀ (x ∘ mask) for left (n, r), x (n, k) and mask like it: (r, k)."""
    n, k = x.shape
    if not reusable(x.device):
        return left.t() @ (x * mask)
    result = x.new_zeros(left.shape[1], k)
    for rows in pieces(n, k, x.device):
        part = torch.mul(x[rows], mask[rows], out=scratch("masked", tuple(x[rows].shape), x.dtype, x.device))
        result.addmm_(left[rows].t(), part)
    return result


def add_masked_product_(total: Tensor, left: Tensor, matrix: Tensor, mask: Tensor) -> None:
    """Adds (left matrix) ∘ mask to `total` (n, k), for left (n, r) and matrix (r, k)."""
    n, k = total.shape
    if not reusable(total.device):
        total.addcmul_(left @ matrix, mask)
        return
    for rows in pieces(n, k, total.device):
        into = scratch("masked", tuple(total[rows].shape), total.dtype, total.device)
        total[rows].addcmul_(torch.mm(left[rows], matrix, out=into), mask[rows])
