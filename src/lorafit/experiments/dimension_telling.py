"""What a search for d90 found: as JSON, and in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lorafit import __version__
from lorafit.experiments.dimension import Measuring, Metric, Projection
from lorafit.experiments.dimension_curve import Interval, Measurements, interval, mean, share_of
from lorafit.experiments.dimension_search import Crossing, crossing
from lorafit.experiments.trial import Kind

FORMAT = 1
SURE = 0.95
"""Of the drawings, to say that the reference gained anything."""


def mapping(
    found: Measuring, *, command: str, complete: bool, data: Mapping[str, Any], advice: Sequence[str] = ()
) -> dict[str, Any]:
    """All of it, as the file holds it; also of a search that is under way. The base must have been measured."""
    question, limits = found.question, found.limits
    told: dict[str, Any] = {
        "format": FORMAT,
        "lorafit": __version__,
        "command": command,
        "complete": complete,
        "kind": question.projection.value,
        "metric": found.metric.value,
        "definition": "gain" if question.gain else "score",
        "share": question.share,
        "settings": question.settings.model_dump(),
        "data": dict(data),
        "limits": {
            "weights": limits.size,
            "sites": len(limits.shapes),
            "layers": limits.layers,
            "least": question.plan.least,
            "most": question.plan.most,
        },
        "base": _plain(found, found.scored(found.base)),
        "full": _plain(found, found.scored(found.full)),
        "threshold": None,
        "d90": None,
        "interval": None,
        "below": None,
        "above": None,
        "reference": _reference(found),
        "points": [],
        "trials": len(found.results),
        "seconds": found.seconds(),
        "step_seconds": step_seconds(found),
        "budget": question.budget,
        "spent": found.spent,
        "said": [],
        "advice": list(advice),
    }
    if told["base"] is not None and told["full"] is not None:
        _compare(found, told)
    return told


def _plain(found: Measuring, models: Sequence[Any]) -> float | None:
    return found.metric.plain(mean(models)) if models else None


def _reference(found: Measuring) -> dict[str, Any]:
    """The reference: what it is, its rates, its seeds."""
    reference = found.question.reference
    return {
        "name": reference.name,
        "told": reference.told,
        "rate": next((rate for rate, name in found.tried.items() if found.full and name == found.full[0]), None),
        "search": [_tried(found, rate, name) for rate, name in found.tried.items()],
        "seeds": [found.metric.plain(one.mean) for one in found.scored(found.full)],
        "trainable": next((found.results[name].trainable for name in found.full if name in found.results), None),
    }


def _tried(found: Measuring, rate: float, name: str) -> dict[str, Any]:
    result = found.results.get(name)
    known = {} if result is None else {"validation": result.validation, "seconds": result.total_seconds}
    return {"rate": rate, "validation": None, "seconds": None, **known, "failed": result and result.failed}


def _compare(found: Measuring, told: dict[str, Any]) -> None:
    """Threshold, d90, interval, points and sentences."""
    measured = found.measurements()
    base, full = mean(measured.base), mean(measured.full)
    told["threshold"] = found.metric.plain(measured.threshold(base, full))
    over = interval(measured) if measured.points else None
    at = across(measured)
    told["points"] = [_point(found, measured, d, over) for d in found.places()]
    gains = full > base
    if gains and at is not None and over is not None:
        told.update(below=at.below, above=at.above, d90=None if at.below is None or at.d is None else round(at.d))
        if (over.low, over.high) != (None, None):
            told["interval"] = [end if end is None else round(end) for end in (over.low, over.high)]
    told["said"] = sentences(found, told, measured, over)


def across(measured: Measurements) -> Crossing | None:
    """Where these scores pass their threshold; None without any."""
    if not measured.points:
        return None
    threshold = measured.threshold(mean(measured.base), mean(measured.full))
    places = sorted(measured.points)
    scores, counts = ([one(measured.points[d]) for d in places] for one in (mean, len))
    return crossing(places, scores, counts, threshold)


def _point(found: Measuring, measured: Measurements, d: int, over: Interval | None) -> dict[str, Any]:
    assert found.search is not None
    models = measured.points.get(d, ())
    base, full = mean(measured.base), mean(measured.full)
    kept = share_of(measured, base, full, mean(models)) if models else math.nan
    ends = None if over is None else over.kept.get(d)
    first = found.question.plan.seeds[0]
    searched = {asked.rate: name for asked, name in found.trials.items() if asked.d == d and asked.seed == first}
    lost = [name for name in found.at(d) if name in found.results and found.results[name].measured is None]
    return {
        "d": d,
        "rate": found.search.best(d),
        "score": _plain(found, models),
        "seeds": [found.metric.plain(one.mean) for one in models],
        "kept": None if math.isnan(kept) else kept,
        "kept_interval": None if ends is None or math.isnan(ends[0]) else list(ends),
        "search": [_tried(found, rate, name) for rate, name in searched.items()],
        "diverged_seeds": len(lost),
    }


def step_seconds(found: Measuring) -> dict[str, float]:
    """Seconds of a step, by what is trained: the reference, and subspaces."""
    kinds: dict[str, list[tuple[float, int]]] = {}
    for one in found.results.values():
        if one.steps:
            kinds.setdefault(one.name.partition("/")[0], []).append((one.seconds, one.steps))
    return {name: math.fsum(s for s, _ in taken) / sum(n for _, n in taken) for name, taken in kinds.items()}


# Sentences --------------------------------------------------------------------


def sentences(found: Measuring, told: Mapping[str, Any], measured: Measurements, over: Interval | None) -> list[str]:
    """What the numbers mean, what they rest on, and what they leave open."""
    lines = [_definition(found, told), _compared(found, told), _space(found, told)]
    if over is not None:
        lines.append(_sureness(found, told, over))
        lines += _warnings(found, told, over)
    if found.metric is Metric.ACCURACY and (other := found.measurements(gain=not found.question.gain)).points:
        lines.append(_otherwise(found, other))
    return [line for line in lines if line]


def number(metric: str, value: float) -> str:
    """A score for people.

    >>> number("loss", 2.34567), number("accuracy", 0.875)
    ('2.3457', '87.5 %')
    """
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4f}"


def _definition(found: Measuring, told: Mapping[str, Any]) -> str:
    metric, share, full = told["metric"], f"{100 * told['share']:.0f} %", told["reference"]["told"]
    numbers = (
        f"untrained {number(metric, told['base'])}, {full} {number(metric, told['full'])}, "
        f"threshold {number(metric, told['threshold'])}"
    )
    if told["definition"] == "score":
        return f"d90 is the smallest d that reaches {share} of the accuracy of {full} ({numbers})"
    moved = "lowers the loss" if metric == "loss" else "raises the accuracy"
    by = "lowers it by" if metric == "loss" else "raises it by"
    return f"d90 is the smallest d at which training {moved} by {share} of what {full} {by} ({numbers})"


def _compared(found: Measuring, told: Mapping[str, Any]) -> str:
    reference, plan = told["reference"], found.question.plan
    rate = reference["rate"]
    chosen = f", rate {rate:.2g} of {len(reference['search'])} tried" if rate is not None else ""
    cheaper = "; it stands for full fine-tuning, which was not run, and d90 is of what it gains"
    seeds = f"{len(reference['seeds'])} of {len(plan.seeds)} seeds"
    told_how = f"the reference is {reference['told']}{chosen}, {seeds}"
    return told_how if found.question.reference.kind is Kind.FULL else told_how + cheaper


def _space(found: Measuring, told: Mapping[str, Any]) -> str:
    limits, projection = told["limits"], found.question.projection
    said = f"; λ of {limits['layers']} layers are among the d numbers" if projection is Projection.SAID else ""
    space = f"subspaces lie in the {limits['weights']:,} weights of {limits['sites']:,} layers{said}"
    if not found.limits.head:
        return space
    rate = found.question.settings.full_learning_rate
    told_rate = "" if rate is None else f" at rate {rate:.2g}"
    return f"{space}; the head is trained in full beside them{told_rate}, and not counted in d"


def _sureness(found: Measuring, told: Mapping[str, Any], over: Interval) -> str:
    if told["d90"] is None and told["interval"] is None:
        return ""
    if over.seeds == 0:
        return "the interval knows of the test records alone: with one seed nothing is known of the others"
    return f"the interval knows of the test records and of the seeds ({over.seeds} degrees of freedom)"


def _warnings(found: Measuring, told: Mapping[str, Any], over: Interval) -> list[str]:
    lines, points = [], told["points"]
    kept = [point["kept"] for point in points if point["kept"] is not None]
    if over.gained < SURE:
        lines.append(f"it is not certain that {told['reference']['told']} gained anything at all: read d90 with care")
    if kept and max(kept) > 1:
        lines.append(
            f"a subspace keeps {100 * max(kept):.0f} %: it does better than {told['reference']['told']}, which may "
            "overfit or want other rates (--rates)"
        )
    edge = _edge(told["reference"])
    if edge:
        lines.append(
            f"the best rate of {told['reference']['told']} is the {edge} that was tried: more --rates may better it"
        )
    lost = [point["d"] for point in points if point["rate"] is None]
    if lost:
        lines.append(f"left out, since every rate diverged there: d = {', '.join(f'{d:,}' for d in lost)}")
    seeds = [point["d"] for point in points if point["diverged_seeds"]]
    if seeds:
        lines.append(f"some seeds diverged, and are left out: at d = {', '.join(f'{d:,}' for d in seeds)}")
    if any(_falls(points)):
        lines.append("scores do not rise everywhere with d: the curve is the nearest that does")
    if found.spent:
        lines.append(f"the budget ended the search after {told['trials']} trials: a larger --budget goes on from here")
    return lines


def _edge(reference: Mapping[str, Any]) -> str:
    """Where the best rate lies among those that were tried, if it is at an end of them."""
    rates = [tried["rate"] for tried in reference["search"]]
    if len(rates) < 2 or min(rates) < reference["rate"] < max(rates):
        return ""
    return "highest" if reference["rate"] == max(rates) else "lowest"


def _falls(points: Sequence[Mapping[str, Any]]) -> list[bool]:
    known = [point["kept"] for point in points if point["kept"] is not None]
    return [after < before for before, after in pairwise(known)]


def _otherwise(found: Measuring, other: Measurements) -> str:
    """d90 by the definition that was not asked for, of the same trainings."""
    at = across(other)
    assert at is not None
    threshold = number("accuracy", other.threshold(mean(other.base), mean(other.full)))
    whose = "of what it adds to the untrained model's" if other.gain else "of its accuracy, as in both papers,"
    if at.above is None:
        came = f"not reached up to {max(other.points):,}"
    elif at.below is None:
        came = f"at most {at.above:,}"
    else:
        came = f"about {at.d:,.0f}"
    return f"by the other definition (90 % {whose} {threshold}) d90 is {came}; the search did not look closely there"


def verdict(told: Mapping[str, Any]) -> str:
    """The last line: d90 and its interval, or why there is none."""
    kind, metric, limits = told["kind"].upper(), told["metric"], told["limits"]
    points = [point for point in told["points"] if point["kept"] is not None]
    if told["base"] is None or told["full"] is None:
        return "no d90 yet: the reference is not trained"
    full = told["reference"]["told"]
    better = told["full"] < told["base"] if metric == "loss" else told["full"] > told["base"]
    if not better:
        scores = f"{number(metric, told['base'])} → {number(metric, told['full'])}"
        return f"no d90: {full} gains nothing over the untrained model ({metric} {scores})"
    if not points:
        return "no d90: no subspace was trained" + (", the budget ended before" if told["spent"] else "")
    if told["above"] is None:
        last = points[-1]
        option = "--max-d" if last["d"] >= limits["most"] else "--points"
        more = f"a larger {'--budget' if told['spent'] else option} goes on"
        if last["d"] >= limits["weights"]:
            more = "more there are not in these layers"
        return f"d90 is more than {last['d']:,} ({kind}), which keeps {100 * last['kept']:.0f} %; {more}"
    if told["below"] is None:
        smallest = points[0]["d"] <= limits["least"]
        why = "the smallest there can be" if smallest else "the smallest tried; a larger --points goes on"
        return f"d90 is at most {told['above']:,} ({kind}), {why}"
    return f"d90 = {told['d90']:,} ({kind}), {ends(told)}"


def ends(told: Mapping[str, Any]) -> str:
    """The interval in words; ends beyond what was tried are said to be."""
    known = [point["d"] for point in told["points"] if point["kept"] is not None]
    if told["interval"] is None:
        return f"95 % interval wider than the d tried, {known[0]:,} to {known[-1]:,}"
    low, high = told["interval"]
    first = f"{low:,}" if low is not None else f"below {known[0]:,}"
    last = f"{high:,}" if high is not None else f"beyond {known[-1]:,}"
    return f"95 % interval {first} to {last}"
