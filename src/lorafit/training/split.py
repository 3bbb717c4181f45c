"""What is learnt and what is held out: a reproducible split, and no question in both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from lorafit.errors import ConfigError, DataError, nearest, some
from lorafit.training.examples import Example
from lorafit.training.formats import Record

E = TypeVar("E", bound=Example)


def split_examples(
    examples: Sequence[E], amount: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[E], list[E]]:
    """Holds some examples out.

    Who is held out is decided by a hash of the seed and the question (or the group): the same on every machine,
    not moved by the order of the records, and little moved by new ones.

    Args:
        examples: all of them.
        amount: a share of the examples (a float between 0 and 1), or their number (an int).
        seed: another seed, another choice.
        groups: the group of each example; groups are held out as a whole, until `amount` is reached.

    Returns:
        What is left for training, and what is held out, each in the order of `examples`.

    Raises:
        ConfigError: `amount` is neither a share nor a number.
        DataError: nothing would be left on one of the sides.
    """
    wanted = _wanted(len(examples), amount, examples[0].where)
    keys = [example.question() for example in examples] if groups is None else list(groups)
    held: set[int] = set()
    for members in _in_hashed_order(keys, seed, whole=groups is not None):
        if len(held) >= wanted:
            break
        held.update(members)
    if len(held) == len(examples):
        raise DataError(
            "The groups are too few to split.",
            where=examples[0].where,
            found=f"{len(set(keys))} groups in {len(examples)} records, {wanted} to be held out",
            expected="groups enough for both sides",
            fix="lower eval_split, or choose a finer column as group",
        )
    train = [example for place, example in enumerate(examples) if place not in held]
    return train, [examples[place] for place in sorted(held)]


def _wanted(count: int, amount: float, where: str) -> int:
    number = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    share = isinstance(amount, float) and 0 < amount < 1
    if not (number or share):
        raise ConfigError(
            "eval_split is neither a share nor a number of records.",
            found=repr(amount),
            expected="a share between 0 and 1 (0.1), or a whole number of records (200)",
            fix="set eval_split=0.1",
        )
    wanted = int(amount) if number else max(1, round(amount * count))
    if wanted >= count:
        raise DataError(
            "The records are too few to hold that many out.",
            where=where,
            found=f"{count} records, {wanted} to be held out by eval_split={amount!r}",
            expected="at least one record left to train on",
            fix="lower eval_split, or add records",
        )
    return wanted


def _in_hashed_order(keys: Sequence[Hashable], seed: int, *, whole: bool) -> list[list[int]]:
    """Places of `keys` in the order of their hashes: singly, or equal keys together if `whole`."""
    digests = [hashlib.blake2b(f"{seed}:{json.dumps(key)}".encode(), digest_size=16).digest() for key in keys]
    order = sorted(range(len(keys)), key=lambda place: (digests[place], place))
    if not whole:
        return [[place] for place in order]
    members: dict[bytes, list[int]] = {}
    for place in order:
        members.setdefault(digests[place], []).append(place)
    return list(members.values())


def groups_of(records: Sequence[Record], column: str) -> list[Hashable]:
    """The value of `column` in each record, as text.

    Raises:
        DataError: a record does not have it.
    """
    for record in records:
        if record.fields.get(column) in (None, ""):
            raise DataError(
                f"The record has no group: the column {column!r} is "
                + ("empty." if column in record.fields else "not there."),
                where=record.where,
                found="the columns " + some(map(repr, record.fields), 12),
                expected=f"a value in {column!r}",
                near=[near for near in nearest(column, record.fields) if near != column],
                fix="name a column that all records have, or leave group away",
            )
    return [str(record.fields[column]) for record in records]


def without_leaks(train: Sequence[E], held: Sequence[Example]) -> tuple[list[E], tuple[str, ...]]:
    """`train` without the questions that are also in `held`, and where those were read.

    Raises:
        DataError: nothing is left.
    """
    questions = {example.question() for example in held}
    kept = [example for example in train if example.question() not in questions]
    removed = tuple(example.where for example in train if example.question() in questions)
    if not kept:
        raise DataError(
            "Every record for training is also held out for evaluation.",
            where=some(removed, 3),
            found=f"{len(removed)} records with questions of the evaluation data",
            expected="other questions to train on than to evaluate on",
            fix="give other evaluation data, or hold some out with eval_split",
        )
    return kept, removed


def repeated(examples: Sequence[Example]) -> int:
    """How many examples ask a question that an earlier one has asked."""
    seen: Mapping[Hashable, None] = dict.fromkeys(example.question() for example in examples)
    return len(examples) - len(seen)
