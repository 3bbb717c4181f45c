"""Fused twins of the plain operations in `layers`: the same numbers, fewer passes and fewer saved tensors.

Nothing here knows a method or a module. Each function has its plain twin named in its docstring, and a test that the
two agree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.errors import StateError


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen; keeps x and H = x Aᵀ, nothing else of the size of x.

    Backward (Hu et al. 2021, eq. 3, differentiated): dH = s dY B; dB = s dYᵀ H; dA = dHᵀ x; dx = dY W + dH A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        h = F.linear(x, down)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), up.t(), alpha=scale)
        # A frozen A needs no x in the backward pass: then r numbers a token are kept instead of `in`.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, h, weight, down, up)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What was saved has the dtype of the forward pass; an autocast around backward() must not mix in another.
        if autocasts(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _LowRankLinear._gradients(ctx, grad)
        return _LowRankLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, down, up = ctx.saved_tensors
        need_x, _, _, need_down, need_up, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: H must be a function of x and A again, not a saved constant
            if x is None:
                raise StateError(
                    "second derivatives through a linear layer whose A is frozen need its input, which was not kept",
                    fix="let A require gradients, or compute second derivatives on a detached model",
                )
            h = F.linear(x, down)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_h = torch.mm(rows, up).mul_(ctx.scale)
        grad_up = grad_down = grad_x = None
        if need_up:
            grad_up = torch.mm(rows.t(), h.reshape(-1, h.shape[-1])).mul_(ctx.scale)
        if need_down:
            grad_down = torch.mm(grad_h.t(), x.reshape(-1, x.shape[-1]))
        if need_x:
            grad_x = torch.mm(rows, weight).addmm_(grad_h, down).view(*grad.shape[:-1], weight.shape[1])
        return grad_x, None, None, grad_down, grad_up, None


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of this kind."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A linear layer with its low-rank update in one operation.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,), frozen, or None.
        down: A, (r, in).
        up: B, (out, r).
        scale: s.

    Returns:
        x Wᵀ + b + s (x Aᵀ) Bᵀ, (..., out). All tensors take the autocast dtype when autocast is on (float64 stays, as
        in torch's own layers) and must share one dtype otherwise. The plain twin is `layers.apply` on a linear site.
    """
    kind = x.device.type
    if autocasts(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = (x, weight, bias, down, up)
        cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        with torch.autocast(kind, enabled=False):
            y: Tensor = _LowRankLinear.apply(*cast, scale)  # type: ignore[no-untyped-call]
            return y
    result: Tensor = _LowRankLinear.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]
    return result
