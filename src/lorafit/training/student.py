"""Student's t: how probable a mean is of so many records, whose spread is itself a guess.

The distribution is an incomplete beta function, which is computed by its continued fraction (Press et al., Numerical
Recipes, 6.4) with Lentz's method: tails have as many digits as the middle.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import Final

TERMS: Final = 10_000
TINY: Final = 1e-300
CLOSE: Final = 1e-15
MANY: Final = 1e6
"""Degrees of freedom from which on t is normal to six digits."""


def below(value: float, degrees: float) -> float:
    """How probable a value as low as this one, or lower, is.

    >>> round(below(-12.706, 1), 4), round(below(1.96, math.inf), 4)
    (0.025, 0.975)
    """
    if degrees >= MANY:
        return NormalDist().cdf(value)
    if math.isinf(value):
        return float(value > 0)
    squared = value * value
    tail = _beta(degrees / (degrees + squared), squared / (degrees + squared), degrees / 2, 0.5) / 2
    return tail if value < 0 else 1 - tail


@cache
def quantile(share: float, degrees: float) -> float:
    """The value below which a share of at least one half lies.

    >>> round(quantile(0.975, 4), 3), round(quantile(0.975, 99), 3)
    (2.776, 1.984)
    """
    if degrees >= MANY:
        return NormalDist().inv_cdf(share)
    low, high = 0.0, 1.0
    while below(high, degrees) < share:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if below(middle, degrees) < share else (low, middle)
    return high


def _beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function at x, where `rest` is 1 - x."""
    if x <= 0 or rest <= 0:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(rest, x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    return math.exp(front) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction 1 + d₁/(1 + d₂/(1 + …)) of the incomplete beta function."""
    value, over, under = 1.0, 1.0, 0.0
    for term in range(1, TERMS):
        half, odd = divmod(term, 2)
        if odd:
            part = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            part = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        under = 1 / _away(1 + part * under)
        over = _away(1 + part / over)
        value *= over * under
        if abs(over * under - 1) < CLOSE:
            return value
    raise AssertionError("the fraction converges in about as many terms as the root of the degrees")


def _away(value: float) -> float:
    return value if abs(value) > TINY else TINY
