"""Language models as classifiers: each of a closed set of answers scored by how probable the model finds it.

Where the answers of the data are few and come again and again ("positive", "negative"), a language model need not
write one: log p(answer | prompt), summed over the answer's tokens and the token that ends it, tells which it prefers,
and a softmax over the set how sure it is. The sequences are those that training sees, token by token.

The prompt is the same for all answers of a record, so it is computed once and its keys and values are shared
(`_Shared`). Whether that gives what whole sequences give (`_Whole`) is tried on the first records of every call; models
that keep no such states, or keep them otherwise, are given whole sequences.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lorafit.errors import DataError, LorafitWarning, nearest, some
from lorafit.rest import at_rest
from lorafit.training.batches import Collator
from lorafit.training.encode import Encoder
from lorafit.training.examples import Conversation, Example, Turn
from lorafit.training.loss import SupervisedLoss, is_half
from lorafit.training.sequences import IGNORED, Encoded

MOST = 20
"""So many different answers at most are a closed set."""
AGAIN = 2
"""So often, on average, an answer of a closed set has to come."""
TRIED = 2
"""Records on which the short way is compared with the long one."""
FOREIGN = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError)
"""What a model's own code raises where it cannot go on from states that are handed to it."""


@final
@dataclass(frozen=True)
class Scored:
    """How probable each answer is, record by record.

    Attributes:
        values: (records, answers), float64: log p(answer | prompt). Records that could not be scored are left out.
        kept: the places of the scored ones among all that were given.
        dropped: where the others were read: an answer of theirs does not fit into the length.
    """

    values: Tensor
    kept: tuple[int, ...]
    dropped: tuple[str, ...]


def closed_answers(examples: Sequence[Example], most: int = MOST) -> tuple[str, ...] | None:
    """The answers of a closed set, by alphabet; None where the data are not of that kind.

    They are one if there are at least two and at most `most` of them, and each comes twice on average.

    >>> def asked(answer):
    ...     return Conversation((Turn("user", "is it so?"), Turn("assistant", answer)), "here")
    >>> closed_answers([asked("yes"), asked("no"), asked("yes"), asked("no")])
    ('no', 'yes')
    >>> closed_answers([asked("yes"), asked("a long story")]) is None
    True
    """
    found: set[str] = set()
    for example in examples:
        if not isinstance(example, Conversation):
            return None
        found.add(answer_of(example))
        if len(found) > most:
            return None
    if len(found) < 2 or len(examples) < AGAIN * len(found):
        return None
    return tuple(sorted(found))


def answer_of(example: Conversation) -> str:
    """The last turn's words."""
    return example.turns[-1].content


def places(examples: Sequence[Example], answers: Sequence[str]) -> list[int]:
    """The place of each example's own answer among `answers`.

    Raises:
        DataError: an example has another answer.
    """
    known = {answer: place for place, answer in enumerate(answers)}
    found = []
    for example in examples:
        own = answer_of(example) if isinstance(example, Conversation) else None
        if own not in known:
            raise DataError(
                "The answer is not one of the closed set.",
                where=example.where,
                found=repr(own),
                expected=some(map(repr, answers), 12),
                near=nearest(str(own), answers),
                fix="mend the answer, or have it among the training records",
            )
        found.append(known[own])
    return found


