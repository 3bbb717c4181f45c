"""What a comparison and a d90 let one say, and what they do not."""

from __future__ import annotations

import random

import pytest

from lorafit.experiments.advice import advise
from lorafit.experiments.ranking import rank


def candidate(name, losses, *, kind="adapter", r=None, rate=1e-3, rates=(3e-4, 1e-3, 3e-3), trainable=5000, last=0.0):
    seeds = []
    for number, loss in enumerate(losses):
        chance, hard = random.Random(f"{loss} {number}"), random.Random(7)
        each = [10 * (loss + hard.gauss(0, 0.5) + chance.gauss(0, 0.01)) for _ in range(40)]
        curve = [[10, loss * (1 + last)], [20, loss]]
        cost = {"seconds": 30.0, "peak_rss_bytes": None, "trainable": trainable, "adapter_bytes": 100}
        seeds.append(
            {"seed": number, "losses": each, "counts": [10] * 40, "correct": None, "curve": curve, "failed": None}
            | cost
        )
    search = [{"rate": one, "validation": 1 + abs(one - rate), "seconds": 1.0, "failed": None} for one in rates]
    options = {} if r is None else {"r": r}
    return {
        "name": name,
        "kind": kind,
        "options": options,
        "rate": rate,
        "search": search,
        "seeds": seeds,
        "failed": None,
    }


BASE = candidate("base", [3.0], kind="base", rate=None, rates=())


def compared(*candidates):
    return {"candidates": [BASE, *candidates], "ranking": None}


def line(told, start):
    return next((each for each in told if each.startswith(start)), None)


def test_the_method_and_what_it_rests_on():
    lora, vera = candidate("lora", [1.5, 1.51, 1.49]), candidate("vera", [1.9, 1.91, 1.89])
    told = advise(compared(lora, vera))
    assert line(told, "Method") == "Method: lora at learning rate 0.001. This rests on 40 test records and 3 seeds."


def test_a_ranking_that_is_there_is_read():
    both = compared(candidate("lora", [1.5, 1.51, 1.49]), candidate("vera", [1.9, 1.91, 1.89]))
    assert advise(both | {"ranking": rank(both["candidates"]).to_json()}) == advise(both)


def test_no_method_where_none_is_better_than_nothing():
    told = advise(compared(candidate("lora", [2.9, 3.2, 3.0])))
    assert "none can be recommended" in line(told, "Method")


def test_the_smallest_rank_that_does():
    ranks = [candidate(f"lora-r{r}", losses, r=r) for r, losses in ((2, [1.9, 1.91, 1.89]), (8, [1.51, 1.505, 1.5]))]
    ranks.append(candidate("lora-r32", [1.5, 1.503, 1.497], r=32))
    told = line(advise(compared(*ranks)), "Rank of lora")
    assert told.startswith("Rank of lora: 8 does: of 2, 8, 32 the best was 32")


def test_the_largest_rank_may_be_too_small():
    ranks = [candidate(f"lora-r{r}", [loss, loss + 0.01, loss - 0.01], r=r) for r, loss in ((2, 1.9), (8, 1.5))]
    assert "try a larger one" in line(advise(compared(*ranks)), "Rank of lora")


def test_one_rank_tells_nothing_of_others():
    told = line(advise(compared(candidate("lora", [1.5, 1.51, 1.49], r=16))), "Rank")
    assert told == "Rank: one was tried of each method that has one; whether a smaller one does was not measured."


@pytest.mark.parametrize(("rate", "word"), [(3e-3, "higher"), (3e-4, "lower"), (1e-3, None)])
def test_a_best_rate_at_the_edge_is_said(rate, word):
    told = line(advise(compared(candidate("lora", [1.5, 1.51, 1.49], rate=rate))), "Learning rate")
    assert told is None if word is None else f"a {word} one may be better" in told


def test_runs_that_had_not_finished_learning():
    told = advise(compared(candidate("lora", [1.5, 1.51, 1.49], last=0.05), candidate("vera", [1.9, 1.91, 1.89])))
    assert line(told, "Steps").startswith("Steps: lora still improved")


@pytest.mark.parametrize(
    ("d90", "interval", "trainable", "said"),
    [
        (
            1000,
            [800, 1200],
            5000,
            "Of those not significantly worse than the best, lora trains the fewest numbers above it (5,000)",
        ),
        (1000, None, 5000, "so a smaller one is worth comparing"),
        (4000, [3000, 4900], 5000, "bounds no rank"),
        (9000, [8000, 9900], 5000, "No candidate trains that many numbers (5,000 at most)"),
        (None, None, 5000, "no d90 was found"),
    ],
)
def test_a_measured_dimension(d90, interval, trainable, said):
    lora = candidate("lora", [1.5, 1.51, 1.49], r=16, trainable=trainable)
    dimension = {"format": 1, "kind": "said", "d90": d90, "interval": interval}
    assert said in line(advise(compared(lora), dimension), "Dimension")


def test_room_is_not_all():
    both = compared(candidate("lora", [1.5, 1.51, 1.49], r=16), candidate("vera", [1.9, 1.91, 1.89], trainable=2000))
    told = line(advise(both, {"format": 1, "kind": "did", "d90": 1000, "interval": [800, None]}), "Dimension")
    assert "lora trains the fewest" in told and "vera would have room too, and fared significantly worse" in told


def close(shift, seed=11):
    """By how much a loss is higher on each record: by `shift` on their mean."""
    chance = random.Random(seed)
    moves = [chance.gauss(0, 0.05) for _ in range(40)]
    mean = sum(moves) / 40
    return [move - mean + shift for move in moves]


def test_who_is_behind_by_an_interval_of_its_own_is_not_said_to_do():
    """The correction for many pairs keeps from calling it worse, and is no reason to recommend it."""
    best = candidate("lora-r16", [1.5], r=16, trainable=9000)
    behind = candidate("lora-r4", [1.5], r=4, trainable=3000)
    others = [candidate(f"other{at}", [1.5], trainable=20_000) for at in range(6)]
    for one, moved in ((behind, close(0.019)), *((each, close(0.001, at)) for at, each in enumerate(others))):
        one["seeds"][0]["losses"] = [
            loss + 10 * more for loss, more in zip(best["seeds"][0]["losses"], moved, strict=True)
        ]
    both = compared(best, behind, *others)
    pair = next(one for one in rank(both["candidates"]).differences if {one.name, one.other} == {"lora-r4", "lora-r16"})
    assert pair.low > 0 and not pair.significant
    told = advise(both, {"format": 1, "kind": "said", "d90": 1000, "interval": [800, 1200]})
    assert line(told, "Rank of lora").startswith("Rank of lora: 16, the largest of 4, 16")
    assert "lora-r16 trains the fewest numbers" in line(told, "Dimension")
    assert "lora-r4 would have room too, and fared worse by an interval of its own" in line(told, "Dimension")
    assert "lora-r4" not in line(told, "Method")
