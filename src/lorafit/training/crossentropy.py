"""The summed cross-entropy of hidden states under an output head, a few rows of logits at a time.

With a vocabulary of 49,152 a row of float32 logits takes 192 KiB, and the plain way keeps three of them for each
token until the backward pass. Here logits live only while their chunk is worked on.

This module knows nothing of models: a head is anything that maps `[n, hidden]` to `[n, vocabulary]`, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def summed_cross_entropy(hidden: Tensor, targets: Tensor, head: Head, *, through_head: bool, chunk: int) -> Tensor:
    """Minus the summed log-probability of `targets`.

    Args:
        hidden: `[rows, hidden]`.
        targets: `[rows]`, token ids.
        head: maps hidden states to logits; it is called, so adapters, biases and quantised weights in it count.
        through_head: whether autograd has to go through the head; see `needs_autograd`.
        chunk: rows of logits to hold at once.

    Returns:
        A scalar in float32 (float64 if the logits are), whatever the type of the logits.

    If autograd need not go through the head, this costs no more than the plain way: the gradient of the hidden
    states is made in the forward pass, chunk by chunk, and only that is kept. Otherwise each chunk is computed
    once more in the backward pass, unless there is only one.
    """
    if torch.is_grad_enabled() and hidden.requires_grad and not through_head:
        total: Tensor = _FrozenHead.apply(hidden, targets, head, chunk)  # type: ignore[no-untyped-call]
        return total
    recompute = torch.is_grad_enabled() and len(targets) > chunk

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(rows)
        return F.cross_entropy(logits.to(_precise(logits)), wanted, reduction="sum")

    sums = [
        checkpoint(part, rows, wanted, use_reentrant=False) if recompute else part(rows, wanted)
        for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(sums).sum()


def needs_autograd(logits: Tensor) -> bool:
    """Whether autograd has to go through the head, told from what it returns for a row that needs no gradient.

    It has to if something in the head is trained, or if the logits are float16: a gradient in that type has to
    carry the loss scale of mixed precision, which is not known before the backward pass.
    """
    return logits.requires_grad or logits.dtype == torch.float16


class _FrozenHead(torch.autograd.Function):
    """The sum, and with it the gradient of the hidden states for a head that needs none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        sums = []
        for start in range(0, max(len(targets), 1), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_()
                logits = head(leaf)
            loss, slope = _loss_and_slope(logits.detach(), targets[rows])
            (gradient[rows],) = torch.autograd.grad(logits, leaf, slope)
            sums.append(loss)
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In float32, or a bfloat16 hidden state would round the scale (one over the number of tokens) as well.
        return (gradient.to(scale.dtype) * scale).to(gradient.dtype), None, None, None


def _loss_and_slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk and its derivative by the logits: softmax minus one-hot."""
    wanted = targets.unsqueeze(1)
    work = torch.log_softmax(logits, dim=-1, dtype=_precise(logits))
    loss = -work.gather(1, wanted).sum()
    work.exp_().scatter_add_(1, wanted, work.new_full(wanted.shape, -1.0))
    return loss, work.to(logits.dtype)


def _precise(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
