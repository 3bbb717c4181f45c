"""A frozen way up between its two vectors, diag(out) up diag(mid), in one pass each way over what is written.

The plain twin is `lorafit.delta.LowRank.upward`, which writes two matrices on the way forth and four on the way back:
with wide layers and few tokens that is a good part of a step of VeRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.delta import LowRank


def upward(delta: LowRank) -> Tensor:
    """The way up, (out, r / groups), with mid and out multiplied in: Δ = scale · up' down'.

    Not for a transform of torch.func, nor for forward mode.
    """
    up, mid, out = delta.up, delta.mid, delta.out
    if mid is None or out is None or delta.groups != 1 or up.requires_grad or not up.dtype == mid.dtype == out.dtype:
        return delta.upward()
    result: Tensor = _Between.apply(up, mid, out)  # type: ignore[no-untyped-call]
    return result


class _Between(torch.autograd.Function):
    """With t = dB' ∘ B: the gradient of mid is tᵀ out, that of out is t mid."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, mid: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(up, mid, out)
        return torch.mul(up, mid).mul_(out[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        up, mid, out = ctx.saved_tensors
        _, need_mid, need_out = ctx.needs_input_grad
        t = grad * up
        return None, torch.mv(t.t(), out) if need_mid else None, torch.mv(t, mid) if need_out else None
