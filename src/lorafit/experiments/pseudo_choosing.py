"""Which of the model's answers are trained on: those that are sure enough, no class taking over."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lorafit.experiments.pseudo_calibration import Calibration
from lorafit.experiments.pseudo_guessing import Guess
from lorafit.training.examples import Example

APART = 0.2
"""From this share on, answers that would have to be others for the classes to come as often as among the labelled
records are worth a warning."""
SHOWN = 6


@final
@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        taken: the answers to train on, by place.
        sure: how many were sure enough.
        shares: class → share of the labelled records, of the sure answers, and of those taken; empty for open answers.
        apart: half the sum of the differences of the first two shares: 0 where they are the same, 1 where they share
            nothing; None where nothing is sure, or answers are open.
    """

    taken: tuple[Guess, ...]
    sure: int
    shares: Mapping[str, tuple[float, float, float]]
    apart: float | None


def choose(
    guesses: Sequence[Guess],
    examples: Sequence[Example],
    labelled: Mapping[str, int] | None,
    *,
    confidence: float,
    most: float,
    records: int,
    seed: int,
) -> Choice:
    """Chooses among the answers that are sure enough by lot, and not the surest of them.

    So they are as right as the validation records of that confidence are, and not the ones that teach least.

    Args:
        guesses: the model's answers.
        examples: the unlabelled records.
        labelled: class → how many labelled training records it has; None for open answers.
        confidence: answers below it are left out.
        most: a class gets at most so many times as many pseudo-labelled records as it has labelled ones.
        records: labelled training records; of open answers at most `most` times as many are taken.
        seed: of the lot.
    """
    sure = [one for one in guesses if one.confidence >= confidence]
    drawn = sorted(sure, key=lambda one: _lot(examples[one.place], seed))
    quota = {} if labelled is None else {name: round(most * count) for name, count in labelled.items()}
    left = Counter(quota)
    taken: list[Guess] = []
    for one in drawn:
        if labelled is None:
            if len(taken) < round(most * records):
                taken.append(one)
        elif left[one.answer] > 0:
            left[one.answer] -= 1
            taken.append(one)
    taken.sort(key=lambda one: one.place)
    if labelled is None:
        return Choice(tuple(taken), len(sure), {}, None)
    parts = (_shares(labelled), _shares(Counter(g.answer for g in sure)), _shares(Counter(g.answer for g in taken)))
    shares = {name: (parts[0].get(name, 0.0), parts[1].get(name, 0.0), parts[2].get(name, 0.0)) for name in labelled}
    apart = sum(abs(own - other) for own, other, _ in shares.values()) / 2 if sure else None
    return Choice(tuple(taken), len(sure), shares, apart)


def _lot(example: Example, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{json.dumps(example.question())}".encode(), digest_size=16).digest()


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def warnings_of(choice: Choice, calibration: Calibration, where: str) -> list[str]:
    """What should make the user doubt the pseudo-labels, one sentence each.

    Args:
        choice: what was chosen.
        calibration: of the model that answered.
        where: which model that was, for people.
    """
    found = []
    if calibration.high is not None and calibration.right is not None and calibration.high < calibration.asked:
        found.append(
            f"{where}: confidences promise more than they hold: at {calibration.asked:g} and above "
            f"{calibration.right:.0%} of {calibration.above:,} validation records are right; "
            "a higher --confidence would be safer"
        )
    if choice.apart is not None and choice.apart >= APART:
        told = ", ".join(
            f"{name} {own:.0%} → {sure:.0%}"
            for name, (own, sure, _) in sorted(choice.shares.items(), key=lambda each: -abs(each[1][0] - each[1][1]))[
                :SHOWN
            ]
        )
        found.append(
            f"{where}: the classes of the confident answers are not those of the labelled records ({told}): either the "
            "unlabelled records are of another kind, or the model confirms its own bias"
        )
    without = [name for name, (_, _, taken) in choice.shares.items() if not taken]
    if choice.taken and without:
        found.append(f"{where}: no pseudo-label for {', '.join(without[:SHOWN])}")
    return found
