"""d90 and its interval, from what the finished models came to on each record of the test part.

Records are drawn anew with replacement, the same ones for every training, since all were measured on the same records
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 8). Seeds are too few for that: to draw three out of
three makes an interval far too narrow. Each score is moved by Student's t instead, with the spread between seeds pooled
over all d and the reference, and with its degrees of freedom. Each drawing has its own threshold, curve and crossing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lorafit.experiments.dimension_search import crossing

Array = NDArray[np.float64]

LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 2000
"""Drawings."""
AT_ONCE = 4_000_000
"""Numbers that a part of the drawings may hold."""


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
    trained = [measured.full, *(measured.points[d] for d in places)]
    draw = np.random.default_rng(seed)
    drawn = _records([measured.base, *trained], resamples, draw)
    freedom = sum(len(models) - 1 for models in trained)
    drawn[:, 1:] += _seeds(trained, resamples, draw)
    drawn[:, :1] += _seeds([measured.base], resamples, draw)
    weights = [len(measured.points[d]) for d in places]
    found = np.empty(resamples)
    kept = np.empty((resamples, len(places)))
    for number, (base, full, *scores) in enumerate(drawn.tolist()):
        at = crossing(places, scores, weights, measured.threshold(base, full))
        found[number] = math.inf if at.above is None else -math.inf if at.below is None else at.d
        kept[number] = [share_of(measured, base, full, score) for score in scores]
    low, high = _ends(found)
    return Interval(
        low if math.isfinite(low) else None,
        high if math.isfinite(high) else None,
        freedom,
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


def _records(groups: Sequence[Sequence[Scored]], resamples: int, draw: Any) -> Array:
    """Mean scores of each group on records drawn with replacement: (drawings, groups)."""
    models = [one for group in groups for one in group]
    sums = np.stack([one.sums for one in models], axis=1)
    counts = np.stack([one.counts for one in models], axis=1)
    records = len(sums)
    parts = []
    for size in _parts(resamples, max(1, AT_ONCE // records)):
        times = draw.multinomial(records, np.full(records, 1 / records), size=size).astype(np.float64)
        parts.append((times @ sums) / (times @ counts))
    scores = np.concatenate(parts)
    ends = np.cumsum([len(group) for group in groups])
    return np.stack([part.mean(axis=1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)


def _parts(whole: int, most: int) -> list[int]:
    return [min(most, whole - start) for start in range(0, whole, most)]


def _seeds(groups: Sequence[Sequence[Scored]], resamples: int, draw: Any) -> Array:
    """How far other seeds would move the mean of each group: (drawings, groups); 0 where nothing tells."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return np.zeros((resamples, len(groups)))
    squares = math.fsum((one.mean - mean(group)) ** 2 for group in groups for one in group)
    spread = math.sqrt(squares / freedom)
    of_means = spread / np.sqrt([len(group) for group in groups])
    moved: Array = draw.standard_t(freedom, size=(resamples, len(groups))) * of_means
    return moved
