"""Which subspace to try next: the search for d90 as a pure function of what was measured.

Outwards from the first d by a constant factor until the threshold lies between two of them, then bisection in log d;
at each d a few learning rates, begun where the nearest d had its best one; at last further seeds at the two d on either
side of the threshold. What is measured is noisy: whether a d reaches the threshold is read off the non-decreasing curve
that lies nearest to all of them (`monotone`), not off its own score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, final

FACTOR = 3.0
"""From one learning rate to the next."""
STEP = 8.0
"""From one d to the next until the threshold lies between two."""
NEAR = 1.25
"""The search ends where the d on either side of the threshold are no farther apart than this factor."""
FURTHER = 3
"""Rates beyond the planned number: as long as each is better than the one before it, or none was of any use."""


class Try(NamedTuple):
    """A training in a subspace."""

    d: int
    rate: float
    seed: int


@final
@dataclass(frozen=True)
class Seen:
    """What came of it.

    Attributes:
        validation: the loss that chooses the rate; None where training diverged.
        score: on the test part, higher is better; None where training diverged.
    """

    validation: float | None
    score: float | None


@final
@dataclass(frozen=True)
class Plan:
    """How far a search may go.

    Attributes:
        start: the first d.
        least, most: the smallest and the largest d.
        guess: a learning rate for `start`.
        points: so many d at most.
        rates: learning rates at the first d; one less at the others, which begin at their neighbour's.
        seeds: the first is that of the search; the others follow at the d on either side of the threshold.
    """

    start: int
    least: int
    most: int
    guess: float
    points: int = 4
    rates: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)


@final
@dataclass(frozen=True)
class Crossing:
    """Where the curve passes the threshold.

    Attributes:
        below: the largest d that does not reach it; None where the smallest does.
        above: the smallest d that reaches it; None where none does.
        d: the place between them, in log d; None where there is no such place.
    """

    below: int | None
    above: int | None
    d: float | None


def monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing values nearest to these by weighted squares: pool adjacent violators (Ayer et al. 1955).

    >>> monotone([1.0, 3.0, 2.0, 4.0], [1, 1, 1, 1])
    [1.0, 2.5, 2.5, 4.0]
    """
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while blocks and blocks[-1][0] >= value:
            before, heavy, many = blocks.pop()
            value = (before * heavy + value * weight) / (heavy + weight)
            weight, count = weight + heavy, count + many
        blocks.append((value, weight, count))
    return [value for value, _, count in blocks for _ in range(count)]


def crossing(places: Sequence[int], scores: Sequence[float], weights: Sequence[float], threshold: float) -> Crossing:
    """Where the curve through these scores passes the threshold, straight in log d between two places.

    Args:
        places: the d, ascending.
        scores: higher is better.
        weights: of the scores: how many trainings each is the mean of.
        threshold: the score to reach.

    >>> crossing([100, 1000, 10000], [0.5, 0.8, 1.0], [1, 1, 1], 0.9)
    Crossing(below=1000, above=10000, d=3162.2776601683795)
    """
    curve = monotone(scores, weights)
    first = next((i for i, value in enumerate(curve) if value >= threshold), None)
    if first is None:
        return Crossing(places[-1] if places else None, None, None)
    if first == 0:
        return Crossing(None, places[0], float(places[0]))
    low, high = places[first - 1], places[first]
    share = (threshold - curve[first - 1]) / (curve[first] - curve[first - 1])
    return Crossing(low, high, low * (high / low) ** share)


def next_rate(
    tried: Mapping[float, float | None], guess: float, lean: int, most: int, untrained: float = math.inf
) -> float | None:
    """The next learning rate of a climb by `FACTOR`; None where it is over.

    Args:
        tried: rate → validation loss, None where training diverged; in the order in which they were tried.
        guess: the first one.
        lean: the side on which the second one lies, 1 for higher and -1 for lower.
        most: so many in all. `FURTHER` more follow while the climb still rises: no d is to look worse than another
            one because its best rate lies farther from its guess. Of one rate there is no climb.
        untrained: the validation loss without training. Steps that end above it were too long, whatever lies beyond.
    """
    if not tried:
        return rounded(guess)
    good = {rate: loss for rate, loss in tried.items() if loss is not None and loss < untrained}
    if not good:
        return rounded(min(tried) / FACTOR) if len(tried) < most + FURTHER else None
    best = min(good, key=lambda rate: (good[rate], rate))
    higher, lower = any(rate > best for rate in tried), any(rate < best for rate in tried)
    rises = most > 1 and best != next(iter(tried))
    if (higher and lower) or len(tried) >= most + (FURTHER if rises else 0):
        return None
    up = lower or (not higher and lean > 0)
    return rounded(best * FACTOR if up else best / FACTOR)


