"""Runs a DreamBooth run for the command, and shows what it came to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.cli.exits import StoppedError
from lorafit.errors import MissingExtraError
from lorafit.training import costs

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.diffusion.outcome import Outcome
    from lorafit.diffusion.settings import Settings

SCALES = "0,0.5,1"
"""Strengths of the line that shows how to try it."""


def finish(settings: Settings, command: str, screen: Screen) -> None:
    """Trains, writes the report and prints the outcome.

    Args:
        settings: of the run.
        command: how the user asked for it.
        screen: where to show it.

    Raises:
        StoppedError: the user interrupted the run.
        LorafitError: the run cannot start or go on.
    """
    from lorafit.cli.quiet import quiet_pipelines

    quiet_pipelines()
    from lorafit.diffusion.run import train

    try:
        outcome = train(settings, command=command, notify=screen.say, console=screen.console)
    except KeyboardInterrupt:
        screen.say(f"stopped; the same command goes on from the last checkpoint, if there is one: {command}")
        raise StoppedError from None
    if outcome.status == "interrupted":
        screen.say(f"stopped after step {outcome.steps} and saved; the same command goes on from there: {command}")
        screen.result(_as_json(outcome, None))
        raise StoppedError
    report = _report(outcome, settings, screen)
    screen.table(("", "before", "after"), _figures(outcome), right=(1, 2))
    screen.say(costs.line(outcome))
    if outcome.sheets:
        screen.say(f"samples: {outcome.sheets[-1]}", whole=True)
    screen.say(f"adapter: {outcome.adapter}", whole=True)
    screen.say(f"try it:  lorafit draw --adapter {outcome.folder.path} --scale {SCALES}", whole=True)
    for line in [] if outcome.verdict is None else outcome.verdict.lines():
        screen.say(line)
    screen.say(f"report:  {report or 'not written'}", whole=True)
    screen.say(verdict(outcome), whole=True)
    screen.result(_as_json(outcome, report))


def verdict(outcome: Outcome) -> str:
    """One plain line on the losses; it claims no more than the numbers."""
    before, after = outcome.eval_before, outcome.eval_after
    if before is None or after is None:
        return "the loss was not measured, so no verdict"
    line = f"loss on the subject {before:.4f} → {after:.4f} ({_changed(before, after)})"
    first, last = outcome.prior_before, outcome.prior_after
    if first is None or last is None:
        return line
    return f"{line}; on the class {first:.4f} → {last:.4f} ({_changed(first, last)})"


def _changed(before: float, after: float) -> str:
    gained = round(before, 4) - round(after, 4)  # of the numbers as they are shown
    if abs(gained) < 5e-5:
        return "no different"
    return f"{'lower' if gained > 0 else 'higher'} by {abs(gained):.4f}"


def _figures(outcome: Outcome) -> list[tuple[str, str, str]]:
    pairs = (
        ("loss on the subject", outcome.eval_before, outcome.eval_after),
        ("loss on the class", outcome.prior_before, outcome.prior_after),
    )
    return [
        (name, f"{before:.4f}", f"{after:.4f}")
        for name, before, after in pairs
        if before is not None and after is not None
    ]


def _report(outcome: Outcome, settings: Settings, screen: Screen) -> Path | None:
    """The report's path, or None if plotly is not there to draw it."""
    from lorafit.cli.pictures import sheet, thumbnail
    from lorafit.report.dreambooth_page import Shown, write_dreambooth

    subject = _pictures(Path(settings.instance_images), screen)
    prior = [] if settings.class_prompt is None else _pictures(settings.prior_folder, screen)
    shown = Shown(subject, prior[: settings.num_class_images], sheet=sheet, thumbnail=thumbnail)
    try:
        return write_dreambooth(outcome.folder.records, outcome.folder.report, shown)
    except MissingExtraError as error:
        screen.say(f"no report: {error.message}; {error.fix}")
        return None


def _pictures(folder: Path, screen: Screen) -> list[Path]:
    """The pictures of a folder; none, and a word on it, where a run was done before and they are gone."""
    from lorafit.diffusion.subjects import paths_of

    if folder.is_dir():
        return paths_of(folder)
    screen.say(f"{folder} is gone: the report does not show its pictures", whole=True)
    return []


def _as_json(outcome: Outcome, report: Path | None) -> dict[str, Any]:
    return {
        **outcome.figures(),
        "folder": outcome.folder.path,
        "adapter": outcome.adapter,
        "report": report,
        "sheets": list(outcome.sheets),
        "verdict": None if outcome.verdict is None else asdict(outcome.verdict),
    }
