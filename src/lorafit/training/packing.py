"""Records of a batch laid out in fewer, fuller rows, with the same loss at every learnt token.

Two things are computed for nothing when each record has a row of its own: padding, and a beginning that the records
share (a system prompt, an instruction) once for each of them. Here several records share a row, and what all of them
begin with stands in the row once. Every token sees the tokens of its own record and no others, at the places they
have there, so it is predicted as if its record were alone. The last token of a record is learnt but never read: where
another record follows in the row, it has no place of its own.

A batch keeps its records: steps, epochs and the mean over learnt tokens are those of padded rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lorafit.training.batches import RECORDS, TOKENS, Collator
from lorafit.training.sequences import IGNORED, Encoded

PADDING = -1
"""Owner of a place that no record has."""
SHARED = 0
"""Owner of a place in the beginning that a row's records share; records count from 1."""


@final
@dataclass(frozen=True)
class Layout:
    """Where the records of a batch go.

    Attributes:
        shared: tokens that all records begin with and that each row holds once.
        rows: the records of each row, by their place in the batch, in order.
        width: tokens of the longest row.
    """

    shared: int
    rows: tuple[tuple[int, ...], ...]
    width: int

    @property
    def tokens(self) -> int:
        """Tokens to compute."""
        return len(self.rows) * self.width


@final
@dataclass(frozen=True)
class Limits:
    """What layouts may look like.

    Attributes:
        balance: tokens of a row at which attention, dense in a packed row, costs as much as all the rest of the model.
        width: tokens of the widest row.
        longest: tokens of the longest record in a row with others.
        shares: whether a shared beginning may stand in a row once.
        one_row: whether a batch has to be one row.
    """

    balance: float = math.inf
    width: float = math.inf
    longest: float = math.inf
    shares: bool = True
    one_row: bool = False

    def cost(self, rows: int, width: int) -> float:
        """The work of a batch, in tokens of very short rows."""
        return rows * width * (1 + width / self.balance)


def shared_beginning(batch: Sequence[Encoded]) -> int:
    """How many tokens all records begin with, up to what the first of them learns.

    The token before the first learnt one stays with its record: two records may learn different tokens after it.
    """
    first = batch[0].input_ids
    length = min(_unlearnt(one) for one in batch)
    for one in batch[1:]:
        ids = one.input_ids
        if ids[:length] != first[:length]:
            length = next(place for place in range(length) if ids[place] != first[place])
    return length


def _unlearnt(record: Encoded) -> int:
    """Tokens that a record may share: those before the one from which its first learnt token is predicted."""
    first = next((place for place, label in enumerate(record.labels) if label != IGNORED), len(record))
    return max(0, min(first, len(record)) - 1)


def best_layout(batch: Sequence[Encoded], limits: Limits) -> Layout | None:
    """The cheapest layout within the limits, or None if a row for each record costs no more."""
    longest = max(map(len, batch))
    if len(batch) < 2 or longest > limits.longest:
        return None
    shared = shared_beginning(batch) if limits.shares else 0
    best, least = None, limits.cost(len(batch), longest)
    for count in range(1, 2 if limits.one_row else len(batch)):
        layout = _laid_out(batch, shared, count)
        cost = limits.cost(count, layout.width)
        if layout.width <= limits.width and cost < least:
            best, least = layout, cost
    return best


