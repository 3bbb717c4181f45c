"""Runs a training run for the commands `train` and `demo`, and shows what it came to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from lorafit.cli.exits import MEND, StoppedError
from lorafit.cli.quiet import quiet
from lorafit.cli.screen import Screen
from lorafit.errors import MissingExtraError
from lorafit.training import costs

if TYPE_CHECKING:
    from lorafit.report.summary import Summary
    from lorafit.training.config import Settings
    from lorafit.training.findings import Slice, Slices
    from lorafit.training.outcome import Outcome, Shown

Last = Literal["verdict", "report"]
NUMBERS = {"mean_absolute_error": "mean absolute error", "pearson": "Pearson", "spearman": "Spearman"}
"""What is told of a regression beside its loss → its name in the table; each has its 95 % interval in brackets."""


def finish(settings: Settings, command: str, screen: Screen, *, last: Last) -> None:
    """Trains, writes the report and prints the outcome.

    Args:
        settings: of the run.
        command: how the user asked for it.
        screen: where to show it.
        last: what the last line is about.

    Raises:
        StoppedError: the user interrupted the run.
        LorafitError: the run cannot start or go on.
    """
    from lorafit.training.ranks import EchoError, leave, speaks
    from lorafit.training.run import train

    quiet()
    try:
        outcome = train(settings, command=command, notify=screen.say, console=screen.console)
    except EchoError:  # another process says it
        raise typer.Exit(MEND) from None
    except KeyboardInterrupt:
        screen.say(f"stopped; the same command goes on from the last checkpoint, if there is one: {command}")
        raise StoppedError from None
    alone = speaks()
    leave()
    if outcome.status == "interrupted":
        screen.say(f"stopped after step {outcome.steps} and saved; the same command goes on from there: {command}")
        screen.result(_as_json(outcome, None, None))
        raise StoppedError
    if not alone:
        return
    report = _report(outcome, screen)
    summary = _summary(outcome)
    show_answers(outcome.shown, settings.max_new_tokens, screen)
    screen.table(("", "before", "after"), _figures(outcome, summary), right=(1, 2))
    show_slices(outcome.findings.slices, screen)
    screen.say(_costs(outcome, summary))
    classifies = summary.after is not None and summary.after.labelled
    screen.say(f"adapter: {outcome.adapter}", whole=True)
    screen.say(f"try it:  lorafit {'eval' if classifies else 'chat'} {outcome.adapter}", whole=True)
    judged = [] if outcome.verdict is None else outcome.verdict.lines()
    for line in [*judged, *outcome.findings.lines()]:
        screen.say(line)
    lines = [f"report:  {report}" if report else "report:  not written", verdict(outcome, classifies)]
    for line in lines if last == "verdict" else reversed(lines):
        screen.say(line, whole=True)
    screen.result(_as_json(outcome, report, summary))


def verdict(outcome: Outcome, classifies: bool) -> str:
    """One plain line on the held-out loss; it claims no more than the two numbers."""
    before, after = outcome.eval_before, outcome.eval_after
    if before is None or after is None:
        return "no held-out data, so no verdict"
    gained = round(before, 3) - round(after, 3)  # of the numbers as they are shown
    if abs(gained) < 5e-4:
        return f"held-out loss {before:.3f} → {after:.3f} (no different)"
    word = "better" if gained > 0 else "worse"
    unit = outcome.unit or f"nats per {'record' if classifies else 'token'}"
    return f"held-out loss {before:.3f} → {after:.3f} ({word} by {abs(gained):.3f} {unit})"


def show_answers(shown: tuple[Shown, ...], length: int, screen: Screen) -> None:
    """Questions with their answers before and after training and the reference."""
    if not shown:
        return
    screen.say(f"\nheld-out questions, answered in at most {length} tokens:")
    if not screen.fancy:
        for one in shown:
            screen.say(f"question:  {_indented(one.prompt)}")
            screen.say(f"before:    {_indented(one.before)}")
            screen.say(f"after:     {_indented(one.after)}")
            screen.say(f"reference: {_indented(one.gold)}\n")
        return
    table = Table(show_lines=True, header_style="bold")
    for name, style in (("question", ""), ("before", "dim"), ("after", "green"), ("reference", "")):
        table.add_column(name, style=style, ratio=1, overflow="fold")
    for one in shown:
        table.add_row(*(Text(text) for text in (one.prompt, one.before, one.after, one.gold)))
    screen.console.print(table)


def show_slices(found: Slices | None, screen: Screen) -> None:
    """The held-out loss of each slice, the one that rose most first."""
    if found is None:
        return
    rows = [
        (part.name, f"{loss.records:,}", f"{loss.before:.3f}", f"{loss.after:.3f}", loss.changed(), _became(part))
        for part in found.parts
        for loss in (part.loss,)
    ]
    screen.say("")
    screen.table((found.column, "records", "loss before", "after", "change", ""), rows, right=(1, 2, 3, 4))


def _became(part: Slice) -> str:
    return "worse" if part.worse else "better" if part.better else ""


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 11)


def _report(outcome: Outcome, screen: Screen) -> Path | None:
    """The report's path, or None if plotly is not there to draw it."""
    from lorafit.report import write_report

    try:
        return write_report(outcome.folder.records, outcome.folder.report)
    except MissingExtraError as error:
        screen.say(f"no report: {error.message}; {error.fix}")
        return None


def _summary(outcome: Outcome) -> Summary:
    from lorafit.report.history import read_records
    from lorafit.report.summary import summarize

    return summarize(read_records(outcome.folder.records))


def _figures(outcome: Outcome, summary: Summary) -> list[tuple[str, str, str]]:
    rows = []
    before, after = summary.before, summary.after
    if outcome.eval_before is not None and outcome.eval_after is not None:
        rows.append(("held-out loss", f"{outcome.eval_before:.3f}", f"{outcome.eval_after:.3f}"))
    classifies = after is not None and after.accuracy is not None
    if before and after and before.perplexity and after.perplexity and not classifies:
        rows.append(("perplexity", f"{before.perplexity:.4g}", f"{after.perplexity:.4g}"))
    if before and after and before.accuracy is not None and after.accuracy is not None:
        rows.append(("accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}"))
    if before and after:
        rows += [(name, before.told(key), after.told(key)) for key, name in NUMBERS.items() if after.knows(key)]
    return rows


def _costs(outcome: Outcome, summary: Summary) -> str:
    rate = summary.tokens_per_second
    return costs.line(outcome, "" if rate is None else f"{rate:,.0f} tokens/s")


def _as_json(outcome: Outcome, report: Path | None, summary: Summary | None) -> dict[str, Any]:
    before = None if summary is None else summary.before
    after = None if summary is None else summary.after
    return {
        "status": outcome.status,
        "folder": outcome.folder.path,
        "adapter": outcome.adapter,
        "report": report,
        "steps": outcome.steps,
        "eval_loss_before": outcome.eval_before,
        "eval_loss_after": outcome.eval_after,
        "accuracy_before": None if before is None else before.accuracy,
        "accuracy_after": None if after is None else after.accuracy,
        "agreement_before": None if before is None else before.agreement or None,
        "agreement_after": None if after is None else after.agreement or None,
        "train_seconds": outcome.train_seconds,
        "seconds": outcome.seconds,
        "tokens_per_second": None if summary is None else summary.tokens_per_second,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "peak_device_bytes": outcome.peak_device_bytes,
        "verdict": None if outcome.verdict is None else asdict(outcome.verdict),
        **outcome.findings.as_json(),
        "samples": [asdict(one) for one in outcome.shown],
    }
