"""A table with its update as one operation: y = g ∘ (W[i] + s (A[i] ∘ mask) Eᵀ) for token ids i, W frozen.

The plain twin is `lorafit.layers.apply` on an embedding's site. Kept for the backward pass: the ids, and H = A[i] ∘
mask of r numbers a token; nothing of the size of the output. Of A, which has a column for every token there is, only
the columns of these ids change their type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.kernels.precision import as_forward, own_precision
from lorafit.kernels.scratch import pieces, recorded


class _Fixed(NamedTuple):
    """What of a table is no tensor."""

    scale: float
    dropout: float
    padding_idx: int | None
    by_frequency: bool


def lookup(
    ids: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    *,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    padding_idx: int | None = None,
    by_frequency: bool = False,
) -> Tensor:
    """A table of vectors with a low-rank update.

    Args:
        ids: which rows, of any shape.
        weight: W as the layer has it, (num, dim), frozen.
        down: A (r, num).
        up: E (dim, r), all vectors folded in.
        scale: s.
        gain: g (dim,), or None for ones.
        dropout: probability with which a token's whole column of A is dropped.
        padding_idx: the token whose column of A gets no gradient.
        by_frequency: whether a column's gradient is divided by how often its token is in `ids`.

    Returns:
        (*ids, dim), in W's type.
    """
    fixed = _Fixed(scale, dropout, padding_idx, by_frequency)
    with own_precision(weight.device):
        result: Tensor = _Lookup.apply(down, up, gain, ids, weight, fixed)  # type: ignore[no-untyped-call]
    return result


class _Lookup(torch.autograd.Function):
    """dH = s (dy ∘ g) E; dE = s (dy ∘ g)ᵀ H; dA is dH ∘ mask added up by token.

    With Z = dyᵀ H, dg = Σ over tokens of dy ∘ W[i] + s Σ over ranks of E ∘ Z: no output is kept for it.
    """

    @staticmethod
    def forward(
        ctx: Any, down: Tensor, up: Tensor, gain: Tensor | None, ids: Tensor, weight: Tensor, fixed: _Fixed
    ) -> Tensor:
        _, need_up, need_gain, *_ = ctx.needs_input_grad
        y = F.embedding(ids, weight)
        rows = y.view(-1, y.shape[-1])  # y itself is returned, no view of it: what comes after may write to it
        h = down.index_select(1, ids.flatten()).to(y.dtype).t()  # along A's rows: ten times as fast as by columns
        keep = F.dropout(h.new_ones(len(h), 1), fixed.dropout) if fixed.dropout else None
        h = h if keep is None else h * keep
        if recorded():  # as selective checkpointing does, which keeps the table's own rows
            rows = torch.addmm(rows, h, up.to(y.dtype).t(), alpha=fixed.scale)
            y = torch.ops.aten._unsafe_view(rows if gain is None else (rows * gain).to(y.dtype), y.shape)
        else:
            rows.addmm_(h, up.to(y.dtype).t(), alpha=fixed.scale)
            if gain is not None:
                torch.mul(y, gain, out=y)
        ctx.save_for_backward(h if need_up or need_gain else None, keep, down, up, gain, ids, weight)
        ctx.fixed = fixed
        return y

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, keep, down, up, gain, ids, weight = ctx.saved_tensors
        need_down, need_up, need_gain, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _twice(ctx, grad)
        scale, _, padding_idx, by_frequency = ctx.fixed
        dy = grad.reshape(-1, grad.shape[-1])
        ddown = dup = dgain = None
        if need_up or need_gain:
            z = (dy.t() @ h).to(up.dtype)
            dup = _times(z, gain, scale).to(up.dtype)
            if need_gain:
                dgain = (_by_row(dy, ids, weight) + (up * z).sum(dim=1) * scale).to(gain.dtype)
        if need_down:
            dh = dy @ _times(up, gain, scale).to(dy.dtype)
            dh = (dh if keep is None else dh * keep).to(down.dtype)
            ddown = _scattered(dh, ids.flatten(), down.shape[1], padding_idx, by_frequency)
        return ddown, dup, dgain, None, None, None


def _scattered(dh: Tensor, ids: Tensor, num: int, padding_idx: int | None, by_frequency: bool) -> Tensor:
    """Gives dA (r, num): the rows of dh (tokens, r) added up by token, in memory as A is."""
    if dh.device.type != "cpu":  # there adding by index has no order, and a run could not be repeated bit for bit
        missing = -1 if padding_idx is None else padding_idx
        found: Tensor = torch.ops.aten.embedding_dense_backward(dh, ids, num, missing, by_frequency)
        return found.t()
    if padding_idx is not None:
        dh = dh.masked_fill((ids == padding_idx)[:, None], 0)
    if by_frequency:
        counts = ids.new_zeros(num).index_add_(0, ids, torch.ones_like(ids))
        dh = dh / counts[ids][:, None]
    return dh.new_zeros(dh.shape[1], num).index_add_(1, ids, dh.t())


def _times(e: Tensor, gain: Tensor | None, scale: float) -> Tensor:
    """Gives s g ∘ E for E (dim, r)."""
    return e * scale if gain is None else e * (scale * gain)[:, None]


def _by_row(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Σ over tokens of dy ∘ W[i], in at least float32."""
    exact = torch.promote_types(dy.dtype, torch.float32)
    flat, total = ids.flatten(), torch.zeros(dy.shape[1], dtype=exact, device=dy.device)
    for some in pieces(len(dy), dy.shape[1], dy.device):
        total += F.embedding(flat[some], weight).mul_(dy[some]).sum(dim=0, dtype=exact)
    return total


def _twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again: those of the plain twin."""
    _, keep, down, up, gain, ids, weight = ctx.saved_tensors
    # Views: what is asked for is the gradient by this layer's own use of a tensor, not by that of layers before it.
    down, up, gain = down.view_as(down), up.view_as(up), None if gain is None else gain.view_as(gain)
    scale, _, padding_idx, by_frequency = ctx.fixed
    y = F.embedding(ids, weight)
    h = F.embedding(ids, down.t(), padding_idx, scale_grad_by_freq=by_frequency).to(y.dtype)
    h = h if keep is None else h * keep.view(*ids.shape, 1)
    y = y + F.linear(h, up.to(y.dtype)) * scale
    if gain is not None:
        y = y + ((gain - 1) * y).to(y.dtype)
    needed = [leaf for leaf, need in zip((down, up, gain), ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
    return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None, None
