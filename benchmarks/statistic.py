"""Ratios of interleaved rounds, and their median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle of a sample, and where its middle half lies.

    >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def width(self) -> float:
        """The distance between the quartiles."""
        return self.high - self.low


def ratios(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """Times of one variant by those of another one, each of the same round.

    >>> ratios({"a": [2.0, 6.0], "b": [1.0, 2.0]}, "a", "b")
    [2.0, 3.0]
    """
    return [own / other for own, other in zip(seconds[name], seconds[to], strict=True)]
