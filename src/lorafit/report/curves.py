"""Series of points: smoothing and thinning, without any drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

DRAWN: Final = 2000
"""About how many points of one series are drawn; a longer one is thinned."""


@dataclass(frozen=True)
class Series:
    """Points over steps; a y of None is a gap.

    Attributes:
        x: steps, ascending.
        y: values.
        of: how many points there were before thinning.
    """

    x: tuple[int, ...]
    y: tuple[float | None, ...]
    of: int

    @classmethod
    def made(cls, points: Sequence[tuple[int, float | None]]) -> Series:
        """The series of all `points`."""
        return cls(tuple(x for x, _ in points), tuple(y for _, y in points), len(points))

    @property
    def finite(self) -> tuple[float, ...]:
        """The values without the gaps."""
        return tuple(y for y in self.y if y is not None)

    @property
    def is_thinned(self) -> bool:
        """Whether points were left out."""
        return len(self.x) < self.of


def span(count: int) -> int:
    """How many points an average over `count` points should reach back."""
    return min(max(count // 15, 5), 200)


def smooth(series: Series, reach: int) -> Series:
    """Exponential moving average with weight 2 / (reach + 1), unbiased at its beginning; gaps stay gaps.

    >>> smooth(Series.made([(1, 2.0), (2, 4.0), (3, None)]), reach=1).y
    (2.0, 4.0, None)
    """
    keep = 1 - 2 / (reach + 1)
    total = weight = 0.0
    values: list[float | None] = []
    for y in series.y:
        if y is None:
            values.append(None)
            continue
        total, weight = keep * total + y, keep * weight + 1
        values.append(total / weight)
    return Series(series.x, tuple(values), series.of)


def thin(series: Series, limit: int = DRAWN) -> Series:
    """At most about `limit` points: of each stretch the lowest and the highest, and its gap if it has one.

    A peak of a single step stays visible, which it would not if every n-th point was taken.
    """
    count = len(series.x)
    if count <= limit:
        return series
    stretch = -(-2 * count // limit)
    kept: list[int] = []
    for start in range(0, count, stretch):
        stop = min(start + stretch, count)
        known = [(y, at) for at in range(start, stop) if (y := series.y[at]) is not None]
        gaps = [at for at in range(start, stop) if series.y[at] is None]
        kept.extend({min(known)[1], max(known)[1]} if known else ())
        kept.extend(gaps[:1])
    # The ends of a curve are what is read first.
    kept = sorted({0, *kept, count - 1})
    return Series(tuple(series.x[at] for at in kept), tuple(series.y[at] for at in kept), series.of)
