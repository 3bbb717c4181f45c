"""A linear layer whose whole change is given, as one operation: y = x (W + Δ)ᵀ + b, W and b frozen.

The plain twin is `lorafit.layers.apply` on a linear site, which multiplies x by W and by Δ. Here the sum is formed once
in each direction: dx = dy (W + Δ), dΔ = dyᵀ x. Kept for the backward pass: x and Δ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.kernels.frozen import Frozen
from lorafit.kernels.precision import as_forward, autocasts
from lorafit.kernels.scratch import beside, recorded, shaped


def summable(x: Tensor, frozen: Frozen, change: Tensor) -> bool:
    """Whether W + Δ is not rounded more than y is: then `dense_linear` gives what its plain twin gives."""
    return frozen.addable and change.dtype == frozen.dtype and not autocasts(x.device.type)


def dense_linear(x: Tensor, frozen: Frozen, bias: Tensor | None, change: Tensor) -> Tensor:
    """The layer's output x (W + Δ)ᵀ + b for x (..., in) and Δ (out, in) where they are `summable`: (..., out)."""
    y: Tensor = _Summed.apply(x, change, bias, frozen, *frozen.tensors)  # type: ignore[no-untyped-call]
    return y


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, bias: Tensor | None, frozen: Frozen, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, change, *tensors)
        ctx.frozen = frozen
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        return shaped(x, F.linear(rows, _sum(frozen.form(tensors, change.dtype), change), bias))

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, change, *tensors = ctx.saved_tensors
        need_x, need_change, *_ = ctx.needs_input_grad
        weight = ctx.frozen.form(tensors, change.dtype)
        # Where the gradients are to be differentiated again, the sum has to be a function of Δ.
        weight = weight + change if torch.is_grad_enabled() else _sum(weight, change)
        dx = grad @ weight if need_x else None
        rows = grad.reshape(-1, grad.shape[-1])
        dchange = rows.t() @ x.reshape(-1, x.shape[-1]) if need_change else None
        return dx, dchange, None, None, *(None for _ in tensors)


def _sum(weight: Tensor, change: Tensor) -> Tensor:
    if recorded():  # what is recorded is not written to
        return weight + change
    return torch.add(weight, change, out=beside("merged", weight))
