"""Layers that multiply patches: `torch.nn.Conv1d`, `Conv2d` and `Conv3d`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.delta import LowRank
from lorafit.errors import MergeError
from lorafit.kernels.convolution import convolution
from lorafit.kernels.geometry import Geometry
from lorafit.kernels.scratch import transformed
from lorafit.kernels.vectors import upward
from lorafit.layers.site import Acting, BaseForward, Made, Shape, Site, apply, exactly


@final
class Flattened(Made):
    """The weight of a convolution as a matrix.

    Args:
        tensor: the weight, (out, in / groups, *kernel).
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def __call__(self) -> Tensor:
        return self.tensor.flatten(1)


class ConvSite(Site):
    """`torch.nn.Conv1d/2d/3d`: weight (out, in / groups, *kernel), seen as (out, in / groups · kernel).

    A is a convolution down to r channels with the layer's own kernel, stride, padding mode, dilation and groups;
    B is a 1 × 1 convolution up, with the same groups. B A is then exactly a change of the layer's weight.
    """

    __slots__ = ()
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @staticmethod
    @abstractmethod
    def convolve(*args: Any, **options: Any) -> Tensor:
        """The convolution of torch in the layer's number of dimensions."""

    @property
    def shape(self) -> Shape:
        weight = self.module.weight
        return Shape(weight.shape[0], weight[0].numel(), self.module.groups)

    @property
    def weight(self) -> Flattened:  # called, it gives the matrix, as the method of others does
        """The weight (out, in) as a matrix when it is called: a copy where its channels lie last in memory."""
        return Flattened(self.module.weight)

    def unfold(self, matrix: Tensor) -> Tensor:
        weight = self.module.weight
        if matrix.numel() != weight.numel():
            raise MergeError(
                "this adapter mixes the groups of a grouped convolution, which no change of its weight can do",
                found=f"a change with {matrix.shape[1]} columns",
                expected=f"{self.shape.inn} columns: the channels of one group times the kernel",
                fix="use it unmerged, or train it again here: then each group has its own part of A",
            )
        return matrix.view_as(weight)

    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        m = self.module
        x = F.dropout(x, dropout) if dropout else x
        padding: int | str | tuple[int, ...] = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        channels = matrix.shape[1] // m.weight[0, 0].numel()
        kernel = matrix.view(-1, channels, *m.kernel_size)
        # PEFT's A of a grouped convolution sees all channels; one made here sees those of its own group.
        return self.convolve(x, kernel, None, m.stride, padding, m.dilation, m.in_channels // channels)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        pointwise = up.view(*up.shape, *(1 for _ in self.module.kernel_size))
        return self.convolve(h, pointwise, groups=self.module.groups)

    def channel(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1 for _ in self.module.kernel_size))

    def bias(self) -> Tensor | None:
        return self.module.bias

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        m = self.module
        trained = m.weight.requires_grad or (m.bias is not None and m.bias.requires_grad)
        if len(acting) != 1 or trained or transformed():
            return apply(self, x, base(m, x), acting)
        update, dropout = acting[0]
        delta = update.delta
        if not isinstance(delta, LowRank):
            return apply(self, x, base(m, x), acting)
        up, geometry = upward(delta), _geometry(m)
        return convolution(
            x, m.weight, m.bias, delta.down, up, delta.scale, geometry, gain=update.gain, dropout=dropout
        )

    def down_to_file(self, down: Tensor) -> Tensor:
        m, r = self.module, down.shape[0]
        if down.shape[1] != self.shape.inn or m.groups == 1:
            return down.view(r, m.in_channels, *m.kernel_size)
        # The file's A sees all channels: group g's rows get zeros for the channels of every other group.
        full = down.new_zeros(m.groups, r // m.groups, m.groups, self.shape.inn)
        own = torch.arange(m.groups, device=down.device)
        full[own, :, own] = down.view(m.groups, r // m.groups, self.shape.inn)
        return full.view(r, m.in_channels, *m.kernel_size)

    def down_from_file(self, stored: Tensor, r: int) -> Tensor:
        m = self.module
        full = exactly(stored, (r, m.in_channels, *m.kernel_size)).flatten(1)
        if m.groups == 1 or r % m.groups:
            return full
        blocks = full.view(m.groups, r // m.groups, m.groups, self.shape.inn)
        own = torch.arange(m.groups, device=stored.device)
        mixed = blocks.clone()
        mixed[own, :, own] = 0
        return full if mixed.any() else blocks[own, :, own].reshape(r, self.shape.inn)

    def up_to_file(self, up: Tensor) -> Tensor:
        return up.view(*up.shape, *(1 for _ in self.module.kernel_size))

    def up_from_file(self, stored: Tensor, r: int) -> Tensor:
        shape = (self.shape.out, r // self.module.groups, *(1 for _ in self.module.kernel_size))
        return exactly(stored, shape).flatten(1)


def _geometry(m: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    """What the layer does beside its weight, as torch does it."""
    if m.padding_mode != "zeros":
        edges, mode = tuple(m._reversed_padding_repeated_twice), m.padding_mode
        return Geometry(m.stride, (0,) * len(m.stride), m.dilation, m.groups, edges, mode)
    if not isinstance(m.padding, str):
        return Geometry(m.stride, tuple(m.padding), m.dilation, m.groups)
    if m.padding == "valid":
        return Geometry(m.stride, (0,) * len(m.stride), m.dilation, m.groups)
    # "same": an odd one of zeros goes to the end of a dimension.
    around = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    odd = tuple(each for total in reversed(around) for each in (0, total % 2))
    return Geometry(m.stride, tuple(total // 2 for total in around), m.dilation, m.groups, odd if any(odd) else ())


class Conv1dSite(ConvSite):
    """`torch.nn.Conv1d`."""

    __slots__ = ()
    kind = "Conv1d"
    convolve = staticmethod(F.conv1d)


class Conv2dSite(ConvSite):
    """`torch.nn.Conv2d`."""

    __slots__ = ()
    kind = "Conv2d"
    convolve = staticmethod(F.conv2d)


class Conv3dSite(ConvSite):
    """`torch.nn.Conv3d`."""

    __slots__ = ()
    kind = "Conv3d"
    convolve = staticmethod(F.conv3d)
