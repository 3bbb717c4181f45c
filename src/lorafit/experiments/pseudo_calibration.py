"""Confidences that mean what they say: of answers given with 0.9, nine in ten are right.

Networks are surer than they should be; dividing their scores by one number, the temperature, mends most of it and
changes no answer (Guo et al. 2017, arXiv:1706.04599, section 4.2). It is the one under which the held-out answers are
most probable. Where all of those are right none is too low: so the targets are not 1 and 0 but what Platt (1999,
"Probabilistic Outputs for Support Vector Machines", section 2.2) puts in their place, (n + 1) / (n + 2) for n records.
Few records do not make a model surer than it is: a temperature below 1 takes `ENOUGH` of them. The expected calibration
error is that of Guo et al., over ten bins of equal width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

import torch
from torch import Tensor

COLDEST, HOTTEST = 0.05, 50.0
"""Between these the temperature is looked for."""
BINS = 10
ENOUGH = 50
"""With fewer held-out records a temperature says little: one in ten of them is a handful of records."""
GOLDEN = (math.sqrt(5) - 1) / 2


@final
@dataclass(frozen=True)
class Bin:
    """Held-out answers of like confidence: their mean confidence, the share that is right, and how many they are."""

    confidence: float
    right: float
    records: int


@final
@dataclass(frozen=True)
class Calibration:
    """What confidences are worth, measured on held-out records.

    Attributes:
        temperature: what scores are divided by; above 1 the model was too sure.
        records: on so many records it was found.
        accuracy: the share of them that is right, whatever the confidence.
        error_before: the expected calibration error without the temperature.
        error: the same with it.
        asked: the confidence that was asked for.
        above: how many of the records have it.
        right: the share of those that is right; None if there are none.
        low, high: the 95 % interval of that share (Wilson 1927); None as well.
        bins: the records by confidence.
    """

    temperature: float
    records: int
    accuracy: float
    error_before: float
    error: float
    asked: float
    above: int
    right: float | None
    low: float | None
    high: float | None
    bins: tuple[Bin, ...]

    def sentence(self) -> str:
        """What there is to say of it."""
        share = (
            f"none of the {self.records:,} validation records"
            if self.right is None or self.low is None or self.high is None
            else f"of the {self.above:,} validation records that have it {self.right:.0%} are right "
            f"(95 % interval {self.low:.0%} to {self.high:.0%})"
        )
        return (
            f"temperature {self.temperature:.2f}, calibration error {self.error_before:.3f} → {self.error:.3f}; "
            f"at confidence {self.asked:g}: {share}"
        )


def calibrate(values: Tensor, gold: Sequence[int], asked: float) -> Calibration:
    """The temperature of these scores, and what confidences are worth with it.

    Args:
        values: (records, answers), scores before the softmax; at least one record.
        gold: the place of each record's right answer; -1 where it is none of them.
        asked: the confidence that answers will be asked for.
    """
    places = torch.tensor(list(gold))
    able = values[places >= 0]
    smooth = 1 / (len(able) + 2)
    targets = torch.full_like(able, smooth / (values.shape[1] - 1))
    targets[torch.arange(len(able)), places[places >= 0]] = 1 - smooth

    def loss(temperature: float) -> float:
        return float(-(targets * (able / temperature).log_softmax(-1)).sum())

    temperature = coldest(loss) if len(able) else 1.0
    if len(able) < ENOUGH:
        temperature = max(1.0, temperature)
    before, after = values.softmax(-1), (values / temperature).softmax(-1)
    right = (values.argmax(-1) == places).double()
    return summarise(temperature, before.max(-1).values, after.max(-1).values, right, asked)


def summarise(temperature: float, before: Tensor, after: Tensor, right: Tensor, asked: float) -> Calibration:
    """The figures of a temperature that is known.

    Args:
        temperature: that.
        before: (records), confidences without it.
        after: (records), with it.
        right: (records), 1 where the answer is right.
        asked: the confidence that answers will be asked for.
    """
    chosen = right[after >= asked]
    low, high = (None, None) if not len(chosen) else wilson(int(chosen.sum()), len(chosen))
    bins = binned(after, right)
    return Calibration(
        temperature=temperature,
        records=len(right),
        accuracy=float(right.mean()),
        error_before=_error(binned(before, right)),
        error=_error(bins),
        asked=asked,
        above=len(chosen),
        right=float(chosen.mean()) if len(chosen) else None,
        low=low,
        high=high,
        bins=bins,
    )


def coldest(loss: Callable[[float], float]) -> float:
    """Where a function of the temperature that falls and then rises is lowest (golden section, on its logarithm)."""
    low, high = math.log(COLDEST), math.log(HOTTEST)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = loss(math.exp(left)), loss(math.exp(right))
    while high - low > 1e-4:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = loss(math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = loss(math.exp(right))
    return math.exp((low + high) / 2)


def binned(confidences: Tensor, right: Tensor) -> tuple[Bin, ...]:
    """The records in bins of equal width; empty ones are left out."""
    places = (confidences * BINS).long().clamp(0, BINS - 1)
    found = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            found.append(Bin(float(confidences[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    return tuple(found)


def _error(bins: Sequence[Bin]) -> float:
    total = sum(one.records for one in bins)
    return math.fsum(one.records * abs(one.confidence - one.right) for one in bins) / total


def wilson(right: int, records: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share (Wilson 1927), which holds for few records and for shares near 0 or 1.

    >>> low, high = wilson(9, 10)
    >>> f"{low:.3f} {high:.3f}"
    '0.596 0.982'
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = right / records, z * z / records
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
