"""The page of `lorafit dimension`: how the score grows with d, and where it reaches the threshold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.report import tables, text
from lorafit.report.anatomy import SYMBOLS
from lorafit.report.columns import Cell, table
from lorafit.report.document import Document, Section, write_document
from lorafit.report.figures import TALL, Plot, blank
from lorafit.report.palette import LIGHT
from lorafit.report.scales import logarithmic, padded, short
from lorafit.report.text import escape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = Mapping[str, Any]


def write_dimension(dimension: Row, path: Path | str, *, source: str = "dimension.json") -> Path:
    """Draw a search for d90 as one self-contained HTML file, also one that is under way.

    Args:
        dimension: what dimension.json holds.
        path: the HTML file; its folder is created when missing, a former file is replaced.
        source: where it was read from, which the page's foot names.

    Raises:
        MissingExtraError: plotly is not installed.
        ConfigError: it cannot be written there.
    """
    return write_document(document(dimension, source), path)


def document(dimension: Row, source: str) -> Document:
    """What stands on the page."""
    points = dimension["points"]
    rates = [each for each in (_rates(points),) if each is not None]
    sections = [
        Section(
            "Score against d", _list(dimension["said"]), [each for each in (curve(dimension),) if each is not None]
        ),
        Section("What follows", _list(dimension["advice"])),
        Section("Each d", _table(dimension, points) if points else ""),
        Section(
            "Learning rates", plots=rates, note="Rates are chosen by the validation part, scores are of the test part."
        ),
        *_facts(dimension),
    ]
    name = (dimension.get("data") or {}).get("name")
    return Document(
        title="Intrinsic dimension" + (f" of {name}" if name else ""),
        lead=_lead(dimension),
        facts=_tiles(dimension),
        sections=[section for section in sections if section.html or section.plots],
        source=source,
    )


def _share(dimension: Row) -> str:
    return f"{100 * float(dimension.get('share', 0.9)):.0f} %"


def _score(dimension: Row, value: float | None) -> str:
    return text.percent(value) if dimension["metric"] == "accuracy" else text.loss(value)


def _against(dimension: Row) -> str:
    """What counts as all that can be learnt."""
    return str((dimension.get("reference") or {}).get("told") or "full fine-tuning")


def _lead(dimension: Row) -> str:
    whole = "reaches" if dimension.get("definition") == "score" else "gains"
    goal = f"{_share(dimension)} of what {_against(dimension)} {whole}"
    if dimension["d90"] is not None:
        return (
            f"Training in a random subspace of {dimension['d90']:,} dimensions is enough for {goal}.{_sure(dimension)}"
        )
    if dimension.get("above") is not None:
        return f"At most {dimension['above']:,} dimensions are enough for {goal}: the smallest d tried reaches it."
    if dimension.get("below") is not None:
        return f"More than {dimension['below']:,} dimensions are needed for {goal}: no d tried reaches it."
    return f"No number of dimensions is known yet that is enough for {goal}."


def _sure(dimension: Row) -> str:
    low, high = dimension["interval"] or (None, None)
    if low is None and high is None:
        return " Its 95 % interval is wider than all d tried, on either side."
    if low is None:
        return f" Its 95 % interval begins below all d tried and ends at {high:,}."
    if high is None:
        return f" Its 95 % interval begins at {low:,} and ends beyond all d tried."
    return f" Its 95 % interval is {low:,} to {high:,}."


def _tiles(dimension: Row) -> list[tuple[str, str]]:
    word = dimension["metric"]
    low, high = dimension["interval"] or (None, None)
    ends = f"{text.NONE if low is None else short(low)} to {text.NONE if high is None else short(high)}"
    tiles = [
        (f"d90 ({dimension['kind'].upper()})", _found(dimension)),
        ("95 % interval", ends if dimension["interval"] else text.NONE),
        (f"{word} untrained", _score(dimension, dimension["base"])),
        (f"{word} at {_share(dimension)}", _score(dimension, dimension["threshold"])),
        (f"{word} of {_against(dimension)}", _score(dimension, dimension["full"])),
    ]
    if (seconds := dimension.get("seconds")) is not None:
        tiles.append(("time spent", text.duration(seconds)))
    return tiles


def _found(dimension: Row) -> str:
    if dimension["d90"] is not None:
        return text.count(dimension["d90"])
    above, below = dimension.get("above"), dimension.get("below")
    return f"≤ {above:,}" if above is not None else f"> {below:,}" if below is not None else text.NONE


def _list(told: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in told)}</ul>" if told else ""


def curve(dimension: Row) -> Plot | None:
    """The score of each d, the untrained and the whole score, the threshold, d90 and its interval."""
    points = [each for each in dimension["points"] if each["score"] is not None]
    if not points:
        return None
    figure = blank(TALL + 40, 34)
    figure.add_scatter(
        x=[each["d"] for each in points],
        y=[each["score"] for each in points],
        name="mean over seeds",
        meta="train",
        mode="lines+markers",
        line={"color": LIGHT.train, "width": 2},
        marker={"color": LIGHT.train, "size": 9},
        hovertemplate="d %{x:,d}: %{y:.4f}<extra></extra>",
    )
    several = [each for each in points if len(each["seeds"]) > 1]
    if several:
        figure.add_scatter(
            x=[each["d"] for each in several for _ in each["seeds"]],
            y=[score for each in several for score in each["seeds"]],
            name="one seed",
            meta="hue-1 mark-0",
            mode="markers",
            marker={"color": LIGHT.hues[1], "size": 6, "line": {"color": LIGHT.card, "width": 1}},
            hovertemplate="d %{x:,d}, one seed: %{y:.4f}<extra></extra>",
        )
    _levels(figure, dimension)
    ends = [end for end in dimension["interval"] or () if end is not None]
    spread = [*(each["d"] for each in points), *ends, *([dimension["d90"]] if dimension["d90"] else [])]
    axis = logarithmic(spread)
    _crossing(figure, dimension, axis["range"])
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(**axis, showgrid=False, title={"text": "d, trained numbers", "standoff": 6}, title_font_size=12)
    known = [dimension[key] for key in ("base", "full", "threshold") if dimension[key] is not None]
    seeds = [score for each in points for score in each["seeds"]]
    figure.update_yaxes(
        range=padded([*known, *seeds, *(each["score"] for each in points)], 0.08),
        title={"text": dimension["metric"], "standoff": 6},
        title_font_size=12,
        tickformat=".1~%" if dimension["metric"] == "accuracy" else "~g",
    )
    notes = [f"Dashed: the score at {_share(dimension)}, which d90 has to reach. The axis of d is logarithmic."]
    if dimension["interval"]:
        notes.append("Shaded: the 95 % interval of d90; where it ends at the plot's edge, it goes beyond all d tried.")
    spoken = "; ".join(f"d {each['d']:,}: {_score(dimension, each['score'])}" for each in points) + "."
    return Plot("curve", f"{dimension['metric'].capitalize()} on the test part", spoken, tuple(notes), figure)


def _levels(figure: Figure, dimension: Row) -> None:
    """Horizontal lines that say what they are: the whole score and the threshold on their far sides."""
    less = dimension["metric"] == "loss"
    levels = (
        ("base", "untrained", LIGHT.muted, "dot", less),
        ("threshold", _share(dimension), LIGHT.held, "dash", not less),
        ("full", _against(dimension), LIGHT.good, "solid", less),
    )
    for key, name, colour, dash, is_below in levels:
        value = dimension[key]
        if value is None:
            continue
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, layer="below",
            line={"color": colour, "width": 1.3, "dash": dash},
        )  # fmt: skip
        figure.add_annotation(
            xref="paper", x=0, xanchor="left", y=value, yanchor="top" if is_below else "bottom", showarrow=False,
            text=f"{escape(name)} {_score(dimension, value)}", font={"size": 11, "color": colour},
        )  # fmt: skip


def _crossing(figure: Figure, dimension: Row, reach: Sequence[float]) -> None:
    """d90 as a line, its interval as a band; an end that is not known is the plot's."""
    if dimension["interval"]:
        low, high = dimension["interval"]
        figure.add_shape(
            type="rect", yref="paper", y0=0, y1=1, x0=10 ** reach[0] if low is None else low,
            x1=10 ** reach[1] if high is None else high, layer="below", line={"width": 0},
            fillcolor=LIGHT.faint, opacity=0.35,
        )  # fmt: skip
    if dimension["d90"] is not None:
        figure.add_shape(
            type="line", yref="paper", y0=0, y1=1, x0=dimension["d90"], x1=dimension["d90"],
            line={"color": LIGHT.held, "width": 1.5},
        )  # fmt: skip
        figure.add_annotation(
            yref="paper", y=1, yanchor="bottom", x=math.log10(dimension["d90"]), showarrow=False,
            text=f"d90 = {dimension['d90']:,}", font={"size": 12, "color": LIGHT.held},
        )  # fmt: skip


