"""What a run is judged to be, from held-out losses alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from lorafit.training.verdict import Change, Evaluation, Kind, change, judge

RECORDS = 100


def course(means: Sequence[float], *, spread: float = 0.5, noise: float = 0.05, seed: int = 0) -> list[Evaluation]:
    """Evaluations at steps 0, 10, 20, … whose records are unlike each other, and move by about the same."""
    draw = random.Random(seed)
    own = [draw.gauss(0, spread) for _ in range(RECORDS)]
    counts = [float(draw.randint(1, 40)) for _ in range(RECORDS)]
    return [
        Evaluation.of(
            10 * place,
            [count * (mean + each + draw.gauss(0, noise)) for each, count in zip(own, counts, strict=True)],
            counts,
        )
        for place, mean in enumerate(means)
    ]


@pytest.mark.parametrize(
    ("means", "kind"),
    [
        ([4.0, 3.0, 2.5, 2.2, 2.0], Kind.IMPROVING),
        ([4.0, 3.0, 2.5, 2.49, 2.49, 2.49], Kind.CONVERGED),
        ([4.0, 3.0, 2.5, 2.6, 2.8], Kind.OVERFITTING),
        ([4.0, 4.0, 4.0], Kind.UNCHANGED),
        ([4.0, 4.5, 5.0], Kind.UNCHANGED),
        ([4.0, 3.0], Kind.UNDECIDED),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_kinds(means: list[float], kind: Kind, seed: int) -> None:
    found = judge(course(means, seed=seed))
    assert found is not None and found.kind is kind
    assert found.sentence.startswith(kind.value)


def test_overfitting_names_the_step_and_what_to_do() -> None:
    found = judge(course([4.0, 3.0, 2.5, 2.6, 2.8]), trained=1.9)
    assert found is not None and found.best == 20
    assert "since step 20" in found.sentence and "±" in found.sentence
    assert "1.900" in found.hints[0] and "stop at step 20" in found.hints[1]


def test_a_higher_loss_before_than_after_is_told_apart_from_none() -> None:
    rising, flat = judge(course([4.0, 4.5, 5.0])), judge(course([4.0, 4.0, 4.0], noise=0.0))
    assert rising is not None and "lower the learning rate" in rising.hints[0]
    assert flat is not None and "raise the learning rate" in flat.hints[0]


def test_what_may_lower_the_loss_of_a_run_that_has_converged() -> None:
    means = [4.0, 3.0, 2.5, 2.49, 2.49, 2.49]
    near, far = judge(course(means), trained=2.45), judge(course(means), trained=1.5)
    assert near is not None and "higher r" in near.hints[0]
    assert far is not None and "more data or a lower r" in far.hints[0]


def test_too_few_records_are_told_with_how_many_would_do() -> None:
    evaluations = course([4.0, 3.0, 2.9, 2.89], noise=3.0)
    few = [Evaluation(one.step, one.losses[:20], one.counts[:20]) for one in evaluations]
    found = judge(few)
    assert found is not None and found.kind in (Kind.UNDECIDED, Kind.UNCHANGED)
    one = [Evaluation(each.step, each.losses[:1], each.counts[:1]) for each in course([4.0, 3.0, 2.0, 1.9])]
    single = judge(one)
    assert single is not None and single.kind is not Kind.OVERFITTING


def test_nothing_is_said_of_nothing() -> None:
    assert judge([]) is None
    first = judge(course([4.0]))
    assert first is not None and first.kind is Kind.UNDECIDED


def test_a_run_that_stays_is_rarely_said_to_overfit() -> None:
    """At most 5 % of runs, though the best of ten evaluations is compared with the last one."""
    wrong = 0
    for seed in range(300):
        found = judge(course([4.0] + [2.5] * 10, noise=0.2, seed=seed))
        assert found is not None
        wrong += found.kind is Kind.OVERFITTING
    assert wrong <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)


def looks(number: int, records: int, seed: int, drift: float = 0.0) -> list[Evaluation]:
    """Evaluations of a run that stays where it is, or rises by `drift` from one to the next; each has its own noise."""
    draw = random.Random(seed)
    own = [1 + draw.random() for _ in range(records)]
    return [
        Evaluation.of(place + 1, [each + place * drift + draw.gauss(0, 0.1) for each in own], [1.0] * records)
        for place in range(number)
    ]


def stopped(evaluations: Sequence[Evaluation]) -> int | None:
    """The look at which a run that is looked at after every evaluation is said to overfit."""
    for place in range(1, len(evaluations) + 1):
        found = judge(evaluations[:place])
        if found is not None and found.kind is Kind.OVERFITTING:
            return place
    return None


@pytest.mark.parametrize(("number", "records"), [(30, 200), (30, 5), (10, 2)])
def test_looking_at_every_evaluation_rarely_ends_a_run_that_stays(number: int, records: int) -> None:
    runs = 120
    wrong = sum(stopped(looks(number, records, seed)) is not None for seed in range(runs))
    assert wrong <= 0.05 * runs + 2 * math.sqrt(runs * 0.05 * 0.95)


def test_a_run_that_overfits_is_ended_in_time() -> None:
    """The loss rises by a hundredth of itself from look to look."""
    found = [stopped(looks(20, 200, seed, drift=0.015)) for seed in range(30)]
    assert all(place is not None and place <= 8 for place in found), found


@pytest.mark.parametrize("records", [2, 3, 5, 10])
def test_few_records_do_not_make_overfitting_likelier(records: int) -> None:
    runs = 600
    found = [judge(looks(2, records, seed), None) for seed in range(runs)]
    wrong = sum(one is not None and one.kind is Kind.OVERFITTING for one in found)
    assert wrong <= 0.05 * runs + 2 * math.sqrt(runs * 0.05 * 0.95)


def test_the_verdict_at_the_end_counts_its_own_comparisons_alone() -> None:
    """What a look in passing does not end a run for, its end may be called."""
    evaluations = looks(6, 100, 0, drift=0.01)
    ended, going = judge(evaluations, None), judge(evaluations)
    assert ended is not None and ended.kind is Kind.OVERFITTING
    assert going is not None and going.kind is not Kind.OVERFITTING


@pytest.mark.parametrize("steps", [(1,), (0, 1), (0, 5)])
def test_one_evaluation_in_training_decides_nothing(steps: tuple[int, ...]) -> None:
    own = [1.0 + place / 20 for place in range(20)]
    evaluations = [Evaluation.of(step, [each + (step == 0) for each in own], [1.0] * 20) for step in steps]
    found = judge(evaluations)
    assert found is not None and found.kind is Kind.UNDECIDED and "measured once" in found.sentence


def test_the_error_of_a_change_is_that_of_repeated_draws() -> None:
    """The spread of the change over fresh records, against what each draw says of itself."""
    found = []
    for seed in range(400):
        before, after = course([3.0, 2.9], noise=0.2, seed=seed)
        found.append(change(before, after))
    mean = sum(one.value for one in found) / len(found)
    spread = math.sqrt(sum((one.value - mean) ** 2 for one in found) / (len(found) - 1))
    told = sum(one.error for one in found) / len(found)
    assert mean == pytest.approx(-0.1, abs=0.01)
    assert told == pytest.approx(spread, rel=0.15)


def test_probabilities() -> None:
    assert Change(-1.96, 1.0).probability() == pytest.approx(0.025, abs=1e-3)
    assert (Change(-1.0, 0.0).probability(), Change(1.0, 0.0).probability()) == (0.0, 1.0)
    assert Change(0.0, 0.0).probability() == 0.5
    assert Change(-1.0, math.inf).probability() == 0.5 and Change(-1.0, math.inf, 0).margin == math.inf


@pytest.mark.parametrize(
    ("degrees", "wide", "tail"), [(1, 12.7062, 0.147584), (4, 2.77645, 0.0580583), (99, 1.98422, 0.0241198)]
)
def test_few_records_make_wide_intervals(degrees: float, wide: float, tail: float) -> None:
    """Against a table of Student's t."""
    assert Change(0.0, 1.0, degrees).margin == pytest.approx(wide, rel=1e-5)
    assert Change(-2.0, 1.0, degrees).probability() == pytest.approx(tail, rel=1e-5)
    assert Change(2.0, 1.0, degrees).probability() == pytest.approx(1 - tail, rel=1e-5)
    assert Change(math.inf, 1.0, degrees).probability() == 1
