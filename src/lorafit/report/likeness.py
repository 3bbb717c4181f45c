"""Two adapters beside each other: which directions they share, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lorafit.report import sitemap, text
from lorafit.report.document import Cell, Section, table
from lorafit.report.figures import Plot, blank
from lorafit.report.palette import LIGHT

DRAWN: Final = 12
"""Sites whose principal angles are drawn: those most alike."""
HEIGHT: Final = 340
WRITTEN: Final = "directions that both write"
READ: Final = "directions that both read"


def beside(other: Mapping[str, Any]) -> list[Section]:
    """The parts of the page on the other adapter.

    Args:
        other: what `lorafit inspect ADAPTER OTHER --json` says of it.
    """
    title = f"Beside {other['adapter']}"
    known: dict[str, Mapping[str, Any]] = {path: one for path, one in other["sites"].items() if one is not None}
    if not known:
        return [Section(title, '<p class="fine">There is no site at which both change something.</p>')]
    return [
        Section(title, _maps(known), note=_note(other, len(known))),
        Section("Principal angles", _table(known), [_angles(known)]),
    ]


def _note(other: Mapping[str, Any], count: int) -> str:
    mean, (first, second) = other["mean"], other["alone"]
    notes = [
        f"Over {count:,} sites, {text.percent(mean['outputs'])} of the directions that they write and "
        f"{text.percent(mean['inputs'])} of those that they read are shared; the cosine of the changes is "
        f"{_signed(mean['cosine'])} in the mean.",
        "Shared: the mean of cos² of the principal angles, 0 for none and 100 for all (Hu et al. 2021, eq. 4). By "
        "chance, two spaces of rank r in n dimensions share r / n. A cell is as dark as the root of its number.",
    ]
    if first or second:
        notes.append(f"{first:,} sites are in the first alone, {second:,} in the second alone.")
    return " ".join(notes)


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")  # no negative zero


def _maps(known: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for key, title in (("outputs", WRITTEN), ("inputs", READ)):
        cells = {
            path: sitemap.Cell(f"{100 * one[key]:.0f}", max(one[key], 0.0) ** 0.5, f"{path}: {text.percent(one[key])}")
            for path, one in known.items()
        }
        label = f"{title[:1].upper()}{title[1:]}, in percent"
        parts.append(f"<h3>{label}</h3>{sitemap.table(cells, label)}")
    return "".join(parts)


def _table(known: Mapping[str, Mapping[str, Any]]) -> str:
    rows: list[Sequence[Cell]] = [
        (
            path,
            (text.percent(one["outputs"]), one["outputs"]),
            (text.percent(one["inputs"]), one["inputs"]),
            (_signed(one["cosine"]), one["cosine"]),
        )
        for path, one in known.items()
    ]
    return table(("site", "written", "read", "cosine of the changes"), rows)


def _angles(known: Mapping[str, Mapping[str, Any]]) -> Plot:
    """The cosines of all principal angles as a map of shades: a row a site, a column an angle."""
    leading = sorted(known, key=lambda path: -known[path]["outputs"])[:DRAWN]
    figure = blank(HEIGHT)
    for key, name, hue, mark in (("output_cosines", "written", 0, 0), ("input_cosines", "read", 1, 2)):
        points = [(at, value, path) for path in leading for at, value in enumerate(known[path][key], start=1)]
        figure.add_scatter(
            x=[at for at, _, _ in points],
            y=[value for _, value, _ in points],
            text=[text.escape(path) for _, _, path in points],
            name=name,
            meta=f"hue-{hue} mark-{mark}",
            mode="markers",
            cliponaxis=False,
            marker={"color": LIGHT.hues[hue], "symbol": ("circle", "diamond")[hue], "size": 7, "opacity": 0.7},
            hovertemplate="%{text}<br>angle %{x}: cos %{y:.3f}<extra></extra>",
        )
    figure.update_layout(hovermode="closest")
    longest = max(len(known[path]["output_cosines"]) for path in leading)
    figure.update_xaxes(
        title={"text": "principal angle", "standoff": 6}, showgrid=False, showline=True, tickformat=",d"
    )
    figure.update_xaxes(range=[0.7, longest + 0.3], **({"dtick": 1} if longest <= DRAWN else {}))
    figure.update_yaxes(title={"text": "cosine", "standoff": 8}, range=[0, 1.04], tickformat="~g")
    most = known[leading[0]]["output_cosines"][0]
    spoken = f"Cosines of the principal angles at {len(leading):,} sites, from {most:.3f} down."
    notes = [f"The {len(leading)} sites that are most alike." if len(leading) < len(known) else "All common sites."]
    notes.append("1: a direction that both have; 0: one at right angles to all of the other's.")
    return Plot("angles", "Cosines of the principal angles", spoken, tuple(notes), figure)
