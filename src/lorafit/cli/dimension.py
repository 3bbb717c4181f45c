"""`lorafit dimension`: how few numbers a task needs.

The function is long because its parameters are the options that the help shows.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.experiments.dimension import Measuring
    from lorafit.experiments.dimension_asking import Asked, Wanted
    from lorafit.experiments.trial import Result

EPILOG = (
    "Takes the options of `lorafit train` that all its trainings share (--targets, --max-length, --num-train-epochs, "
    "--bf16, …), by the same names. Exit status: 0 done, 1 the input must be mended, 130 stopped."
)
SEARCH = "Search"


def dimension(
    context: typer.Context,
    model: options.Model = None,
    dtype: options.Dtype = None,
    data: options.Data = None,
    data_split: options.DataSplit = None,
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    eval_limit: options.EvalLimit = None,
    columns: options.Columns = None,
    task: options.Task = None,
    max_length: options.MaxLength = None,
    max_steps: options.MaxSteps = None,
    per_device_train_batch_size: options.BatchSize = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="said|did",
            help="A factor for each layer, trained and counted in d (said), or one projection for all (did).",
            rich_help_panel=SEARCH,
        ),
    ] = "said",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="full|lora",
            help="90 % of what: full fine-tuning, or LoRA (--method names another), which is cheaper.",
            rich_help_panel=SEARCH,
        ),
    ] = "full",
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="loss|accuracy|auto",
            help="Of the score on the test part. auto: accuracy for classifiers, else loss.",
            rich_help_panel=SEARCH,
        ),
    ] = "auto",
    of: Annotated[
        str,
        typer.Option(
            "--of",
            metavar="gain|score",
            help="90 % of what training adds to the untrained model, or of the score itself, as in the papers "
            "(accuracy only).",
            rich_help_panel=SEARCH,
        ),
    ] = "gain",
    points: Annotated[int, typer.Option("--points", min=2, help="So many d at most.", rich_help_panel=SEARCH)] = 4,
    rates: Annotated[
        int,
        typer.Option(
            "--rates",
            min=1,
            help="Learning rates of the reference and of the first d; one less at the others.",
            rich_help_panel=SEARCH,
        ),
    ] = 3,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            min=1,
            help="Of the reference, and of the two d on either side of the threshold.",
            rich_help_panel=SEARCH,
        ),
    ] = 3,
    max_d: Annotated[
        int | None,
        typer.Option("--max-d", min=1, help="The largest d. Default: 100,000.", rich_help_panel=SEARCH),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Stop before what would go beyond it: 40min, 2h, 90s. All trials count, also those of before.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    comparison: Annotated[
        Path | None,
        typer.Option(
            "--comparison",
            metavar="FILE",
            help="comparison.json of lorafit compare on the same task: for advice on rank and method.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    output_dir: options.OutputDir = None,
    seed: options.Seed = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure the intrinsic dimension of a task: the smallest d that learns 90 % of it.

    Trains the whole model, and then only d numbers in a random subspace of its weights, for several d. Rates are
    chosen on a validation part, scores are those on a test part. The same command goes on after an interruption.
    """
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved

    screen = Screen(as_json)
    wanted = _wanted(kind, against, metric, of, budget, points=points, rates=rates, seeds=seeds, most=max_d)
    own = ("kind", "against", "metric", "of", "points", "rates", "seeds", "max_d", "budget", "comparison")
    left = {*own, "config", "set_", "as_json", "debug"}
    flags = {name: value for name, value in context.params.items() if name not in left}
    settings = resolved(gather(config=config, sets=set_ or (), flags=flags, extra=context.args), screen.say)
    quiet()
    _run(settings, wanted, comparison, shlex.join(["lorafit", *context.obj.arguments]), screen)


def _wanted(kind: str, against: str, metric: str, of: str, budget: str | None, **numbers: Any) -> Wanted:
    """What the options of this command say, once checked."""
    from lorafit.cli.exits import usage
    from lorafit.experiments.dimension import Metric, Projection
    from lorafit.experiments.dimension_asking import Wanted
    from lorafit.training.spans import read_duration

    with usage():
        return Wanted(
            projection=_one("--kind", kind, [("said", Projection.SAID), ("did", Projection.DID)]),
            full=_one("--against", against, [("full", True), ("lora", False)]),
            metric=_one("--metric", metric, [("auto", None), ("loss", Metric.LOSS), ("accuracy", Metric.ACCURACY)]),
            gain=_one("--of", of, [("gain", True), ("score", False)]),
            budget=None if budget is None else read_duration(budget),
            **numbers,
        )


def _one(option: str, word: str, choices: Sequence[tuple[str, Any]]) -> Any:
    """What a word stands for."""
    from lorafit.errors import ConfigError, nearest

    known = dict(choices)
    if word.lower() in known:
        return known[word.lower()]
    near = nearest(word.lower(), known)
    raise ConfigError(
        "an option has a value it cannot have",
        where=option,
        found=repr(word),
        expected=" or ".join(known),
        near=near,
        fix=f"{option} {next(iter([*near, *known]))}",
    )