def _table(dimension: Row, points: Iterable[Row]) -> str:
    rows: list[list[Cell]] = []
    for each in points:
        kept, ends = each["kept"], each.get("kept_interval")
        rows.append(
            [
                (f"{each['d']:,}", each["d"]),
                (text.NONE, None) if each["rate"] is None else (short(each["rate"]), each["rate"]),
                (_score(dimension, each["score"]), each["score"]),
                (text.NONE, None) if kept is None else (f"{100 * kept:.0f} %", kept),
                (text.NONE, None) if not ends else (f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f} %", ends[0]),
                ", ".join(_score(dimension, score) for score in each["seeds"]) or text.NONE,
                f"{each['diverged_seeds']:,}" if each.get("diverged_seeds") else text.NONE,
            ]
        )
    return table(("d", "rate", dimension["metric"], "kept", "95 % interval", "seeds", "diverged"), rows)


def _rates(points: Sequence[Row]) -> Plot | None:
    """The loss on the validation part at each rate, a line for each d."""
    lines = [
        (each["d"], sorted((one["rate"], one["validation"]) for one in found if one["validation"] is not None))
        for each in points
        if (found := each.get("search"))
    ]
    lines = [(d, line) for d, line in lines if line]
    if not lines:
        return None
    figure = blank(TALL)
    for at, (d, line) in enumerate(lines):
        hue, mark = at % len(LIGHT.hues), (at + at // len(LIGHT.hues)) % 8
        figure.add_scatter(
            x=[rate for rate, _ in line],
            y=[loss for _, loss in line],
            name=f"d {d:,}",
            meta=f"hue-{hue} mark-{mark}",
            mode="lines+markers",
            line={"color": LIGHT.hues[hue], "width": 1.8},
            marker={"color": LIGHT.hues[hue], "size": 8, "symbol": SYMBOLS[mark]},
            hovertemplate=f"d {d:,}, rate %{{x:.3~g}}: %{{y:.4f}}<extra></extra>",
        )
    figure.update_layout(hovermode="closest")
    tried = [rate for _, line in lines for rate, _ in line]
    figure.update_xaxes(**logarithmic(tried), title={"text": "learning rate", "standoff": 6}, title_font_size=12)
    figure.update_yaxes(tickformat="~g")
    lost = [
        f"d {each['d']:,} at {short(one['rate'])}"
        for each in points
        for one in each.get("search") or ()
        if one["failed"]
    ]
    notes = (f"Failed: {', '.join(lost)}.",) if lost else ()
    spoken = "; ".join(f"d {each['d']:,}: {short(each['rate'])}" for each in points if each["rate"] is not None)
    return Plot("rates", "Loss on the validation part", f"Chosen: {spoken}.", notes, figure)


def _facts(dimension: Row) -> Iterable[Section]:
    for title, key in (
        ("Data", "data"),
        ("Limits", "limits"),
        ("Settings", "settings"),
        ("Environment", "environment"),
    ):
        if found := dimension.get(key):
            values = tables.facts(found)
            yield Section(title, f"<details><summary>{len(found)} values</summary>{values}</details>")
