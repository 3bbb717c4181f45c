"""Which sites LoRA-drop gave adapters of their own: one bar a site, as long as its share of the importance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from lorafit.report import tables, text
from lorafit.report.figures import Plot, blank
from lorafit.report.palette import LIGHT
from lorafit.report.records import Drop, Run
from lorafit.report.text import escape

LONGEST: Final = 48
"""So many bars are drawn at most; the table has all sites."""
BAR: Final = 17
"""Pixels from one bar to the next."""


def draw(run: Run) -> list[Plot]:
    """The figure of the sites' importance; none for a run that made no choice.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    drop = run.drop
    if drop is None or not drop.scores:
        return []
    ranked = _ranked(drop)
    shown = ranked[:LONGEST]
    short = _shortened(shown)
    figure = blank(len(shown) * BAR + 60)
    figure.update_layout(barmode="overlay", bargap=0.3, hovermode="closest")
    for name, meta, colour, kept in (
        ("an adapter of its own", "train", LIGHT.train, True),
        (_rest(drop), "faint", LIGHT.faint, False),
    ):
        paths = [path for path in shown if (path in drop.kept) == kept]
        if paths:
            figure.add_bar(
                x=[drop.scores[path] for path in paths],
                y=[short[path] for path in paths],
                orientation="h",
                name=name,
                meta=meta,
                marker={"color": colour},
                hovertemplate="%{y}: %{x:.2%}<extra></extra>",
            )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", side="bottom")
    figure.update_yaxes(
        categoryorder="array", categoryarray=[short[path] for path in shown], autorange="reversed", dtick=1,
        showgrid=False, tickfont={"size": 11},
    )  # fmt: skip
    notes = _notes(drop, len(shown))
    return [Plot("importance", "Importance of the sites", " ".join(notes), tuple(notes), figure)]


def _ranked(drop: Drop) -> list[str]:
    return sorted(drop.scores, key=drop.scores.__getitem__, reverse=True)


def _rest(drop: Drop) -> str:
    return "left as it is" if drop.rest == "freeze" else "shares an adapter"


def _shortened(paths: Iterable[str]) -> dict[str, str]:
    """The paths without the components with which all of them begin, safe for plotly, which reads some HTML."""
    parts = {path: path.split(".") for path in paths}
    shortest = min(map(len, parts.values()))
    common = 0
    while common + 1 < shortest and len({part[common] for part in parts.values()}) == 1:
        common += 1
    return {path: escape(".".join(part[common:])) for path, part in parts.items()}


def _notes(drop: Drop, shown: int) -> list[str]:
    share = math.fsum(drop.scores[path] for path in drop.kept if path in drop.scores)
    others = len(drop.scores) - len(drop.kept)
    notes = [f"{len(drop.kept):,} of {len(drop.scores):,} sites have an adapter of their own, and with it "
             f"{text.percent(share)} of the importance."]  # fmt: skip
    if others and drop.rest == "freeze":
        notes.append(f"The other {others:,} are left as they are.")
    elif others:
        shapes = ", ".join(f"{shape} ({count:,})" for shape, count in drop.shared.items())
        notes.append(f"The other {others:,} share one adapter for each shape{': ' if shapes else ''}{shapes}.")
    if drop.sample_records is not None and drop.steps is not None:
        notes.append(f"Measured after a trial of {drop.steps:,} steps on {drop.sample_records:,} records.")
    if shown < len(drop.scores):
        notes.append(f"The {shown:,} largest are drawn.")
    return notes


def section(run: Run, frame: str) -> str:
    """The part of the page with the figure and the numbers behind it.

    Args:
        run: a run with a choice of sites.
        frame: the figure's HTML.
    """
    drop = run.drop
    assert drop is not None
    rows = [
        (escape(path), f"{text.percent(drop.scores[path])}, {'its own' if path in drop.kept else _rest(drop)}")
        for path in _ranked(drop)
    ]
    numbers = (
        f"<details><summary>Importance as numbers ({len(rows)})</summary>"
        f'<div class="wide" tabindex="0">{tables.table(rows)}</div></details>'
    )
    return tables.section("Importance of the sites", frame + numbers, kind="full")