def _run(settings: Any, wanted: Wanted, comparison: Path | None, command: str, screen: Screen) -> None:
    from lorafit.experiments import dimension_asking as asking
    from lorafit.experiments.claim import alone

    beside = None if comparison is None else asking.comparison(comparison)
    folder = asking.begin(settings, wanted)
    with alone(folder):
        _measure(asking.ask(settings, wanted, folder, screen.say), folder, beside, command, screen)


def _measure(asked: Asked, folder: Path, beside: Any, command: str, screen: Screen) -> None:
    from lorafit.cli.exits import StoppedError
    from lorafit.experiments.dimension import Measuring
    from lorafit.experiments.runner import Local

    def kept(found: Measuring, result: Result) -> None:
        screen.say(_progress(found, result), whole=True)
        _write(found, asked, folder, command, complete=False)

    found = Measuring(asked.question, asked.limits, Local(folder, screen.say), screen.say, kept)
    _announce(asked, found.expected(), screen)
    try:
        found.run()
    except KeyboardInterrupt:
        screen.say(f"stopped; the same command goes on from here, and trains nothing again: {command}", whole=True)
        raise StoppedError from None
    told = _write(found, asked, folder, command, complete=True, beside=beside)
    _show(told, folder, _page(told, folder, screen), screen)


def _announce(asked: Asked, trials: int, screen: Screen) -> None:
    question, found = asked.question, asked.limits
    plan = question.plan
    screen.say(
        f"D = {found.size:,} weights in {len(found.shapes):,} layers; d from {plan.least:,} to {plan.most:,}, "
        f"{plan.start:,} first; {question.reference.told} is the reference; about {trials} trials"
        + ("" if question.budget is None else f", within {_duration(question.budget)}")
    )


def _progress(found: Measuring, result: Result) -> str:
    """One line on a trial that has ended, and how long the rest may take."""
    from lorafit.experiments.dimension_telling import number

    done, most = len(found.results), found.expected()
    trained = [one.total_seconds for one in found.results.values() if one.steps]
    left = (most - done) * sum(trained) / len(trained) if trained else 0.0
    if result.failed is not None or result.measured is None:
        came = f"diverged: {result.failed}"
    else:
        score = found.metric.plain(found.metric.scored(result.measured).mean)
        chosen = "" if result.validation is None else f"validation loss {result.validation:.4f}, "
        came = f"{chosen}test {found.metric.value} {number(found.metric.value, score)}"
    rest = f"; about {_duration(left)} to go" if left else ""
    return f"[{done}/{most}] {result.name}: {came}, {_duration(result.total_seconds)}{rest}"


def _duration(seconds: float) -> str:
    from lorafit.report.text import duration

    return duration(seconds)


def _write(
    found: Measuring, asked: Asked, folder: Path, command: str, *, complete: bool, beside: Any = None
) -> dict[str, Any]:
    """Puts what is known into the folder."""
    import json

    from lorafit import files
    from lorafit.experiments.dimension_asking import FILE
    from lorafit.experiments.dimension_telling import mapping, verdict

    told = mapping(found, command=command, complete=complete, data=asked.data())
    told["verdict"] = verdict(told)
    if beside is not None:
        from lorafit.experiments.advice import advise

        told["advice"] = list(advise(beside, told))
    files.write_text(folder / FILE, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False))
    return told


def _page(told: dict[str, Any], folder: Path, screen: Screen) -> Path | None:
    """The page, or None if plotly is not there to draw it."""
    from lorafit.errors import MissingExtraError
    from lorafit.experiments.dimension_asking import FILE, PAGE
    from lorafit.report.dimension_page import write_dimension

    try:
        return write_dimension(told, folder / PAGE, source=str(folder / FILE))
    except MissingExtraError as error:
        screen.say(f"no report: {error.message}; {error.fix}")
        return None


def _show(told: dict[str, Any], folder: Path, page: Path | None, screen: Screen) -> None:
    from lorafit.experiments.dimension_asking import FILE
    from lorafit.experiments.dimension_telling import number

    metric = told["metric"]
    rows = [("untrained", "", number(metric, told["base"]), "", "", "")]
    for point in told["points"]:
        score, ends = point["score"], point["kept_interval"]
        rows.append(
            (
                f"{point['d']:,}",
                "" if point["rate"] is None else f"{point['rate']:.2g}",
                "diverged" if score is None else number(metric, score),
                "" if point["kept"] is None else f"{100 * point['kept']:.0f} %",
                "" if ends is None else f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f} %",
                f"{len(point['seeds'])}",
            )
        )
    reference = told["reference"]
    rate = "" if reference["rate"] is None else f"{reference['rate']:.2g}"
    seeds = f"{len(reference['seeds'])}"
    rows.append((reference["told"], rate, number(metric, told["full"]), "100 %", "", seeds))
    screen.say()
    screen.table(("d", "rate", metric, "kept", "95 % interval", "seeds"), rows, right=(0, 1, 2, 3, 4, 5))
    for line in [*told["said"], *(f"advice: {one}" for one in told["advice"])]:
        screen.say(line)
    screen.say(f"{told['trials']} trials, {_duration(told['seconds'])}: {folder / FILE}", whole=True)
    screen.say(f"report:  {page or 'not written'}", whole=True)
    screen.say(told["verdict"], whole=True)
    screen.result(told)
