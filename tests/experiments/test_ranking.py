"""Candidates in order, who shares a place, what is said of it, and that failures are named."""

from __future__ import annotations

import json
import math
import random

import pytest

from lorafit.errors import ConfigError, DataError
from lorafit.experiments.advice import advise
from lorafit.experiments.pareto import front
from lorafit.experiments.ranking import DEVICE, Ranking, rank

RECORDS = 50


def seed(number, loss, *, noise=0.01, records=RECORDS, failed=None, seconds=30.0, trainable=1000, file=4096, **more):
    chance = random.Random(f"{loss} {number}")
    hard = random.Random(7)
    counts = [10 + at % 7 for at in range(records)]
    losses = [count * (loss + hard.gauss(0, 0.5) + chance.gauss(0, noise)) for count in counts]
    return {
        "seed": number,
        "trial": f"x/seed-{number}",
        "validation": loss,
        "losses": None if failed else losses,
        "counts": None if failed else counts,
        "correct": None if failed else [count * (3 - loss) / 3 for count in counts],
        "steps": 20,
        "tokens": 4000,
        "seconds": seconds,
        "total_seconds": seconds + 9,
        "peak_rss_bytes": 2**30,
        "trainable": trainable,
        "adapter_bytes": file,
        "curve": [[10, loss + 0.1], [20, loss]],
        "failed": failed,
    } | more


def candidate(name, losses, *, kind="adapter", failed=None, **more):
    seeds = [seed(number, loss, **more) for number, loss in enumerate(losses)]
    options = {"method": name}
    return {
        "name": name,
        "kind": kind,
        "options": options,
        "rate": 1e-3,
        "search": [],
        "seeds": seeds,
        "failed": failed,
    }


@pytest.fixture
def usual():
    return [
        candidate("base", [3.0], kind="base", noise=0.0),
        candidate("lora", [1.500, 1.503, 1.497], seconds=30.0, file=9000),
        candidate("dora", [1.499, 1.502, 1.496], seconds=60.0),
        candidate("vera", [1.90, 1.91, 1.89], trainable=10),
    ]


def test_the_best_its_equals_and_the_rest(usual):
    ranking = rank(usual)
    assert [place.name for place in ranking.places] == ["dora", "lora", "vera", "base"]
    assert [place.tied for place in ranking.places] == [True, True, False, False]
    assert [place.place for place in ranking.places] == [1, 2, 3, 4]
    best, lora, vera, base = ranking.places
    assert best.to_best is None and lora.to_best.other == "dora" and not lora.to_best.significant
    assert vera.to_best.value == pytest.approx(0.4, abs=0.01)
    assert vera.to_best.low < 0.4 < vera.to_best.high and vera.to_best.significant
    assert base.to_base is None and lora.to_base.value == pytest.approx(-1.5, abs=0.01)
    assert lora.to_base.low < -1.5 < lora.to_base.high
    assert lora.low < lora.score < lora.high
    assert len(ranking.differences) == 6
    assert ranking.degrees == 6 and 0.001 < ranking.spread < 0.02
    assert ranking.records == RECORDS


def test_the_sentences(usual):
    told = rank(usual).sentences()
    text = " ".join(told)
    assert told[0].startswith("dora has the lowest loss on the 50 test records: ")
    assert "Against the untrained model that is -1.50" in told[0]
    assert told[1].startswith("Not significantly worse: lora (+0.0") and "may be luck" in told[1]
    assert told[2].startswith("Significantly worse: vera (+0.4") and "the untrained model (+1.5" in told[2]
    assert "lora has the least training time (30 s)" in told[3] and "dora has the smallest file (4 KiB)" in told[3]
    assert told[4] == "Pick lora: it is not significantly worse than dora and trains in 30 s instead of 60 s."
    assert "each has 3 seeds" in text and "cannot be told apart here" in text
    assert told[-1].startswith("All of this holds for this model, this data and this budget")


