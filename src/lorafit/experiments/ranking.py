"""Which of several candidates is best on the same test records, and which of them cannot be told apart.

Scores, intervals and probabilities come from `bootstrap`. All pairs are compared, and Holm's correction is made over
all of them: the best is chosen by looking at the data, so that comparisons with it alone would call differences real
that are none. Whoever is not significantly worse than the best shares its place. Of accuracy, few records that differ,
and records that all agree, are not told to be surer than they can be (`counted`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Final, Literal, TypeAlias, final

from lorafit.errors import ConfigError, DataError
from lorafit.experiments.bootstrap import Draws, Sample, draw, holm, interval, probability
from lorafit.experiments.counted import Answers, Told, check_several
from lorafit.experiments.pareto import front
from lorafit.experiments.telling import tell

Metric: TypeAlias = Literal["loss", "accuracy"]
METRICS: Final = ("loss", "accuracy")
DEVICE: Final = "peak_device_bytes"
PROCESS: Final = "peak_rss_bytes"
"""Where a seed's peak memory is found: on the accelerator, and of the process."""
COSTS: Final = ("seconds", "memory", "trainable", "file")
"""What a candidate is paid with: training time, peak memory, trained numbers, bytes of the file."""
BASE: Final = "base"
"""The kind of a candidate that was not trained."""


@final
@dataclass(frozen=True)
class Difference:
    """Two candidates beside each other.

    Attributes:
        name: the one.
        other: the other one.
        value: score of the one less that of the other.
        low: lower end of the difference's interval, by itself.
        high: upper end of it.
        probability: of a difference as far from zero where there is none.
        adjusted: the same over all pairs (Holm).
        significant: whether `adjusted` is less than 1 - level.
    """

    name: str
    other: str
    value: float
    low: float
    high: float
    probability: float
    adjusted: float
    significant: bool

    def turned(self) -> Difference:
        """The other one less the one."""
        return Difference(
            self.other,
            self.name,
            -self.value,
            -self.high,
            -self.low,
            self.probability,
            self.adjusted,
            self.significant,
        )


@final
@dataclass(frozen=True)
class Place:
    """One candidate.

    Attributes:
        name: the candidate's.
        kind: adapter, full or base.
        place: 1 is the best.
        tied: whether it is the best or not significantly worse.
        score: mean over its seeds, per prediction.
        low: lower end of the score's interval.
        high: upper end of it.
        seeds: (seed, its score).
        lost: (seed, what went wrong): seeds that gave no model to measure.
        cost: mean seconds and trained numbers of a run, largest peak memory, bytes of the file; None where not known.
        to_best: the difference to the best; None for the best.
        to_base: the difference to the untrained model; None where it was not measured, and for itself.
    """

    name: str
    kind: str
    place: int
    tied: bool
    score: float
    low: float
    high: float
    seeds: tuple[tuple[int, float], ...]
    lost: tuple[tuple[int, str], ...]
    cost: Mapping[str, float | None]
    to_best: Difference | None
    to_base: Difference | None


