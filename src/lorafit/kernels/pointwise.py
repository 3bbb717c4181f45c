"""The way up, a 1 × 1 convolution, as products of matrices in the memory where the tensors are, and its gradients.

E is (out, r / groups); h has r channels, y and dy have `out`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.kernels.geometry import blocks, channels_last, rows
from lorafit.kernels.scratch import recorded


def _of_each_sample(e: Tensor, samples: int, groups: int) -> Tensor:
    """E as (samples · groups, out / groups, r / groups)."""
    if groups == 1:
        return e.expand(samples, *e.shape)
    each = e.view(1, groups, len(e) // groups, e.shape[1])
    return each.expand(samples, -1, -1, -1).reshape(samples * groups, *each.shape[2:])


def added_upward(y: Tensor, h: Tensor, e: Tensor, scale: float, groups: int) -> Tensor:
    """Gives y + scale · E h, in the memory of y except where operations are recorded, and never as a view."""
    if recorded():  # as selective checkpointing does, which keeps the layer's own output
        return _apart(y, h, e, scale, groups)
    if groups == 1 and channels_last(y):
        rows(y).addmm_(rows(h), e.t(), alpha=scale)
        return y
    ups, low = _of_each_sample(e, len(y), groups), blocks(h, groups)
    if y.is_contiguous():
        blocks(y, groups).baddbmm_(ups, low, alpha=scale)
    else:
        y.add_(torch.bmm(ups, low).view(y.shape), alpha=scale)
    return y


def _apart(y: Tensor, h: Tensor, e: Tensor, scale: float, groups: int) -> Tensor:
    """The same sums in memory of their own."""
    if groups == 1 and channels_last(y):
        whole = torch.addmm(rows(y), rows(h), e.t(), alpha=scale)
        return whole.view(len(y), *y.shape[2:], y.shape[1]).movedim(-1, 1).clone()
    ups, low = _of_each_sample(e, len(y), groups), blocks(h, groups)
    if y.is_contiguous():
        whole = torch.baddbmm(blocks(y, groups), ups, low, alpha=scale)
        result: Tensor = torch.ops.aten._unsafe_view(whole, y.shape)
        return result
    return torch.add(y, torch.bmm(ups, low).view(y.shape), alpha=scale)


def downward(dy: Tensor, e: Tensor, groups: int) -> Tensor:
    """Eᵀ dy, with r channels."""
    size = dy.shape[2:]
    if groups == 1 and channels_last(dy):
        return (rows(dy) @ e).view(len(dy), *size, e.shape[1]).movedim(-1, 1)
    ups = _of_each_sample(e, len(dy), groups).transpose(1, 2)
    return torch.bmm(ups, blocks(dy, groups)).view(len(dy), e.shape[1] * groups, *size)


def outer(dy: Tensor, h: Tensor, groups: int) -> Tensor:
    """Σ over positions of dy hᵀ, (out, r / groups): block by block."""
    out, r = dy.shape[1], h.shape[1] // groups
    if groups == 1 and channels_last(dy):
        return rows(dy).t() @ rows(h)
    parts = torch.bmm(blocks(dy, groups), blocks(h, groups).transpose(1, 2))
    exact = torch.promote_types(dy.dtype, torch.float32)
    return parts.view(len(dy), out, r).sum(dim=0, dtype=exact).to(dy.dtype)
