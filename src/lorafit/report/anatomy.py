"""How far DoRA moved the lengths and the directions of the weights' rows: ΔM over ΔD, a dot for each site and step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import StatisticsError, correlation, fmean, median
from typing import Any, Final

from lorafit.errors import some
from lorafit.report import tables, text
from lorafit.report.figures import Plot, blank
from lorafit.report.palette import LIGHT
from lorafit.report.places import places
from lorafit.report.records import Anatomy, Run
from lorafit.report.text import escape

HEIGHT: Final = 460
STEPS: Final = 4
"""So many recorded steps are drawn at most: with more, each site's dots run into each other."""
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
CROWDED: Final = 8
"""Axes are logarithmic where the largest number is so many times the middle one."""
NARROW: Final = 0.8
"""On fewer decades, hardly any power of ten would lie on a logarithmic axis."""
MANY: Final = 4
"""From so many decades on, only powers of ten have labels."""
LABELS: Final = 6
"""They are about so many at most, which a narrow screen has room for."""
REFERENCE: Final = (
    "For comparison, Liu et al. (2024, arXiv:2402.09353) report \N{MINUS SIGN}0.62 for full fine-tuning, +0.83 for "
    "LoRA and \N{MINUS SIGN}0.31 for DoRA, on another model and other data; the sign depends on the run."
)


@dataclass(frozen=True)
class Dot:
    """One site at one step."""

    path: str
    step: int
    direction: float
    magnitude: float


def draw(run: Run) -> list[Plot]:
    """The scatter plot of the recorded steps; none for a run that recorded nothing after its first step.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    moved = _moved(run)
    if not moved:
        return []
    shown = _spread(list(moved))
    notes = [f"{count:,} at step {step:,}" for step in shown if (count := _lost(run, step))]
    return [_plot(moved, shown, notes)]


def of_sites(moved: Mapping[str, tuple[float, float]]) -> Plot:
    """The scatter plot of sites as they are now.

    Args:
        moved: module path → ΔM and ΔD, in the order of the model; at least one that is not zero.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    dots = [Dot(path, 0, direction, magnitude) for path, (magnitude, direction) in moved.items()]
    # A site that has not moved has no place on logarithmic axes.
    drawn = [dot for dot in dots if dot.direction or dot.magnitude]
    plot = _plot({0: drawn}, [0], [])
    still = len(dots) - len(drawn)
    told = (*plot.notes, f"Not drawn: {still:,} that did not move.") if still else plot.notes
    return replace(plot, notes=told)


def by_kind(moved: Mapping[str, tuple[float, float]]) -> str:
    """The numbers of that plot as a table, by kind of module."""
    return _kinds([Dot(path, 0, direction, magnitude) for path, (magnitude, direction) in moved.items()])


def _plot(moved: Mapping[int, Sequence[Dot]], shown: Sequence[int], lost: Sequence[str]) -> Plot:
    last = moved[shown[-1]]
    # Step 0 stands for none: before the first step nothing has moved, which is not drawn.
    told = "step %{customdata:,d}<br>" if shown[-1] else ""
    figure = blank(HEIGHT)
    figure.update_layout(hovermode="closest")
    dots = [dot for step in shown for dot in moved[step]]
    for at, (kind, group) in enumerate(_by_kind(dots).items()):
        figure.add_scatter(
            x=[dot.direction for dot in group],
            y=[dot.magnitude for dot in group],
            text=[escape(dot.path) for dot in group],
            customdata=[dot.step for dot in group],
            name=kind,
            meta=f"hue-{at % len(LIGHT.hues)} mark-{_symbol(at)}",
            mode="markers",
            cliponaxis=False,
            marker={
                "color": LIGHT.hues[at % len(LIGHT.hues)],
                "symbol": SYMBOLS[_symbol(at)],
                "size": [_weight(shown, dot.step, 4.5, 9.5) for dot in group],
                "opacity": [_weight(shown, dot.step, 0.3, 0.95) for dot in group],
                "line": {"color": LIGHT.paper, "width": 0.7},
            },
            hovertemplate=f"%{{text}}<br>{told}ΔD %{{x:.3g}}<br>ΔM %{{y:.3g}}<extra></extra>",
        )
    is_far = _crowded(last) and all(dot.direction > 0 and dot.magnitude > 0 for dot in dots)
    named = (("x", "ΔD, change of direction", [dot.direction for dot in dots]),
             ("y", "ΔM, change of length", [dot.magnitude for dot in dots]))  # fmt: skip
    for letter, title, values in named:
        scale = _logarithmic(values) if is_far else {"rangemode": "tozero", "tickformat": "~g"}
        figure.update_layout({f"{letter}axis": {"title": {"text": title, "standoff": 8}, **scale}})
    notes = _notes(last, shown, recorded=len(moved), is_far=is_far)
    if lost:
        notes.append(f"Sites that are not drawn, since what was measured is not a finite number: {some(lost)}.")
    return Plot("anatomy", "Lengths and directions of the weights", " ".join(notes), tuple(notes), figure)


def _moved(run: Run) -> Mapping[int, Sequence[Dot]]:
    """The dots of each recorded step. Before the first step nothing has moved, which is not drawn."""
    steps = {one.step: _dots(one) for one in run.anatomies if one.step}
    return {step: dots for step, dots in steps.items() if dots}