def test_a_twentieth_of_the_time_is_not_worth_it(usual):
    usual[2] = candidate("dora", [1.499, 1.502, 1.496], seconds=30.5)
    assert "Pick dora." in rank(usual).sentences()


def test_one_that_may_be_no_better_than_none_is_not_picked_for_its_speed():
    """It shares the best one's place only because its own is uncertain."""
    wild = candidate("wild", [1.44, 1.64, 1.84], seconds=1.0)
    sure = [candidate(f"sure{at}", [1.50, 1.51, 1.49], seconds=30.0) for at in range(6)]
    ranking = rank([candidate("base", [1.95], kind="base", noise=0.0), *sure, wild])
    place = next(place for place in ranking.places if place.name == "wild")
    assert place.tied and not place.to_base.significant and ranking.places[0].to_base.significant
    assert any(sentence.startswith("Pick sure") for sentence in ranking.sentences())


def test_a_fast_one_that_only_the_correction_calls_equal_is_named_and_not_picked():
    """Its own interval leaves out zero: enough to keep from recommending it, not enough to call it worse."""
    sure = [candidate(f"sure{at}", [1.50, 1.51, 1.49], seconds=30.0, noise=0.05) for at in range(6)]
    quick = candidate("quick", [1.54, 1.55, 1.53], seconds=3.0, noise=0.05)
    ranking = rank([candidate("base", [1.95], kind="base", noise=0.0), *sure, quick])
    place = next(place for place in ranking.places if place.name == "quick")
    assert place.tied and place.to_best.low > 0 and not place.to_best.significant
    text = " ".join(ranking.sentences())
    assert "Pick sure0. quick trains in 3 s, but is probably worse than sure0 (+0.0370, interval +0.0097" in text
    assert "only the correction for 28 pairs lets it share that place" in text
    assert advise({"candidates": [*sure, quick]})[0].startswith("Method: sure0")


def test_it_reads_back_what_it_wrote(usual):
    for each in usual:
        for one in each["seeds"]:
            one[DEVICE] = 2**31
    ranking = rank(usual)
    assert ranking.memory == DEVICE
    written = json.loads(json.dumps(ranking.to_json(), allow_nan=False))
    assert Ranking.from_json(written) == ranking
    assert written["sentences"] == ranking.sentences()
    del written["places"]
    with pytest.raises(DataError, match="no ranking"):
        Ranking.from_json(written)


def test_the_same_numbers_give_the_same_ranking_in_any_order(usual):
    first, again = rank(usual), rank(usual)
    assert first == again
    assert [place.name for place in rank(usual[::-1]).places] == [place.name for place in first.places]


def test_accuracy_is_better_when_it_is_higher(usual):
    ranking = rank(usual, metric="accuracy")
    assert [place.name for place in ranking.places] == ["dora", "lora", "vera", "base"]
    assert ranking.places[0].score == pytest.approx(0.5, abs=0.01)
    assert ranking.places[3].score == pytest.approx(0.0)
    assert ranking.places[2].to_best.value < 0
    assert ranking.sentences()[0].startswith("dora has the highest accuracy on the 50 test records: 50.0 %")
    del usual[1]["seeds"][0]["correct"]
    usual[1]["seeds"][0]["correct"] = None
    with pytest.raises(ConfigError, match="no accuracy"):
        rank(usual, metric="accuracy")


def test_a_seed_that_diverged_is_named_and_not_picked(usual):
    usual[1]["seeds"][1] = seed(1, 1.5, failed="the loss was not finite at step 12")
    ranking = rank(usual)
    lora = next(place for place in ranking.places if place.name == "lora")
    assert lora.lost == ((1, "the loss was not finite at step 12"),)
    assert [number for number, _ in lora.seeds] == [0, 2]
    text = " ".join(ranking.sentences())
    assert "lora failed with 1 seed (seed 1: the loss was not finite at step 12)" in text and "flatters it" in text
    assert "Pick dora." in text  # although lora trains in half the time


