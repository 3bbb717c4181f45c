"""The search for d90 on made-up curves, its interval, and the command's experiment on a tiny model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest

from lorafit.errors import ConfigError, TrainingError
from lorafit.experiments.dimension import Measuring, Metric, Projection, Question, Reference, subspace
from lorafit.experiments.dimension_asking import Wanted, ask, begin
from lorafit.experiments.dimension_curve import Measurements, Scored, interval, share_of
from lorafit.experiments.dimension_limits import Limits
from lorafit.experiments.dimension_search import (
    FACTOR,
    NEAR,
    Crossing,
    Plan,
    Search,
    Seen,
    Try,
    crossing,
    leaning,
    monotone,
    next_rate,
)
from lorafit.experiments.dimension_telling import mapping, verdict
from lorafit.experiments.runner import Runner
from lorafit.experiments.trial import Kind, Measured, Result, Trial
from lorafit.layers import Shape
from lorafit.training.config import Settings, resolve
from lorafit.training.models import default_rate

Answer = Callable[[Try], Seen]
PLAN = Plan(start=1000, least=31, most=100_000, guess=0.4, points=5)


def task(centre: float, *, noise: float = 0.0, best: float = 0.4, breaks: float = math.inf) -> Answer:
    """A task of which 90 % is reached at `centre`: scores rise with log d, fall with the distance to the best rate,
    which goes with 1 / sqrt(d), and diverge above `breaks` times that rate."""

    def answer(asked: Try) -> Seen:
        ideal = best * math.sqrt(1000 / asked.d)
        if asked.rate > breaks * ideal:
            return Seen(None, None)
        reached = 1 / (1 + math.exp(-math.log(9) - 1.2 * math.log(asked.d / centre)))
        reached -= 0.05 * math.log(asked.rate / ideal, FACTOR) ** 2
        reached += random.Random(repr(asked)).gauss(0, noise)
        return Seen(1 - reached, reached)

    return answer


def searched(answer: Answer, plan: Plan = PLAN) -> Search:
    """A search to its end; it never asks the same twice."""
    search, asked = Search(plan, 0.9), []
    while wanted := search.ask():
        asked += wanted
        assert len(set(asked)) == len(asked) and len(asked) < 60
        for one in wanted:
            assert plan.least <= one.d <= plan.most
            search.tell(one, answer(one))
    assert len(search.places()) <= plan.points
    return search


@pytest.mark.parametrize("centre", [45, 130, 900, 1100, 7000, 60_000])
def test_finds_where_ninety_percent_are(centre: int) -> None:
    search = searched(task(centre))
    found = search.found()
    assert found.below is not None and found.above is not None and found.below < centre <= found.above
    assert found.d == pytest.approx(centre, rel=0.35)


def test_few_trainings_by_default() -> None:
    plan = Plan(start=1000, least=31, most=100_000, guess=0.4)
    counts = [len(searched(task(centre, noise=0.01), plan).seen) for centre in (130, 500, 3000, 20_000)]
    assert max(counts) <= 15


def test_more_points_come_nearer() -> None:
    search = searched(task(3000), Plan(1000, 31, 100_000, 0.4, points=12))
    found = search.found()
    assert found.above <= NEAR * found.below and found.d == pytest.approx(3000, rel=0.05)


def test_a_warm_start_stays_with_the_best_rate() -> None:
    search = searched(task(20_000, best=4.0))
    assert len(search.rates(1000)) == 4, "until the best one has a worse one on either side"
    for d in search.places()[1:]:
        assert len(search.rates(d)) <= 2
        assert search.best(d) == pytest.approx(3.6 * math.sqrt(1000 / d), rel=0.02)


def test_not_reached_at_the_largest() -> None:
    search = searched(task(10**9))
    assert search.found() == Crossing(PLAN.most, None, None)
    assert set(search.scores(PLAN.most)) == {0, 1, 2}, "how sure that is, further seeds tell"


def test_reached_at_the_smallest_already() -> None:
    search = searched(task(2))
    assert search.found() == Crossing(None, PLAN.least, float(PLAN.least))
    assert set(search.scores(PLAN.least)) == {0, 1, 2}


def test_one_d_alone() -> None:
    search = searched(task(400), Plan(1000, 1000, 1000, 0.4))
    assert search.places() == [1000] and search.found().above == 1000


@pytest.mark.parametrize("seed", range(8))
def test_noise_that_turns_points_around(seed: int) -> None:
    plan = Plan(1000, 31, 100_000, 0.4, points=8, seeds=(seed, seed + 100, seed + 200))
    search = searched(task(2000, noise=0.03), plan)
    found = search.found()
    assert found.d is not None and 500 < found.d < 8000
    for d in (found.below, found.above):
        assert d is not None and len(search.scores(d)) == 3, "further seeds where the threshold is"


def test_the_same_questions_after_a_kill() -> None:
    """Answers that are there already do not change what is asked next: a search told again asks the same."""
    answer, first, again = task(3000, noise=0.02), [], []
    for asked in (first, again):
        search = Search(PLAN, 0.9)
        while wanted := search.ask():
            asked += wanted
            for one in reversed(wanted):  # in whatever order they end
                search.tell(one, answer(one))
    assert first == again


def test_diverged_rates_go_down() -> None:
    search = searched(task(900, best=0.4, breaks=0.2))
    assert all(search.best(d) is not None for d in search.places())
    assert None in search.rates(1000).values()


def test_a_d_at_which_nothing_trains_is_left_out() -> None:
    plain = task(3000)
    search = searched(lambda asked: Seen(None, None) if 2000 < asked.d < 4000 else plain(asked))
    dead = [d for d in search.places() if search.best(d) is None]
    assert dead == [2828] and not search.scores(2828)
    assert len([d for d in search.places() if 1000 < d < 8000]) > 1
    assert 1000 <= search.found().below < search.found().above <= 8000


def test_nothing_trains_at_all() -> None:
    search = searched(lambda _: Seen(None, None))
    assert search.found() == Crossing(None, None, None)


def test_a_diverged_seed_is_no_score() -> None:
    plain = task(3000)
    search = searched(lambda asked: Seen(None, None) if asked.seed == 1 else plain(asked))
    assert set(search.scores(search.found().above)) == {0, 2}


def test_monotone_is_the_nearest_rising_curve() -> None:
    assert monotone([3.0, 1.0], [1, 3]) == [1.5, 1.5]
    assert monotone([], []) == []
    assert monotone([1.0, 2.0, 3.0], [1, 1, 1]) == [1.0, 2.0, 3.0]


def test_crossing_between_pooled_points() -> None:
    found = crossing([10, 100, 1000], [0.0, 1.0, 0.9], [1, 1, 1], 0.95)
    assert found == Crossing(10, 100, pytest.approx(100))


@pytest.mark.parametrize(
    ("tried", "lean", "expected"),
    [
        ({}, 1, 1.0),
        ({1.0: 0.5}, 1, 3.0),
        ({1.0: 0.5}, -1, 0.333),
        ({1.0: 0.5, 3.0: 0.4}, 1, 9.0),
        ({1.0: 0.5, 3.0: 0.6}, 1, 0.333),
        ({1.0: None}, 1, 0.333),
        ({1.0: 0.5, 3.0: None}, 1, 0.333),
        ({1.0: 0.5, 3.0: 0.6, 0.333: 0.7}, 1, None),
        ({1.0: 0.5, 3.0: 0.4, 9.0: 0.3}, 1, 27.0),  # it still rises
        ({1.0: 0.5, 0.333: 0.4, 0.111: 0.3}, -1, 0.037),
        ({1.0: 0.5, 3.0: 0.4, 9.0: 0.3, 27.0: 0.31}, 1, None),
        ({1.0: 0.9, 3.0: 0.8, 9.0: 0.7, 27.0: 0.6, 81.0: 0.5, 243.0: 0.4}, 1, None),  # enough is enough
    ],
)
def test_rates_climb(tried: dict[float, float | None], lean: int, expected: float | None) -> None:
    assert next_rate(tried, 1.0, lean, 3) == expected


def test_a_warm_start_that_was_right_is_not_climbed_away_from() -> None:
    assert next_rate({1.0: 0.5, 3.0: 0.6}, 1.0, 1, 2) is None
    assert next_rate({1.0: 0.5, 3.0: 0.4}, 1.0, 1, 2) == 9.0
    assert next_rate({1.0: 0.5}, 1.0, 1, 1) is None


def test_rates_that_did_harm_go_down_whatever_lies_above() -> None:
    assert next_rate({1.0: 0.8}, 1.0, 1, 3, untrained=0.7) == 0.333
    assert next_rate({1.0: 0.8, 0.333: 0.75, 0.111: 0.71}, 1.0, 1, 3, untrained=0.7) == 0.037  # a rescue
    assert next_rate({1.0: 0.8, 0.333: 0.6}, 1.0, 1, 3, untrained=0.7) == 0.111
    assert next_rate({1.0: 0.8, 0.333: 0.75, 0.111: 0.6}, 1.0, 1, 3, untrained=0.7) == 0.037  # it still rises
    assert next_rate({1.0: 0.8, 0.333: 0.75, 0.111: 0.6, 0.037: 0.65}, 1.0, 1, 3, untrained=0.7) is None
    assert next_rate({1.0: 0.8}, 1.0, 1, 3) == 3.0


def test_a_d_whose_neighbours_rate_does_harm_there_is_not_given_up() -> None:
    """At large d the good rates may be lower than the neighbour's times sqrt(d / d'), where steps of it do harm."""
    plain = task(20_000)

    def answer(asked: Try) -> Seen:
        ideal = 0.4 * math.sqrt(1000 / asked.d) / (9 if asked.d > 30_000 else 1)
        if asked.rate > 3 * ideal:
            return Seen(1.2, 0.0)  # worse than no training
        return plain(Try(asked.d, asked.rate * 9 if asked.d > 30_000 else asked.rate, asked.seed))

    search = Search(PLAN, 0.9, untrained=1.0)
    while wanted := search.ask():
        for one in wanted:
            search.tell(one, answer(one))
    found = search.found()
    assert found.d is not None and 8000 < found.d < 60_000
    assert min(answer.validation or 0 for one, answer in search.seen.items() if one.d > 30_000) < 1.0


def test_the_side_on_which_a_better_rate_may_lie() -> None:
    assert leaning({1.0: 0.5}) == 1
    assert leaning({1.0: 0.4, 3.0: 0.5}) == -1
    assert leaning({1.0: 0.4, 3.0: 0.5, 0.3: 0.6}) == 1
    assert leaning({1.0: 0.4, 3.0: None}) == -1


# The interval ------------------------------------------------------------------


def drawn(means: float, spread: float, chance: np.random.Generator, hard: np.ndarray) -> Scored:
    """A model that is right on each record with a probability about its mean, moved by its seed."""
    right = hard < means + chance.normal(0, spread)
    return Scored(right.astype(np.float64), np.ones(len(hard)))


def measured(seed: int, spread: float = 0.01, records: int = 400) -> Measurements:
    """A base of 0.5, a reference of 0.9, and a curve that passes 0.86 at d = 1000."""
    chance = np.random.default_rng(seed)
    hard = chance.random(records)
    curve = {125: 0.70, 354: 0.79, 1000: 0.86, 8000: 0.89}
    seeds = {125: 1, 354: 3, 1000: 3, 8000: 1}
    return Measurements(
        [drawn(0.5, 0, chance, hard)],
        [drawn(0.9, spread, chance, hard) for _ in range(3)],
        {d: [drawn(value, spread, chance, hard) for _ in range(seeds[d])] for d, value in curve.items()},
    )


def test_the_interval_covers_what_is_true() -> None:
    hits, runs = 0, 60
    for seed in range(runs):
        found = interval(measured(seed), resamples=300)
        hits += (found.low or 0) <= 1000 <= (found.high or math.inf)
    assert hits >= 0.9 * runs


def test_the_interval_is_the_same_each_time_and_wider_with_unlike_seeds() -> None:
    same = interval(measured(1), resamples=300)
    assert same == interval(measured(1), resamples=300)
    assert same.seeds == 2 + 2 + 2 and same.gained == 1
    narrow, wide = (interval(measured(3, spread), resamples=300).kept[354] for spread in (0.0, 0.05))
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_ends_beyond_what_was_tried_are_open() -> None:
    chance = np.random.default_rng(0)
    hard = chance.random(300)
    low, high = (drawn(value, 0, chance, hard) for value in (0.5, 0.9))
    never = interval(Measurements([low], [high], {100: [low], 1000: [low]}), resamples=100)
    assert (never.low, never.high, never.seeds) == (None, None, 0)
    always = interval(Measurements([low], [high], {100: [high]}), resamples=100)
    assert (always.low, always.high) == (None, None) and always.kept[100] == (1.0, 1.0)


def test_no_gain_keeps_nothing() -> None:
    flat = Scored(np.ones(10), np.ones(10))
    found = interval(Measurements([flat], [flat], {100: [flat]}), resamples=50)
    assert found.gained == 0 and math.isnan(found.kept[100][0])


def test_both_definitions_of_ninety_percent() -> None:
    chance = np.random.default_rng(0)
    one = drawn(0.5, 0, chance, chance.random(10))
    gain, whole = (Measurements([one], [one], {}, gain=kind) for kind in (True, False))
    assert gain.threshold(0.5, 0.9) == pytest.approx(0.86) and whole.threshold(0.5, 0.9) == pytest.approx(0.81)
    assert share_of(gain, 0.5, 0.9, 0.86) == pytest.approx(0.9) == share_of(whole, 0.5, 0.9, 0.81)


# The experiment, with made-up trials --------------------------------------------


RECORDS = 60


@final
class Pretended(Runner):
    """Gives results without training: losses by what is trained, each record with its own difficulty."""

    def __init__(self, loss: Callable[[Trial], float | None], correct: bool = False) -> None:
        self.loss, self.correct = loss, correct
        self.asked: list[str] = []

    def run(self, trials: Sequence[Trial]) -> Iterator[Result]:
        for trial in trials:
            self.asked.append(trial.name)
            loss = self.loss(trial)
            measured = None
            if loss is not None:
                hard = [0.5 + (n + 0.5) / RECORDS for n in range(RECORDS)]
                right = tuple(float(n >= RECORDS * loss / 4) for n in range(RECORDS)) if self.correct else None
                measured = Measured(tuple(loss * each for each in hard), (1,) * RECORDS, right)
            failed = "the loss is not finite at step 3" if measured is None else None
            steps = 0 if trial.kind is Kind.BASE else 10
            yield Result(trial.name, steps, 100, 1000, 20.0, 30.0, None, None, loss, (), measured, failed)


def losses(trial: Trial) -> float:
    """4 untrained, 2 after full fine-tuning, and 90 % of that at d = 2,000; the usual rates are the best."""
    if trial.kind is Kind.BASE:
        return 4.0
    rate = trial.settings.training["learning_rate"]
    if trial.kind is Kind.FULL:
        return 2.0 + 0.1 * abs(math.log(rate / 1e-4)) + 0.001 * (trial.settings.seed % 3)
    d = trial.settings.method_options["d"]
    kept = 1 / (1 + math.exp(-math.log(9) - math.log(d / 2000)))
    return 4 - 2 * kept + 0.05 * abs(math.log(rate * math.sqrt(d / 1000) / 0.4)) + 0.001 * (trial.settings.seed % 3)


def measuring(runner: Runner, *, head: bool = False, **options: Any) -> Measuring:
    """A question about a model of 24 layers of 64 × 64 numbers."""
    shared = resolve([("a test", {"learning_rate": 1.0})])
    reference = Reference("full", "full fine-tuning", Kind.FULL, shared, 1e-4)
    given = {"projection": Projection.SAID, "plan": PLAN, **options}
    question = Question(shared, "test.jsonl", reference=reference, **given)
    limits = Limits((Shape(64, 64),) * 24, 24, 64, head)
    return Measuring(question, limits, runner, lambda _: None, lambda found, result: None)


def told_of(found: Measuring) -> dict[str, Any]:
    told = mapping(found, command="lorafit dimension", complete=True, data={})
    json.dumps(told, allow_nan=False)
    return told


def test_an_experiment_from_end_to_end() -> None:
    runner = Pretended(losses)
    found = measuring(runner)
    found.run()
    told = told_of(found)
    assert len(set(runner.asked)) == len(runner.asked) <= found.expected()
    assert runner.asked[:4] == [
        "base/seed-0",
        *(f"full/rate-{rate}/seed-0" for rate in ("1.00e-04", "3.00e-04", "3.33e-05")),
    ]
    assert (
        told["base"] == pytest.approx(4)
        and told["full"] == pytest.approx(2.001)
        and told["threshold"] == pytest.approx(2.2009)
    )
    low, high = told["interval"]
    assert low <= told["d90"] <= high and 1000 < told["d90"] < 4000
    assert [point["d"] for point in told["points"]] == sorted(point["d"] for point in told["points"])
    assert verdict(told) == f"d90 = {told['d90']:,} (SAID), 95 % interval {low:,} to {high:,}"
    first, last = (told["points"][at]["d"] for at in (0, -1))
    assert verdict(told | {"interval": None}).endswith(f"95 % interval wider than the d tried, {first:,} to {last:,}")
    assert verdict(told | {"interval": [None, 9]}).endswith(f"95 % interval below {first:,} to 9")
    assert "lowers the loss by 90 % of what full fine-tuning lowers it by" in told["said"][0]
    assert told["step_seconds"] == {"full": 2.0, "said": 2.0} and told["complete"]


def test_another_process_asks_the_same() -> None:
    runners = Pretended(losses), Pretended(losses)
    for runner in runners:
        measuring(runner).run()
    assert runners[0].asked == runners[1].asked


def test_the_budget_ends_the_search_and_says_so() -> None:
    runner = Pretended(losses)
    found = measuring(runner, budget=30.0 * 12)
    found.run()
    told = told_of(found)
    assert len(runner.asked) == 12 and told["spent"]
    assert any("a larger --budget goes on" in line for line in told["said"])
    longer = Pretended(losses)
    measuring(longer, budget=30.0 * 14).run()
    assert longer.asked[:12] == runner.asked and len(longer.asked) == 14


def test_a_budget_too_small_for_the_reference() -> None:
    with pytest.raises(TrainingError, match="the budget does not reach for the reference"):
        measuring(Pretended(losses), budget=100.0).run()


def test_a_reference_that_gains_nothing() -> None:
    runner = Pretended(lambda trial: 4.0 if trial.kind is Kind.BASE else 4.2)
    found = measuring(runner)
    found.run()
    told = told_of(found)
    assert not told["points"] and all(not name.startswith("said") for name in runner.asked)
    assert verdict(told).startswith("no d90: full fine-tuning gains nothing over the untrained model (loss 4.0000 →")


def test_a_reference_that_diverges() -> None:
    with pytest.raises(TrainingError, match="full fine-tuning diverged at every rate"):
        measuring(Pretended(lambda trial: 4.0 if trial.kind is Kind.BASE else None)).run()


def test_diverged_trials_are_results() -> None:
    def broken(trial: Trial) -> float | None:
        high = trial.kind is not Kind.BASE and trial.settings.training["learning_rate"] > 0.5
        return None if high else losses(trial)

    found = measuring(Pretended(broken))
    found.run()
    told = told_of(found)
    assert told["d90"] is not None
    assert any(tried["failed"] for point in told["points"] for tried in point["search"])


@pytest.mark.parametrize(
    ("kept", "most", "words"),
    [
        (0.5, 90_000, "d90 is more than 90,000 (SAID), which keeps 50 %; a larger --max-d goes on"),
        (0.5, 24 * 64 * 64, "d90 is more than 98,304 (SAID), which keeps 50 %; more there are not in these layers"),
        (0.99, 90_000, "d90 is at most 31 (SAID)"),
    ],
)
def test_beyond_what_can_be_tried(kept: float, most: int, words: str) -> None:
    def flat(trial: Trial) -> float:
        return losses(trial) if trial.kind is not Kind.ADAPTER else 4 - 2 * kept

    found = measuring(Pretended(flat), plan=replace(PLAN, most=most))
    found.run()
    told = told_of(found)
    assert told["d90"] is None and (told["above"] == 31) is (told["below"] is None)
    assert verdict(told).startswith(words)


def test_accuracy_by_both_definitions() -> None:
    found = measuring(Pretended(losses, correct=True), head=True)
    found.run()
    told = told_of(found)
    assert told["metric"] == "accuracy" and told["base"] < told["threshold"] < told["full"]
    assert [name for name in found.results if name.startswith("base")] == [f"base/seed-{n}" for n in range(5)]
    text = " ".join(told["said"])
    assert "raises the accuracy by 90 %" in text and "as in both papers" in text and "head" in text
    papers = measuring(Pretended(losses, correct=True), gain=False)
    papers.run()
    assert told_of(papers)["threshold"] == pytest.approx(0.9 * told_of(papers)["full"])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"metric": Metric.ACCURACY}, "no accuracy of these data"), ({"gain": False}, "a share of a loss is no measure")],
)
def test_metrics_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        measuring(Pretended(losses), **options).run()


def test_a_new_head_does_not_have_the_rate_of_a_subspace(llama: Path, tmp_path: Path) -> None:
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(40)]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flat = {"model": str(llama), "data": str(tmp_path / "films.jsonl"), "output_dir": str(tmp_path / "run")}
    for given, expected in (({}, default_rate(32)), ({"full_learning_rate": 0.02}, 0.02)):
        asked = ask(resolve([("a test", {**flat, **given})]), Wanted(), tmp_path / "run", lambda _: None).question
        assert asked.plan.guess > 4 * default_rate(32)
        trial = subspace(asked.settings, asked.plan.start, asked.projection)
        assert trial.full_learning_rate == expected and "learning_rate" not in trial.training


def test_a_folder_is_one_experiment_s(tmp_path: Path) -> None:
    def settings(folder: str, **more: Any) -> Settings:
        return resolve([("a test", {"output_dir": str(tmp_path / folder), **more})])

    first, new = settings("new", max_steps=5), tmp_path / "new"
    assert begin(first, Wanted()) == begin(first, Wanted()) == new
    begin(settings("new", max_steps=6), Wanted())  # nothing was trained yet
    begin(settings("new", max_steps=6, learning_rate=1e-3), Wanted())  # where the search begins, no more
    (new / "trials" / "base" / "seed-0").mkdir(parents=True)
    (new / "trials" / "base" / "seed-0" / "trial.json").write_text("{}")
    with pytest.raises(ConfigError, match="max_steps was 6"):
        begin(first, Wanted())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        begin(settings("other"), Wanted())
    assert not (tmp_path / "other" / "begun.json").exists()
