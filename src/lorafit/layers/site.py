"""What a layer is to an update: the abstract `Site`, and the plain twin of every fused path.

A site sees its layer as a matrix W (out, in) that is applied to something: vectors (Linear, HF Conv1D), one-hot
vectors (Embedding) or patches (convolutions, whose "in" is channels per group × kernel).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.delta import Dense, LowRank, Update
from lorafit.kernels.siblings import Member

BaseForward = Callable[[nn.Module, Tensor], Tensor]


class Shape(NamedTuple):
    """The matrix of one site: `out` rows, `inn` columns (of one group), `groups`; `lookup`: one-hot input."""

    out: int
    inn: int
    groups: int = 1
    lookup: bool = False


class Acting(NamedTuple):
    """An update and the probability with which it drops its own input (0 outside training)."""

    update: Update
    dropout: float


class Made(ABC):
    """A way to get a weight (out, in) that has to be made anew when it is called, and what it is made of."""

    __slots__ = ()

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the weight is made of: as long as these are what they were, it is what it was."""

    @abstractmethod
    def __call__(self) -> Tensor:
        """The weight as a matrix (out, in)."""


class Site(ABC):
    """One layer of a model, seen as a matrix. Final subclasses know one layer type each."""

    __slots__ = ("module",)
    kind: ClassVar[str]
    all_linear: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    """Whether the weight is kept in another form than numbers that can be trained or added to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """The sizes of the matrix."""

    @property
    def raw_weight(self) -> nn.Parameter:
        """The layer's own parameter, in its own shape."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as a matrix (out, in): a view where that is possible."""

    @abstractmethod
    def unfold(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape and layout of the layer's own weight."""

    @abstractmethod
    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        """The layer's operation on x with `matrix` (rows, in) for a weight, no bias; x dropped with `dropout`."""

    @abstractmethod
    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        """`up` (out, r / groups) applied to h, which has r channels where the layer has its channels."""

    @abstractmethod
    def channel(self, v: Tensor) -> Tensor:
        """A vector over channels, shaped to broadcast over the layer's output."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """The layer's bias (out,), if it has one."""

    def down_to_file(self, down: Tensor) -> Tensor:
        """A as the ecosystem's files hold it."""
        return down

    def down_from_file(self, stored: Tensor, r: int) -> Tensor:
        """A as this site uses it; the inverse of `down_to_file`. Raises ValueError for a shape that cannot be."""
        return exactly(stored, (r, self.shape.inn))

    def up_to_file(self, up: Tensor) -> Tensor:
        """B as the ecosystem's files hold it."""
        return up

    def up_from_file(self, stored: Tensor, r: int) -> Tensor:
        """B as this site uses it; the inverse of `up_to_file`. Raises ValueError for a shape that cannot be."""
        return exactly(stored, (self.shape.out, r))

    @property
    def parts(self) -> tuple[str, ...]:
        """The module's attributes that a change of the weight changes."""
        weight = self.raw_weight
        return (next(key for key, value in self.module._parameters.items() if value is weight),)

    def merged(self, change: Tensor) -> dict[str, Tensor]:
        """What `parts` are once `change`, in the weight's own shape, is added to the weight.

        Raises:
            MergeError: the form in which the weight is kept cannot take it.
        """
        weight, (part,) = self.raw_weight, self.parts
        return {part: (weight.to(change.dtype) + change).to(weight.dtype)}

    def kept(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight, in its own shape, that such parts stand for."""
        (weight,) = parts.values()
        return weight

    def objection(self, path: str) -> tuple[str, str] | None:
        """Why this layer, at this path, cannot be adapted, and what mends it; None when it can."""
        return None

    def beside(self, more: tuple[Any, ...], named: Mapping[str, Any]) -> Site:
        """The layer as it is in a call with more than its input: itself, where nothing else can be given."""
        return self

    def member(self, x: Tensor, acting: Sequence[Acting]) -> Member | None:
        """What the layer would compute for x, as one of several that read it; None where it has to do it alone."""
        return None

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        """The layer's output with its updates applied."""
        return apply(self, x, base(self.module, x), acting)


def exactly(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, which must have this shape: ValueError if it has another."""
    if tuple(stored.shape) != shape:
        raise ValueError(str(shape))
    return stored


def apply(site: Site, x: Tensor, y: Tensor, acting: Sequence[Acting]) -> Tensor:
    """The plain twin of every fused path: y plus what each update changes of it.

    Args:
        site: the layer.
        x: its input.
        y: its own output for x, bias included.
        acting: the updates; several add up, each relative to the base weight: W + Σ (W'ᵢ − W).

    Returns:
        A tensor like y. Updates are cast to y's dtype, so that a bf16 model keeps bf16 activations only.
    """
    result = y
    for update, dropout in acting:
        z = _delta(site, x, y.dtype, update, dropout)
        if update.gain is None:
            result = result + z
            continue
        # (g − 1) y + g z instead of g (y + z): the difference from y must survive rounding. The bias has no gain.
        # In the gain's own precision: in bf16 a gain of 1.003 is 1.
        gain = site.channel(update.gain)
        bias = site.bias()
        linear = y if bias is None else y - site.channel(bias.to(y.dtype))
        result = result + (gain - 1).to(y.dtype) * linear + gain.to(y.dtype) * z
    return result


def _delta(site: Site, x: Tensor, dtype: torch.dtype, update: Update, dropout: float) -> Tensor:
    delta = update.delta.to(dtype)
    if isinstance(delta, Dense):
        return site.project(x, delta.matrix, dropout).to(dtype)
    assert isinstance(delta, LowRank)
    h = site.project(x, delta.down, dropout)
    if delta.mid is not None:
        h = h * site.channel(delta.mid)
    z = site.expand(h, delta.up)
    if delta.out is not None:
        z = z * site.channel(delta.out)
    return (z * delta.scale).to(dtype)
