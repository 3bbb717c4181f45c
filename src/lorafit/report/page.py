"""The report of a training run as one HTML file that opens from disk and asks for nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorafit.report import anatomy, dataset, document, head, importance, ranks, slices, tables
from lorafit.report.document import frame
from lorafit.report.figures import Plot, draw
from lorafit.report.history import read_records
from lorafit.report.records import Run
from lorafit.report.samples import samples
from lorafit.report.summary import summarize


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
    document.check_place(html_path, records_path, "report")
    return document.write(render(read_records(records_path)), Path(html_path))


def render(run: Run) -> str:
    """The page of `run`, as HTML."""
    curves, budget, moved, parted = draw(run), ranks.draw(run), anatomy.draw(run), slices.draw(run)
    summary = summarize(run)
    parts = (dataset.data(run), tables.settings(run), tables.environment(run))
    body = (
        head.masthead(run, summary),
        head.headline(run, summary),
        head.verdict(run),
        head.remarks(run),
        _curves(run, curves),
        slices.sections(run, "".join(map(frame, parted))),
        importance.section(run),
        ranks.section(run, "".join(map(frame, budget))),
        "".join(anatomy.section(run, frame(plot)) for plot in moved),
        samples(run),
        f'<div class="parts">{"".join(parts)}</div>',
        tables.history(run),
    )
    return document.page(head.title(run), "\n".join(body), [*curves, *parted, *budget, *moved], str(run.path))


def _curves(run: Run, plots: Iterable[Plot]) -> str:
    by = {plot.key: plot for plot in plots}
    loss = by.pop("loss", None)
    if loss is None and not by:
        return '<section class="full"><h2>Curves</h2><p class="fine">The run recorded no step.</p></section>'
    first = "" if loss is None else f"<h2>{loss.title}</h2>{frame(loss)}{tables.evaluations(run)}"
    rest = "".join(f'<div class="small"><h3>{plot.title}</h3>{frame(plot)}</div>' for plot in by.values())
    return (f'<section class="full">{first}</section>' if first else "") + (
        f'<section class="full"><h2>Course of the training</h2><div class="smalls">{rest}</div></section>'
        if rest
        else ""
    )
