"""A ranking in plain language. What it says rests on the ranking's numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, median
from typing import Any, Final

from lorafit.errors import some

Row = Mapping[str, Any]

WORTH: Final = 0.05
"""The share of its price that a candidate has to save to be picked instead of the best."""
FEW_SEEDS: Final = 5
"""With fewer seeds each, what they can tell is said."""
FEW_RECORDS: Final = 30
"""With fewer test records, their number is said to be low."""


def tell(ranking: Row) -> list[str]:
    """Sentences on a ranking: the best, its equals, the cheapest of them, what to pick, what cannot be told.

    Args:
        ranking: what `Ranking.to_json` gives.
    """
    places = ranking["places"]
    if not places:
        return ["Nothing was measured, so nothing can be ranked.", *_failures(ranking)]
    return [
        *_best(ranking, places),
        *_others(ranking, places),
        *_cheapest(places),
        *_pick(ranking, places),
        *_failures(ranking),
        *_limits(ranking, places),
    ]


def called(place: Row) -> str:
    """A candidate's name in a sentence."""
    return "the untrained model" if place["kind"] == "base" else str(place["name"])


def number(ranking: Row, value: float, *, signed: bool = False) -> str:
    """A score, or a difference of scores.

    >>> number({"metric": "accuracy"}, 0.625), number({"metric": "loss"}, 0.01234, signed=True)
    ('62.5 %', '+0.0123')
    """
    sign = "+" if signed else ""
    return f"{value * 100:{sign}.1f} %" if ranking["metric"] == "accuracy" else f"{value:{sign}.4f}"


def span(ranking: Row, low: float, high: float, *, signed: bool = False) -> str:
    """An interval."""
    return f"{number(ranking, low, signed=signed)} to {number(ranking, high, signed=signed)}"


def size(count: float) -> str:
    """Bytes in a unit that suits them.

    >>> size(512), size(9_772_000), size(2.5 * 2**30)
    ('512 bytes', '9.3 MiB', '2.50 GiB')
    """
    if count < 2**10:
        return f"{count:.0f} bytes"
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


PRICES: Final[Mapping[str, tuple[str, Callable[[float], str]]]] = {
    "seconds": ("the least training time", lambda value: f"{value:,.3g} s"),
    "memory": ("the least memory", size),
    "trainable": ("the fewest trained numbers", lambda value: f"{value:,.0f}"),
    "file": ("the smallest file", size),
}
"""What the cheapest has, and how its price is written."""


def _best(ranking: Row, places: Sequence[Row]) -> list[str]:
    best, many = places[0], f"{ranking['records']:,} test record{'' if ranking['records'] == 1 else 's'}"
    most = "lowest loss" if ranking["metric"] == "loss" else "highest accuracy"
    name = called(best)
    told = (
        f"{name[0].upper() + name[1:] if best['kind'] == 'base' else name} has the {most} on the {many}: "
        f"{number(ranking, best['score'])} ({ranking['level'] * 100:.0f} % interval "
        f"{span(ranking, best['low'], best['high'])})"
    )
    if best["kind"] == "base":
        return [told + ": nothing that was trained does better."]
    if (base := best["to_base"]) is None:
        return [told + "."]
    found = f"{number(ranking, base['value'], signed=True)} ({span(ranking, base['low'], base['high'], signed=True)})"
    sure = "" if base["significant"] else ", which is not significant"
    return [f"{told}. Against the untrained model that is {found}{sure}."]


def _others(ranking: Row, places: Sequence[Row]) -> list[str]:
    if len(places) == 1:
        return []

    def listed(rows: Sequence[Row]) -> str:
        return some((f"{called(row)} ({_distance(ranking, row)})" for row in rows), limit=8)

    tied = [place for place in places[1:] if place["tied"]]
    worse = [place for place in places[1:] if not place["tied"]]
    if not worse:
        return [
            f"No significant difference was found between {called(places[0])} and the others: {listed(tied)}; "
            f"their order may be luck.{_lone(ranking, tied)}"
        ]
    told = [f"Not significantly worse: {listed(tied)}; their order may be luck.{_lone(ranking, tied)}"] if tied else []
    told.append(f"Significantly worse: {listed(worse)}.")
    if not tied:
        told.append(f"Nothing else comes up to {called(places[0])}.")
    return told


def _lone(ranking: Row, tied: Sequence[Row]) -> str:
    """Why an interval may leave out zero and the difference still not be significant."""
    if not any(map(_behind, tied)):
        return ""
    pairs = len(ranking["differences"])
    return f" Intervals that leave out zero are so by themselves: of {pairs:,} pairs, some are by luck."


def _distance(ranking: Row, place: Row) -> str:
    found = place["to_best"]
    value = number(ranking, found["value"], signed=True)
    return f"{value}, interval {span(ranking, found['low'], found['high'], signed=True)}"


def _equals(places: Sequence[Row]) -> list[Row]:
    """Those that were trained and are not significantly worse than the best."""
    return [place for place in places if place["tied"] and place["kind"] != "base"]


def _cheapest(places: Sequence[Row]) -> list[str]:
    equals = _equals(places)
    if len(equals) < 2:
        return []
    has: dict[str, list[str]] = {}
    for cost, (most, written) in PRICES.items():
        known = [place for place in equals if place["cost"][cost] is not None]
        if len(known) < 2:
            continue
        least = min(known, key=lambda place: (float(place["cost"][cost]), place["cost"]["seconds"] or 0.0))
        if all(place["cost"][cost] == least["cost"][cost] for place in known):
            continue
        has.setdefault(least["name"], []).append(f"{most} ({written(least['cost'][cost])})")
    if not has:
        return []
    return ["Of these, " + "; ".join(f"{name} has {_and(what)}" for name, what in has.items()) + "."]


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pick(ranking: Row, places: Sequence[Row]) -> list[str]:
    found = choice(ranking)
    if found is None:
        return [
            "Pick none of them yet: no training was significantly better than none. Train for longer or on more data, "
            "and look at the data: lorafit check."
        ]
    return [_picked(found, places[0]), *_faster(ranking, found)]


