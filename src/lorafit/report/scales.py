"""Axes that show what matters of numbers that lie far apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

WIDE: Final = 8
"""An axis is logarithmic where the largest number is so many times the smallest."""
LABELS: Final = 6
"""About so many labels fit below a small figure."""
_GRIDS: Final = ((1, 2, 5), (1, 3), (1,))


def short(value: float) -> str:
    """A number in few characters.

    >>> [short(each) for each in (0.0003, 12, 1500, 4_884_480)]
    ['3e-4', '12', '1.5k', '4.9M']
    """
    if 0 < abs(value) < 0.001:
        figures, power = f"{value:.0e}".split("e")
        return f"{figures}e{int(power)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.2g}{name}" if abs(value) < 100 * unit else f"{value / unit:.0f}{name}"
    return f"{value:.3g}"


def logarithmic(values: Sequence[float], written: Callable[[float], str] = short) -> dict[str, Any]:
    """A logarithmic axis with labels of few figures; `values` are above zero."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.06 * (high - low), 0.04)
    low, high = low - room, high + room
    ticks = _ticks(low, high)
    return {
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [written(each) for each in ticks],
        "tickmode": "array",
    }


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    for figures in _GRIDS:
        found = [at for power in decades for figure in figures if low <= math.log10(at := figure * 10.0**power) <= high]
        if len(found) <= LABELS:
            return found
    every = math.ceil(len(found) / LABELS)
    return found[::every]


def price(values: Sequence[float], written: Callable[[float], str] = short) -> dict[str, Any]:
    """An axis for prices: logarithmic where they lie far apart, else with some room around them."""
    if min(values) > 0 and max(values) >= WIDE * min(values):
        return logarithmic(values, written)
    return {"range": padded(values), "tickformat": ",~g", "nticks": LABELS}


def padded(values: Sequence[float], share: float = 0.08) -> list[float]:
    """From the smallest to the largest, and some room."""
    low, high = min(values), max(values)
    room = share * ((high - low) or abs(high) or 1.0)
    return [low - room, high + room]


def upto(ends: Sequence[float], values: Sequence[float]) -> tuple[list[float] | None, int]:
    """The range in which `ends`, which matter, can be told apart; None where that is the range of all values.

    Returns:
        the range, and how many of `values` lie above it.
    """
    low, high = min(values), max(ends)
    top = high + max(2.5 * (high - min(ends)), 0.25 * abs(high))
    above = sum(each > top for each in values)
    return ([low - 0.05 * (top - low), top], above) if above else (None, 0)
