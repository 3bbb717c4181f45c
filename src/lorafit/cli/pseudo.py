"""`lorafit few-labels`: few records with labels, many without, and whether the latter help.

The function is long because its parameters are the options that the help shows.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.experiments.pseudo import Wanted
    from lorafit.training.config import Settings

EPILOG = (
    "Takes the options of `lorafit train` that its runs share (--method, --r, --targets, --learning-rate, --bf16, …), "
    "by the same names. Exit status: 0 done, helped or not, 1 the input must be mended, 130 stopped."
)
PSEUDO = "Pseudo-labels"
DEFAULTS: Mapping[str, Any] = {"num_train_epochs": 10.0, "eval_split": 0.25}
"""What differs from `lorafit train`: few records want several passes, and enough of them to calibrate and report on."""


def few_labels(
    context: typer.Context,
    unlabelled: Annotated[
        str,
        typer.Option(
            "--unlabelled",
            metavar="PATH|NAME",
            help="Records with the columns of --data; the label's or answer's may be missing.",
            rich_help_panel=options.DATA,
        ),
    ],
    model: options.Model = None,
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    data: options.Data = None,
    data_split: options.DataSplit = None,
    eval_data: options.EvalData = None,
    eval_split: Annotated[
        str | None,
        typer.Option(
            "--eval-split",
            metavar="SHARE|NUMBER",
            help="Of the records, to choose and calibrate by; and as many to report on without --eval-data. "
            "Default: 0.25.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    eval_limit: options.EvalLimit = None,
    columns: options.Columns = None,
    task: options.Task = None,
    max_length: options.MaxLength = None,
    method: options.MethodName = None,
    max_steps: options.MaxSteps = None,
    per_device_train_batch_size: options.BatchSize = None,
    confidence: Annotated[
        float,
        typer.Option("--confidence", help="Less sure answers are not trained on.", rich_help_panel=PSEUDO),
    ] = 0.9,
    ratio: Annotated[
        float,
        typer.Option(
            "--ratio",
            help="Of a class at most so many times as many pseudo-labelled records as labelled ones.",
            rich_help_panel=PSEUDO,
        ),
    ] = 3.0,
    rounds: Annotated[
        int, typer.Option("--rounds", help="How often it labels and trains anew.", rich_help_panel=PSEUDO)
    ] = 1,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each kind, at least 3.", rich_help_panel=PSEUDO)] = 3,
    max_new_tokens: options.MaxNewTokens = None,
    output_dir: options.OutputDir = None,
    seed: options.Seed = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train on few labels and on the model's own confident answers, beside a run on the labels alone.

    The supervised run answers the unlabelled records; what it is sure of is trained on, in a new run of as many steps.
    Both are measured on held-out records with several seeds. The same command goes on after an interruption.
    """
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved

    screen = Screen(as_json)
    own = {"unlabelled", "confidence", "ratio", "rounds", "seeds", "config", "set_", "as_json", "debug"}
    flags = {name: value for name, value in context.params.items() if name not in own}
    layers = gather(config=config, sets=set_ or (), flags=flags, extra=context.args)
    settings = resolved([("the defaults of few-labels", DEFAULTS), *layers], screen.say)
    with usage():
        from lorafit.experiments.pseudo import Wanted

        wanted = Wanted(unlabelled, confidence, ratio, rounds, seeds)
    quiet()
    _run(_placed(settings), wanted, shlex.join(["lorafit", *context.obj.arguments]), screen)


def _placed(settings: Settings) -> Settings:
    """With a folder of its own, where the user names none."""
    if settings.output_dir:
        return settings
    stem = "python-qa" if settings.data is None else Path(settings.data).name.partition(".")[0] or "data"
    return settings.model_copy(update={"output_dir": str(Path("runs") / f"{stem}-few-labels")})


def _run(settings: Settings, wanted: Wanted, command: str, screen: Screen) -> None:
    from lorafit.cli.exits import StoppedError
    from lorafit.experiments.pseudo import RESULTS, few_labels
    from lorafit.experiments.runner import Local

    try:
        found = few_labels(settings, wanted, Local(settings.folder, screen.say), command=command, notify=screen.say)
    except KeyboardInterrupt:
        screen.say(f"stopped; the same command goes on from here, and trains nothing again: {command}", whole=True)
        raise StoppedError from None
    report = _report(found, settings.folder, screen)
    show(found, screen)
    screen.say(f"results: {settings.folder / RESULTS}", whole=True)
    screen.say(f"report:  {report or 'not written'}", whole=True)
    verdict = found["verdict"]
    if verdict["adapter"] is not None:
        screen.say(f"adapter: {verdict['adapter']}", whole=True)
        screen.say(verdict["kept_sentence"], whole=True)
    screen.say(verdict["sentence"], whole=True)
    screen.result({**found, "report": report})


def _report(found: Mapping[str, Any], folder: Path, screen: Screen) -> Path | None:
    """The page, or None if plotly is not there to draw it."""
    from lorafit.errors import MissingExtraError
    from lorafit.experiments.pseudo import RESULTS
    from lorafit.report.few_labels_page import write_few_labels

    try:
        return write_few_labels(found, folder / "report.html", source=str(folder / RESULTS))
    except MissingExtraError as error:
        screen.say(f"no report: {error.message}; {error.fix}")
        return None


def show(found: Mapping[str, Any], screen: Screen) -> None:
    """A row for each run, the supervised one of a seed above those with pseudo-labels."""
    rows = []
    for seed in found["seeds"]:
        rows.append(_row(f"{seed['seed']}", "supervised", None, seed["supervised"]))
        for one in seed["rounds"]:
            rows.append(_row("", f"pseudo-labels {one['round']}", one, one["result"]))
    screen.say()
    screen.table(("seed", "run", "sure", "added", "steps", "tokens", "loss", "accuracy"), rows, right=range(2, 8))


def _row(seed: str, name: str, labels: Mapping[str, Any] | None, result: Mapping[str, Any]) -> tuple[str, ...]:
    sure, added = ("", "") if labels is None else (f"{labels['sure']:,}", f"{labels['taken']:,}")
    if result["failed"] is not None:
        return (seed, name, sure, added, f"{result['steps']:,}", f"{result['tokens']:,}", "diverged", "")
    loss = sum(result["losses"]) / sum(result["counts"])
    right = "" if result["correct"] is None else f"{sum(result['correct']) / len(result['correct']):.1%}"
    return (seed, name, sure, added, f"{result['steps']:,}", f"{result['tokens']:,}", f"{loss:.4f}", right)
