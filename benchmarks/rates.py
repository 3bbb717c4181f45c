"""The search for a learning rate: a few rates for each candidate, none of them beside the point."""

from __future__ import annotations

import math
from collections.abc import Sequence

FACTOR = math.sqrt(10)
"""Between a rate and the next one that is tried beyond it."""


def next_rate(tried: Sequence[tuple[float, float | None]], first: float) -> float:
    """The rate to try now: beyond the best one if nothing lies beyond it yet, else beside it towards its better side.

    Args:
        tried: (rate, validation loss; None for a run that failed), in the order in which they were tried.
        first: the rate to begin with.

    >>> next_rate([], 0.01), next_rate([(0.01, 2.0)], 0.01), next_rate([(0.01, None)], 0.01)
    (0.01, 0.0316, 0.00316)
    >>> next_rate([(0.01, 2.0), (0.0316, 1.0)], 0.01), next_rate([(0.01, 1.0), (0.0316, 2.0)], 0.01)
    (0.0999, 0.00316)
    """
    if not tried:
        return rounded(first)
    losses = {rate: math.inf if loss is None else loss for rate, loss in tried}
    rates = sorted(losses)
    best = rates.index(min(rates, key=losses.__getitem__))
    if math.isinf(losses[rates[best]]):
        return rounded(rates[0] / FACTOR)
    if best == len(rates) - 1:
        return rounded(rates[best] * FACTOR)
    if best == 0:
        return rounded(rates[0] / FACTOR)
    beside = min((rates[best - 1], rates[best + 1]), key=losses.__getitem__)
    return rounded(math.sqrt(rates[best] * beside))


def rounded(rate: float) -> float:
    """A rate in three digits, as files and commands have it."""
    return float(f"{rate:.2e}")
