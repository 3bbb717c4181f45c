"""Which row of a batch has which slot of a table, and how the products of such a batch are best taken.

Rows of one slot are one product. Few slots are taken one after the other, each in place (`Segment`); many at once as a
batched product over a run of slots (`Batched`), for which each slot gets the same number of rows, made up with rows
whose result is thrown away. What is made up costs arithmetic, what is taken one after the other costs calls:
`width` weighs the one against the other. Nothing is ever gathered for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

CALL = 4.0
"""What a product of its own costs beside its arithmetic, in microseconds: measured on a CPU."""
ROW = 0.5
"""What the arithmetic of one row more costs, in microseconds, at rank 16 and a layer of 576 by 576."""
COPY = 0.5
"""What a row costs that is copied out of the batch and back into it, in microseconds, at a layer of 576 by 576."""
FEW = 4
"""So many slots are always taken one after the other."""
HOLES = 0.25
"""So many slots without rows, as a share of those with some, are put up with in a batched product."""


class Segment(NamedTuple):
    """Rows of one slot, `start` to `stop` in the order of slots."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Batched:
    """The same number of rows of each slot from `first` to `last`.

    Attributes:
        first, last: slots, `last` excluded.
        take: (slots · rows of each,) rows of the batch; those that only make up the number are real rows, too.
        kept: which of these are no makeweights; None for all.
        rows: (kept,) the rows of the batch that get the results.
        start: the first row, where `take` is rows as they stand in the batch; else None.
    """

    first: int
    last: int
    take: Tensor
    kept: Tensor | None
    rows: Tensor
    start: int | None


class Steps(NamedTuple):
    """The products of one layer: at most one batched, and the segments for the rest.

    Attributes:
        batched: the one, if any.
        segments: in the order of slots; of the batch itself where they are `direct`.
        direct: whether segments are rows as they stand in the batch: nothing is copied then.
    """

    batched: Batched | None
    segments: tuple[Segment, ...]
    direct: bool = False


class Assignment:
    """The rows of a batch that have a slot in one table.

    Args:
        slots: for each row of the batch its slot, or None.
        device: where the indices are wanted.
    """

    def __init__(self, slots: Sequence[int | None], device: torch.device) -> None:
        placed = sorted((slot, row) for row, slot in enumerate(slots) if slot is not None)
        self.size = len(slots)
        self.rows = tuple(row for _, row in placed)
        self.slots = tuple(slot for slot, _ in placed)
        self._device = device
        self._steps: dict[int, Steps] = {}

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """(first, last + 1) where the rows, in the order of slots, stand one after the other in the batch."""
        first = self.rows[0]
        return (first, first + len(self.rows)) if self.rows == tuple(range(first, first + len(self.rows))) else None

    @cached_property
    def index(self) -> Tensor:
        """The rows, (n,), in the order of slots."""
        return torch.tensor(self.rows, device=self._device)

    @cached_property
    def slot_index(self) -> Tensor:
        """The slot of each of them, (n,)."""
        return torch.tensor(self.slots, device=self._device)

    @cached_property
    def groups(self) -> tuple[Segment, ...]:
        """The rows of each slot."""
        found, start = [], 0
        for slot, rows in groupby(self.slots):
            stop = start + len(list(rows))
            found.append(Segment(slot, start, stop))
            start = stop
        return tuple(found)

    @cached_property
    def runs(self) -> tuple[Segment, ...]:
        """Rows of one slot that stand one after the other in the batch, in its order."""
        found: list[Segment] = []
        for row, slot in sorted(zip(self.rows, self.slots, strict=True)):
            if found and found[-1].slot == slot and found[-1].stop == row:
                found[-1] = Segment(slot, found[-1].start, row + 1)
            else:
                found.append(Segment(slot, row, row + 1))
        return tuple(found)

    @property
    def used(self) -> tuple[int, ...]:
        """The slots that rows have, ascending."""
        return tuple(group.slot for group in self.groups)

    def steps(self, tokens: int) -> Steps:
        """How the products are taken where each row has so many tokens."""
        if tokens not in self._steps:
            self._steps[tokens] = self._planned(tokens)
        return self._steps[tokens]

    def _planned(self, tokens: int) -> Steps:
        groups = self.groups
        wide = 0
        if len(groups) > FEW and compact(self.used):
            wide = width([group.stop - group.start for group in groups], tokens)
        if not wide:
            apart = self.run is None and tokens * COPY > CALL
            return Steps(None, self.runs, direct=True) if apart else Steps(None, groups)
        over = (Segment(slot, start + wide, stop) for slot, start, stop in groups if stop - start > wide)
        return Steps(self._batched(wide), tuple(over))

    def _batched(self, wide: int) -> Batched:
        spans = {slot: (start, stop) for slot, start, stop in self.groups}
        first, last = self.used[0], self.used[-1] + 1
        take: list[int] = []
        kept: list[int] = []
        rows: list[int] = []
        for slot in range(first, last):
            start, stop = spans.get(slot, (0, 0))
            for place in range(start, start + wide):
                if place < stop:
                    kept.append(len(take))
                    rows.append(self.rows[place])
                take.append(self.rows[place if place < stop else 0])
        whole = len(kept) == len(take)
        return Batched(
            first,
            last,
            torch.tensor(take, device=self._device),
            None if whole else torch.tensor(kept, device=self._device),
            torch.tensor(rows, device=self._device),
            start=self.run[0] if whole and self.run is not None and len(rows) == len(self.rows) else None,
        )


def compact(slots: Sequence[int]) -> bool:
    """Whether slots, ascending, stand so close that a product over all from the first to the last is no waste.

    >>> compact([3, 4, 5, 6]), compact([0, 9])
    (True, False)
    """
    return slots[-1] - slots[0] + 1 <= len(slots) * (1 + HOLES)


def width(counts: Sequence[int], tokens: int) -> int:
    """How many rows of each slot a batched product takes; the rest is taken slot by slot. 0: all of it is.

    Args:
        counts: the rows of each slot.
        tokens: of each row.

    >>> width([1] * 32, 1)
    1
    >>> width([20] + [1] * 31, 1)
    1
    >>> width([1] * 8, 512)
    0
    """
    if tokens * ROW > 2 * CALL:  # the arithmetic of one row is more than its calls: nothing is worth a copy
        return 0

    def cost(wide: int) -> float:
        made_up = sum(max(wide - count, 0) for count in counts)
        own = sum(count > wide for count in counts)
        return (2 * CALL if wide else 0.0) + made_up * tokens * ROW + own * 2 * CALL

    return min([0, *sorted(set(counts))], key=cost)
