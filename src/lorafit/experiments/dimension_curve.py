"""d90 and its interval, from what the finished models came to on each record of the test part.

Scores are drawn anew as `bootstrap` does it, test records and seeds; each drawing has its own threshold, curve and
crossing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from lorafit.experiments.bootstrap import Sample, draw
from lorafit.experiments.dimension_search import crossing

Array = NDArray[np.float64]

LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 2000
"""Drawings."""


@final
@dataclass(frozen=True)
class Scored:
    """A finished model on the test part, record by record; higher is better.

    Attributes:
        sums: of each record: minus its loss, or how much of it is right.
        counts: what its sum is divided by.
    """

    sums: Array
    counts: Array

    @property
    def mean(self) -> float:
        """The score."""
        return float(self.sums.sum() / self.counts.sum())


@final
@dataclass(frozen=True)
class Measurements:
    """All that was measured with the chosen rates; of each a model or more, by seed.

    Attributes:
        base: the untrained model.
        full: the reference.
        points: d → models.
        share: how much of the reference counts as reached.
        gain: of what the reference gains over the base (true), or of its score (false).
    """

    base: Sequence[Scored]
    full: Sequence[Scored]
    points: Mapping[int, Sequence[Scored]]
    share: float = 0.9
    gain: bool = True

    def threshold(self, base: float, full: float) -> float:
        """The score to reach."""
        return base + self.share * (full - base) if self.gain else self.share * full


@final
@dataclass(frozen=True)
class Interval:
    """An interval whose ends may lie beyond what was tried; those are None.

    Attributes:
        low, high: the ends.
        seeds: degrees of freedom of the spread between seeds; 0 where no score has two, and it is of records alone.
        kept: d → interval of the share that it keeps.
        gained: the probability, by the drawings, that the reference gains anything over the base.
    """

    low: float | None
    high: float | None
    seeds: int
    kept: Mapping[int, tuple[float, float]]
    gained: float


def mean(models: Sequence[Scored]) -> float:
    """The mean score over seeds."""
    return math.fsum(one.mean for one in models) / len(models)


def interval(measured: Measurements, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The interval of d90; deterministic. `measured` has a base, a reference and a point at least."""
    places = sorted(measured.points)
    base = Sample(_sums(measured.base), apart=True)
    trained = [Sample(_sums(models)) for models in (measured.full, *(measured.points[d] for d in places))]
    made = draw([base, *trained], measured.base[0].counts.tolist(), resamples=resamples, seed=seed)
    drawn = made.values.numpy()
    weights = [len(measured.points[d]) for d in places]
    found = np.empty(resamples)
    kept = np.empty((resamples, len(places)))
    for number, (untrained, full, *scores) in enumerate(drawn.tolist()):
        at = crossing(places, scores, weights, measured.threshold(untrained, full))
        found[number] = math.inf if at.above is None else -math.inf if at.below is None else at.d
        kept[number] = [share_of(measured, untrained, full, score) for score in scores]
    low, high = _ends(found)
    return Interval(
        low if math.isfinite(low) else None,
        high if math.isfinite(high) else None,
        made.degrees,
        {d: _ends(kept[:, place]) for place, d in enumerate(places)},
        float((drawn[:, 1] > drawn[:, 0]).mean()),
    )


def share_of(measured: Measurements, base: float, full: float, score: float) -> float:
    """How much of the reference a score keeps; NaN where there is nothing to keep."""
    over, zero = (full - base, base) if measured.gain else (full, 0.0)
    return (score - zero) / over if over > 0 else math.nan


def _ends(values: Array) -> tuple[float, float]:
    """The two quantiles, each a value that was drawn: between a number and infinity nothing is interpolated."""
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    tail = (1 - LEVEL) / 2
    low = np.quantile(known, tail, method="lower")
    return float(low), float(np.quantile(known, 1 - tail, method="higher"))


def _sums(models: Sequence[Scored]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(one.sums.tolist()) for one in models)
