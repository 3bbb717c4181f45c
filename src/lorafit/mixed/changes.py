"""The change of one layer in the form in which many lie in one table: nothing depends on the weight any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lorafit.delta import LowRank, Update


@dataclass(frozen=True, eq=False)
class Pair:
    """``W' = diag(gain) (W + up down)``: the scale and all vectors are in `up` and `down`.

    Shapes: `down` (r, in), `up` (out, r / groups), `gain` (out,) or None for ones.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.down.shape[0]


@dataclass(frozen=True, eq=False)
class Vectors:
    """``W' = diag(gain) (W + diag(out) up diag(mid) down)``: `up` and `down` are those of other adapters too (VeRA).

    Shapes: `down` (r, in), `up` (out, r), `mid` (r,), `out` (out,) with the scale in it, `gain` (out,) or None.
    """

    down: Tensor
    up: Tensor
    mid: Tensor
    out: Tensor
    gain: Tensor | None

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.down.shape[0]

    def pair(self) -> Pair:
        """The same change by itself."""
        return Pair(self.down, self.out[:, None] * self.up * self.mid, self.gain)


Change: TypeAlias = Pair | Vectors


def fold(update: Update) -> Change | None:
    """An update as a row of a table, in at least single precision; None for one that is kept as a whole matrix."""
    return folded(update.delta, update.gain) if isinstance(update.delta, LowRank) else None


def folded(delta: LowRank, gain: Tensor | None = None) -> Change:
    """The same of a change of low rank."""
    delta = delta.to(torch.promote_types(delta.up.dtype, torch.float32))
    if delta.mid is not None and delta.out is not None and delta.groups == 1:
        return Vectors(delta.down, delta.up, delta.mid, delta.out * delta.scale, gain)
    return Pair(delta.down, delta.upward() * delta.scale, gain)


def padded(rank: int) -> int:
    """The rank to which ranks like this one are padded, so that most adapters share a table.

    >>> padded(3), padded(16), padded(17)
    (8, 16, 32)
    """
    return max(8, 1 << (rank - 1).bit_length())
