"""Linear layers whose frozen weight is kept in another form than a matrix of numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from lorafit.kernels.frozen import Frozen
from lorafit.kernels.scratch import reusable
from lorafit.layers.site import Made, Shape
from lorafit.layers.vector import VectorSite
from lorafit.quant.modules import SCALE, ModuleClass, origin
from lorafit.quant.rows import Int8Rows, pack


@final
@dataclass(frozen=True, eq=False)
class Stored(Made):
    """A way to get a weight that has to be formed, and what it is formed of.

    Attributes:
        frozen: the stored form.
    """

    frozen: Frozen

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.frozen.tensors

    def __call__(self) -> Tensor:
        """The weight (out, in) as a matrix of its own, in the stored form's own type."""
        with torch.no_grad():
            matrix = self.frozen.form(self.tensors, self.frozen.dtype)
            return matrix.clone() if reusable(matrix.device) else matrix  # what is reusable is shared


class PackedSite(VectorSite):
    """A linear layer over a stored form; a final subclass for each form."""

    __slots__ = ()
    packed: ClassVar[bool] = True

    @abstractmethod
    def stored(self, dtype: torch.dtype) -> Frozen:
        """The stored form, for a layer that works in `dtype`."""

    @property
    def weight(self) -> Stored:  # called, it gives the matrix, as the method of others does
        """Forms the weight (out, in) in single precision when it is called."""
        return Stored(self.stored(torch.float32))

    @property
    def shape(self) -> Shape:
        return Shape(*self.stored(torch.float32).shape)

    def frozen(self, x: Tensor) -> Frozen:
        return self.stored(x.dtype)

    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None

    @abstractmethod
    def unpack(self, weight: Tensor, around: Callable[..., ModuleClass]) -> None:
        """Makes the layer a plain one with this weight, in its own layout.

        Args:
            weight: the new weight.
            around: the class to be, given the plain one: an adapted layer stays adapted.
        """


class Int8Site(PackedSite):
    """A layer with int8 rows, see `lorafit.quant.modules`."""

    __slots__ = ()
    transposed: ClassVar[bool]

    def stored(self, dtype: torch.dtype) -> Int8Rows:
        values, scale = self.module.weight, self.module.weight_scale
        assert isinstance(values, Tensor) and isinstance(scale, Tensor)
        return Int8Rows(values, scale, dtype, self.transposed)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("weight", SCALE)

    def merged(self, change: Tensor) -> dict[str, Tensor]:
        rows = pack(self.weight() + self.unfold(change))
        scale = self.unfold(rows.scale)
        if not math.isfinite(rows.squares):  # integers cannot say so
            scale.fill_(math.nan)
        return {"weight": self.unfold(rows.values), SCALE: scale}

    def kept(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"] * parts[SCALE]

    def unpack(self, weight: Tensor, around: Callable[..., ModuleClass]) -> None:
        module = self.module
        module.__class__ = around(origin(type(module)))
        del module._buffers[SCALE]
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


class Int8LinearSite(Int8Site):
    """`torch.nn.Linear` with int8 rows."""

    __slots__ = ()
    kind = "int8 Linear"
    transposed = False

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix


class Int8Conv1DSite(Int8Site):
    """`transformers.pytorch_utils.Conv1D` with int8 rows: its weight is (in, out)."""

    __slots__ = ()
    kind = "int8 HF Conv1D"
    transposed = True

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix.t()
