"""The sequences of a batch, wherever they lie in it, each with a digest of everything that its states depend on.

A causal language model needs a sequence's states up to the last token from which something is learnt: what comes after
it has no part in the loss. So a record is the same sequence in a padded row and in a row with others (`packing`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorafit.training.batches import RECORDS, TOKENS, VALUES
from lorafit.training.sequences import IGNORED

TOLD = ("input_ids", "token_type_ids")
"""What a model is told of each token beside its place: it decides what the layers make of a sequence."""
KNOWN = frozenset({*TOLD, "attention_mask", "position_ids", "labels", TOKENS, RECORDS, VALUES})
"""What a batch may hold; with anything else in it, it is not known what a sequence's states depend on."""


class Piece(NamedTuple):
    """One sequence of a batch.

    Attributes:
        row: its row.
        shared: places at the beginning of the row that belong to it, and perhaps to others as well.
        start, end: the further places that belong to it; the last ones of a record that are not needed are left out.
        digest: of its tokens.
    """

    row: int
    shared: int
    start: int
    end: int
    digest: str

    def read(self, states: Tensor) -> Tensor:
        """The sequence's part of (batch, tokens, width): (tokens, width)."""
        row = states[self.row]
        own = row[self.start : self.end]
        return torch.cat([row[: self.shared], own]) if self.shared else own

    def write(self, states: Tensor, values: Tensor) -> None:
        """Puts the sequence's values in their place."""
        row = states[self.row]
        row[: self.shared] = values[: self.shared]
        row[self.start : self.end] = values[self.shared :]


def pieces(batch: Mapping[str, Tensor]) -> list[Piece] | None:
    """The sequences of a batch; None for a batch of a form that is not known here.

    Args:
        batch: `input_ids` and `labels`; rows that are padded on the right, as `attention_mask` says, or rows of several
            records whose `position_ids` step back where another record begins: to the place behind what they share.
    """
    told = {name: batch[name].to("cpu", torch.int64) for name in TOLD if name in batch}
    ids, labels = told["input_ids"], batch["labels"].to("cpu")
    if not batch.keys() <= KNOWN or ids.dim() != 2 or any(one.shape != ids.shape for one in told.values()):
        return None
    spans = _packed(batch["position_ids"]) if "position_ids" in batch else _padded(batch, ids)
    if spans is None:
        return None
    found = []
    for row, shared, start, end in spans:
        needed = end if labels.dim() == 1 else _needed(labels[row], start, end)
        if needed > start:
            found.append(Piece(row, shared, start, needed, _digest(told, row, shared, start, needed)))
    return found


_Span = tuple[int, int, int, int]


def _padded(batch: Mapping[str, Tensor], ids: Tensor) -> list[_Span] | None:
    mask = batch["attention_mask"].to("cpu")
    if mask.shape != ids.shape:
        return None
    lengths = mask.sum(1, keepdim=True)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths):
        return None
    return [(row, 0, 0, length) for row, length in enumerate(lengths.flatten().tolist())]


def _packed(positions: Tensor) -> list[_Span] | None:
    spans = []
    for row, places in enumerate(positions.tolist()):
        starts = [0, *(at for at in range(1, len(places)) if places[at] != places[at - 1] + 1)]
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            shared = places[start]
            if shared > starts[1 if start else 0]:
                return None
            spans.append((row, shared, start, end))
    return spans


def _needed(labels: Tensor, start: int, end: int) -> int:
    """The place behind the last one of a span from which something is learnt; `start` if there is none."""
    learnt = (labels[start + 1 : end + 1] != IGNORED).nonzero()
    return start + 1 + int(learnt[-1]) if len(learnt) else start


def _digest(told: Mapping[str, Tensor], row: int, shared: int, start: int, end: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, values in told.items():
        digest.update(name.encode())
        for part in _parts(values[row], shared, start, end):
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def _parts(values: Tensor, shared: int, start: int, end: int) -> Iterator[Tensor]:
    yield values[:shared]
    yield values[start:end]
