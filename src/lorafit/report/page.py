"""The report as one HTML file that opens from disk and asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from string import Template

from lorafit.errors import ConfigError
from lorafit.report import anatomy, dataset, head, importance, ranks, tables, text
from lorafit.report.figures import Plot, as_json, draw, plotly_script
from lorafit.report.history import read_records
from lorafit.report.palette import DARK, LIGHT, exchange
from lorafit.report.records import Run
from lorafit.report.samples import samples
from lorafit.report.summary import summarize
from lorafit.report.text import escape


def write_report(records_path: Path | str, html_path: Path | str) -> Path:
    """Draw the records of a run as one self-contained HTML file.

    The file holds its scripts, styles and data and forbids the browser every request. It is written whole or
    not at all.

    Args:
        records_path: the run's `records.jsonl`.
        html_path: the file to write; its folder is created when missing, a former report is replaced.

    Returns:
        `html_path`.

    Raises:
        DataError: the records cannot be read or are damaged; the message names file and line.
        MissingExtraError: plotly is not installed.
        ConfigError: the report cannot be written there.
    """
    html_path = Path(html_path)
    if html_path.is_dir() or html_path.absolute() == Path(records_path).absolute():
        raise ConfigError(
            "the report cannot be written over this path",
            where=html_path,
            found="a folder" if html_path.is_dir() else "the records file itself",
            expected="the path of an HTML file",
            fix=f"give {html_path / 'report.html' if html_path.is_dir() else html_path.with_suffix('.html')}",
        )
    page = render(read_records(records_path))
    try:
        _replace(html_path, page.encode())
    except OSError as error:
        raise ConfigError(
            "the report cannot be written",
            where=html_path,
            found=error,
            fix="choose a folder that can be written and has room",
        ) from error
    return html_path


def render(run: Run) -> str:
    """The page of `run`, as HTML."""
    curves, budget, moved = draw(run), ranks.draw(run), anatomy.draw(run)
    summary = summarize(run)
    library, script = _embedded(plotly_script()), _asset("page.js")
    data = text.script_json({"figures": as_json([*curves, *budget, *moved]), "dark": exchange()})
    return Template(_asset("page.html")).substitute(
        policy=_policy((library, script)),
        title=escape(head.title(run)),
        style=_asset("page.css"),
        light=LIGHT.css(),
        dark=DARK.css(),
        masthead=head.masthead(run, summary),
        remarks=head.remarks(run),
        headline=head.headline(run, summary),
        verdict=head.verdict(run),
        curves=_curves(run, curves),
        importance=importance.section(run),
        ranks=ranks.section(run, "".join(map(_frame, budget))),
        anatomy="".join(anatomy.section(run, _frame(plot)) for plot in moved),
        samples=samples(run),
        data=dataset.data(run),
        settings=tables.settings(run),
        environment=tables.environment(run),
        history=tables.history(run),
        source=escape(str(run.path)),
        figures=data,
        library=library,
        script=script,
    )


def _curves(run: Run, plots: Iterable[Plot]) -> str:
    by = {plot.key: plot for plot in plots}
    loss = by.pop("loss", None)
    if loss is None and not by:
        return '<section class="full"><h2>Curves</h2><p class="fine">The run recorded no step.</p></section>'
    first = "" if loss is None else f"<h2>{loss.title}</h2>{_frame(loss)}{tables.evaluations(run)}"
    rest = "".join(f'<div class="small"><h3>{plot.title}</h3>{_frame(plot)}</div>' for plot in by.values())
    return (f'<section class="full">{first}</section>' if first else "") + (
        f'<section class="full"><h2>Course of the training</h2><div class="smalls">{rest}</div></section>'
        if rest
        else ""
    )


def _frame(plot: Plot) -> str:
    notes = f"<figcaption>{escape(' '.join(plot.notes))}</figcaption>" if plot.notes else ""
    height = plot.figure.layout.height
    traces = plot.figure.data if len(plot.figure.data) > 1 else ()
    marks = "".join(f'<li class="{trace.meta}">{escape(trace.name)}</li>' for trace in traces)
    legend = f'<ul class="legend" aria-label="Legend">{marks}</ul>' if marks else ""
    return (
        f'<figure>{legend}<div class="plot" role="img" aria-label="{escape(plot.spoken)}" '
        f'data-figure="{plot.key}" style="height:{height}px"></div>{notes}</figure>'
    )


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


def _replace(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all."""
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