def _laid_out(batch: Sequence[Encoded], shared: int, count: int) -> Layout:
    """In so many rows, as even as the longest-first rule makes them: each record goes into the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for place in sorted(range(len(batch)), key=lambda place: -len(batch[place])):
        row = filled.index(min(filled))
        rows[row].append(place)
        filled[row] += _kept(batch[place], shared)
    # The last record of a row keeps its last token.
    ends = [len(batch[row[-1]]) - shared - _kept(batch[row[-1]], shared) for row in rows]
    width = shared + max(tokens + end for tokens, end in zip(filled, ends, strict=True))
    return Layout(shared, tuple(map(tuple, rows)), width)


def _kept(record: Encoded, shared: int) -> int:
    """Tokens that a record needs of its own where another one follows."""
    return max(1, len(record) - shared - 1)


class Isolation(ABC):
    """How a model is told which tokens of a row belong together.

    Attributes:
        name: in a few words, for people.
        shares: whether a token may see a beginning that other records see too.
        one_row: whether it can be told of one row only.
    """

    name: str
    shares: bool
    one_row: bool

    @abstractmethod
    def inputs(self, owners: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """What the model's forward takes beside the tokens.

        Args:
            owners: (rows, width) int64, whose a place is: `PADDING`, `SHARED`, or a record from 1.
            positions: (rows, width) int64, the place of a token in its record.
        """


@final
class Masked(Isolation):
    """An additive mask for each row, made here: (rows, 1, width, width), 0 where a token sees another.

    Args:
        dtype: of the mask; that of the model.
    """

    name = "an attention mask for each row"
    shares = True
    one_row = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def inputs(self, owners: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """See `Isolation`; padding sees itself, for a row of a softmax must not be empty."""
        asks, gives = owners.unsqueeze(2), owners.unsqueeze(1)
        seen = (asks == gives) | ((gives == SHARED) & (asks > SHARED))
        width = owners.shape[1]
        seen &= torch.ones(width, width, dtype=torch.bool).tril_()
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, torch.finfo(self.dtype).min)
        return {"attention_mask": mask.unsqueeze(1), "position_ids": positions}


@final
class Restarted(Isolation):
    """Positions that begin anew with each record; the model itself knows what they mean.

    `transformers` makes its masks by them where it is given none, sliding windows included, and calls attention
    kernels for sequences of several lengths, these for one row only.
    """

    name = "positions that begin anew"
    shares = False

    def __init__(self, *, one_row: bool) -> None:
        self.one_row = one_row

    def inputs(self, owners: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """See `Isolation`."""
        return {"position_ids": positions}


@final
class PackingCollator:
    """Lays the records of a batch out in rows wherever that is less work than a row for each, and pads otherwise.

    Args:
        plain: pads the batches in which there is nothing to gain.
        isolation: keeps the records of a row apart.
        limits: of the layouts.
    """

    def __init__(self, plain: Collator, isolation: Isolation, limits: Limits) -> None:
        self.plain = plain
        self.isolation = isolation
        self.limits = limits

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `position_ids`, perhaps `attention_mask`, (rows, width); or what `plain` gives.

        `TOKENS` is a scalar: the tokens of the records, as if each had a row of its own. `RECORDS` says whose each
        place is; a beginning that records share, in which nothing is learnt, is the last one's there.
        """
        layout = best_layout(batch, self.limits)
        return self.plain(batch) if layout is None else self.packed(batch, layout)

    def packed(self, batch: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """The batch in a given layout."""
        rows = [_row([batch[place] for place in row], layout.shared) for row in layout.rows]
        pads = [layout.width - len(row.ids) for row in rows]

        def stacked(parts: list[list[int]], value: int) -> Tensor:
            return torch.tensor([[*part, *[value] * pad] for part, pad in zip(parts, pads, strict=True)])

        positions = [[*row.positions, *range(pad)] for row, pad in zip(rows, pads, strict=True)]
        return {
            "input_ids": stacked([row.ids for row in rows], self.plain.pad_token_id),
            "labels": stacked([row.labels for row in rows], IGNORED),
            **self.isolation.inputs(stacked([row.owners for row in rows], PADDING), torch.tensor(positions)),
            RECORDS: stacked(
                [[places[owner - 1] for owner in row.owners] for row, places in zip(rows, layout.rows, strict=True)], 0
            ),
            TOKENS: torch.tensor(sum(map(len, batch))),
        }


@final
@dataclass
class _Row:
    """One row, not padded yet."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    owners: list[int]


def _row(records: Sequence[Encoded], shared: int) -> _Row:
    row = _Row(records[0].input_ids[:shared], [IGNORED] * shared, [*range(shared)], [SHARED] * shared)
    after = IGNORED  # what the last place of the row so far learns to predict; it is the label of the next place
    for number, record in enumerate(records, start=1):
        end = len(record) if number == len(records) else shared + _kept(record, shared)
        row.ids += record.input_ids[shared:end]
        row.labels += [after, *record.labels[shared + 1 : end]]
        row.positions += range(shared, end)
        row.owners += [number] * (end - shared)
        after = record.labels[end] if end < len(record) else IGNORED
    return row
