"""A frozen matrix as a kernel sees it: what is kept for the backward pass, and how the matrix is formed from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Frozen(ABC):
    """A matrix W (out, in) without a gradient, in the form in which a layer keeps it."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd is to keep for the backward pass: the layer's own memory, never a copy of it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type in which the layer works where no autocast is on."""

    @property
    @abstractmethod
    def addable(self) -> bool:
        """Whether a small change can be added to the matrix without being rounded away, in float32 or better."""

    @abstractmethod
    def form(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix (out, in), perhaps in memory that all share: it holds until the next call of any `form`.

        Args:
            tensors: what `tensors` was, as autograd hands it back.
            dtype: of the result.
        """


@final
@dataclass(frozen=True, eq=False)
class Plain(Frozen):
    """A matrix that is kept as what it is."""

    matrix: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def addable(self) -> bool:
        return self.matrix.dtype in (torch.float32, torch.float64)

    def form(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype)
