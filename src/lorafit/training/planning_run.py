"""What a run will do, in batches: which ones, how many, and how often it evaluates and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

from transformers import TrainingArguments

from lorafit.training.batches import LengthBucketSampler
from lorafit.training.config import Settings
from lorafit.training.measuring import batches as within
from lorafit.training.trainer import planned_steps, records_per_step, steps_per_epoch

MOST = 400
"""Batches that are laid out to be counted; of longer runs an even choice of them stands for the rest."""


@final
@dataclass(frozen=True)
class Course:
    """A run's batches.

    Attributes:
        steps: optimizer steps.
        micro_batches: batches in all of them.
        longest: the records of the largest batch.
        median: the records of a batch of ordinary size.
        tokens: places of a micro-batch on average, padding included.
        held: held-out records that each evaluation goes through.
        evaluations: how often.
        samples: questions answered before and after.
        watched: batches of the general text and of the target, measured before and after.
    """

    steps: int
    micro_batches: int
    longest: list[Any]
    median: list[Any]
    tokens: float
    held: list[Any]
    evaluations: int
    samples: int
    watched: list[list[Any]]


def course(
    settings: Settings,
    arguments: TrainingArguments,
    train: Sequence[Any],
    held: Sequence[Any],
    samples: int,
    width: Callable[[Sequence[Any]], int],
    watched: Sequence[Sequence[Any]] = (),
) -> Course:
    """What a run of these settings on these records will do; `width` gives the places of a batch."""
    steps = planned_steps(arguments, len(train))
    size = arguments.train_batch_size
    micro = steps * arguments.gradient_accumulation_steps
    first = list(batches(train, size, settings.seed, records_per_step(arguments)))
    counted = first[:micro]
    stride = -(-len(counted) // MOST)
    widths = sorted((width(batch), place) for place, batch in enumerate(counted) if place % stride == 0)
    middle = counted[widths[len(widths) // 2][1]]
    held = limited(held, settings.eval_limit)
    return Course(
        steps=steps,
        micro_batches=micro,
        longest=max(counted[:MOST], key=width),
        median=middle,
        tokens=sum(one for one, _ in widths) / len(widths),
        held=list(held),
        evaluations=_evaluations(arguments, steps, len(train)) if held else 0,
        samples=samples,
        watched=[batch for part in watched for batch in within(part, arguments.eval_batch_size)],
    )


def batches(records: Sequence[Any], size: int, seed: int, step: int | None = None) -> Iterator[list[Any]]:
    """The batches of the first epoch, in the order in which training meets them; `step` is the records of a step."""
    order = iter(LengthBucketSampler([len(one) for one in records], step or size, seed))
    while batch := [records[place] for place in islice(order, size)]:
        yield batch


def limited(records: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of the records, evenly spaced, as an evaluation takes them."""
    if limit is None or limit >= len(records):
        return records
    return [records[place * len(records) // limit] for place in range(limit)]


def _evaluations(arguments: TrainingArguments, steps: int, records: int) -> int:
    """One before, those on the way, and one after if the last on the way was not there."""
    strategy = str(arguments.eval_strategy.value)
    if strategy == "no":
        return 2
    every = steps_per_epoch(arguments, records)
    if strategy == "steps":
        asked = arguments.eval_steps or arguments.logging_steps
        every = max(1, math.ceil(steps * asked) if asked < 1 else int(asked))
    during, left = divmod(steps, every)
    # At the end of the last epoch there is one even if max_steps cut it short.
    return 1 + during + (1 if left else 0)
