"""Right answers of few records: no surer than an exact test, and no interval without a width."""

from __future__ import annotations

import json
import math
import random

import pytest

from lorafit.errors import DataError
from lorafit.experiments.counted import MOST, signs
from lorafit.experiments.parts import part
from lorafit.experiments.pseudo_verdict import Measure, difference
from lorafit.experiments.ranking import Ranking, rank


def candidate(name, *seeds, kind="adapter"):
    cost = {"seconds": 1.0, "peak_rss_bytes": 1, "trainable": 9, "adapter_bytes": 9, "curve": [], "failed": None}
    told = [
        {"seed": number, "losses": [1.0] * len(right), "counts": [1] * len(right), "correct": right} | cost
        for number, right in enumerate(seeds)
    ]
    return {"name": name, "kind": kind, "options": {}, "rate": 1e-3, "search": [], "seeds": told, "failed": None}


def two(first, second):
    return rank([candidate("a", *first), candidate("b", *second)], metric="accuracy", resamples=2000)


@pytest.mark.parametrize(("differ", "sure"), [(1, False), (3, False), (5, False), (6, True), (12, True)])
def test_a_handful_of_records_tells_no_more_than_the_sign_test(differ, sure):
    found = two([[1] * 100], [[0] * differ + [1] * (100 - differ)]).differences[0]
    assert found.probability >= 2 * 0.5**differ - 1e-12 and found.significant is sure
    assert (found.low > 0 or found.high < 0) is sure, "the interval says what the probability says"


def test_records_that_all_agree_have_an_interval():
    ranking = two([[1] * 30], [[1] * 27 + [0] * 3])
    best = ranking.places[0]
    assert (best.score, best.high) == (1.0, 1.0)
    assert best.low == pytest.approx(0.025 ** (1 / 30))  # Clopper and Pearson's: 88.4 %
    assert "95 % interval 88.4 % to 100.0 %" in ranking.sentences()[0]
    assert Ranking.from_json(json.loads(json.dumps(ranking.to_json(), allow_nan=False))) == ranking
    none = two([[0] * 30], [[0] * 30])
    assert none.places[0].low == 0 and none.places[0].high == pytest.approx(1 - 0.025 ** (1 / 30))
    same = none.differences[0]
    assert same.low < 0 < same.high and same.low == -same.high and not same.significant


def test_two_records_tell_nothing():
    ranking = two([[1, 1]], [[0, 0]])
    found = ranking.differences[0]
    assert not found.significant and found.low < 0 < found.high and found.probability == 0.5
    assert all(place.tied and place.high - place.low > 0.8 for place in ranking.places)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_one_record_is_refused(metric):
    with pytest.raises(DataError, match="one test record") as caught:
        rank([candidate("a", [1]), candidate("b", [0])], metric=metric)
    assert "at least 2" in str(caught.value)
    with pytest.raises(DataError, match="one test record"):
        difference(metric, [Measure((0.0,), (1.0,), (1.0,))])


def test_one_record_is_refused_before_anything_is_trained(settings, tmp_path):
    with pytest.raises(DataError, match="one test record"):
        part(settings(eval_split=1), tmp_path / "split")
    lone = tmp_path / "lone.jsonl"
    lone.write_text(json.dumps({"question": "what is 3 plus one?", "answer": "it is 4"}) + "\n")
    with pytest.raises(DataError, match="one test record"):
        part(settings(eval_data=str(lone), eval_split=None), tmp_path / "given")


@pytest.mark.parametrize(("records", "differing"), [(100, 0.04), (30, 0.15), (6, 1.0)])
def test_equal_candidates_are_rarely_told_apart(records, differing):
    chance, times, alarms = random.Random(0), 150, 0
    for _ in range(times):
        sides = [chance.random() < 0.5 if chance.random() < differing else None for _ in range(records)]
        alarms += (
            two([[int(side is not True) for side in sides]], [[int(side is not False) for side in sides]])
            .differences[0]
            .significant
        )
    assert alarms / times <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / times)


def test_seeds_are_taken_together_and_a_clear_difference_is_seen():
    good = [[1] * 40 + [0] * 10, [1] * 41 + [0] * 9, [1] * 39 + [0] * 11]
    bad = [[1] * 20 + [0] * 30, [1] * 21 + [0] * 29, [1] * 19 + [0] * 31]
    found = two(good, bad).differences[0]
    assert found.significant and found.name == "b" and found.high < 0


def test_signs_of_unlike_steps():
    assert signs([]) == 1.0
    assert signs([2, 1]) == 0.5 and signs([2, -1]) == 1.0  # of -3, -1, 1, 3
    assert signs([3, 1, 1]) == 0.25 and signs([1] * (MOST + 1)) == 0.0


def test_pseudo_labels_are_judged_alike():
    few = [Measure((0.0,) * 4 + (1.0,) * 20, (1.0,) * 24, (1.0,) * 24)]
    found = difference("accuracy", few)
    assert not found.helped and found.probability == 0.125 and found.low == 0
    many = [Measure((0.0,) * 9 + (1.0,) * 15, (1.0,) * 24, (1.0,) * 24)]
    assert difference("accuracy", many).helped