def _dots(one: Anatomy) -> Sequence[Dot]:
    pairs = ((path, one.direction.get(path), magnitude) for path, magnitude in one.magnitude.items())
    return [
        Dot(path, one.step, direction, magnitude)
        for path, direction, magnitude in pairs
        if direction is not None and magnitude is not None
    ]


def _lost(run: Run, step: int) -> int:
    """How many sites have no dot at this step."""
    (one,) = (one for one in run.anatomies if one.step == step)
    return len(one.magnitude.keys() | one.direction.keys()) - len(_dots(one))


def _spread(steps: Sequence[int]) -> Sequence[int]:
    """At most `STEPS` of them, evenly, and the last one."""
    count = min(STEPS, len(steps))
    return [steps[(at + 1) * len(steps) // count - 1] for at in range(count)]


def _by_kind(dots: Iterable[Dot]) -> Mapping[str, Sequence[Dot]]:
    """The dots of each kind of module, in the order of the model."""
    dots = list(dots)
    found = places(dict.fromkeys(dot.path for dot in dots))
    kinds: defaultdict[str, list[Dot]] = defaultdict(list)
    for dot in dots:
        kinds[found[dot.path].kind].append(dot)
    return kinds


def _symbol(at: int) -> int:
    """The symbol of the so-manieth kind: another one when the hues begin again."""
    return (at + at // len(LIGHT.hues)) % len(SYMBOLS)


def _weight(shown: Sequence[int], step: int, first: float, last: float) -> float:
    """A number for the step's dots: halfway from `first` to `last` at most, unless it is the last step."""
    if step == shown[-1]:
        return last
    return round(first + (last - first) / 2 * shown.index(step) / (len(shown) - 1), 3)


def _crowded(dots: Sequence[Dot]) -> bool:
    """Whether most dots would lie in a corner of linear axes."""
    return any(
        max(values) > CROWDED * median(values)
        for values in ([dot.direction for dot in dots], [dot.magnitude for dot in dots])
    )


def _logarithmic(values: Sequence[float]) -> Mapping[str, Any]:
    """A logarithmic axis for positive values: decades, with 2 and 5 between them where there are few decades."""
    decades = math.log10(max(values)) - math.log10(min(values))
    if decades < NARROW:
        return {"type": "log", "tickformat": "~g"}  # plotly takes round numbers then, as on a linear axis
    return {"type": "log", "dtick": "D2" if decades < MANY else math.ceil(decades / LABELS)}


def _correlation(dots: Sequence[Dot]) -> str:
    """Pearson's correlation of ΔM and ΔD in words; a dash where there is none."""
    try:
        found = correlation([dot.magnitude for dot in dots], [dot.direction for dot in dots])
    except StatisticsError:  # fewer than two, or all alike
        return text.NONE
    return f"{found:+.2f}".replace("-", "\N{MINUS SIGN}")


def _notes(last: Sequence[Dot], shown: Sequence[int], *, recorded: int, is_far: bool) -> list[str]:
    over = f"the {len(last):,} sites" + (f" at step {shown[-1]:,}" if shown[-1] else "")
    found = _correlation(last)
    notes = [
        f"There is no correlation of ΔM and ΔD over {over}: too few sites, or all alike."
        if found == text.NONE
        else f"Correlation of ΔM and ΔD over {over}: {found}. {REFERENCE}",
        "ΔM is the mean change of the lengths of a weight's rows, ΔD the mean of 1 \N{MINUS SIGN} cos of the angles by "
        "which they turned.",
    ]
    if len(shown) > 1:
        earlier = ", ".join(f"{step:,}" for step in shown[:-1])
        notes.append(f"Small and pale: {'steps' if len(shown) > 2 else 'step'} {earlier}; large: step {shown[-1]:,}.")
    if len(shown) < recorded:
        notes.append(f"{len(shown)} of {recorded:,} recorded steps are drawn.")
    if is_far:
        notes.append("Both axes are logarithmic.")
    return notes


def section(run: Run, frame: str) -> str:
    """The part of the page with the figure and the numbers behind it.

    Args:
        run: a run with a figure.
        frame: the figure's HTML.
    """
    last = list(_moved(run).values())[-1]
    sites = [(escape(dot.path), text.rough(dot.direction), text.rough(dot.magnitude)) for dot in last]
    numbers = (
        f"<details><summary>By kind of module, and each site, at step {last[0].step:,} ({len(last):,})</summary>"
        + _kinds(last)
        + tables.numbers(("site", "ΔD", "ΔM"), sites)
        + "</details>"
    )
    return tables.section("Lengths and directions of the weights", frame + numbers, kind="full")


def _kinds(dots: Sequence[Dot]) -> str:
    kinds = [
        (
            escape(kind),
            f"{len(group):,}",
            text.rough(fmean(dot.direction for dot in group)),
            text.rough(fmean(dot.magnitude for dot in group)),
            _correlation(group),
        )
        for kind, group in _by_kind(dots).items()
    ]
    return tables.numbers(("kind", "sites", "mean ΔD", "mean ΔM", "correlation"), kinds)
