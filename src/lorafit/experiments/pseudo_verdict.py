"""Whether pseudo-labels helped: two models of each seed, measured on the same records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lorafit.experiments.bootstrap import Sample, draw, interval, probability
from lorafit.experiments.counted import Answers, Told, check_several
from lorafit.experiments.trial import TRIALS
from lorafit.training.owned import ADAPTER

RESAMPLES = 10_000
LEVEL = 0.95


@final
@dataclass(frozen=True)
class Measure:
    """One seed's test records under both models: sums and, alike for both, counts."""

    before: tuple[float, ...]
    after: tuple[float, ...]
    counts: tuple[float, ...]


@final
@dataclass(frozen=True)
class Difference:
    """What the pseudo-labels changed.

    Attributes:
        metric: "accuracy" or "loss".
        before, after: its mean over the seeds, supervised alone and with pseudo-labels.
        value: after - before.
        low, high: the 95 % interval of that, by records and seeds.
        probability: how probable a difference as large is, to either side, where there is none.
        records, seeds: of how many it was taken.
    """

    metric: str
    before: float
    after: float
    value: float
    low: float
    high: float
    probability: float
    records: int
    seeds: int

    @property
    def helped(self) -> bool:
        """Whether it is better by more than chance would have it."""
        return self.low > 0 if self.metric == "accuracy" else self.high < 0

    @property
    def harmed(self) -> bool:
        """Whether it is worse by more than chance would have it."""
        return self.high < 0 if self.metric == "accuracy" else self.low > 0

    def sentence(self) -> str:
        """The verdict."""
        word = "helped" if self.helped else "harmed" if self.harmed else "did not help"
        rest = "" if self.helped or self.harmed else ", as far as can be told"
        form = ".1%" if self.metric == "accuracy" else ".4f"
        seeds = f"{self.seeds} seed{'s' * (self.seeds != 1)}"
        return (
            f"pseudo-labels {word}{rest}: {self.metric} {self.before:{form}} → {self.after:{form}} on "
            f"{self.records:,} test records ({self.value:+{form}}, 95 % interval {self.low:+{form}} to "
            f"{self.high:+{form}}, {seeds})"
        )


def difference(metric: str, measures: Sequence[Measure]) -> Difference:
    """The mean difference and how far it could be off.

    A seed's two models start from the same values and answer the same records, so they are compared pair by pair: what
    is drawn anew (`bootstrap.draw`) are the differences.

    Raises:
        DataError: there is one record alone.
    """
    counts = measures[0].counts
    check_several(counts, "the test part")
    moved = [tuple(b - a for a, b in zip(one.before, one.after, strict=True)) for one in measures]
    drawn = draw([Sample(tuple(moved))], counts, resamples=RESAMPLES, seed=0)
    told = Told(*interval(drawn.values[:, 0], LEVEL), probability(drawn.values[:, 0]))
    if metric == "accuracy":
        sides = [Sample(tuple(one.after for one in measures)), Sample(tuple(one.before for one in measures))]
        told = Answers.of(sides, counts).apart(0, 1, told, LEVEL)
    total = sum(counts)
    before = sum(sum(one.before) for one in measures) / len(measures) / total
    after = sum(sum(one.after) for one in measures) / len(measures) / total
    ends = (told.low, told.high, told.probability)
    return Difference(metric, before, after, after - before, *ends, len(counts), len(measures))


def verdict(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], folder: Path) -> dict[str, Any]:
    """What the runs of all seeds say, as few-labels.json has it.

    Accuracy decides where there is one, else the loss. The adapter with pseudo-labels is kept if it is better by more
    than chance would have it, and otherwise the supervised one: of the seed with the lowest validation loss.

    Args:
        pairs: for each seed the results of the supervised run and of the last one with pseudo-labels.
        folder: the experiment's.
    """
    if not pairs:
        return {"sentence": "nothing can be said: no seed has both runs", "kept": None, "adapter": None, "metrics": []}
    found = [difference("loss", [_measure(a["losses"], b["losses"], a["counts"]) for a, b in pairs])]
    if all(a["correct"] is not None and b["correct"] is not None for a, b in pairs):
        ones = [1.0] * len(pairs[0][0]["correct"])
        found.insert(0, difference("accuracy", [_measure(a["correct"], b["correct"], ones) for a, b in pairs]))
    decisive = found[0]
    sentence = decisive.sentence()
    if all(a["trial"] == b["trial"] for a, b in pairs):
        sentence = "pseudo-labels did not help: no answer was sure enough to be trained on"
    side = 1 if decisive.helped else 0
    kept = min((pair[side] for pair in pairs), key=lambda one: (one["validation"] is None, one["validation"]))
    named = "with pseudo-labels" if decisive.helped else "supervised"
    called = "the adapter trained with pseudo-labels" if decisive.helped else "the supervised adapter"
    tokens = [sum(pair[place]["tokens"] for pair in pairs) / len(pairs) for place in (0, 1)]
    return {
        "sentence": sentence,
        "helped": decisive.helped,
        "harmed": decisive.harmed,
        "metrics": [asdict(one) for one in found],
        "steps": [sorted({pair[place]["steps"] for pair in pairs}) for place in (0, 1)],
        "tokens": tokens,
        "kept": named,
        "adapter": str(folder / TRIALS / kept["trial"] / ADAPTER),
        "kept_sentence": f"kept: {called}, of {kept['trial']}, whose validation loss is the lowest",
    }


def _measure(before: Sequence[float], after: Sequence[float], counts: Sequence[float]) -> Measure:
    return Measure(tuple(before), tuple(after), tuple(map(float, counts)))
