"""Which method, which rank, which rate: what a comparison says of it, and a measured d90 beside it.

Nothing here is a formula: a piece of advice names the measurement that it rests on, and what was not measured is said
not to be known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lorafit.errors import some
from lorafit.experiments.ranking import Place, Ranking, rank
from lorafit.experiments.telling import choice

Row = Mapping[str, Any]

FALLING: Final = 0.01
"""A run whose loss fell by this share between its last two evaluations had not finished learning."""
RANKED: Final = re.compile(r"[-_/:@ ]*(?:r|rank)[-_=]?\d+$")
"""What a name ends in that says its rank."""


def advise(comparison: Row, dimension: Row | None = None) -> list[str]:
    """What to use next, each sentence with what it rests on.

    Args:
        comparison: what comparison.json holds; it is ranked anew where it has no ranking.
        dimension: what `lorafit dimension` measured of the same task; None for nothing.

    Raises:
        DataError: the candidates were measured on different records, or the ranking is none.
    """
    candidates = {each["name"]: each for each in comparison["candidates"]}
    found = comparison.get("ranking")
    ranking = Ranking.from_json(found) if found else rank(comparison["candidates"])
    return [
        *_method(ranking, candidates),
        *_rank(ranking, candidates),
        *_rates(ranking, candidates),
        *_budget(ranking, candidates),
        *(_dimension(ranking, candidates, dimension) if dimension is not None else ()),
    ]


def _method(ranking: Ranking, candidates: Mapping[str, Row]) -> list[str]:
    picked = choice(ranking.to_json())
    if picked is None:
        return ["Method: none can be recommended: no training was measured to be better than the untrained model."]
    at = candidates[picked["name"]]["rate"]
    rate = "" if at is None else f" at learning rate {at:.3g}"
    seeds = f"{len(picked['seeds'])} seed{'' if len(picked['seeds']) == 1 else 's'}"
    own = next(place for place in ranking.places if place.name == picked["name"])
    tied = [each.name for each in ranking.places if each.tied and each is not own and not _apart(ranking, own, each)]
    beside = f"; not told apart from {', '.join(tied)}" if tied else ""
    return [
        f"Method: {picked['name']}{rate}. This rests on {ranking.records:,} test records and {seeds}{beside}.",
    ]


def _family(name: str, options: Row) -> str:
    return str(options.get("method") or RANKED.sub("", name))


def _ranks(ranking: Ranking, candidates: Mapping[str, Row]) -> dict[str, list[tuple[int, Place]]]:
    """The ranks of each method that were measured, the smallest first."""
    ranks: dict[str, list[tuple[int, Place]]] = {}
    for place in ranking.places:
        options = candidates[place.name]["options"]
        if isinstance(r := options.get("r"), int) and place.kind == "adapter":
            ranks.setdefault(_family(place.name, options), []).append((r, place))
    return {family: sorted(rows, key=lambda row: row[0]) for family, rows in ranks.items()}


def _rank(ranking: Ranking, candidates: Mapping[str, Row]) -> list[str]:
    told = []
    for family, rows in _ranks(ranking, candidates).items():
        if len({r for r, _ in rows}) < 2:
            continue
        best_r, best = min(rows, key=lambda row: row[1].place)
        enough_r, _ = next((r, place) for r, place in rows if place is best or not _apart(ranking, place, best))
        tried = ", ".join(str(r) for r, _ in rows)
        if enough_r == rows[-1][0]:
            told.append(f"Rank of {family}: {enough_r}, the largest of {tried}; try a larger one too.")
        elif enough_r == best_r:
            told.append(f"Rank of {family}: {enough_r}, the best of {tried}.")
        else:
            told.append(
                f"Rank of {family}: {enough_r} does: of {tried} the best was {best_r}, and {enough_r} is not "
                "significantly worse."
            )
    if not told and any(place.kind == "adapter" for place in ranking.places):
        return ["Rank: one was tried of each method that has one; whether a smaller one does was not measured."]
    return told


def _apart(ranking: Ranking, one: Place, other: Place) -> bool:
    """Whether they differ, as far as can be told of these two alone: who is behind so is not picked either."""
    return any(
        {each.name, each.other} == {one.name, other.name} and (each.significant or each.low > 0 or each.high < 0)
        for each in ranking.differences
    )


def _rates(ranking: Ranking, candidates: Mapping[str, Row]) -> list[str]:
    """Candidates whose best rate lies at the edge of those that were tried."""
    edges: dict[str, list[str]] = {"highest": [], "lowest": []}
    for place in ranking.places:
        search = [one for one in candidates[place.name]["search"] if one["validation"] is not None]
        chosen = candidates[place.name]["rate"]
        if chosen is None or len(search) < 2:
            continue
        rates = sorted(one["rate"] for one in candidates[place.name]["search"])
        for end, rate in (("highest", rates[-1]), ("lowest", rates[0])):
            if math.isclose(chosen, rate):
                edges[end].append(f"{place.name} ({chosen:.3g})")
    ways = {"highest": "higher", "lowest": "lower"}
    return [
        f"Learning rate: the {end} that was tried was the best on the validation part for {', '.join(names)}; "
        f"a {ways[end]} one may be better still (--rates tries more)."
        for end, names in edges.items()
        if names
    ]


def _budget(ranking: Ranking, candidates: Mapping[str, Row]) -> list[str]:
    """Whether the runs ended before their learning did."""
    falling = [place.name for place in ranking.places if _still(candidates[place.name]["seeds"])]
    if not falling:
        return []
    return [
        f"Steps: {some(falling)} still improved between the last two evaluations (by {FALLING * 100:.0f} % or more, "
        "with every seed): train for longer, and do not take this order for that of longer runs."
    ]


def _still(seeds: Sequence[Row]) -> bool:
    curves = [one["curve"] for one in seeds if one["failed"] is None]
    return bool(curves) and all(
        len(curve) > 1
        and curve[-1][1] is not None
        and curve[-2][1] is not None
        and curve[-1][1] < (1 - FALLING) * curve[-2][1]
        for curve in curves
    )


def _dimension(ranking: Ranking, candidates: Mapping[str, Row], dimension: Row) -> list[str]:
    """What d90 adds: whether what was trained has room for the task, beside how it fared."""
    measured = dimension.get("d90")
    if measured is None:
        return ["Dimension: no d90 was found among the d that were tried, so nothing follows from it."]
    ends = dimension.get("interval") or (None, None)
    low, high = (None if end is None else float(end) for end in ends)
    within = "" if low is None or high is None else f" ({low:,.0f} to {high:,.0f})"
    told = f"Dimension: d90 of this task is {measured:,.0f}{within}, measured with {dimension['kind'].upper()}. "
    trained = [place for place in ranking.places if place.kind == "adapter" and place.cost["trainable"]]
    if not trained:
        return [told + "No adapter was measured beside it."]
    room = [place for place in trained if (place.cost["trainable"] or 0) >= (high or measured)]
    if not room:
        most = max(place.cost["trainable"] or 0 for place in trained)
        return [
            f"{told}No candidate trains that many numbers ({most:,.0f} at most): compare larger ranks before settling."
        ]
    worse = [place.name for place in room if not place.tied]
    close = [place.name for place in room if place.tied and _apart(ranking, place, ranking.places[0])]
    lone = f"{some(worse)} would have room too, and fared significantly worse: room is not all. " if worse else ""
    lone += f"{some(close)} would have room too, and fared worse by an interval of its own. " if close else ""
    equal = [place for place in room if place.tied and place.name not in close]
    if not equal:
        return [told + lone + "d90 is of a random subspace: it bounds no rank."]
    least = min(equal, key=lambda place: place.cost["trainable"] or 0)
    numbers = f"{least.cost['trainable']:,.0f}"
    step = _smaller(candidates[least.name], float(least.cost["trainable"] or 0), high or measured)
    return [
        f"{told}Of those not significantly worse than the best, {least.name} trains the fewest numbers above it "
        f"({numbers}). {step} {lone}".rstrip()
    ]


def _smaller(candidate: Row, trainable: float, needed: float) -> str:
    """A rank worth measuring: a suggestion, and said to be one."""
    if candidate["options"].get("r") == 1 or trainable < 2 * needed:
        return "d90 is of a random subspace: it bounds no rank, and only a comparison tells which one does."
    return (
        f"It trains {trainable / needed:,.0f} times as many, so a smaller one is worth comparing; d90 is of a "
        "random subspace and does not say which."
    )
