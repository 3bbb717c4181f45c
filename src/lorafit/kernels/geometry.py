"""How a convolution meets its input, as a value: strides, padding, dilation and groups, and its gradients by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_BACKWARD = torch.ops.aten.convolution_backward.default


class Geometry(NamedTuple):
    """What a convolution is besides its weight, in one to three dimensions.

    `padding` is what the convolution adds by itself, zeros and as many on both sides of each dimension. `edges` is what
    is put around the input before, in the order of `torch.nn.functional.pad` (last dimension first), and `mode` how:
    padding of another mode, and what "same" needs on one side more than on the other.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    edges: tuple[int, ...] = ()
    mode: str = "constant"

    def positions(self, shape: tuple[int, ...], kernel: tuple[int, ...]) -> int:
        """In how many places a kernel (*kernel) meets an input of this shape (N, channels, *size)."""
        count = shape[0]
        for i, size in enumerate(shape[2:]):
            around = 2 * self.padding[i] + sum(self.edges[2 * (len(kernel) - 1 - i) :][:2])
            count *= max(0, (size + around - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1)
        return count

    def padded(self, x: Tensor) -> Tensor:
        """The input with its edges."""
        return F.pad(x, self.edges, self.mode) if self.edges else x

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of an input that has its edges."""
        function = _CONVOLVE[len(self.stride) - 1]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, *, need_x: bool = False, need_weight: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """(gradient of the input that has its edges, gradient of the weight), each None where it is not asked for.

        Args:
            grad: of the output.
            x: the input with its edges; for its own gradient alone its shape is all that matters.
            weight: for its own gradient alone its shape is all that matters.
            need_x: whether the first is asked for.
            need_weight: whether the second is asked for.
        """
        zeros, asked = (0,) * len(self.stride), (need_x, need_weight, False)
        dx, dweight, _ = _BACKWARD(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, asked
        )
        return dx if need_x else None, dweight if need_weight else None

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: tuple[int, ...], x: Tensor | None) -> Tensor:
        """The gradient of an input of this shape, without its edges; `x`: the input where it is at hand.

        torch wants a tensor of the input's shape and order, and does not look at its values.
        """
        if x is None or self.edges or x.dtype != grad.dtype:
            size = list(shape)
            for i in range(len(self.edges) // 2):
                size[-1 - i] += self.edges[2 * i] + self.edges[2 * i + 1]
            if channels_last(grad):
                x = grad.new_empty(size[0], *size[2:], size[1]).movedim(-1, 1)
            else:
                x = grad.new_empty(1).expand(size)
        dx, _ = self.gradients(grad, x, weight, need_x=True)
        assert dx is not None
        return self.unpadded(dx)

    def unpadded(self, grad: Tensor) -> Tensor:
        """The gradient of an input given that of the input with its edges, which is written to."""
        for i in range(len(self.edges) // 2):
            low, high = self.edges[2 * i : 2 * i + 2]
            dim, n = grad.dim() - 1 - i, grad.shape[-1 - i] - low - high
            before, inner, after = torch.split(grad, [low, n, high], dim)
            if self.mode == "replicate":
                inner.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
                inner.narrow(dim, n - 1, 1).add_(after.sum(dim, keepdim=True))
            elif self.mode == "reflect":
                inner.narrow(dim, 1, low).add_(before.flip(dim))
                inner.narrow(dim, n - 1 - high, high).add_(after.flip(dim))
            elif self.mode == "circular":
                inner.narrow(dim, n - low, low).add_(before)
                inner.narrow(dim, 0, high).add_(after)
            grad = inner
        # Memory of its own: the rest of what had edges is not to be kept.
        return grad.clone() if self.edges else grad


def channels_last(t: Tensor) -> bool:
    """Whether the channels of t (N, channels, *size) lie next to each other, as those of a matrix's rows do."""
    return t.movedim(1, -1).is_contiguous()


def in_order(t: Tensor, *, last: bool) -> Tensor:
    """The tensor in one of the two orders of memory: channels last, or in the order of its dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def rows(t: Tensor) -> Tensor:
    """View t (N, channels, *size) as (positions, channels); a copy where channels do not lie next to each other."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def blocks(t: Tensor, groups: int) -> Tensor:
    """View t (N, channels, *size) as (N · groups, channels of a group, positions of a sample); a copy if need be."""
    return t.reshape(t.shape[0] * groups, t.shape[1] // groups, math.prod(t.shape[2:]))