def test_a_loss_that_is_not_finite_is_a_lost_seed(usual):
    usual[2]["seeds"][0]["losses"][3] = math.nan
    dora = next(place for place in rank(usual).places if place.name == "dora")
    assert dora.lost == ((0, "its loss on the test records is not finite"),)


def test_a_candidate_without_a_score_is_named(usual):
    usual.append(candidate("full", [], kind="full", failed="every rate diverged"))
    usual.append({**candidate("ia3", []), "seeds": [seed(0, 1.0, failed="out of memory")]})
    ranking = rank(usual)
    assert ranking.failed == (("full", "every rate diverged"), ("ia3", "seed 0: out of memory"))
    assert "full has no score: every rate diverged." in ranking.sentences()


def test_nothing_measured_is_said():
    ranking = rank([candidate("lora", [], failed="every rate diverged")])
    assert ranking.places == () and ranking.sentences()[0] == "Nothing was measured, so nothing can be ranked."
    assert Ranking.from_json(json.loads(json.dumps(ranking.to_json()))) == ranking


def test_no_adapter_is_picked_that_is_no_better_than_none():
    ranking = rank([candidate("base", [2.0], kind="base"), candidate("lora", [1.99, 2.02, 2.0], noise=0.3)])
    text = " ".join(ranking.sentences())
    assert "Pick none of them yet" in text and "Pick lora" not in text
    assert "No significant difference was found" in text


def test_one_seed_each_is_said_to_be_too_few(usual):
    for each in usual:
        del each["seeds"][1:]
    ranking = rank(usual)
    assert ranking.spread is None and ranking.degrees == 0
    assert any("One seed each" in sentence for sentence in ranking.sentences())


def test_few_test_records_are_said_to_be_few():
    ranking = rank([candidate("lora", [1.0, 1.1, 1.2], records=8), candidate("dora", [2.0, 2.1, 2.2], records=8)])
    assert any(sentence.startswith("8 test records are few") for sentence in ranking.sentences())


def test_who_is_worth_the_price(usual):
    fronts = rank(usual).fronts
    assert fronts["seconds"] == ("lora", "dora")
    assert fronts["trainable"] == ("vera", "dora")
    assert all("base" not in names for names in fronts.values())
    assert front({"a": (1, 1.0), "b": (1, 1.0), "c": (1, 2.0)}) == ("a", "b")


def test_other_test_records_are_refused(usual):
    usual[3]["seeds"][0]["counts"] = [*usual[3]["seeds"][0]["counts"][:-1], 99]
    with pytest.raises(DataError, match="not measured on the same test records"):
        rank(usual)


def test_two_of_one_name_are_refused(usual):
    with pytest.raises(DataError, match="same name"):
        rank([*usual, usual[1]])


@pytest.mark.parametrize("wrong", [{"metric": "f1"}, {"level": 1.0}, {"resamples": 10}])
def test_what_cannot_be_had_is_refused(usual, wrong):
    with pytest.raises(ConfigError):
        rank(usual, **wrong)


def test_many_pairs_get_enough_draws():
    """Holm's correction over 66 pairs must not hide a clear difference behind the coarseness of the draws."""
    many = [candidate(f"m{at}", [2.0 + 0.2 * at, 2.003 + 0.2 * at, 1.998 + 0.2 * at]) for at in range(12)]
    ranking = rank(many, resamples=500)
    assert ranking.resamples > 10_000
    assert [place.tied for place in ranking.places] == [True] + 11 * [False]


def test_memory_is_that_of_the_accelerator_where_one_was_used(usual):
    assert rank(usual).memory == "peak_rss_bytes"
    for each in usual:
        for one in each["seeds"]:
            one["peak_device_bytes"] = None if each["name"] == "base" else 5 * 2**30
    ranking = rank(usual)
    cost = {place.name: place.cost["memory"] for place in ranking.places}
    assert ranking.memory == "peak_device_bytes" and ranking.to_json()["memory"] == "peak_device_bytes"
    assert cost["lora"] == 5 * 2**30 and cost["base"] is None