@final
@dataclass(frozen=True)
class Ranking:
    """What can be said of the candidates.

    Attributes:
        metric: loss (less is better) or accuracy (more is better).
        level: of the intervals.
        resamples: how often records and seeds were drawn.
        records: how many test records there are.
        spread: standard deviation of one seed's score, over all candidates; None where each has one seed.
        degrees: of freedom of `spread`.
        places: the candidates, the best first.
        failed: (candidate, what went wrong): those without any score.
        differences: all pairs.
        fronts: for each cost the candidates that no other one beats in price and score, the cheapest first.
        memory: whose peak the cost "memory" is, `DEVICE` or `PROCESS`.
    """

    metric: Metric
    level: float
    resamples: int
    records: int
    spread: float | None
    degrees: int
    places: tuple[Place, ...]
    failed: tuple[tuple[str, str], ...]
    differences: tuple[Difference, ...]
    fronts: Mapping[str, tuple[str, ...]]
    memory: str = PROCESS

    def sentences(self) -> list[str]:
        """In plain language: the best, its equals, the cheapest of them, what to pick, what cannot be told."""
        return tell(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it, with its sentences; `from_json` reads it back."""
        return asdict(self) | {"sentences": self.sentences()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Ranking:
        """As `to_json` gave it, other keys left alone.

        Raises:
            DataError: it is something else.
        """
        try:
            return cls(
                metric=found["metric"],
                level=found["level"],
                resamples=found["resamples"],
                records=found["records"],
                spread=found["spread"],
                degrees=found["degrees"],
                places=tuple(_place(each) for each in found["places"]),
                failed=tuple((name, reason) for name, reason in found["failed"]),
                differences=tuple(Difference(**each) for each in found["differences"]),
                fronts={cost: tuple(names) for cost, names in found["fronts"].items()},
                memory=found.get("memory", PROCESS),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "this is no ranking",
                found=f"{type(error).__name__}: {error}",
                expected="what Ranking.to_json gives",
                fix="rank the candidates anew: the measurements are still in comparison.json",
            ) from None


def _place(found: Mapping[str, Any]) -> Place:
    return Place(
        **{
            **found,
            "seeds": tuple((seed, score) for seed, score in found["seeds"]),
            "lost": tuple((seed, reason) for seed, reason in found["lost"]),
            "to_best": None if found["to_best"] is None else Difference(**found["to_best"]),
            "to_base": None if found["to_base"] is None else Difference(**found["to_base"]),
        }
    )


@final
@dataclass(frozen=True)
class _Entry:
    """A candidate with at least one measured seed."""

    name: str
    kind: str
    sample: Sample
    seeds: tuple[int, ...]
    lost: tuple[tuple[int, str], ...]
    cost: dict[str, float | None]


def rank(
    candidates: Sequence[Mapping[str, Any]],
    *,
    metric: Metric = "loss",
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Ranking:
    """Ranks candidates by what was measured of them on the same test records.

    Args:
        candidates: as comparison.json holds them.
        metric: loss, per prediction, or accuracy, the share of predictions that are right.
        resamples: how often to draw records and seeds; more are drawn where so many pairs need it.
        level: of the intervals; 1 - level is the probability of one false difference among all pairs.
        seed: of the drawing: the same one gives the same ranking.

    Raises:
        ConfigError: metric, resamples or level is none, or a candidate has no accuracy.
        DataError: candidates were measured on different records, or on one alone, or two have the same name.
    """
    _check(metric, resamples, level, [candidate["name"] for candidate in candidates])
    failed: list[tuple[str, str]] = []
    entries: list[_Entry] = []
    counts: Sequence[float] | None = None
    memory = memory_of(candidates)
    for candidate in candidates:
        kept, lost = _sorted_out(candidate)
        if not kept:
            failed.append((candidate["name"], candidate.get("failed") or _reasons(lost)))
            continue
        for one in kept:
            counts = _same(counts, one["counts"], candidate["name"])
        entries.append(_entry(candidate, kept, lost, metric, memory))
    if counts is None:
        return Ranking(metric, level, resamples, 0, None, 0, (), tuple(failed), (), dict.fromkeys(COSTS, ()))
    pairs = math.comb(len(entries), 2)
    # The least probability that can be told, times all pairs, has to stay below what is asked for.
    resamples = max(resamples, math.ceil(8 * pairs / (1 - level)))
    drawn = draw([entry.sample for entry in entries], counts, resamples=resamples, seed=seed)
    sign = 1 if metric == "loss" else -1
    order = sorted(range(len(entries)), key=lambda at: (sign * float(drawn.scores[at]), entries[at].name))
    answers = Answers.of([entry.sample for entry in entries], counts) if metric == "accuracy" else None
    differences = _differences(entries, order, drawn, answers, level)
    places = [_placed(entries, order, number, drawn, answers, differences, level) for number in range(len(order))]
    return Ranking(
        metric=metric,
        level=level,
        resamples=resamples,
        records=len(counts),
        spread=drawn.spread,
        degrees=drawn.degrees,
        places=tuple(places),
        failed=tuple(failed),
        differences=tuple(differences),
        fronts={cost: _front(places, cost, sign) for cost in COSTS},
        memory=memory,
    )


def _check(metric: str, resamples: int, level: float, names: Sequence[str]) -> None:
    if metric not in METRICS:
        raise ConfigError("no such metric", found=metric, expected=" or ".join(METRICS), fix="metric='loss'")
    if not 0 < level < 1 or resamples < 100:
        raise ConfigError(
            "these intervals cannot be had",
            found=f"level {level}, {resamples} resamples",
            expected="a level between 0 and 1, and at least 100 resamples",
            fix="level=0.95, resamples=10_000",
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError("two candidates have the same name", found=twice[0], fix="name them apart")


def _sorted_out(candidate: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], tuple[tuple[int, str], ...]]:
    """The measured seeds of a candidate, and what became of the others."""
    kept, lost = [], []
    for one in candidate["seeds"]:
        if one["failed"] is not None or not one["losses"]:
            lost.append((one["seed"], one["failed"] or "it was not measured"))
        elif not all(loss is not None and math.isfinite(loss) for loss in one["losses"]):
            lost.append((one["seed"], "its loss on the test records is not finite"))
        else:
            kept.append(one)
    return kept, tuple(lost)


def _reasons(lost: Iterable[tuple[int, str]]) -> str:
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in lost) or "no seed of it was measured"


def _same(before: Sequence[float] | None, now: Sequence[float], name: str) -> Sequence[float]:
    if not math.fsum(now) > 0 or (before is not None and list(before) != list(now)):
        raise DataError(
            "the candidates were not measured on the same test records",
            where=name,
            found=f"{len(now):,} records of {math.fsum(now):,.0f} predictions",
            expected="predictions to measure"
            if before is None
            else f"{len(before):,} records of {math.fsum(before):,.0f} predictions, in the same order",
            fix="measure them anew, in a new folder",
        )
    check_several(now, name)
    return now


def _entry(
    candidate: Mapping[str, Any],
    kept: Sequence[Mapping[str, Any]],
    lost: tuple[tuple[int, str], ...],
    metric: Metric,
    memory: str,
) -> _Entry:
    sums = [one["losses" if metric == "loss" else "correct"] for one in kept]
    if any(each is None for each in sums):
        raise ConfigError(
            "there is no accuracy to rank by",
            where=candidate["name"],
            found="losses alone",
            expected="right predictions of each record",
            fix="metric='loss'",
        )
    base = candidate["kind"] == BASE
    return _Entry(
        name=candidate["name"],
        kind=candidate["kind"],
        sample=Sample(tuple(tuple(each) for each in sums), fixed=base),
        seeds=tuple(one["seed"] for one in kept),
        lost=lost,
        cost={
            "seconds": 0.0 if base else _over(kept, "seconds", mean=True),
            "memory": _over(kept, memory, mean=False),
            "trainable": 0.0 if base else _over(kept, "trainable", mean=True),
            "file": 0.0 if base else _over(kept, "adapter_bytes", mean=True),
        },
    )


def memory_of(candidates: Iterable[Mapping[str, Any]]) -> str:
    """Which memory is a cost: that of the accelerator where one was used (`DEVICE`), else the process's (`PROCESS`)."""
    used = any(seed.get(DEVICE) for candidate in candidates for seed in candidate["seeds"])
    return DEVICE if used else PROCESS


def _over(kept: Sequence[Mapping[str, Any]], key: str, *, mean: bool) -> float | None:
    known = [float(one[key]) for one in kept if one.get(key) is not None]
    if not known:
        return None
    return math.fsum(known) / len(known) if mean else max(known)


def _differences(
    entries: Sequence[_Entry], order: Sequence[int], drawn: Draws, answers: Answers | None, level: float
) -> list[Difference]:
    """Of all pairs, the worse one less the better one."""
    pairs = [(worse, better) for better, worse in combinations(order, 2)]
    told = []
    for a, b in pairs:
        column = drawn.values[:, a] - drawn.values[:, b]
        one = Told(*interval(column, level), probability(column))
        told.append(one if answers is None else answers.apart(a, b, one, level))
    found = []
    for (a, b), one, adjusted in zip(pairs, told, holm([one.probability for one in told]), strict=True):
        value = float(drawn.scores[a] - drawn.scores[b])
        names = (entries[a].name, entries[b].name)
        sure = adjusted < 1 - level
        found.append(Difference(*names, value, one.low, one.high, one.probability, adjusted, sure))
    return found


def _placed(
    entries: Sequence[_Entry],
    order: Sequence[int],
    number: int,
    drawn: Draws,
    answers: Answers | None,
    differences: Sequence[Difference],
    level: float,
) -> Place:
    at = order[number]
    entry = entries[at]
    both = {(one.name, one.other): one for each in differences for one in (each, each.turned())}
    to_best = both.get((entry.name, entries[order[0]].name))
    base = next((each.name for each in entries if each.kind == BASE), None)
    own = Told(*interval(drawn.values[:, at], level))
    if answers is not None:
        own = own.between(answers.shares[at], 0.0, level)
    return Place(
        name=entry.name,
        kind=entry.kind,
        place=number + 1,
        tied=to_best is None or not to_best.significant,
        score=float(drawn.scores[at]),
        low=max(own.low, 0.0),
        high=own.high if answers is None else min(own.high, 1.0),
        seeds=tuple(zip(entry.seeds, drawn.seeds[at], strict=True)),
        lost=entry.lost,
        cost=entry.cost,
        to_best=to_best,
        to_base=None if base is None else both.get((entry.name, base)),
    )


def _front(places: Sequence[Place], cost: str, sign: int) -> tuple[str, ...]:
    """Among what was trained: nothing is cheaper than not training."""
    return front(
        {
            each.name: (price, sign * each.score)
            for each in places
            if each.kind != BASE and (price := each.cost[cost]) is not None
        }
    )
