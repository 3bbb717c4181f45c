"""Right and wrong answers of few records: what drawing them anew cannot know.

Records that all agree give the same score however they are drawn, and an interval of no width: as if no other record
could have been answered otherwise. And where two candidates differ on a handful of records, drawing tells them apart
sooner than chance allows. Both have exact answers. Of n records that agree, a share of up to 1 - (α/2)^(1/n) of all
there are may be otherwise (Clopper and Pearson 1934). And where two candidates are equal, a record's difference is as
probable with the other sign: of one prediction each, that is the sign test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from lorafit.errors import DataError
from lorafit.experiments.bootstrap import Sample

MOST: Final = 400
"""So many records that differ need no exact answer."""


def check_several(records: Sequence[object], where: str) -> None:
    """Raises `DataError` of one test record alone: nothing that was measured on it says how another would come out."""
    if len(records) < 2:
        raise DataError(
            "one test record says nothing of others",
            where=where,
            found=f"{len(records)} test record{'s' * (len(records) != 1)}",
            expected="at least 2, and better some hundreds",
            fix="hold out more: eval_split, or a larger eval_data",
        )


@final
@dataclass(frozen=True)
class Told:
    """What is told of a score or of a difference: its interval, and the probability of one as far from zero."""

    low: float
    high: float
    probability: float = 0.0

    def between(self, shares: Sequence[float], least: float, level: float) -> Told:
        """Widened where all records have the same share: others may have any from `least` to 1."""
        if min(shares) < max(shares):
            return self
        unseen = 1 - ((1 - level) / 2) ** (1 / len(shares))
        low, high = shares[0] - unseen * (shares[0] - least), shares[0] + unseen * (1 - shares[0])
        return Told(min(self.low, low), max(self.high, high), self.probability)

    def signed(self, moved: Sequence[int], level: float) -> Told:
        """No surer than the signs of the records' differences let one be, in whole steps.

        The interval holds zero wherever the probability leaves that open.
        """
        chance = signs(moved)
        if chance <= self.probability:
            return self
        low, high = (self.low, self.high) if chance < 1 - level else (min(self.low, 0.0), max(self.high, 0.0))
        return Told(low, high, chance)


def signs(moved: Sequence[int]) -> float:
    """How probable a sum as far from zero is, to either side, if each number had either sign; 0 of more than `MOST`.

    >>> signs([1, 1, 1, 1, 1, 0, 0]), signs([1, -1]), signs([-1] * 6)
    (0.0625, 1.0, 0.03125)
    """
    steps = [abs(each) for each in moved if each]
    if len(steps) > MOST:
        return 0.0
    whole = sum(steps)
    chances = torch.zeros(2 * whole + 1, dtype=torch.float64)  # of the sums from -whole to whole
    chances[whole] = 1
    for step in steps:
        chances = (chances.roll(step) + chances.roll(-step)) / 2
    far = abs(sum(moved))
    return min(1.0, float(chances[: whole - far + 1].sum() + chances[whole + far :].sum()))


@final
@dataclass(frozen=True)
class Answers:
    """What is right of each record, for candidates that were measured on the same ones.

    Attributes:
        shares: for each candidate, the share of each record's predictions that is right, over its seeds.
        right: for each candidate and seed, whether a record's one prediction is right; empty where some have several.
    """

    shares: tuple[tuple[float, ...], ...]
    right: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], counts: Sequence[float]) -> Answers:
        """Those of samples whose sums count what is right."""
        columns = [list(zip(*sample.sums, strict=True)) for sample in samples]
        shares = tuple(
            tuple(
                math.fsum(each) / (len(each) * count) if count else 0.0 for each, count in zip(one, counts, strict=True)
            )
            for one in columns
        )
        single = all(count == 1 for count in counts)
        single = single and all(value in (0, 1) for sample in samples for sums in sample.sums for value in sums)
        right = tuple(tuple(tuple(map(int, sums)) for sums in sample.sums) for sample in samples) if single else ()
        return cls(shares, right)

    def apart(self, one: int, other: int, told: Told, level: float) -> Told:
        """What is told of the difference of two candidates, no surer than it can be."""
        moved = [a - b for a, b in zip(self.shares[one], self.shares[other], strict=True)]
        told = told.between(moved, -1.0, level)
        if not self.right:
            return told
        first, second = self.right[one], self.right[other]
        steps = [
            len(second) * sum(a) - len(first) * sum(b)
            for a, b in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True)
        ]
        return told.signed(steps, level)