def rounded(rate: float) -> float:
    """A rate that its name in three digits says exactly, so that a trial of that name is this one."""
    return float(f"{rate:.2e}")


def leaning(tried: Mapping[float, float | None]) -> int:
    """The side of the best rate on which a better one may lie: 1 for higher, -1 for lower."""
    losses = {rate: math.inf if loss is None else loss for rate, loss in tried.items()}
    best = min(losses, key=lambda rate: (losses[rate], rate))
    higher = [loss for rate, loss in losses.items() if rate > best]
    lower = [loss for rate, loss in losses.items() if rate < best]
    if higher and lower:
        return 1 if min(higher) < min(lower) else -1
    return 1 if not higher else -1


@final
@dataclass
class Search:
    """The search itself: `ask` gives what to train next, `tell` takes what came of it.

    What it asks depends on the answers alone, in whatever order those of one question arrive: asked again from the
    start, it asks the same.

    Attributes:
        plan: how far it may go.
        threshold: the score to reach.
        untrained: the validation loss without training.
        seen: all answers so far.
    """

    plan: Plan
    threshold: float
    untrained: float = math.inf
    seen: dict[Try, Seen] = field(default_factory=dict)

    def tell(self, asked: Try, answer: Seen) -> None:
        """Takes an answer."""
        self.seen[asked] = answer

    def ask(self) -> tuple[Try, ...]:
        """What to train next, in any order; nothing when the search is over."""
        for d in self.places():  # a d whose rates are not settled
            rate = self._rate(d)
            if rate is not None:
                return (Try(d, rate, self.plan.seeds[0]),)
        fresh = self._place()
        if fresh is not None:
            rate = self._rate(fresh)
            assert rate is not None, "a new d has no rate yet"
            return (Try(fresh, rate, self.plan.seeds[0]),)
        found = self.found()
        wanted = [
            Try(d, rate, seed)
            for d in (found.below, found.above)
            if d is not None and (rate := self.best(d)) is not None
            for seed in self.plan.seeds[1:]
        ]
        return tuple(one for one in wanted if one not in self.seen)

    def places(self) -> list[int]:
        """The d that were tried, ascending."""
        return sorted({one.d for one in self.seen})

    def rates(self, d: int) -> dict[float, float | None]:
        """Rate → validation loss, of the first seed, in the order in which they were asked for."""
        return {
            one.rate: answer.validation
            for one, answer in self.seen.items()
            if one.d == d and one.seed == self.plan.seeds[0]
        }

    def best(self, d: int) -> float | None:
        """The rate of the lowest validation loss; None where all diverged."""
        good = {rate: loss for rate, loss in self.rates(d).items() if loss is not None}
        return min(good, key=lambda rate: (good[rate], rate)) if good else None

    def scores(self, d: int) -> dict[int, float]:
        """Seed → score, at the best rate; seeds that diverged have none."""
        rate = self.best(d)
        found = {one.seed: answer.score for one, answer in self.seen.items() if one.d == d and one.rate == rate}
        return {seed: score for seed, score in found.items() if score is not None}

    def found(self) -> Crossing:
        """Where the threshold is passed, as far as is known."""
        scores = {d: held for d in self.places() if (held := self.scores(d))}
        means = [math.fsum(held.values()) / len(held) for held in scores.values()]
        return crossing(list(scores), means, [len(held) for held in scores.values()], self.threshold)

    def _rate(self, d: int) -> float | None:
        plan, others = self.plan, [one for one in self.places() if one != d and self.best(one) is not None]
        tried = self.rates(d)
        if not others:
            return next_rate(tried, plan.guess * math.sqrt(plan.start / d), 1, plan.rates, self.untrained)
        neighbour = min(others, key=lambda one: (abs(math.log(one / d)), one))
        best = self.best(neighbour)
        assert best is not None
        lean = leaning(self.rates(neighbour))
        return next_rate(tried, best * math.sqrt(neighbour / d), lean, max(1, plan.rates - 1), self.untrained)

    def _place(self) -> int | None:
        """The next d; None where the search has come near enough or its points are spent."""
        plan, places = self.plan, self.places()
        if not places:
            return plan.start
        if len(places) >= plan.points:
            return None
        found = self.found()
        if found.above is None:
            return self._outwards(min(plan.most, round(places[-1] * STEP)))
        if found.below is None:
            return self._outwards(max(plan.least, round(places[0] / STEP)))
        if found.above <= NEAR * found.below:
            return None
        # Between the two there may be d at which every rate diverged: the widest gap is halved.
        inner = [d for d in places if found.below <= d <= found.above]
        low, high = max(pairwise(inner), key=lambda pair: pair[1] / pair[0])
        return self._outwards(round(math.sqrt(low * high)))

    def _outwards(self, d: int) -> int | None:
        return None if d in self.places() else d
