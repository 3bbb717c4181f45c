"""Forgetting, slices and another domain: what was said of them, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lorafit.report import columns, tables, text
from lorafit.report.figures import Plot, blank
from lorafit.report.palette import LIGHT
from lorafit.report.records import Run
from lorafit.report.text import NONE, escape
from lorafit.report.watched import Compared, Gap, Moved, Slice

_Reader = Callable[[float | None], str]
ROW = 28
"""Pixels of the figure for each slice."""
_HEAD = ("records", "before", "after", "change")
_MARGINS = "Behind ± is half the width of a 95 % interval."


def draw(run: Run) -> list[Plot]:
    """How far the loss of each slice went, with its interval; nothing for a run without slices.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    parts = [] if run.slices is None else [part for part in run.slices.parts if part.loss.change is not None]
    if run.slices is None or not parts:
        return []
    figure = blank(70 + ROW * len(parts))
    figure.add_scatter(
        x=[part.loss.change for part in parts],
        y=[part.name for part in parts],
        error_x={"array": [part.loss.margin or 0 for part in parts], "color": LIGHT.held, "thickness": 1.6, "width": 4},
        mode="markers",
        marker={"color": LIGHT.held, "size": 9},
        customdata=[_with(part.loss.change, part.loss.margin, text.loss, signed=True) for part in parts],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
        cliponaxis=False,
    )
    line = {"color": LIGHT.muted, "width": 1, "dash": "dot"}
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    figure.update_layout(shapes=[zero], xaxis={"title": {"text": "change of the held-out loss", "standoff": 6}})
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    least, most = parts[-1], parts[0]
    spoken = f"The loss changed by {_with(most.loss.change, None, text.loss, signed=True)} on {most.name}"
    spoken += f", and by {_with(least.loss.change, None, text.loss, signed=True)} on {least.name}."
    notes = ("Left of the dotted line the loss fell.",)
    return [Plot("slices", "Slices of the held-out records", spoken, notes, figure)]


def sections(run: Run, drawn: str = "") -> str:
    """A part of the page for each of the three; empty for a run that looked at none.

    Args:
        run: the run.
        drawn: what `draw` gave, framed.
    """
    return _forgetting(run) + _slices(run, drawn) + _shift(run)


def _forgetting(run: Run) -> str:
    found = run.forgetting
    if found is None:
        return ""
    rows = [_row(found.text, found.loss, text.loss)]
    note = f"Loss in nats per token; records are paragraphs or whole texts. {_MARGINS}"
    return _section("Forgetting", found.sentence, found.hints, columns.table(("text", *_HEAD), rows), note)


def _slices(run: Run, drawn: str) -> str:
    found = run.slices
    if found is None:
        return ""
    rows = [[*_row(part.name, part.loss, text.loss), _became(part)] for part in found.parts]
    table = drawn + columns.table((found.column, *_HEAD, "verdict"), rows)
    numbers = any(one.agreement for one in run.evaluations)
    unit = "as a share of the labels' variance" if numbers else "in nats per prediction"
    note = (
        f"Held-out loss {unit}, the slice that rose most first. {_MARGINS} A slice is called better or worse if that "
        "is more than luck among so many slices would bring about, and if it has eight records at least."
    )
    return _section("Slices of the held-out records", found.sentence, found.hints, table, note)


def _became(part: Slice) -> str:
    return "worse" if part.worse else "better" if part.better else ""


def _shift(run: Run) -> str:
    found = run.shift
    if found is None:
        return ""
    body = _compared(found.source, found.target, found.loss, "loss", text.loss)
    if found.accuracy is not None:
        body += _compared(found.source, found.target, found.accuracy, "accuracy", text.percent)
    note = f"Nothing of {found.target} was learnt from. {_MARGINS}"
    return _section("Another domain", found.sentence, found.hints, body, note)


def _compared(source: str, target: str, found: Compared, measure: str, read: _Reader) -> str:
    rows = [] if found.on_source is None else [_row(f"{source}, held out", found.on_source, read)]
    rows.append(_row(target, found.on_target, read))
    if found.gap is not None:
        rows.append(_gap(found.gap, read))
    return columns.table((measure, *_HEAD), rows, sortable=False)


def _row(name: str, moved: Moved, read: _Reader) -> list[columns.Cell]:
    return [
        name,
        text.count(moved.records),
        read(moved.before),
        read(moved.after),
        (_with(moved.change, moved.margin, read, signed=True), moved.change),
    ]


def _gap(gap: Gap, read: _Reader) -> list[columns.Cell]:
    return [
        "gap",
        "",
        (_with(gap.before, gap.before_margin, read), gap.before),
        (_with(gap.after, gap.after_margin, read), gap.after),
        (_with(gap.change, gap.change_margin, read, signed=True), gap.change),
    ]


def _with(value: float | None, margin: float | None, read: _Reader, *, signed: bool = False) -> str:
    """A number with its margin.

    >>> _with(0.25, 0.03, text.loss, signed=True), _with(-0.25, None, text.loss)
    ('+0.250 ± 0.030', '−0.250')
    """
    if value is None:
        return NONE
    sign = "+" if signed and value > 0 else ""
    shown = sign + read(value).replace("-", "\N{MINUS SIGN}", 1)
    return shown if margin is None else f"{shown} ± {read(margin)}"


def _section(title: str, sentence: str, hints: Iterable[str], table: str, note: str) -> str:
    rows = "".join(f"<li>{escape(_said(hint))}</li>" for hint in hints)
    listed = f"<ul>{rows}</ul>" if rows else ""
    said = f"<p>{escape(_said(sentence))}</p>{listed}"
    return tables.section(title, f'{said}{table}<p class="fine">{escape(note)}</p>', kind="full")


def _said(words: str) -> str:
    """Words of a line, as a sentence of their own."""
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith('.') else '.'}"
