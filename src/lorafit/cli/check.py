"""`lorafit check`: what training would see of the data. No model weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options
from lorafit.cli.exits import MEND

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.training.config import Settings
    from lorafit.training.datacheck import Inspected
    from lorafit.training.datacheck_findings import Findings
    from lorafit.training.datacheck_settings import Given


def check(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA", help="A file, a directory or a hub name. Default: the embedded data.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|NAME",
            help="Whose tokenizer, chat template and config are used. Default: the embedded SmolLM2-135M-Instruct.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    data_split: options.DataSplit = None,
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    columns: options.Columns = None,
    task: options.Task = None,
    max_length: options.MaxLength = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Records to render.", rich_help_panel=options.ANSWERS)
    ] = 3,
    seed: options.Seed = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Look at data and settings as training would see them.

    Says how the data are read, renders some records with the learnt text marked, and looks for what is wrong: records
    that cannot be read or teach nothing, repetitions, leaks between training and evaluation, labels, damaged text, a
    chat template that does not fit, settings that do nothing or that the model has no room for.

    Takes the settings of train. The exit status is 1 if something must be mended; what, is in the last lines.
    """
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved
    from lorafit.cli.values import canonical
    from lorafit.training.datacheck_settings import Given

    screen = Screen(as_json)
    flags = {
        "data": data,
        "model": model,
        "data_split": data_split,
        "eval_data": eval_data,
        "eval_split": eval_split,
        "columns": columns,
        "task": task,
        "max_length": max_length,
        "seed": seed,
    }
    layers = gather(config=config, sets=set_ or (), flags=flags)
    given = Given({canonical(name): origin for origin, values in layers for name in values})
    _look(resolved(layers, screen.say), given, samples, screen)


def _look(settings: Settings, given: Given, samples: int, screen: Screen) -> None:
    from lorafit.cli import check_screen
    from lorafit.cli.quiet import quiet
    from lorafit.errors import LorafitError
    from lorafit.training.datacheck import inspect
    from lorafit.training.datacheck_findings import Findings

    quiet()
    findings = Findings()
    try:
        seen = inspect(settings, given, findings, screen.say)
    except LorafitError as error:
        check_screen.say_findings(findings, screen)
        findings.raised(error, "stopped")
        screen.result({"ok": False, "findings": [finding.to_json() for finding in findings.listed()]})
        raise
    rendered, bins = check_screen.say_data(seen, samples, screen)
    check_screen.say_findings(findings, screen)
    screen.say(f"took: {seen.clock}", style="dim")
    screen.say(check_screen.verdict(seen, findings), whole=True)
    screen.result(_as_json(seen, findings, rendered, bins))
    if findings.errors:
        raise typer.Exit(MEND)


def _as_json(
    seen: Inspected, findings: Findings, rendered: list[dict[str, Any]], bins: list[tuple[int, int, int]]
) -> dict[str, Any]:
    repeated = [finding.at for finding in findings.listed() if finding.name in REPEATING]
    return {
        "ok": not findings.errors,
        **seen.made.info,
        "repeated_at": [where for places in repeated for where in places][:5],
        "lengths": bins,
        "samples": rendered,
        "near_compared": seen.compared,
        "seconds": seen.clock.seconds,
        "findings": [finding.to_json() for finding in findings.listed()],
    }


REPEATING = ("duplicate", "repeated-question", "conflicting-label")
"""Findings about a question that an earlier record asks."""
