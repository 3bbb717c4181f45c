"""The best update of a given rank for an update of a higher one, and how far it is from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.errors import LorafitWarning

NOTICED = 1e-3
"""Above this relative error it is said that an adapter is not the one that it was made from."""


class TruncationWarning(LorafitWarning):
    """An adapter of lower rank is not exactly what it was made from.

    Attributes:
        overall: the relative error over all sites, ‖Δ' − Δ‖ / ‖Δ‖ in the Frobenius norm.
        errors: module path → the same for one site.
    """

    def __init__(self, message: str, overall: float, errors: Mapping[str, float]) -> None:
        super().__init__(message)
        self.overall = overall
        self.errors = dict(errors)


@dataclass(frozen=True, eq=False)
class Squeezed:
    """Δ' = up down, group by group: up (out, r / groups), down (r, in); and the squared norms of Δ and of Δ' − Δ."""

    up: Tensor
    down: Tensor
    norm: float
    lost: float

    @property
    def r(self) -> int:
        """The rank that is left."""
        return self.down.shape[0]

    @property
    def error(self) -> float:
        """‖Δ' − Δ‖ / ‖Δ‖ in the Frobenius norm."""
        return relative(self.lost, self.norm)


def relative(lost: float, norm: float) -> float:
    """The relative error for two squared norms."""
    return (max(lost, 0.0) / norm) ** 0.5 if norm > 0 else 0.0


def squeeze_low_rank(up: Tensor, down: Tensor, r: int, groups: int = 1) -> Squeezed:
    """The best rank-r update for up (out, R / groups) times down (R, in), without ever forming the product.

    up = Q₁ R₁ and downᵀ = Q₂ R₂ make it Q₁ (R₁ R₂ᵀ) Q₂ᵀ, and the singular values of that are those of the small middle.
    """
    first = torch.linalg.qr(up.double().view(groups, -1, up.shape[1]))
    second = torch.linalg.qr(down.double().view(groups, -1, down.shape[1]).mT)
    u, s, vh = torch.linalg.svd(first.R @ second.R.mT, full_matrices=False)
    return _cut(first.Q @ u, s, vh @ second.Q.mT, r, up.dtype)


def squeeze_dense(matrix: Tensor, r: int, groups: int = 1) -> Squeezed:
    """The best rank-r update for a matrix (out, in), group by group of its rows."""
    u, s, vh = torch.linalg.svd(matrix.view(groups, -1, matrix.shape[1]), full_matrices=False)
    return _cut(u, s, vh, r, matrix.dtype)


def _cut(u: Tensor, s: Tensor, vh: Tensor, r: int, dtype: torch.dtype) -> Squeezed:
    groups = s.shape[0]
    kept = max(1, min(r // groups, s.shape[1]))
    root = s[:, :kept].sqrt()
    up = (u[:, :, :kept] * root[:, None, :]).flatten(0, 1)
    down = (root[:, :, None] * vh[:, :kept]).flatten(0, 1)
    squares = s.double() ** 2
    return Squeezed(
        up.to(dtype).contiguous(), down.to(dtype).contiguous(), float(squares.sum()), float(squares[:, kept:].sum())
    )
