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
    assert Change(-1.0, math.inf).probability() == 0.5
