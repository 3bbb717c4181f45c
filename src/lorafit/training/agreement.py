"""How well predicted numbers agree with the right ones: mean absolute error, Pearson's r, Spearman's rho.

Each has an interval: records are drawn anew with replacement, and the middle 95 % of what the draws give is it
(percentile bootstrap). A draw is told by how often each record is in it, so that nothing is sorted twice: ranks are
mid-ranks, with ties, of the drawn records. The draws are always the same ones: the same numbers give the same
intervals. A correlation of numbers that are all alike is not defined, and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

DRAWS: Final = 1000
CELLS: Final = 2_000_000
"""So many numbers are held at a time."""
LEVEL: Final = 0.95
ROUNDING: Final = 1e-20
"""The share of their squares that numbers which are all alike may keep around their mean."""
FEWEST: Final = 3
"""Records of which intervals are told, at least."""


@final
@dataclass(frozen=True)
class Estimate:
    """A number and its interval; the ends are None where too few records tell nothing of it."""

    value: float
    low: float | None
    high: float | None

    def told(self, digits: int = 3) -> str:
        """For people.

        >>> Estimate(0.81234, 0.78, 0.84).told(), Estimate(0.5, None, None).told(2)
        ('0.812 (0.780 to 0.840)', '0.50')
        """
        within = "" if self.low is None or self.high is None else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return f"{self.value:.{digits}f}{within}"


@final
@dataclass(frozen=True)
class Agreement:
    """Predicted numbers beside the right ones.

    Attributes:
        records: how many.
        error: the mean absolute error, in the labels' own unit.
        pearson: the linear correlation; None where it is not defined.
        spearman: that of the ranks; None where it is not defined.
    """

    records: int
    error: Estimate
    pearson: Estimate | None
    spearman: Estimate | None

    def figures(self) -> dict[str, float]:
        """Flat, as records of a run hold it; what is not known is left out."""
        found: dict[str, float] = {}
        for name, one in self.parts():
            for key, value in ((name, one.value), (f"{name}_low", one.low), (f"{name}_high", one.high)):
                if value is not None:
                    found[key] = value
        return found

    def parts(self) -> list[tuple[str, Estimate]]:
        """Those that are known, by name."""
        every = (("mean_absolute_error", self.error), ("pearson", self.pearson), ("spearman", self.spearman))
        return [(name, one) for name, one in every if one is not None]


def agreement(pairs: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Agreement:
    """How well the two columns of `pairs` agree.

    Args:
        pairs: (records, 2): what was predicted, and what is right.
        draws: how often records are drawn anew.
        seed: of the drawing.

    >>> agreement(torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]])).error.value
    0.5
    """
    predicted, expected = pairs.double().cpu().unbind(1)
    order = torch.argsort(predicted, stable=True)
    order = order[torch.argsort(expected[order], stable=True)]  # the draws are the same whatever the records' order
    predicted, expected = predicted[order], expected[order]
    records = len(expected)
    once = torch.ones(1, records, dtype=torch.float64)
    points = _measured(once, predicted, expected)
    drawn = [points[:, :0]]
    if records >= FEWEST:
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, CELLS // records)
        for start in range(0, draws, rows):
            weights = _drawn(min(rows, draws - start), records, generator)
            drawn.append(_measured(weights, predicted, expected))
    spread = torch.cat(drawn, 1)
    error, pearson, spearman = (_estimate(point, values) for point, values in zip(points[:, 0], spread, strict=True))
    assert error is not None, "an error is always defined"
    return Agreement(records, error, pearson, spearman)


def _drawn(rows: int, records: int, generator: torch.Generator) -> Tensor:
    """(rows, records): how often each record is in each draw."""
    chosen = torch.randint(records, (rows, records), generator=generator)
    weights = torch.zeros(rows, records, dtype=torch.float64)
    return weights.scatter_add_(1, chosen, torch.ones_like(weights))


def _measured(weights: Tensor, predicted: Tensor, expected: Tensor) -> Tensor:
    """(3, rows): error, Pearson's r and Spearman's rho of each draw; NaN where a correlation is not defined."""
    error = (weights * (predicted - expected).abs()).sum(1) / weights.sum(1)
    rows = weights.shape[0]
    linear = _correlation(weights, predicted.expand(rows, -1), expected.expand(rows, -1))
    ranked = _correlation(weights, _ranks(weights, predicted), _ranks(weights, expected))
    return torch.stack([error, linear, ranked])


def _correlation(weights: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """(rows,): Pearson's r under these weights."""
    (one, wide), (other, broad) = _centred(weights, one), _centred(weights, other)
    shared = (weights * one * other).sum(1)
    return torch.where(wide * broad > 0, shared / (wide * broad).sqrt(), torch.nan).clamp(-1, 1)


def _centred(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The values less their mean, and the sum of their squares: 0 where nothing but rounding is left."""
    off = values - (weights * values).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    size, whole = (weights * off.square()).sum(1), (weights * values.square()).sum(1)
    return off, torch.where(size > ROUNDING * whole, size, torch.zeros_like(size))


def _ranks(weights: Tensor, values: Tensor) -> Tensor:
    """(rows, records): mid-ranks among the drawn records, those of equal values alike."""
    known, places = torch.unique(values, return_inverse=True)
    rows = weights.shape[0]
    at = places.expand(rows, -1)
    counts = torch.zeros(rows, len(known), dtype=torch.float64).scatter_add_(1, at, weights)
    middle = counts.cumsum(1) - (counts - 1) / 2
    return middle.gather(1, at)


def _estimate(point: Tensor, values: Tensor) -> Estimate | None:
    if bool(point.isnan()):
        return None
    known = values[~values.isnan()]
    if len(known) < 2:
        return Estimate(point.item(), None, None)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(known, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(point.item(), low, high)
