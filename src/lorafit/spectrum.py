"""The singular values of a change, how many of them count, and how alike two changes are.

Of a change of low rank nothing larger than its factors is formed: up = Q₁ R₁ and downᵀ = Q₂ R₂ make it Q₁ (R₁ R₂ᵀ) Q₂ᵀ,
whose singular values are those of the small middle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.delta import Delta, Dense, LowRank

ROUNDING = 1e-6
"""The share of the largest singular value up to which another may be zero, rounded: the factors are in float32."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a change, largest first.

    Attributes:
        values: σ₁ ≥ σ₂ ≥ …
    """

    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """The Frobenius norm, (Σ σ²)^½."""
        return math.sqrt(sum(value * value for value in self.values))

    @property
    def rank(self) -> int:
        """How many of them are more than `ROUNDING` of the largest."""
        return sum(value > ROUNDING * self.values[0] for value in self.values)

    @property
    def stable_rank(self) -> float:
        """Σ σ² / σ₁², which small values hardly change (Rudelson and Vershynin 2007, J. ACM 54); 0 of no change."""
        return 0.0 if not self.norm else (self.norm / self.values[0]) ** 2

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of σ / Σ σ (Roy and Vetterli 2007, EUSIPCO); 0 of no change."""
        total = sum(self.values)
        if not total:
            return 0.0
        shares = torch.tensor(self.values, dtype=torch.float64) / total
        return float(torch.special.entr(shares).sum().exp())

    def rank_for(self, share: float) -> int:
        """The least rank that keeps so much of Σ σ²."""
        wanted, kept = share * self.norm**2, 0.0
        for rank, value in enumerate(self.values, start=1):
            kept += value * value
            if kept >= wanted * (1 - 1e-12):
                return rank
        return len(self.values)


@dataclass(frozen=True)
class Likeness:
    """How far two changes work in the same directions: 0 is not at all, 1 is in the same ones.

    Attributes:
        outputs: of the spaces that their outputs lie in (the columns of B), φ of Hu et al. 2021, eq. 4: the mean of
            cos² over the principal angles, as many as the smaller rank.
        inputs: of those that they read (the rows of A).
        cosine: of the changes themselves, as vectors, from -1 to 1.
    """

    outputs: float
    inputs: float
    cosine: float


@torch.no_grad()
def spectrum(delta: Delta) -> Spectrum:
    """The singular values of a change; of a grouped convolution those of all its groups."""
    if isinstance(delta, Dense):
        return _sorted(torch.linalg.svdvals(delta.matrix.double()))
    up, down = _factors(delta)
    first = torch.linalg.qr(up, mode="r").R
    second = torch.linalg.qr(down.mT, mode="r").R
    return _sorted(torch.linalg.svdvals(first @ second.mT))


@torch.no_grad()
def row_norms(delta: Delta) -> Tensor:
    """The length of each row of a change, (out,), in double precision."""
    squares: Tensor
    if isinstance(delta, Dense):
        squares = delta.matrix.double().square().sum(dim=1)
    else:
        up, down = _factors(delta)
        squares = ((up @ (down @ down.mT)) * up).sum(dim=2).flatten()
    return squares.clamp(min=0).sqrt()


@torch.no_grad()
def principal_cosines(first: Delta, second: Delta) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The cosines of the principal angles between what two changes of one layer write, and between what they read.

    Each largest first, as many as the smaller rank; of a grouped convolution those of all its groups. The means of
    their squares are `likeness(...).outputs` and `.inputs`. None if one of the changes is none.

    Args:
        first: of a layer.
        second: of the same layer, of any rank.
    """
    pair = [_spaces(each) for each in (first, second)]
    if any(space is None for space in pair):
        return None
    (u1, _, v1), (u2, _, v2) = (space for space in pair if space is not None)
    outputs, inputs = (_sorted(torch.linalg.svdvals(product).clamp(max=1)) for product in (u1.mT @ u2, v1.mT @ v2))
    return outputs.values, inputs.values


@torch.no_grad()
def likeness(first: Delta, second: Delta) -> Likeness | None:
    """How alike two changes of one layer are; None if one of them is none.

    Args:
        first: of a layer.
        second: of the same layer, of any rank.
    """
    pair = [_spaces(each) for each in (first, second)]
    if any(space is None for space in pair):
        return None
    (u1, s1, v1), (u2, s2, v2) = (space for space in pair if space is not None)
    left, right = u1.mT @ u2, v1.mT @ v2
    least = min(s1.shape[-1], s2.shape[-1]) * s1.shape[0]
    inner = ((s1[:, :, None] * right * s2[:, None, :]) * left).sum()
    return Likeness(
        outputs=float(left.square().sum()) / least,
        inputs=float(right.square().sum()) / least,
        cosine=float(inner / (s1.norm() * s2.norm())),
    )


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    """Up (groups, out / groups, r / groups) and down (groups, r / groups, in), in double precision."""
    assert isinstance(delta, LowRank)
    up, down = delta.fold()
    return (
        up.double().view(delta.groups, -1, up.shape[1]),
        down.double().view(delta.groups, -1, down.shape[1]),
    )


def _spaces(delta: Delta) -> tuple[Tensor, Tensor, Tensor] | None:
    """U, σ and V of a change, (groups, …), cut to its rank; None if there is none."""
    if isinstance(delta, Dense):
        u, s, vh = torch.linalg.svd(delta.matrix.double()[None], full_matrices=False)
        v = vh.mT
    else:
        up, down = _factors(delta)
        first, second = torch.linalg.qr(up), torch.linalg.qr(down.mT)
        u, s, vh = torch.linalg.svd(first.Q.mT @ up @ down @ second.Q, full_matrices=False)
        u, v = first.Q @ u, second.Q @ vh.mT
    rank = int((s > s.max() * 1e-10).sum(dim=1).max()) if s.numel() and s.max() > 0 else 0
    return (u[:, :, :rank], s[:, :rank], v[:, :, :rank]) if rank else None


def _sorted(values: Tensor) -> Spectrum:
    return Spectrum(tuple(values.flatten().sort(descending=True).values.tolist()))
