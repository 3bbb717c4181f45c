"""The fewest of some scored things that have a given share of the whole: how LoRA-drop chooses its sites."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorafit.errors import DataError

ROUNDING = 1e-9
"""By how much a sum of scores may miss the share: 0.3 + 0.3 + 0.3 is not to be less than 0.9."""


def fewest(scores: Mapping[str, float], share: float) -> list[str]:
    """The shortest list of names, by descending score, that has this share of all scores; of equal ones the first.

    A share of 1 is everything, also what has a score of 0.

    >>> fewest({"a": 0.2, "b": 0.6, "c": 0.2}, 0.8)
    ['b', 'a']
    """
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)  # stable: of equal ones the first comes first
    wanted = share * math.fsum(scores.values()) * (1 - ROUNDING)
    for count in range(len(ranked)):
        if share < 1 and math.fsum(scores[name] for name in ranked[:count]) >= wanted:
            return ranked[:count]
    return ranked


def check(scores: Mapping[str, float]) -> None:
    """Raises `DataError` unless these are importances: finite, none negative, their sum 1."""
    wrong = [path for path, score in scores.items() if not (math.isfinite(score) and score >= 0)]
    total = math.nan if wrong else math.fsum(scores.values())
    if scores and total == 0:
        raise DataError(
            "the trial adapter learnt nothing: its output is zero at every site",
            found=f"{len(scores)} scores of 0",
            expected="a trained adapter",
            fix="train it for longer or at a higher rate; give it a larger sample",
        )
    if not abs(total - 1) <= 1e-6:
        raise DataError(
            "these are no importances of sites",
            where=wrong[0] if wrong else None,
            found=repr(scores[wrong[0]]) if wrong else f"{len(scores)} scores whose sum is {total:g}",
            expected="finite numbers of at least 0 whose sum is 1",
            fix="use what lorafit.importance.importance gives",
        )
