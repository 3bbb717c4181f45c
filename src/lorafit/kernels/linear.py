"""A linear layer with its update as one operation: y = g ∘ (x Wᵀ + s (x ∘ mask) Aᵀ Bᵀ) + b, W and b frozen.

The plain twin is `lorafit.layers.apply` on a linear site. What is kept for the backward pass: x (where A is trained),
H = (x ∘ mask) Aᵀ of r numbers a token, a mask of one byte a number where there is dropout, and x Wᵀ + s H Bᵀ where g is
trained. A middle vector and one over outputs are folded into B before (`lorafit.delta.LowRank`), which costs out · r.

Two orders give the same numbers: `_LowRank` adds s H Bᵀ to the layer's own output; `_Merged` multiplies x by W + s B A,
which it forms. The first costs 2 r (in + out) a token more than the frozen layer in the forward pass, the second
2 r · in · out, whatever the number of tokens (RunLoRA, Cherniuk et al. 2023, arXiv:2312.03415, with other names).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.kernels.frozen import Frozen
from lorafit.kernels.masks import add_masked_product_, masked_outer
from lorafit.kernels.parts import (
    Operands,
    added,
    as_rows,
    formed,
    gain_gradient,
    low_rank,
    product,
    rows_times,
    scaled,
    through,
    twice,
    typed,
    up_gradient,
)
from lorafit.kernels.precision import as_forward, own_precision, wanted
from lorafit.kernels.products import shared_product
from lorafit.kernels.scratch import shaped

KEEP = 1 / 16
"""A merged weight is kept for the backward pass where forming it costs more than this part of the layer itself."""
ADDING = 16
"""What a pass over y costs beside its products, in columns of A: measured on a CPU; memory is slower than products."""
FORMING = 64
"""The same of a pass that forms a weight."""


def linear(
    x: Tensor,
    frozen: Frozen,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    *,
    gain: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with a low-rank update.

    Args:
        x: (..., in).
        frozen: W (out, in).
        bias: b (out,), frozen, or None.
        down: A (r, in).
        up: B (out, r), all vectors folded in.
        scale: s.
        gain: g (out,), or None for ones.
        dropout: probability with which each number of x is dropped on its way into A.

    Returns:
        (..., out), in the type that the layer itself would give: W's, or autocast's.

    Raises:
        StateError: second derivatives are asked for where x was not kept.
    """
    dtype = wanted(x, frozen.dtype)
    if dtype != frozen.dtype:
        with own_precision(x.device):
            return _apply(x, frozen, bias, down, up, scale, gain, dropout, dtype)
    return _apply(x, frozen, bias, down, up, scale, gain, dropout, dtype)


