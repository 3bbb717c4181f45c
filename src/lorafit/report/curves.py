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
    """How many points to either side an average over `count` points should reach."""
    return min(max(count // 30, 3), 100)


def smooth(series: Series, reach: int) -> Series:
    """At each point the straight line that fits best, where a point `d` away weighs `(1 - 1 / reach) ** d`.

    Gaps stay gaps. An average of the past alone would lie above a falling curve, and so above held-out points that
    in truth are on it; one that looks to both sides would do so at the ends.

    >>> [y and round(y, 6) for y in smooth(Series.made([(1, 4.0), (2, 3.0), (3, None)]), reach=5).y]
    [4.0, 3.0, None]
    """
    known = series.finite
    if len(known) < 2:
        return series
    keep = 1 - 1 / reach
    before = _moments(known, keep)
    after = _moments(known[::-1], keep)[::-1]
    values = iter([_fitted(y, left, right) for y, left, right in zip(known, before, after, strict=True)])
    return Series(series.x, tuple(None if y is None else next(values) for y in series.y), series.of)


_Moments = tuple[float, float, float, float, float]


def _moments(values: Sequence[float], keep: float) -> list[_Moments]:
    """For each of `values`, itself and those before it at distances d: the sums of w, wd, wdd, wy, wdy."""
    w = wd = wdd = wy = wdy = 0.0
    sums = []
    for y in values:
        # All that came before moves one further away.
        wdd, wd, w = keep * (wdd + 2 * wd + w), keep * (wd + w), keep * w + 1
        wdy, wy = keep * (wdy + wy), keep * wy + y
        sums.append((w, wd, wdd, wy, wdy))
    return sums


def _fitted(y: float, left: _Moments, right: _Moments) -> float:
    """The weighted least squares line at distance 0; `y`, which is there, is in both sums."""
    w, wd, wdd = left[0] + right[0] - 1, right[1] - left[1], left[2] + right[2]
    wy, wdy = left[3] + right[3] - y, right[4] - left[4]
    return (wdd * wy - wd * wdy) / (w * wdd - wd * wd)


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