def _picked(found: Row, best: Row) -> str:
    if found["name"] == best["name"]:
        return f"Pick {found['name']}."
    if (least := best["cost"]["seconds"]) and found["cost"]["seconds"] < least:
        paid = f"trains in {found['cost']['seconds']:,.3g} s instead of {least:,.3g} s"
        return f"Pick {found['name']}: it is not significantly worse than {called(best)} and {paid}."
    return f"Pick {found['name']}: it is not significantly worse than {called(best)}, and none of its seeds failed."


def _faster(ranking: Row, found: Row) -> list[str]:
    """Why the fastest of all that share the best one's place is not the one to pick, if it is behind by itself."""
    fastest = _fastest([found, *(place for place in _eligible(ranking) if _behind(place))])
    if fastest is found:
        return []
    return [
        f"{fastest['name']} trains in {fastest['cost']['seconds']:,.3g} s, but is probably worse than "
        f"{called(ranking['places'][0])} ({_distance(ranking, fastest)}): only the correction for "
        f"{len(ranking['differences']):,} pairs lets it share that place."
    ]


def choice(ranking: Row) -> Row | None:
    """The place to pick: of those not worse than the best the one that trains fastest.

    Not worse is here who shares the best one's place and whose difference to it is not told from zero by itself
    either: the correction for many pairs keeps differences from being claimed, and is no reason to count on their
    absence. The best itself if less than a twentieth of its time is saved; one with seeds that failed only where there
    is no other; None where no training was significantly better than none, or nothing was trained.
    """
    eligible = _eligible(ranking)
    return _fastest([place for place in eligible if not _behind(place)] or eligible) if eligible else None


def _eligible(ranking: Row) -> list[Row]:
    """Who shares the best one's place and is better than none, without failed seeds if there is any such."""
    places = ranking["places"]
    if any(place["tied"] and place["kind"] == "base" for place in places):
        return []
    # Who shares the best one's place because its own is uncertain may not be better than none.
    better = [place for place in _equals(places) if place["to_base"] is None or place["to_base"]["significant"]]
    return [place for place in better if not place["lost"]] or better


def _behind(place: Row) -> bool:
    """Whether the interval of its difference to the best, by itself, leaves out zero."""
    to_best = place["to_best"]
    return to_best is not None and (to_best["low"] > 0 or to_best["high"] < 0)


def _fastest(places: Sequence[Row]) -> Row:
    """The one that trains fastest, if that saves a share of the first one's time that is worth it; else the first."""
    first = places[0]
    timed = [place for place in places if place["cost"]["seconds"] is not None]
    if first["cost"]["seconds"] is None or not timed:
        return first
    fastest = min(timed, key=lambda place: float(place["cost"]["seconds"]))
    return fastest if fastest["cost"]["seconds"] < (1 - WORTH) * first["cost"]["seconds"] else first


def _failures(ranking: Row) -> list[str]:
    told = [f"{name} has no score: {reason}." for name, reason in ranking["failed"]]
    for place in ranking["places"]:
        if place["lost"]:
            lost = "; ".join(f"seed {seed}: {reason}" for seed, reason in place["lost"])
            left = len(place["seeds"])
            told.append(
                f"{place['name']} failed with {_many(len(place['lost']), 'seed')} ({lost}): its score is of the other "
                f"{left} alone, and so flatters it."
            )
    return told


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _limits(ranking: Row, places: Sequence[Row]) -> list[str]:
    """What these numbers cannot tell."""
    told = []
    trained = {place["name"]: len(place["seeds"]) for place in places if place["kind"] != "base"}
    if trained and ranking["spread"] is None:
        told.append(
            "One seed each: how far another seed would move the scores cannot be told, so this ranks these trained "
            "models, and not the ways to train. Give at least 3 seeds."
        )
    halves = [
        (each["high"] - each["low"]) / 2
        for each in ranking["differences"]
        if each["name"] in trained and each["other"] in trained
    ]
    if halves and (half := median(halves)) > 0:
        told.append(_resolution(ranking, half, sorted(trained.values())))
    if ranking["records"] < FEW_RECORDS:
        told.append(f"{_many(ranking['records'], 'test record')} are few: hold out more, for narrower intervals.")
    if trained:
        told.append("All of this holds for this model, this data and this budget; more steps may rank them otherwise.")
    return told


def _resolution(ranking: Row, half: float, counts: Sequence[int]) -> str:
    small = number(ranking, half)
    told = f"Two candidates that are less than about {small} apart cannot be told apart here"
    if ranking["spread"] is None:
        return f"{told}, even for these seeds; more test records would tell."
    # The part of the variance of a difference that is the seeds': the records have the rest.
    seeds, most = counts[0], counts[-1]
    seeded = 2 * ranking["spread"] ** 2 / seeds
    whole = (half / NormalDist().inv_cdf((1 + ranking["level"]) / 2)) ** 2
    owed = "seeds" if seeded > whole / 2 else "test records"
    have = f"each has {_many(seeds, 'seed')}" if seeds == most else f"they have {seeds} to {most} seeds"
    few = f" ({have}, which say little of how far seeds move it)" if seeds < FEW_SEEDS else ""
    told += f"{few}; more {owed} would help most"
    if owed == "seeds" and math.isfinite(half):
        told += f", since one seed and the next are {number(ranking, ranking['spread'])} apart (standard deviation)"
    return told + "."
