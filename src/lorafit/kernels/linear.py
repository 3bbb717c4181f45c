"""A linear layer with its update as one operation: y = g ∘ (x Wᵀ + s (x ∘ mask) Aᵀ Bᵀ) + b, W and b frozen.

The plain twin is `lorafit.layers.apply` on a linear site. What is kept for the backward pass: x (where A is trained),
H = (x ∘ mask) Aᵀ of r numbers a token, a mask of one byte a number where there is dropout, and x Wᵀ + s H Bᵀ where g is
trained. A middle vector and one over outputs are folded into B before (`lorafit.delta.LowRank`), which costs out · r.

Two orders give the same numbers: `_LowRank` adds s H Bᵀ to the layer's own output; `_Merged` multiplies x by W + s B A,
which it forms. The first costs 2 r (in + out) a token more than the frozen layer in the forward pass, the second
2 r · in · out, whatever the number of tokens (RunLoRA, Cherniuk et al. 2023, arXiv:2312.03415, with other names).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.errors import StateError
from lorafit.kernels.frozen import Frozen
from lorafit.kernels.masks import add_masked_product_, keep_mask, masked_outer, masked_product
from lorafit.kernels.precision import as_forward, own_precision, wanted
from lorafit.kernels.products import shared_product
from lorafit.kernels.scratch import pieces, recorded, scratch, shaped, turned

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
            weight = _merged(frozen.form(tensors, dtype), down, up, scale, kept=False)
            return shaped(x, _scaled(F.linear(_rows(x, dtype), weight, _as(bias, dtype)), gain, _as(bias, dtype)))
        y = _low_rank(x, frozen.form(tensors, dtype), _as(bias, dtype), down, up, scale, dropout)[0]
        return shaped(x, _scaled(y, gain, _as(bias, dtype)))
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
    if dropout or dtype not in (torch.float32, torch.float64) or not frozen.addable:
        return False, False
    out, inn = frozen.shape
    adding, forming = tokens * (inn + out) * (r + ADDING), inn * out * (r + FORMING)
    kept = r > KEEP * tokens and inn <= tokens
    # H is still needed for B, but neither s H Bᵀ nor, on the way back, s (dy B) A.
    return kept, adding > (1 if kept else 2) * forming


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
        bias = _as(bias, dtype)
        y, h, mask = _low_rank(
            x, frozen.form(tensors, dtype), bias, down, up, scale, dropout, None if need_down else tensors[0]
        )
        whole, y = y if need_gain else None, _scaled(y, gain, bias)
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
            return _twice(ctx, grad, _Operands(x, mask, down, up, gain, bias), tensors)
        dy = grad.reshape(-1, grad.shape[-1])
        a, b = down.to(dy.dtype), up.to(dy.dtype)
        dgain = _gain_gradient(dy, whole, bias, gain.dtype) if need_gain else None
        b = b if gain is None else _rows_times(b, gain)
        dh = (dy @ turned(b).t()).mul_(ctx.scale) if need_down or need_x else dy
        dup = _up_gradient(dy, h, ctx.scale, gain, up) if need_up else None
        ddown = dx = None
        if need_down:
            rows = _rows(x, dy.dtype)
            ddown = (turned(dh) @ rows if mask is None else masked_outer(dh, rows, mask)).to(down.dtype)
        if need_x:
            dx = _through(dy, ctx.frozen.form(tensors, dy.dtype), gain)
            if mask is None:
                dx = torch.addmm(dx, dh, a, out=None if recorded() else dx)
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
        rows, bias = _rows(x, dtype), _as(bias, dtype)
        merged = _merged(frozen.form(tensors, dtype), down, up, scale, kept=kept)
        y = F.linear(rows, merged, bias)
        whole, y = y if need_gain else None, _scaled(y, gain, bias)
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
            return _twice(ctx, grad, _Operands(x, None, down, up, gain, bias), tensors)
        dy = grad.reshape(-1, grad.shape[-1])
        a, b = down.to(dy.dtype), up.to(dy.dtype)
        dgain = _gain_gradient(dy, whole, bias, gain.dtype) if need_gain else None
        dup = ddown = dx = None
        if need_up:
            dup = _up_gradient(dy, _rows(x, dy.dtype) @ turned(a) if h is None else h, ctx.scale, gain, up)
        if need_down:
            rows = _rows(x, dy.dtype)
            dh = (dy @ turned(b if gain is None else _rows_times(b, gain)).t()).mul_(ctx.scale)
            ddown = (turned(dh) @ rows).to(down.dtype)
        if need_x:
            if merged is None:
                merged = _merged(ctx.frozen.form(tensors, dy.dtype), down, up, ctx.scale, kept=False)
            dx = _through(dy, merged, gain).view(ctx.x[0]).to(ctx.x[1])
        return dx, ddown, dup, dgain, None, None, None, None, None, *(None for _ in tensors)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to(dtype)


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropout: float,
    user: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x Wᵀ + b + s / (1 − p) H Bᵀ, H, mask); with `user`, a layer's weight, H may be that of the layer before."""
    dtype = weight.dtype
    rows = _rows(x, dtype)
    y, mask = F.linear(rows, weight, bias), keep_mask(rows, dropout) if dropout else None
    a = down.to(dtype)
    if mask is not None:
        h = masked_product(rows, mask, a)
    else:
        h = rows @ turned(a) if user is None else shared_product(x, rows, down, user)
    # Not in place where operations are recorded: selective checkpointing keeps the layer's own output.
    into = None if recorded() else y
    return torch.addmm(y, h, turned(up.to(dtype)), alpha=scale / (1 - dropout), out=into), h, mask


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: float, *, kept: bool) -> Tensor:
    """W + s B A, in memory of its own if it is to be kept."""
    shape, kind = (weight.shape[0], weight.shape[1]), weight.dtype
    into = weight.new_empty(shape) if kept else scratch("merged", shape, kind, weight.device)
    return torch.addmm(weight, up.to(kind), down.to(kind), alpha=scale, out=into)


