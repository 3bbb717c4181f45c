"""The pages of all commands: one self-contained HTML file each, which opens from disk and asks for nothing else.

A `Document` says what stands on a page. The skeleton, the style sheet, light and dark colours, the figures' script, the
tables that sort on a click and the policy that forbids every request are the same for all.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from lorafit.errors import ConfigError
from lorafit.report import text
from lorafit.report.columns import Cell, Key, table
from lorafit.report.figures import TALL, Plot, as_json, plotly_script
from lorafit.report.palette import DARK, LIGHT, exchange
from lorafit.report.text import escape

__all__ = [
    "Cell",
    "Document",
    "Key",
    "Section",
    "check_place",
    "frame",
    "page",
    "render_document",
    "table",
    "write",
    "write_document",
]

LOW: Final = 300
"""Figures up to so many pixels high stand beside each other where there is room."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading, as plain text.
        html: what stands below it, such as what `table` gives; made safe by who gives it (`report.text.escape`).
        plots: figures, after that; their keys are unique in the page.
        note: fine print at the end, as plain text.
    """

    title: str
    html: str = ""
    plots: Sequence[Plot] = ()
    note: str = ""


@dataclass(frozen=True)
class Document:
    """What stands on a page; all texts but a section's `html` are plain.

    Attributes:
        title: what it is about, in a few words.
        lead: the first paragraph, in plain language: what was done, and what came of it.
        facts: labels and values of the tiles at the head.
        sections: the parts below.
        source: the path of what it was drawn from.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    source: str


def render_document(document: Document) -> str:
    """The page as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    body = [
        f'<header class="masthead"><p class="over"><span>lorafit report</span></p><h1>{escape(document.title)}</h1>'
        f"{lead(document.lead)}</header>",
        tiles(document.facts),
        *map(_section, document.sections),
    ]
    plots = [plot for section in document.sections for plot in section.plots]
    return page(document.title, "\n".join(filter(None, body)), plots, document.source)


def write_document(document: Document, path: Path | str) -> Path:
    """Write the page whole or not at all.

    Args:
        document: what stands on it.
        path: the HTML file; its folder is created when missing, a former file is replaced.

    Returns:
        `path`.

    Raises:
        MissingExtraError: plotly is not installed.
        ConfigError: it cannot be written there, or would replace what it was drawn from.
    """
    check_place(path, document.source)
    return write(render_document(document), Path(path), "page")


def check_place(path: Path | str, source: Path | str, name: str = "page") -> None:
    """Raises `ConfigError` for a path that no page can have: a folder, or the file that it is drawn from."""
    path = Path(path)
    if path.is_dir() or path.absolute() == Path(source).absolute():
        raise ConfigError(
            f"the {name} cannot be written over this path",
            where=path,
            found="a folder" if path.is_dir() else "the file that it is drawn from",
            expected="the path of an HTML file",
            fix=f"give {path / 'report.html' if path.is_dir() else path.with_suffix('.html')}",
        )


def lead(words: str) -> str:
    """The first paragraph of a page as HTML, from plain text; empty for none."""
    return f'<p class="lead">{escape(words)}</p>' if words else ""


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Labels and values, both plain text, beside each other as HTML; empty for none."""
    made = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return f'<dl class="tiles" aria-label="At a glance">{made}</dl>' if made else ""


def page(title: str, body: str, plots: Iterable[Plot], source: str) -> str:
    """The whole HTML file around what stands on the page.

    Args:
        title: plain text.
        body: HTML, with a `frame` for each of `plots`.
        plots: the figures.
        source: what the page was drawn from, plain text.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    library, script = _embedded(plotly_script()), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        policy=_policy((library, script)),
        title=escape(title),
        style=_asset("page.css"),
        light=LIGHT.css(),
        dark=DARK.css(),
        body=body,
        source=escape(source),
        figures=text.script_json({"figures": as_json(plots), "dark": exchange()}),
        library=library,
        script=script,
    )


def frame(plot: Plot) -> str:
    """The place of a figure in the page, with its legend and notes."""
    notes = f"<figcaption>{escape(' '.join(plot.notes))}</figcaption>" if plot.notes else ""
    traces = plot.figure.data if len(plot.figure.data) > 1 else ()
    marks = "".join(f'<li class="{escape(trace.meta or "")}">{escape(trace.name or "")}</li>' for trace in traces)
    legend = f'<ul class="legend" aria-label="Legend">{marks}</ul>' if marks else ""
    return (
        f'<figure>{legend}<div class="plot" role="group" aria-roledescription="figure" '
        f'aria-label="{escape(plot.spoken)}" data-figure="{escape(plot.key)}" '
        f'style="height:{_height(plot)}px"></div>{notes}</figure>'
    )


def _height(plot: Plot) -> int:
    return int(plot.figure.layout.height or TALL)


def _section(section: Section) -> str:
    low = [plot for plot in section.plots if _height(plot) <= LOW]
    beside = len(low) > 1
    stacked = [plot for plot in section.plots if not (beside and plot in low)]
    figures = "".join(_titled(plot, section.title) for plot in stacked)
    if beside:
        figures += f'<div class="smalls">{"".join(_titled(plot, section.title) for plot in low)}</div>'
    note = f'<p class="fine note">{escape(section.note)}</p>' if section.note else ""
    return f'<section class="full"><h2>{escape(section.title)}</h2>{section.html}{figures}{note}</section>'


def _titled(plot: Plot, above: str) -> str:
    heading = "" if plot.title == above else f"<h3>{escape(plot.title)}</h3>"
    return f'<div class="small">{heading}{frame(plot)}</div>'


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _embedded(script: str) -> str:
    """`script` such that it can stand inside of a script element; what it means stays the same."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy: only these scripts run, and nothing is ever requested."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def write(html: str, path: Path, name: str = "report") -> Path:
    """Write a page whole or not at all.

    Args:
        html: the page.
        path: the file.
        name: what it is called where it cannot be written.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        _replace(path, html.encode())
    except OSError as error:
        raise ConfigError(
            f"the {name} cannot be written",
            where=path,
            found=error,
            fix="choose a folder that can be written and has room",
        ) from error
    return path


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
