"""Rows that pass through the model together: those whose prompts are read, and those that write their answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lorafit.serve.cache import RowCache
from lorafit.serve.requests import Adapters
from lorafit.serve.row import Row
from lorafit.serve.sampling import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_FINITE = "the model's logits are not finite"


@final
class Forward:
    """Forward passes of a model of which each row has an adapter of its own.

    Args:
        model: the model, adapters and all.
        bank: gives rows their adapters.
        windows: for each layer the width of its sliding window, or None.
    """

    def __init__(self, model: PreTrainedModel, bank: Adapters, windows: Sequence[int | None]) -> None:
        self._model = model
        self._bank = bank
        self._windows = tuple(windows)
        self.device = model.get_input_embeddings().weight.device
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._settings: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if keeps:
            self._settings["logits_to_keep"] = 1

    def cache(self, *, rows: int = 0, columns: int = 0) -> RowCache:
        """An empty cache for this model."""
        return RowCache(self._windows, rows=rows, columns=columns)

    def __call__(self, rows: Sequence[Row], ids: Tensor, lengths: Sequence[int], cache: RowCache) -> Tensor:
        """The logits after the last column, (rows, vocabulary).

        Args:
            rows: whose they are. One that has ended may still be among them; it has no adapter any more.
            ids: (rows, columns) the next tokens; padding, if any, is at the left of all that a row has.
            lengths: how many tokens of its own each row has, these included.
            cache: what came before, which is added to.
        """
        more = ids.shape[1]
        columns = cache.columns + more
        gaps = torch.tensor([[columns - length] for length in lengths], device=ids.device)
        places = torch.arange(columns, device=ids.device)
        mask = places >= gaps if min(lengths) < columns else None
        positions = (places[-more:] - gaps).clamp_(min=0)
        cache.reserve(more)
        with self._bank.rows(tuple(row.adapter if row.finish is None else None for row in rows)):
            made = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                **self._settings,
            )
        cache.advance(more)
        logits: Tensor = made.logits[:, -1]
        return logits


def write(rows: Sequence[Row], logits: Tensor) -> int:
    """Has each row that goes on write its next token; one whose logits are not finite fails.

    Returns:
        How many tokens were written.
    """
    written = 0
    for row, token in zip(rows, choose(logits, [row.draw for row in rows]), strict=True):
        if token is None:
            row.fail(NOT_FINITE)
        elif row.finish is None:
            _write(row, token)
            written += 1
    return written


def _write(row: Row, token: int) -> None:
    try:
        row.write(token)
    except Exception as error:  # a tokenizer that cannot decode: the other rows have theirs
        row.fail(f"the answer could not be decoded: {type(error).__name__}")


@final
class Prefill:
    """Rows whose prompts are read together, some columns at a time, until each has written a token.

    Args:
        rows: the requests, with prompts of like lengths.
        forward: the model.
        width: columns per step.
    """

    def __init__(self, rows: Sequence[Row], forward: Forward, width: int) -> None:
        self.rows = list(rows)
        self._forward = forward
        self._width = width
        self._lengths = [len(row.ids) for row in rows]
        self.columns = max(self._lengths)
        padded = [[0] * (self.columns - len(row.ids)) + row.ids for row in rows]
        self._ids = torch.tensor(padded, device=forward.device)
        self.cache = forward.cache(rows=len(rows), columns=self.columns)

    @torch.inference_mode()
    def step(self) -> int | None:
        """Reads on; None until the prompts have been read, and then how many tokens the rows have written."""
        start = self.cache.columns
        stop = min(start + self._width, self.columns)
        # A row that begins further right has no token yet, and a length of 0.
        lengths = [max(0, length - (self.columns - stop)) for length in self._lengths]
        logits = self._forward(self.rows, self._ids[:, start:stop], lengths, self.cache)
        return write(self.rows, logits) if stop == self.columns else None


@final
class Batch:
    """The rows that write their answers, a token in each step.

    Args:
        forward: the model.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.rows: list[Row] = []
        self._cache = forward.cache()

    @property
    def columns(self) -> int:
        """How many the longest row has."""
        return self._cache.columns

    @property
    def nbytes(self) -> int:
        """What the cache takes."""
        return self._cache.nbytes

    @torch.inference_mode()
    def join(self, prefill: Prefill) -> None:
        """Takes in the rows of a finished prefill that go on."""
        places = [place for place, row in enumerate(prefill.rows) if row.finish is None]
        if places:
            joining = [prefill.rows[place] for place in places]
            self._cache.take_in(prefill.cache, places, [row.cached for row in joining])
            self.rows += joining

    @torch.inference_mode()
    def step(self) -> int:
        """A token for each row; how many there were. Rows that have ended by it stay until they are removed."""
        ids = torch.tensor([[row.ids[-1]] for row in self.rows], device=self._forward.device)
        lengths = [len(row.ids) for row in self.rows]
        return write(self.rows, self._forward(self.rows, ids, lengths, self._cache))

    @torch.inference_mode()
    def remove(self, leaving: Sequence[Row]) -> None:
        """Lets rows go; the last rows take their places."""
        if len(leaving) == len(self.rows):
            self.clear()
            return
        for place in sorted(map(self.rows.index, leaving), reverse=True):  # so that none of them is moved first
            self._cache.drop(place)
            last = self.rows.pop()
            if place < len(self.rows):
                self.rows[place] = last
        self._cache.narrow(max(row.cached for row in self.rows))

    def clear(self) -> list[Row]:
        """Lets all rows go, and their memory."""
        rows, self.rows = self.rows, []
        self._cache = self._forward.cache()
        return rows
