"""Layers of a type of torch's whose class has a forward of its own: one that pads its input there, and the like."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorafit.layers.convolution import Conv1dSite, Conv2dSite, Conv3dSite
from lorafit.layers.following import Draw, FollowingSite
from lorafit.layers.site import BaseForward, Shape, Site
from lorafit.layers.vector import LinearSite


class OwnSite(FollowingSite):
    """A layer whose weight is that of a type of torch's, and whose forward is its own.

    Args:
        module: the layer.
        own: as for `FollowingSite`.

    Attributes:
        usual: the layer as a site of torch's type, which knows all of it but its forward.
    """

    __slots__ = ("usual",)

    def __init__(self, module: nn.Module, own: BaseForward | None = None) -> None:
        super().__init__(module, own)
        self.usual = self.as_usual(module)

    @staticmethod
    @abstractmethod
    def as_usual(module: nn.Module) -> Site:
        """The layer as a site of torch's type. By a function: a compiler makes objects of classes that are named."""

    @property
    def shape(self) -> Shape:
        return self.usual.shape

    @property
    def weight(self) -> Callable[[], Tensor]:  # called, it gives the matrix, as the method of others does
        """The weight (out, in) as a matrix when it is called."""
        return self.usual.weight

    def kernel(self, matrix: Tensor) -> Tensor:
        weight = self.module.weight  # no parameter in the replicas of DataParallel
        assert isinstance(weight, Tensor)
        return matrix.view(matrix.shape[0], *weight.shape[1:])

    def unfold(self, matrix: Tensor) -> Tensor:
        return self.usual.unfold(matrix)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        return self.usual.expand(h, up)

    def channel(self, v: Tensor) -> Tensor:
        return self.usual.channel(v)

    def bias(self) -> Tensor | None:
        return self.usual.bias()

    def down_to_file(self, down: Tensor) -> Tensor:
        return self.usual.down_to_file(down)

    def down_from_file(self, stored: Tensor, r: int) -> Tensor:
        down = self.usual.down_from_file(stored, r)
        if down.shape[1] != self.shape.inn:
            raise ValueError("zeros where A meets the channels of other groups, which this layer's forward keeps apart")
        return down

    def up_to_file(self, up: Tensor) -> Tensor:
        return self.usual.up_to_file(up)

    def up_from_file(self, stored: Tensor, r: int) -> Tensor:
        return self.usual.up_from_file(stored, r)


class OwnLinearSite(OwnSite):
    """A `torch.nn.Linear` with a forward of its own."""

    __slots__ = ()
    kind = "Linear"
    all_linear = True
    based = nn.Linear

    @staticmethod
    def as_usual(module: nn.Module) -> Site:
        return LinearSite(module)

    def trial(self, draw: Draw, larger: int) -> Tensor:
        inn = self.shape.inn
        return draw(2, inn) if larger > 1 else draw(2, 3, inn)

    def positions(self, x: Tensor) -> int:
        return x.numel() // max(1, self.shape.inn)


class OwnConvSite(OwnSite):
    """A convolution of torch's with a forward of its own."""

    __slots__ = ()

    def trial(self, draw: Draw, larger: int) -> Tensor:
        m: Any = self.module
        settings = zip(m.kernel_size, m.stride, m.dilation, strict=True)
        # Another size in each dimension, and larger than any padding that keeps a size.
        sizes = [larger * (d * (k - 1) + 1) + 2 * s + i for i, (k, s, d) in enumerate(settings)]
        return draw(2, m.in_channels, *sizes)

    def positions(self, x: Tensor) -> int:
        m: Any = self.module
        each: int = m.in_channels * math.prod(m.stride)
        return x.numel() // max(1, each)


class OwnConv1dSite(OwnConvSite):
    """A `torch.nn.Conv1d` with a forward of its own."""

    __slots__ = ()
    kind = "Conv1d"
    based = nn.Conv1d

    @staticmethod
    def as_usual(module: nn.Module) -> Site:
        return Conv1dSite(module)


class OwnConv2dSite(OwnConvSite):
    """A `torch.nn.Conv2d` with a forward of its own."""

    __slots__ = ()
    kind = "Conv2d"
    based = nn.Conv2d

    @staticmethod
    def as_usual(module: nn.Module) -> Site:
        return Conv2dSite(module)


class OwnConv3dSite(OwnConvSite):
    """A `torch.nn.Conv3d` with a forward of its own."""

    __slots__ = ()
    kind = "Conv3d"
    based = nn.Conv3d

    @staticmethod
    def as_usual(module: nn.Module) -> Site:
        return Conv3dSite(module)
