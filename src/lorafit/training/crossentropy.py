"""The summed cross-entropy of hidden states under an output head, a few rows of logits at a time.

With a vocabulary of 49,152 a row of float32 logits takes 192 KiB, and the plain way keeps three of them for each
token until the backward pass. Here logits live only while their chunk is worked on; under a `FrozenMatrix`, as one
buffer that holds logits, then probabilities, then the gradient.

This module knows nothing of models: a head is anything that maps `[n, hidden]` to `[n, vocabulary]`, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

RARE = 1e-30
"""Probability below which the logarithm of a float32 one is not to be trusted: the logits are asked again."""


@final
@dataclass(frozen=True)
class FrozenMatrix:
    """A head that is a matrix of which nothing is trained.

    Attributes:
        weight: `[vocabulary, hidden]`, a plain tensor.
        bias: `[vocabulary]`, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        """The logits of `[n, hidden]`."""
        return F.linear(rows, self.weight, self.bias)

    def cast(self) -> FrozenMatrix:
        """In the type that autocast computes in, if it is on."""
        device = self.weight.device.type
        if not torch.is_autocast_enabled(device) or self.weight.dtype == torch.float64:
            return self
        dtype = torch.get_autocast_dtype(device)
        return FrozenMatrix(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def summed_cross_entropy(hidden: Tensor, targets: Tensor, head: Head, *, through_head: bool, chunk: int) -> Tensor:
    """Minus the summed log-probability of `targets`.

    Args:
        hidden: `[rows, hidden]`.
        targets: `[rows]`, token ids.
        head: maps hidden states to logits; it is called, so adapters, biases and quantised weights in it count. A
            `FrozenMatrix` is not: it is two products for each chunk, and nothing else of the size of the logits.
        through_head: whether autograd has to go through the head; see `needs_autograd`.
        chunk: rows of logits to hold at once, at most.

    Returns:
        A scalar in float32 (float64 if the logits are), whatever the type of the logits.

    If autograd need not go through the head, this costs no more than the plain way: the gradient of the hidden
    states is made in the forward pass, chunk by chunk, and only that is kept. Otherwise each chunk is computed
    once more in the backward pass, unless there is only one.
    """
    if torch.is_grad_enabled() and hidden.requires_grad and not through_head:
        way = _MatrixHead if isinstance(head, FrozenMatrix) else _FrozenHead
        total: Tensor = way.apply(hidden, targets, head, chunk)  # type: ignore[no-untyped-call]
        return total
    recompute = torch.is_grad_enabled() and len(targets) > chunk
    chunk = _even(len(targets), chunk)

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(rows)
        return F.cross_entropy(logits.to(_precise(logits)), wanted, reduction="sum")

    sums = [
        checkpoint(part, rows, wanted, use_reentrant=False) if recompute else part(rows, wanted)
        for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(sums).sum()


def each_cross_entropy(hidden: Tensor, targets: Tensor, head: Head, *, through_head: bool, chunk: int) -> Tensor:
    """Minus the log-probability of each of `targets`, `[rows]`; else as `summed_cross_entropy`. Keeps no gradient."""
    with torch.no_grad():
        chunk = _even(len(targets), chunk)
        parts = [
            F.cross_entropy(logits.to(_precise(logits)), wanted, reduction="none")
            for logits, wanted in _logits_of(hidden, targets, head, chunk)
        ]
        return torch.cat(parts)


def _logits_of(hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        yield head(rows), wanted


def needs_autograd(logits: Tensor) -> bool:
    """Whether autograd has to go through the head, told from what it returns for a row that needs no gradient.

    It has to if something in the head is trained, or if the logits are float16: a gradient in that type has to
    carry the loss scale of mixed precision, which is not known before the backward pass.
    """
    return logits.requires_grad or logits.dtype == torch.float16


def _even(rows: int, chunk: int) -> int:
    """Rows of a chunk, at most `chunk`, so that all chunks are about as long: a short one reads the head for little."""
    return max(1, math.ceil(rows / max(1, math.ceil(rows / chunk))))


class _FrozenHead(torch.autograd.Function):
    """The sum, and with it the gradient of the hidden states for a head that needs none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        chunk = _even(len(targets), chunk)
        sums = []
        for start in range(0, max(len(targets), 1), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_()
                logits = head(leaf)
            made = logits.detach()
            loss, slope = _loss_and_slope(made, targets[rows], made.__getitem__)
            (gradient[rows],) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
            sums.append(loss)
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        return _scaled(ctx, scale), None, None, None


class _MatrixHead(torch.autograd.Function):
    """The same for a `FrozenMatrix`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: FrozenMatrix, chunk: int) -> Tensor:
        head = head.cast()
        weight, bias = head.weight, head.bias
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        chunk = _even(len(targets), chunk)
        held = weight.new_empty(chunk, len(weight))
        sums = []
        # The products are written into given tensors, which autocast knows nothing of.
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                states, wanted = hidden[rows].to(weight.dtype), targets[rows]
                logits = held[: len(states)]
                if bias is None:
                    torch.mm(states, weight.T, out=logits)
                else:
                    torch.addmm(bias, states, weight.T, out=logits)
                again = partial(_some_logits, head, states)
                loss, slope = _loss_and_slope(logits, wanted, again, overwrite=True)
                sums.append(loss)
                gradient[rows] = torch.mm(slope.to(weight.dtype), weight)
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=_precise(held))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        return _scaled(ctx, scale), None, None, None


def _some_logits(head: Head, states: Tensor, rows: Tensor) -> Tensor:
    return head(states[rows])


def _scaled(ctx: Any, scale: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    # In float32, or a bfloat16 hidden state would round the scale (one over the number of tokens) as well.
    product: Tensor = (gradient.to(scale.dtype) * scale).to(gradient.dtype)
    return product


def _loss_and_slope(
    logits: Tensor, targets: Tensor, again: Callable[[Tensor], Tensor], *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk and its derivative by the logits: softmax minus one-hot, in float32 at least.

    The loss is read off the targets' probabilities, which spares a second pass over all the logits.

    Args:
        logits: `[n, vocabulary]`.
        targets: `[n]`.
        again: logits of some of the rows, where probabilities are so small that they tell nothing.
        overwrite: whether the derivative may take the place of the logits.
    """
    wanted = targets.unsqueeze(1)
    precise = _precise(logits)
    own = overwrite and logits.dtype == precise
    slope = torch.softmax(logits, dim=1, out=logits) if own else torch.softmax(logits, dim=1, dtype=precise)
    chances = slope.gather(1, wanted).squeeze(1)
    losses = -chances.log()
    rare = chances < RARE
    if rare.any():
        losses[rare] = F.cross_entropy(again(rare).to(precise), targets[rare], reduction="none")
    slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
    return losses.sum(), slope


def _precise(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
