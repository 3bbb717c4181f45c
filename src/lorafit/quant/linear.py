"""A linear layer over a frozen weight in another form: y = x Wᵀ + b, of which backward needs nothing but that form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.kernels.frozen import Frozen
from lorafit.kernels.precision import as_forward, own_precision
from lorafit.kernels.scratch import transformed


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b; keeps what stands for W, which is in memory anyway. Backward: dx = dY W, db = Σ dY."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, frozen: Frozen, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.frozen = frozen
        return F.linear(x, frozen.form(tensors, x.dtype), bias)

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = ctx.frozen.form(tensors, grad.dtype)
            if torch.is_grad_enabled():  # create_graph: this product is differentiated in its turn, and keeps W
                matrix = matrix.clone()
            grad_x = torch.mm(grad.reshape(-1, grad.shape[-1]), matrix).view(*grad.shape[:-1], matrix.shape[1])
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, *(None for _ in tensors)


def frozen_linear(x: Tensor, frozen: Frozen, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A linear layer, x Wᵀ + b.

    Args:
        x: (..., in).
        frozen: stands for W (out, in).
        bias: b (out,), or None.
        dtype: the type to work in, and of the result.
    """
    with own_precision(x.device):
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        # A compiler sees by itself that the packed form is the cheaper one to keep.
        if torch.compiler.is_compiling() or transformed():
            return F.linear(x, frozen.form(frozen.tensors, dtype), bias)
        result: Tensor = _FrozenLinear.apply(x, bias, frozen, *frozen.tensors)  # type: ignore[no-untyped-call]
        return result