def _scaled(y: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gives g ∘ (y − b) + b for y with its bias: y itself, bit for bit, where g is 1. g acts in its own precision."""
    if gain is None:
        return y
    scaled = torch.mul(y, gain, out=torch.empty_like(y))
    return scaled if bias is None else scaled.add_(((1 - gain) * bias).to(y.dtype))


def _rows_times(matrix: Tensor, gain: Tensor) -> Tensor:
    return torch.mul(matrix, gain[:, None]).to(matrix.dtype)


def _through(dy: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
    """(dy ∘ g) W; g goes to the smaller of the two."""
    if gain is None:
        return dy @ weight
    if len(dy) < weight.shape[1] or weight.dtype != gain.dtype:
        return torch.mul(dy, gain, out=scratch("scaled", tuple(dy.shape), dy.dtype, dy.device)) @ weight
    into = scratch("scaled", tuple(weight.shape), weight.dtype, weight.device)
    return dy @ torch.mul(weight, gain[:, None], out=into)


def _gain_gradient(dy: Tensor, whole: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """Σ over tokens of dy ∘ (y − b), in at least float32, for y with its bias but before g."""
    exact = torch.promote_types(dy.dtype, torch.float32)
    total = torch.zeros(dy.shape[1], dtype=exact, device=dy.device)
    for rows in pieces(len(dy), dy.shape[1], dy.device):
        part = dy[rows]
        into = scratch("products", tuple(part.shape), dy.dtype, dy.device)
        linear = whole[rows] if bias is None else torch.sub(whole[rows], bias, out=into)
        total += torch.mul(part, linear, out=into).sum(dim=0, dtype=exact)
    return total.to(kind)


def _up_gradient(dy: Tensor, h: Tensor, scale: float, gain: Tensor | None, up: Tensor) -> Tensor:
    """The gradient of B, s (dy ∘ g)ᵀ H."""
    z = (turned(h) @ dy).t().to(up.dtype).contiguous()  # the faster way round on a CPU
    z = z.view(-1).view(up.shape)  # a single column would keep the strides of a row, which DDP warns of
    return z.mul_(scale) if gain is None else z.mul_((scale * gain).to(up.dtype)[:, None])


class _Operands(NamedTuple):
    """What the plain twin is made of."""

    x: Tensor | None
    mask: Tensor | None
    down: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None


def _twice(ctx: Any, grad: Tensor, operands: _Operands, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again: those of the plain twin."""
    if operands.x is None:
        raise StateError(
            "second derivatives through a linear layer whose A is frozen need its input, which was not kept",
            fix="let A require gradients, or compute second derivatives on a detached model",
        )
    # Views: what is asked for is the gradient by this layer's own use of a tensor, not by that of layers before it.
    x, down, up = (each.view_as(each) for each in (operands.x, operands.down, operands.up))
    gain = None if operands.gain is None else operands.gain.view_as(operands.gain)
    dtype: torch.dtype = ctx.dtype
    rows = _rows(x, dtype)
    y = F.linear(rows, ctx.frozen.form(tensors, dtype).clone(), operands.bias)
    h = F.linear(rows if operands.mask is None else rows * operands.mask, down.to(dtype))
    y = y + F.linear(h, up.to(dtype)) * ctx.scale
    if gain is not None:
        linear = y if operands.bias is None else y - operands.bias
        y = y + ((gain - 1) * linear).to(dtype)
    leaves = (x, down, up, gain)
    needed = [leaf for leaf, need in zip(leaves, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, needed, grad.reshape(y.shape), create_graph=True))  # type: ignore[arg-type]
    gradients = [next(found) if need else None for need in ctx.needs_input_grad[:4]]
    return *gradients, None, None, None, None, None, *(None for _ in tensors)
