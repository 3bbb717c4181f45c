"""Which rows pass through the model next: prompts in portions, answers in between, first come first served.

All of this is for one thread. Each turn reads one portion of one group of prompts and then writes one token of every
running answer. Groups take turns, so that a short prompt does not wait until a long one has been read, nor a long one
for all short ones that come after it. Where the cache would outgrow its limit, the answer that was begun last is set
aside; its tokens are read again as a prompt as soon as there is room, before anything new is begun.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import final

from lorafit.errors import LorafitError
from lorafit.serve.bank import FullError
from lorafit.serve.batch import Batch, Forward, Prefill
from lorafit.serve.limits import Limits
from lorafit.serve.requests import Adapters, Finish
from lorafit.serve.row import Row

LOG = logging.getLogger("lorafit.serve")
PORTIONS = 4
"""The most that a step reads, in portions of `Limits.chunk` tokens: of so many rows; more rows read less of each."""
AHEAD = 16
"""Columns that have to be free for each row when another one begins: so many tokens are written for certain."""
SHORT = 32
"""Prompts up to this length are read together, whatever their lengths."""


@final
class Schedule:
    """The rows that have been admitted, and what is done with them.

    Args:
        forward: the model.
        bank: its adapters.
        limits: how much is done at once.
    """

    def __init__(self, forward: Forward, bank: Adapters, limits: Limits) -> None:
        self._forward = forward
        self._bank = bank
        self._limits = limits
        self._batch = Batch(forward)
        self._prefills: deque[Prefill] = deque()
        self._new: list[Row] = []
        self._aside: list[Row] = []
        self._rows: list[Row] = []  # all of these, in the order in which they were admitted
        self._full = False  # of adapters that are in use, until a row has ended
        self.tokens = self.prompt_tokens = self.steps = self.prompt_steps = self.set_aside = 0
        self.finished = dict.fromkeys(Finish, 0)

    @property
    def running(self) -> int:
        """How many rows have been admitted and have not ended."""
        return len(self._rows)

    @property
    def columns(self) -> int:
        """Of the running answers' cache."""
        return self._batch.columns

    @property
    def cache_bytes(self) -> int:
        """What that cache takes."""
        return self._batch.nbytes

    def fits(self, row: Row) -> bool:
        """Whether there is room for a row now. What was set aside comes first."""
        return not self._aside and not self._full and self._room_for(row)

    def admit(self, row: Row) -> bool:
        """Begins a row, or fails it where its adapter cannot be had.

        Returns:
            Whether that is settled; else the row has to wait until another one has ended.
        """
        try:
            self._bank.take(row.adapter)
        except FullError as error:
            if self._rows:
                self._full = True
                return False
            self._refuse(row, error)
        except Exception as error:
            self._refuse(row, error)
        else:
            self.prompt_tokens += len(row.ids)
            self._rows.append(row)
            self._new.append(row)
        return True

    def _refuse(self, row: Row, error: Exception) -> None:
        LOG.warning("the adapter %r cannot be used", row.adapter, exc_info=error)
        row.fail(_said(error, "the adapter cannot be used"))
        self.ended(row)

    def ended(self, row: Row) -> None:
        """Counts a row that has ended."""
        assert row.finish is not None
        self.finished[row.finish] += 1

    def turn(self, now: float) -> None:
        """One portion of prompts, and a token for each running answer.

        Args:
            now: the time, for rows that have taken too long.
        """
        self.end(now)
        self._take_up()
        self._begin()
        self._read()
        self._write()

    def end(self, now: float, *, everything: Finish | None = None) -> None:
        """Ends the rows that are due, or all of them."""
        for row in self._rows:
            finish = everything or row.due(now)
            if finish is not None:
                end(row, finish)
        self._settle()

    def fail(self, error: str) -> None:
        """Fails all rows and forgets them, whatever state they are in."""
        rows, self._rows = self._rows, []
        self._new, self._aside = [], []
        self._prefills.clear()
        self._batch.clear()
        for row in rows:
            row.fail(error)
            self.ended(row)

    def _room_for(self, row: Row) -> bool:
        waiting = [len(other.ids) for other in self._new]
        read = [prefill.columns for prefill in self._prefills]
        count = len(self._rows) - len(self._aside)
        columns = max(self._batch.columns, len(row.ids), *waiting, *read) + AHEAD
        return count == 0 or (count < self._limits.rows and (count + 1) * columns <= self._limits.cached)

    def _take_up(self) -> None:
        while self._aside and self._room_for(self._aside[0]):
            self._new.append(self._aside.pop(0))

    def _begin(self) -> None:
        """Makes groups of the rows that are new, each of prompts of like lengths."""
        rows, self._new = self._new, []
        for group in alike(rows):
            each = min(self._limits.chunk, PORTIONS * self._limits.chunk // len(group))
            try:
                self._prefills.append(Prefill(group, self._forward, max(1, each)))
            except Exception as error:
                self._broke(group, error)

    def _read(self) -> None:
        if not self._prefills:
            return
        prefill = self._prefills.popleft()
        try:
            written = prefill.step()
        except Exception as error:
            self._broke(prefill.rows, error)
        else:
            self.prompt_steps += 1
            if written is None:
                self._prefills.append(prefill)
            else:
                self.tokens += written
                self._join(prefill)
        self._settle()

    def _join(self, prefill: Prefill) -> None:
        try:
            self._batch.join(prefill)
        except Exception as error:
            self._broke([*prefill.rows, *self._batch.clear()], error)

    def _write(self) -> None:
        self._lighten()
        if not self._batch.rows:
            return
        try:
            self.tokens += self._batch.step()
            self.steps += 1
        except Exception as error:
            self._broke(self._batch.clear(), error)
        self._settle()

    def _lighten(self) -> None:
        """Sets aside what was begun last while the next column does not fit."""
        while len(self._batch.rows) * (self._batch.columns + 1) > self._limits.cached and len(self._batch.rows) > 1:
            last = max(self._batch.rows, key=self._rows.index)
            self._batch.remove([last])
            self._aside.insert(0, last)
            self.set_aside += 1

    def _broke(self, rows: Iterable[Row], error: Exception) -> None:
        LOG.error("a forward pass failed", exc_info=error)
        said = _said(error, "the model failed")
        for row in rows:
            row.fail(said)

    def _settle(self) -> None:
        """Lets the rows go that have ended."""
        ended = [row for row in self._rows if row.finish is not None]
        if not ended:
            return
        self._full = False
        self._rows = _going(self._rows)
        self._new, self._aside = _going(self._new), _going(self._aside)
        self._prefills = deque(prefill for prefill in self._prefills if _going(prefill.rows))
        self._batch.remove([row for row in self._batch.rows if row.finish is not None])
        for row in ended:
            self.ended(row)
            self._bank.drop(row.adapter)


def _going(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.finish is None]


def _said(error: Exception, what: str) -> str:
    """What a client is told of an error: no place on this machine, nothing of the code."""
    return error.message if isinstance(error, LorafitError) else f"{what}: {type(error).__name__}"


def end(row: Row, finish: Finish) -> None:
    """Ends a row, also one whose rest cannot be decoded."""
    try:
        row.end(finish)
    except Exception as error:
        row.fail(_said(error, "the answer could not be decoded"))


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups of like lengths, so that little of what is read is padding; in each, by their adapters.

    The group of the row that came first is the first.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if groups and len(row.ids) <= max(SHORT, 2 * len(groups[-1][0].ids)):
            groups[-1].append(row)
        else:
            groups.append([row])
    groups.sort(key=lambda group: min(map(rows.index, group)))
    for group in groups:
        group.sort(key=lambda row: (row.adapter is not None, row.adapter or ""))
    return groups