def _apply(
    x: Tensor,
    frozen: Frozen,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    gain: Tensor | None,
    dropout: float,
    dtype: torch.dtype,
) -> Tensor:
    trained = [x.requires_grad, down.requires_grad, up.requires_grad, gain is not None and gain.requires_grad]
    differentiated = torch.is_grad_enabled() and any(trained)
    kept, merged = order(frozen, x.numel() // max(1, x.shape[-1]), down.shape[0], dtype, dropout)
    tensors = frozen.tensors
    if not differentiated:  # the call of a Function costs as much as a small layer
        if merged:
            weight = formed(frozen.form(tensors, dtype), down, up, scale, kept=False)
            return shaped(x, scaled(F.linear(as_rows(x, dtype), weight, typed(bias, dtype)), gain, typed(bias, dtype)))
        y = low_rank(x, frozen.form(tensors, dtype), typed(bias, dtype), down, up, scale, dropout)[0]
        return shaped(x, scaled(y, gain, typed(bias, dtype)))
    shared = (x, down, up, gain, bias, frozen, scale, dtype)
    function, last = (_Merged, kept) if merged else (_LowRank, dropout)
    result: Tensor = function.apply(*shared, last, *tensors)  # type: ignore[no-untyped-call]
    return result


def order(frozen: Frozen, tokens: int, r: int, dtype: torch.dtype, dropout: float) -> tuple[bool, bool]:
    """(kept, merged): whether the merged weight is kept for the backward pass, and whether it is formed at all.

    Merged where that costs less in training, by the count of products and passes, and where it is the same: without
    dropout, and where W + s B A is not rounded more than y is. Shapes alone decide: with and without gradients the
    result is the same to the last bit.
    """
    if not allows(frozen, dtype, dropout):
        return False, False
    out, inn = frozen.shape
    adding, forming = tokens * (inn + out) * (r + ADDING), inn * out * (r + FORMING)
    kept = r > KEEP * tokens and inn <= tokens
    # H is still needed for B, but neither s H Bᵀ nor, on the way back, s (dy B) A.
    return kept, adding > (1 if kept else 2) * forming


def allows(frozen: Frozen, dtype: torch.dtype, dropout: float) -> bool:
    """Whether the merged order gives the same."""
    return not dropout and dtype in (torch.float32, torch.float64) and frozen.addable


class _LowRank(torch.autograd.Function):
    """The low-rank order: dH = s dy B; dB = s dyᵀ H; dA = dHᵀ (x ∘ mask); dx = dy W + (dH A) ∘ mask, dy times g first.

    (Hu et al. 2021, eq. 3, differentiated.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        frozen: Frozen,
        scale: float,
        dtype: torch.dtype,
        dropout: float,
        *tensors: Tensor,
    ) -> Tensor:
        _, need_down, _, need_gain, *_ = ctx.needs_input_grad
        bias = typed(bias, dtype)
        y, h, mask = low_rank(
            x, frozen.form(tensors, dtype), bias, down, up, scale, dropout, None if need_down else tensors[0]
        )
        whole, y = y if need_gain else None, scaled(y, gain, bias)
        # A frozen A needs no x in the backward pass: then r numbers a token are kept instead of `in`.
        ctx.save_for_backward(
            x if need_down else None, h, mask, down, up, gain, bias if gain is not None else None, whole, *tensors
        )
        ctx.frozen, ctx.scale, ctx.x, ctx.dtype = frozen, scale / (1 - dropout), (x.shape, x.dtype), dtype
        return shaped(x, y)

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, mask, down, up, gain, bias, whole, *tensors = ctx.saved_tensors
        need_x, need_down, need_up, need_gain, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _twice(ctx, grad, Operands(x, mask, down, up, gain, bias), tensors)
        dy = grad.reshape(-1, grad.shape[-1])
        a, b = down.to(dy.dtype), up.to(dy.dtype)
        dgain = gain_gradient(dy, whole, bias, gain.dtype) if need_gain else None
        b = b if gain is None else rows_times(b, gain)
        dh = product(dy, b, ctx.scale) if need_down or need_x else dy
        dup = up_gradient(dy, h, ctx.scale, gain, up) if need_up else None
        ddown = dx = None
        if need_down:
            rows = as_rows(x, dy.dtype)
            ddown = (dh.t() @ rows if mask is None else masked_outer(dh, rows, mask)).to(down.dtype)
        if need_x:
            dx = through(dy, ctx.frozen.form(tensors, dy.dtype), gain)
            if mask is None:
                dx = added(dx, dh, a)
            else:
                add_masked_product_(dx, dh, a, mask)
            dx = dx.view(ctx.x[0]).to(ctx.x[1])
        return dx, ddown, dup, dgain, None, None, None, None, None, *(None for _ in tensors)


class _Merged(torch.autograd.Function):
    """The merged order: y = g ∘ (x W'ᵀ) + b with W' = W + s B A; dx = dy W', dB and dA as in the other order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        frozen: Frozen,
        scale: float,
        dtype: torch.dtype,
        kept: bool,
        *tensors: Tensor,
    ) -> Tensor:
        need_x, need_down, need_up, need_gain, *_ = ctx.needs_input_grad
        rows, bias = as_rows(x, dtype), typed(bias, dtype)
        merged = formed(frozen.form(tensors, dtype), down, up, scale, kept=kept)
        y = F.linear(rows, merged, bias)
        whole, y = y if need_gain else None, scaled(y, gain, bias)
        h = shared_product(x, rows, down, tensors[0]) if need_up and not need_down else None
        ctx.save_for_backward(
            x if need_down else None,
            h,
            merged if kept and need_x else None,
            down,
            up,
            gain,
            bias if gain is not None else None,
            whole,
            *tensors,
        )
        ctx.frozen, ctx.scale, ctx.x, ctx.dtype = frozen, scale, (x.shape, x.dtype), dtype
        return shaped(x, y)

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, merged, down, up, gain, bias, whole, *tensors = ctx.saved_tensors
        need_x, need_down, need_up, need_gain, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _twice(ctx, grad, Operands(x, None, down, up, gain, bias), tensors)
        dy = grad.reshape(-1, grad.shape[-1])
        a, b = down.to(dy.dtype), up.to(dy.dtype)
        dgain = gain_gradient(dy, whole, bias, gain.dtype) if need_gain else None
        dup = ddown = dx = None
        if need_up:
            dup = up_gradient(dy, as_rows(x, dy.dtype) @ a.t() if h is None else h, ctx.scale, gain, up)
        if need_down:
            rows = as_rows(x, dy.dtype)
            dh = product(dy, b if gain is None else rows_times(b, gain), ctx.scale)
            ddown = (dh.t() @ rows).to(down.dtype)
        if need_x:
            if merged is None:
                merged = formed(ctx.frozen.form(tensors, dy.dtype), down, up, ctx.scale, kept=False)
            dx = through(dy, merged, gain).view(ctx.x[0]).to(ctx.x[1])
        return dx, ddown, dup, dgain, None, None, None, None, None, *(None for _ in tensors)


def _twice(ctx: Any, grad: Tensor, operands: Operands, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    weight = ctx.frozen.form(tensors, ctx.dtype).clone()
    gradients = twice(operands, weight, ctx.scale, grad, ctx.needs_input_grad[:4])
    return *gradients, None, None, None, None, None, *(None for _ in tensors)
