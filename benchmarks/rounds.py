"""Interleaving: the variants take turns, so that whatever slows the machine slows them all."""

from __future__ import annotations

import copy
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.cases import Case
from benchmarks.quiet import quiet
from benchmarks.variants import FLOOR, Batch, Trainee, Variant, trainee

PROGRESS = 10
"""Rounds between two words of how far it is."""

Say = Callable[[str], object]


def silent(message: str) -> None:
    """Says nothing."""


def trainees(case: Case, variants: Mapping[str, Variant], seed: int) -> dict[str, Trainee]:
    """One model for each variant, all with the same weights at the start."""
    base = case.model(seed)
    with quiet():
        return {name: trainee(variant, copy.deepcopy(base), seed) for name, variant in variants.items()}


def interleave(
    made: Mapping[str, Trainee],
    batches: Iterator[Batch],
    *,
    rounds: int,
    warmup: int,
    seed: int,
    say: Say = silent,
) -> dict[str, list[float]]:
    """Seconds of each variant's step in each round.

    In a round every variant takes one step on the same batch; the order is drawn anew. Rounds of warming-up are left
    out. Garbage is collected between the steps, not in them.

    Raises:
        ArithmeticError: a loss that is not finite: what was measured was no training.
    """
    chance = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    begun = time.perf_counter()
    for number in range(warmup + rounds):
        batch = next(batches)
        order = list(made)
        chance.shuffle(order)
        for name in order:
            passed = timed(made[name], batch, name)
            if number >= warmup:
                seconds[name].append(passed)
        if number >= warmup and (number + 1 - warmup) % PROGRESS == 0:
            say(f"  {number + 1 - warmup} of {rounds} rounds")
        if number + 1 == warmup or (not warmup and not number):
            each = (time.perf_counter() - begun) / (number + 1)
            say(f"  a round of {len(made)} steps takes {each:.1f} s: {each * rounds / 60:.1f} min for {rounds}")
    return seconds


def timed(one: Trainee, batch: Batch, name: str) -> float:
    """Seconds of one step."""
    gc.collect()
    gc.disable()
    try:
        with quiet():
            begun = time.perf_counter()
            loss = one.step(batch)
            passed = time.perf_counter() - begun
    finally:
        gc.enable()
    if not math.isfinite(loss):
        raise ArithmeticError(f"{name}: the loss is {loss}")
    return passed


def measure(
    case: Case, variants: Mapping[str, Variant], *, rounds: int, warmup: int, seed: int, say: Say = silent
) -> dict[str, list[float]]:
    """Builds the variants, the floor among them, and lets them take turns."""
    from benchmarks.variants import VARIANTS

    chosen = {FLOOR: VARIANTS[FLOOR], **variants}
    made = trainees(case, chosen, seed)
    return interleave(made, case.batches(seed), rounds=rounds, warmup=warmup, seed=seed, say=say)


def table(seconds: Mapping[str, list[float]]) -> list[str]:
    """The ratios to the floor as lines of text."""
    from benchmarks.statistic import Spread, ratios

    lines = []
    for name in seconds:
        spread = Spread.of(ratios(seconds, name, FLOOR))
        middle = Spread.of(seconds[name]).median
        lines.append(f"  {name:44} {spread.median:6.3f}  ({spread.low:.3f}-{spread.high:.3f})  {middle * 1e3:9.1f} ms")
    return lines


def plain(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """The variants in JSON's types."""
    return {name: dict(vars(variant)) for name, variant in variants.items()}
