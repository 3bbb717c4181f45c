"""What the fused linear layers are made of: their products, gradients and plain twin, each written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.errors import StateError
from lorafit.kernels.masks import keep_mask, masked_product
from lorafit.kernels.products import shared_product
from lorafit.kernels.scratch import beside, pieces, recorded, scratch


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to(dtype)


def typed(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def low_rank(
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
    rows = as_rows(x, dtype)
    y, mask = F.linear(rows, weight, bias), keep_mask(rows, dropout) if dropout else None
    a = down.to(dtype)
    if mask is not None:
        h = masked_product(rows, mask, a)
    else:
        h = rows @ a.t() if user is None else shared_product(x, rows, down, user)
    return added(y, h, up.to(dtype).t(), scale / (1 - dropout)), h, mask


def formed(weight: Tensor, down: Tensor, up: Tensor, scale: float, *, kept: bool) -> Tensor:
    """W + s B A, in memory of its own if it is to be kept."""
    factors = up.to(weight.dtype), down.to(weight.dtype)
    if recorded():  # a compiler finds memory by itself, and takes none that lies by columns
        return torch.addmm(weight, *factors, alpha=scale)
    into = torch.empty_like(weight) if kept else beside("merged", weight)
    return torch.addmm(weight, *factors, alpha=scale, out=into)


def scaled(y: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gives g ∘ (y − b) + b for y with its bias: y itself, bit for bit, where g is 1. g acts in its own precision."""
    if gain is None:
        return y
    if recorded():
        scaled = torch.mul(y, gain).to(y.dtype)
        return scaled if bias is None else scaled + ((1 - gain) * bias).to(y.dtype)
    scaled = torch.mul(y, gain, out=torch.empty_like(y))
    return scaled if bias is None else scaled.add_(((1 - gain) * bias).to(y.dtype))


def rows_times(matrix: Tensor, gain: Tensor) -> Tensor:
    return torch.mul(matrix, gain[:, None]).to(matrix.dtype)


def through(dy: Tensor, weight: Tensor, gain: Tensor | None, total: Tensor | None = None) -> Tensor:
    """(dy ∘ g) W, added to `total` if there is one; g goes to the smaller of the two."""
    if gain is not None:
        if len(dy) < weight.shape[1] or weight.dtype != gain.dtype:
            dy = torch.mul(dy, gain, out=scratch("scaled", tuple(dy.shape), dy.dtype, dy.device))
        else:
            into = scratch("scaled", tuple(weight.shape), weight.dtype, weight.device)
            weight = torch.mul(weight, gain[:, None], out=into)
    return dy @ weight if total is None else added(total, dy, weight)


def added(total: Tensor, left: Tensor, right: Tensor, scale: float | None = None) -> Tensor:
    """Gives total + s left right, in the memory of `total` except where operations are recorded.

    Selective checkpointing, which records, keeps the layer's own output.
    """
    out = None if recorded() else total
    if scale is None:  # a default of 1 would be a number of unknown value to a compiler
        return torch.addmm(total, left, right, out=out)
    return torch.addmm(total, left, right, alpha=scale, out=out)


def gain_gradient(dy: Tensor, whole: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """Σ over tokens of dy ∘ (y − b), in at least float32, for y with its bias but before g."""
    exact = torch.promote_types(dy.dtype, torch.float32)
    total = torch.zeros(dy.shape[1], dtype=exact, device=dy.device)
    for rows in pieces(len(dy), dy.shape[1], dy.device):
        part = dy[rows]
        into = scratch("products", tuple(part.shape), dy.dtype, dy.device)
        linear = whole[rows] if bias is None else torch.sub(whole[rows], bias, out=into)
        total += torch.mul(part, linear, out=into).sum(dim=0, dtype=exact)
    return total.to(kind)


def up_gradient(dy: Tensor, h: Tensor, scale: float, gain: Tensor | None, up: Tensor) -> Tensor:
    """The gradient of B, s (dy ∘ g)ᵀ H."""
    z = product(h.t(), dy, 1.0 if gain is not None else scale).t()  # the faster way round on a CPU
    z = z.reshape(-1).view(up.shape).to(up.dtype)  # a single column would keep a row's strides, which DDP warns of
    return z if gain is None else z.mul_((scale * gain).to(up.dtype)[:, None])


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Gives s left right in one operation."""
    if recorded():  # a compiler may hold the scale for something that changes, which alpha cannot be
        return (left @ right).mul_(scale)
    nothing = left.new_empty(())
    return torch.addmm(nothing, left, right, beta=0, alpha=scale)  # with beta of 0 `nothing` is not read


class Operands(NamedTuple):
    """What the plain twin is made of."""

    x: Tensor | None
    mask: Tensor | None
    down: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None


def twice(
    operands: Operands,
    weight: Tensor,
    scale: float,
    grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients by x, A, B and g as functions that can be differentiated again: those of the plain twin.

    Args:
        operands: of the layer.
        weight: W, in the type of the operation; it is not written to while the result is in use.
        scale: s, divided by 1 - p where there is dropout.
        grad: the gradient of the layer's output.
        needs: which of the four are asked for.
    """
    if operands.x is None:
        raise StateError(
            "second derivatives through a linear layer whose A is frozen need its input, which was not kept",
            fix="let A require gradients, or compute second derivatives on a detached model",
        )
    # Views: what is asked for is the gradient by this layer's own use of a tensor, not by that of layers before it.
    x, down, up = (each.view_as(each) for each in (operands.x, operands.down, operands.up))
    gain = None if operands.gain is None else operands.gain.view_as(operands.gain)
    rows = as_rows(x, weight.dtype)
    y = F.linear(rows, weight, operands.bias)
    h = F.linear(rows if operands.mask is None else rows * operands.mask, down.to(weight.dtype))
    y = y + F.linear(h, up.to(weight.dtype)) * scale
    if gain is not None:
        linear = y if operands.bias is None else y - operands.bias
        y = y + ((gain - 1) * linear).to(weight.dtype)
    leaves = (x, down, up, gain)
    needed = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, needed, grad.reshape(y.shape), create_graph=True))  # type: ignore[arg-type]
    return [next(found) if need else None for need in needs]
