"""A change of a weight as a value: the plain mathematics that everything else is tested against.

Every member of the household says ``W' = diag(gain) (W + Δ)``. A method turns its parameters into an `Update`
(``gain``, ``Δ``), where ``Δ`` is a small lazy operator: nobody forms the product in training. Everything here is
matrices: which layer they act in, and how, is for `layers` to know.

Shapes: W and Δ are (out, in); ``down`` (r, in); ``up`` (out, r / groups); ``mid`` (r,); ``out`` and ``gain`` (out,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Delta(ABC):
    """A change of a weight matrix, kept in whatever form is cheapest."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The change as a matrix (out, in)."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Delta:
        """The same change with its tensors in `dtype` (differentiable; the tensors themselves where they fit)."""


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """``scale · diag(out) up diag(mid) down``.

    With ``groups`` > 1 (grouped convolutions) the product is taken block by block: rows of `up` of group g meet the
    rows of `down` of group g only, which is what two grouped layers one after the other compute.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None = None
    out: Tensor | None = None
    scale: float = 1.0
    groups: int = 1

    def fold(self) -> tuple[Tensor, Tensor]:
        """``(up', down')`` with mid, out and scale multiplied in, so that Δ = up' down' (block by block)."""
        up = self.up if self.out is None else self.out[:, None] * self.up
        down = self.down if self.mid is None else self.mid[:, None] * self.down
        return up * self.scale, down

    def upward(self) -> Tensor:
        """The way up, (out, r / groups), with mid and out multiplied in: Δ = scale · up' down."""
        up = self.up
        if self.mid is not None:
            blocks = up.view(self.groups, -1, up.shape[1]) * self.mid.view(self.groups, 1, -1)
            up = blocks.view(up.shape)
        return up if self.out is None else self.out[:, None] * up

    def dense(self) -> Tensor:
        up, down = self.fold()
        if self.groups == 1:
            return up @ down
        blocks_up = up.view(self.groups, -1, up.shape[1])
        blocks_down = down.view(self.groups, -1, down.shape[1])
        return torch.bmm(blocks_up, blocks_down).flatten(0, 1)

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(
            self.up.to(dtype),
            self.down.to(dtype),
            None if self.mid is None else self.mid.to(dtype),
            None if self.out is None else self.out.to(dtype),
            self.scale,
            self.groups,
        )


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """A change that is kept as the matrix it is, (out, in)."""

    matrix: Tensor

    def dense(self) -> Tensor:
        return self.matrix

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.matrix.to(dtype))


@dataclass(frozen=True, eq=False)
class Update:
    """``W' = diag(gain) (W + Δ)``; a gain of None is a gain of one."""

    delta: Delta
    gain: Tensor | None = None

    def change(self, weight: Tensor) -> Tensor:
        """``W' − W`` as a matrix (out, in), in at least single precision."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = self.delta.to(dtype).dense()
        if self.gain is None:
            return delta
        gain = self.gain.to(dtype)[:, None]
        # (g − 1) W + g Δ keeps the digits that g (W + Δ) − W would lose when g is close to one.
        return (gain - 1) * weight.to(dtype) + gain * delta
