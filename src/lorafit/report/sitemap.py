"""A map of the sites: a table with a row for each kind of module and a column for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorafit.report import text
from lorafit.report.places import places
from lorafit.report.text import escape


@dataclass(frozen=True)
class Cell:
    """What the map has of one site.

    Attributes:
        shown: what stands in the cell.
        shade: how dark it is, from 0 to 1.
        told: what a pointer over it tells.
        is_marked: whether it has a border and is bold.
    """

    shown: str
    shade: float
    told: str
    is_marked: bool = False


@dataclass(frozen=True)
class Column:
    """A last column, which has something of each kind.

    Attributes:
        title: what stands above it.
        shown: kind, as `places` calls it → what stands in its row.
    """

    title: str
    shown: Mapping[str, str]


def table(cells: Mapping[str, Cell], label: str, last: Column | None = None) -> str:
    """The map as HTML, its rows in the order of the model.

    Args:
        cells: module path → what its cell shows, in the order of the model.
        label: what the map is of.
        last: a column after those of the layers.
    """
    found = places(cells)
    at = {(place.kind, place.layer): cells[path] for path, place in found.items()}
    kinds = dict.fromkeys(place.kind for place in found.values())
    numbers = {place.layer for place in found.values()}
    layers = [*({None} & numbers), *sorted(number for number in numbers if number is not None)]
    head = "".join(f'<th scope="col">{text.NONE if layer is None else layer}</th>' for layer in layers)
    after = "" if last is None else f'<th scope="col" class="last">{escape(last.title)}</th>'
    rows = "".join(
        f'<tr><th scope="row">{_breakable(kind)}</th>'
        + "".join(_cell(at.get((kind, layer))) for layer in layers)
        + ("" if last is None else f'<td class="last">{escape(last.shown[kind])}</td>')
        + "</tr>"
        for kind in kinds
    )
    return (
        f'<div class="wide" tabindex="0"><table class="map" aria-label="{escape(label)}">'
        f'<thead><tr><th scope="col">layer</th>{head}{after}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def notes(paths: Iterable[str]) -> list[str]:
    """What a reader should know of the columns of the map of these sites."""
    if any(place.layer is None for place in places(paths).values()):
        return [f"Column {text.NONE}: modules whose path has no number."]
    return []


def _breakable(kind: str) -> str:
    """A kind as HTML whose lines may end after a dot or an ellipsis."""
    return escape(kind).replace(".", ".<wbr>").replace("…", "…<wbr>")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    kind, shown = ("site own", f"<b>{escape(cell.shown)}</b>") if cell.is_marked else ("site", escape(cell.shown))
    return f'<td class="{kind}" style="--share:{cell.shade:.3g}" title="{escape(cell.told)}">{shown}</td>'
