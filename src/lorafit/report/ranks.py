"""Which ranks AdaLoRA left: a table of kinds of modules and layers, each site with its rank as a number and a shade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lorafit.report import sitemap, tables
from lorafit.report.figures import SMALL, Plot, over_steps
from lorafit.report.palette import LIGHT
from lorafit.report.records import Run, Schedule
from lorafit.report.sitemap import Cell
from lorafit.report.text import escape

FEWEST: Final = 3
"""So many recorded steps make a curve."""


def drawn(run: Run) -> Schedule | None:
    """The state whose ranks are shown: the last one; None where no ranks were recorded."""
    return next((one for one in reversed(run.schedules) if one.ranks), None)


def draw(run: Run) -> list[Plot]:
    """The curve of budget and ranks in use; none for a run that recorded too few of them, or no change.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    found = [one for one in run.schedules if one.ranks and one.budget is not None]
    if len(found) < FEWEST or len({one.budget for one in found}) == 1:
        return []
    figure = over_steps(run, SMALL)
    for name, meta, colour, width, points in (
        ("budget", "faint", LIGHT.faint, 5.0, [(one.step, one.budget) for one in found]),
        ("in use", "train", LIGHT.train, 1.8, [(one.step, in_use) for one in found if (in_use := _in_use(one))]),
    ):
        if points:
            figure.add_scatter(
                x=[step for step, _ in points],
                y=[ranks for _, ranks in points],
                name=name,
                meta=meta,
                mode="lines+markers",
                cliponaxis=False,
                line={"color": colour, "width": width},
                marker={"color": colour, "size": 7},
                hovertemplate="%{y:,d}",
            )
    figure.update_yaxes(rangemode="tozero", tickformat=",~g")
    first, last = found[0], found[-1]
    spoken = f"Budget from {first.budget:,} ranks at step {first.step:,} to {last.budget:,} at step {last.step:,}."
    return [Plot("ranks", "Ranks of all sites together", spoken, (), figure)]


def _in_use(schedule: Schedule) -> int:
    return sum(schedule.ranks.values())


def section(run: Run, curve: str) -> str:
    """The part of the page with the table of ranks; empty where none were recorded.

    Args:
        run: a run.
        curve: the HTML of the figure of `draw`, or nothing.
    """
    schedule = drawn(run)
    if schedule is None:
        return ""
    below = f'<div class="small"><h3>Ranks of all sites together</h3>{curve}</div>' if curve else ""
    notes = escape(" ".join(_notes(run, schedule)))
    return tables.section(
        "Ranks of the sites", f"<figure>{_map(schedule.ranks)}<figcaption>{notes}</figcaption></figure>{below}", "full"
    )


def _map(ranks: Mapping[str, int]) -> str:
    most = max(ranks.values()) or 1
    cells = {path: Cell(f"{rank}", rank / most, path) for path, rank in ranks.items()}
    return sitemap.table(cells, "Rank of each site, by kind and layer")


def _notes(run: Run, schedule: Schedule) -> list[str]:
    ranks = schedule.ranks
    used, sites = _in_use(schedule), len(ranks)
    many = "site" if sites == 1 else "sites"
    told = f"At step {schedule.step:,}: {used:,} ranks in use at {sites:,} {many}, {used / sites:.2f} on average"
    if schedule.budget is not None:
        told += f", of a budget of {schedule.budget:,}"
    notes = [f"{told}."]
    if not used:
        notes.append("A rank is in use once its λ is not zero, and all begin at zero.")
    elif none := sum(rank == 0 for rank in ranks.values()):
        notes.append(f"{none:,} {'site has' if none == 1 else 'sites have'} none left.")
    first = next(one for one in run.schedules if one.ranks)
    if first.budget is not None and schedule.budget is not None and first.budget != schedule.budget:
        notes.append(f"At step {first.step:,} the budget was {first.budget:,}.")
    return [*notes, *sitemap.notes(ranks)]