def score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 16,
) -> Scored:
    """Scores every answer as the continuation of every prompt.

    Args:
        model: a causal language model on its device; it is left as it was.
        tokenizer: its tokenizer, with a padding token.
        examples: conversations; their own last turns are not looked at.
        answers: the closed set.
        max_length: tokens of the longest sequence: a record of which an answer would be cut is not scored.
        batch_size: sequences computed at a time.

    Raises:
        DataError: an example is no conversation, or the chat template refuses it.
    """
    rows, kept, dropped = _encoded(tokenizer, examples, answers, max_length)
    if not kept:
        return Scored(torch.zeros(0, len(answers), dtype=torch.float64), (), dropped)
    together = max(1, batch_size // len(answers))
    order = sorted(range(len(kept)), key=lambda place: len(rows[place][0]))
    values = torch.zeros(len(kept), len(answers), dtype=torch.float64)
    with at_rest(model), torch.no_grad():
        way = _way(model, tokenizer, [rows[place] for place in order[:TRIED]])
        for start in range(0, len(order), together):
            chosen = order[start : start + together]
            values[torch.tensor(chosen)] = way(model, [rows[place] for place in chosen])
    return Scored(values, kept, dropped)


def _encoded(
    tokenizer: Any, examples: Sequence[Example], answers: Sequence[str], max_length: int
) -> tuple[list[list[Encoded]], tuple[int, ...], tuple[str, ...]]:
    """Of each record that fits, a sequence for each answer, of which the answer alone is learnt."""
    asked = [
        Conversation((*example.turns[:-1], Turn("assistant", answer)), f"{place} {number}")
        for place, example in enumerate(_conversations(examples))
        for number, answer in enumerate(answers)
    ]
    with warnings.catch_warnings():
        # What is odd about the template or a text was said when the records themselves were encoded.
        warnings.simplefilter("ignore", LorafitWarning)
        made = Encoder(tokenizer, max_length).encode_all(asked)
    # Earlier answers of a conversation may have sequences of their own: the last one ends in the answer in question.
    last = {one.where: one for one in made.items}
    rows, kept, dropped = [], [], []
    for place, example in enumerate(examples):
        own = [last.get(f"{place} {number}") for number in range(len(answers))]
        whole = [_answer_alone(one) for one in own if one is not None and not one.truncated]
        if len(whole) < len(answers):
            dropped.append(example.where)
            continue
        rows.append(whole)
        kept.append(place)
    return rows, tuple(kept), tuple(dropped)


def _conversations(examples: Sequence[Example]) -> list[Conversation]:
    found = []
    for example in examples:
        if not isinstance(example, Conversation):
            raise DataError(
                "The record has no answer that could be scored.",
                where=example.where,
                expected="a prompt and its answer, or a conversation",
                fix="give data with questions and answers",
            )
        found.append(example)
    return found


def _answer_alone(one: Encoded) -> Encoded:
    """The sequence with its last run of learnt tokens alone."""
    start = _start(one)
    return Encoded(one.input_ids, [IGNORED] * start + one.labels[start:], one.where)


def _start(one: Encoded) -> int:
    """Where the last run of learnt tokens begins."""
    start = len(one.labels)
    while start and one.labels[start - 1] != IGNORED:
        start -= 1
    return start


# Ways --------------------------------------------------------------------------------------------------------------


class _Way(ABC):
    """From sequences to log-likelihoods."""

    def __init__(self, loss: SupervisedLoss, pad: int) -> None:
        self._loss = loss
        self._collate = Collator(pad)

    @abstractmethod
    def __call__(self, model: Any, rows: Sequence[Sequence[Encoded]]) -> Tensor:
        """(records, answers), float64, on the CPU."""

    def _summed(self, model: Any, batch: dict[str, Any], shape: tuple[int, int]) -> Tensor:
        values, owners = (each.cpu() for each in self._loss.each(model, batch))
        total = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        return -total.index_add(0, owners, values.double()).view(shape)


@final
class _Whole(_Way):
    """Every answer behind its prompt, as training has it."""

    def __call__(self, model: Any, rows: Sequence[Sequence[Encoded]]) -> Tensor:
        device = next(model.parameters()).device
        batch = self._collate([one for row in rows for one in row])
        placed = {key: value.to(device) for key, value in batch.items()}
        return self._summed(model, placed, (len(rows), len(rows[0])))


@final
class _Shared(_Way):
    """The prompts once; the answers go on from their keys and values."""

    def __init__(self, loss: SupervisedLoss, pad: int) -> None:
        super().__init__(loss, pad)
        self._whole = _Whole(loss, pad)

    def __call__(self, model: Any, rows: Sequence[Sequence[Encoded]]) -> Tensor:
        # The prompt's last token is what the answer's first one is predicted from: it goes with the answers.
        fronts = [_start(row[0]) - 1 for row in rows]
        if not all(front > 0 and _begin_alike(row, front) for row, front in zip(rows, fronts, strict=True)):
            return self._whole(model, rows)
        device = next(model.parameters()).device
        number = len(rows[0])
        prompts = [Encoded(row[0].input_ids[:front], [], "") for row, front in zip(rows, fronts, strict=True)]
        ends = [
            Encoded(one.input_ids[front:], one.labels[front:], one.where)
            for row, front in zip(rows, fronts, strict=True)
            for one in row
        ]
        before, after = self._collate(prompts), self._collate(ends)
        ids, seen = before["input_ids"].to(device), before["attention_mask"].to(device)
        states = model.base_model(input_ids=ids, attention_mask=seen, use_cache=True).past_key_values
        states.batch_repeat_interleave(number)
        behind = torch.tensor(fronts).repeat_interleave(number)[:, None] + torch.arange(after["input_ids"].shape[1])
        batch = {
            "input_ids": after["input_ids"].to(device),
            "labels": after["labels"].to(device),
            "attention_mask": torch.cat([seen.repeat_interleave(number, 0), after["attention_mask"].to(device)], 1),
            "position_ids": behind.to(device),
            "past_key_values": states,
        }
        return self._summed(model, batch, (len(rows), number))


def _begin_alike(row: Sequence[Encoded], front: int) -> bool:
    """Whether all sequences of a record have the same tokens up to `front`, and their answers begin at one place."""
    return all(_start(one) - 1 == front and one.input_ids[:front] == row[0].input_ids[:front] for one in row)


def _way(model: Any, tokenizer: Any, tried: Sequence[Sequence[Encoded]]) -> _Way:
    """The short way, if it gives on these records what the long one gives."""
    loss = SupervisedLoss.prepare(model)
    whole, shared = _Whole(loss, tokenizer.pad_token_id), _Shared(loss, tokenizer.pad_token_id)
    expected = whole(model, tried)
    try:
        found = shared(model, tried)
    except FOREIGN:
        return whole
    near = 2e-2 if is_half(model) else 1e-4
    return shared if torch.allclose(found, expected, rtol=near, atol=near) else whole
