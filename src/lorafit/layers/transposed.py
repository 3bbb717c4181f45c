"""Layers that multiply into patches: `torch.nn.ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import MergeError
from lorafit.layers.following import Draw, FollowingSite
from lorafit.layers.site import Made, Shape, exactly


@final
class Turned(Made):
    """The weight of a transposed convolution as a matrix.

    Args:
        tensor: the weight, (in, out / groups, *kernel).
        groups: of the layer.
    """

    __slots__ = ("groups", "tensor")

    def __init__(self, tensor: Tensor, groups: int) -> None:
        self.tensor = tensor
        self.groups = groups

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def __call__(self) -> Tensor:
        inn, out, *kernel = self.tensor.shape
        blocks = self.tensor.reshape(self.groups, inn // self.groups, out, math.prod(kernel))
        return blocks.transpose(1, 2).reshape(self.groups * out, -1)


class TransposedSite(FollowingSite):
    """`torch.nn.ConvTranspose1d/2d/3d`: weight (in, out / groups, *kernel), seen as (out, in / groups · kernel).

    Each number of the output is a row of that matrix times the inputs that reach it: A is a transposed convolution down
    to r channels with the layer's own kernel, stride, padding, output padding (or output size), dilation and groups; B
    is a 1 × 1 convolution up, with the same groups. B A is then exactly a change of the layer's weight.
    """

    __slots__ = ()
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

    @staticmethod
    @abstractmethod
    def pointwise(*args: Any, **options: Any) -> Tensor:
        """The convolution of torch in the layer's number of dimensions."""

    @property
    def shape(self) -> Shape:
        weight, groups = self.module.weight, self.module.groups
        inn, out, *kernel = weight.shape
        return Shape(out * groups, inn // groups * math.prod(kernel), groups)

    @property
    def weight(self) -> Turned:  # called, it gives the matrix, as the method of others does
        """The weight (out, in) as a matrix when it is called: a copy."""
        return Turned(self.module.weight, self.module.groups)

    def kernel(self, matrix: Tensor) -> Tensor:
        m, groups = self.module, self.module.groups
        inn, _, *kernel = m.weight.shape
        each = matrix.shape[0] // groups
        blocks = matrix.reshape(groups, each, inn // groups, *kernel)
        return blocks.transpose(1, 2).reshape(inn, each, *kernel)

    def unfold(self, matrix: Tensor) -> Tensor:
        if matrix.numel() != self.module.weight.numel():
            raise MergeError(
                "this adapter mixes the groups of a transposed convolution, which no change of its weight can do",
                found=f"a change with {matrix.shape[1]} columns",
                expected=f"{self.shape.inn} columns: the channels of one group times the kernel",
                fix="train it again here: then each group has its own part of A",
            )
        return self.kernel(matrix)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        return self.pointwise(h, self.up_to_file(up), groups=self.module.groups)

    def channel(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1 for _ in self.module.kernel_size))

    def bias(self) -> Tensor | None:
        return self.module.bias

    def trial(self, draw: Draw, larger: int) -> Tensor:
        return draw(2, self.module.in_channels, *(4 * larger + i for i, _ in enumerate(self.module.kernel_size)))

    def positions(self, x: Tensor) -> int:
        return x.numel() // max(1, self.module.in_channels)

    def down_to_file(self, down: Tensor) -> Tensor:
        inn, _, *kernel = self.module.weight.shape
        return down.view(down.shape[0], inn // self.module.groups, *kernel)

    def down_from_file(self, stored: Tensor, r: int) -> Tensor:
        inn, _, *kernel = self.module.weight.shape
        return exactly(stored, (r, inn // self.module.groups, *kernel)).flatten(1)

    def up_to_file(self, up: Tensor) -> Tensor:
        return up.view(*up.shape, *(1 for _ in self.module.kernel_size))

    def up_from_file(self, stored: Tensor, r: int) -> Tensor:
        shape = (self.shape.out, r // self.module.groups, *(1 for _ in self.module.kernel_size))
        return exactly(stored, shape).flatten(1)


class ConvTranspose1dSite(TransposedSite):
    """`torch.nn.ConvTranspose1d`."""

    __slots__ = ()
    kind = "ConvTranspose1d"
    based = nn.ConvTranspose1d
    pointwise = staticmethod(F.conv1d)


class ConvTranspose2dSite(TransposedSite):
    """`torch.nn.ConvTranspose2d`."""

    __slots__ = ()
    kind = "ConvTranspose2d"
    based = nn.ConvTranspose2d
    pointwise = staticmethod(F.conv2d)


class ConvTranspose3dSite(TransposedSite):
    """`torch.nn.ConvTranspose3d`."""

    __slots__ = ()
    kind = "ConvTranspose3d"
    based = nn.ConvTranspose3d
    pointwise = staticmethod(F.conv3d)
