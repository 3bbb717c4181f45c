"""`lorafit plan`: memory and time of a run before it is started, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.training.planning import Forecast, Times
    from lorafit.training.planning_advice import Advice

EPILOG = (
    "Takes every option of `lorafit train`, by the same names: put plan in the place of train. "
    "Exit status: 0 it fits, 1 it does not, or the input must be mended."
)
TIGHT = 0.9
"""The share of the memory from which on a run fits, but barely."""


def plan(
    context: typer.Context,
    model: options.Model = None,
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    data: options.Data = None,
    max_length: options.MaxLength = None,
    method: options.MethodName = None,
    per_device_train_batch_size: options.BatchSize = None,
    max_steps: options.MaxSteps = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="What the run may take, such as 8GB. Default: what is free here.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry", help="By formula alone: no weights are loaded.", rich_help_panel=options.RUN),
    ] = False,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what a run takes before it is started: memory, time, and whether it fits.

    By formula, and by a few real steps in a process of their own, the longest batch first. Writes nothing.
    """
    from lorafit.cli.exits import MEND, usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved
    from lorafit.training.planning import plan as planned
    from lorafit.training.planning_advice import advise
    from lorafit.training.planning_machine import parse_memory

    screen = Screen(as_json)
    with usage():
        limit = None if memory is None else parse_memory(memory)
    own = ("config", "set_", "as_json", "debug", "memory", "dry")
    flags = {name: value for name, value in context.params.items() if name not in own}
    settings = resolved(gather(config=config, sets=set_ or (), flags=flags, extra=context.args), screen.say)
    quiet()
    forecast, planner = planned(settings, dry=dry, limit=limit, notify=screen.say)
    advice = [] if forecast.fits else advise(planner, forecast)
    _show(forecast, advice, screen)
    screen.result(_as_json(forecast, advice))
    if not forecast.fits:
        raise typer.Exit(MEND)


def _show(forecast: Forecast, advice: Sequence[Advice], screen: Screen) -> None:
    formula, way = forecast.formula, forecast.course
    if forecast.layout:
        screen.say(forecast.layout)
    if forecast.not_measured:
        screen.say(f"not measured: {forecast.not_measured}")
    screen.say()
    rows = [(part.name, _gib(part.formula), "") for part in forecast.parts]
    rows.append(("peak", _gib(formula.peak), "" if forecast.measured is None else _gib(forecast.measured.peak)))
    screen.table(("memory", "formula", "measured"), rows, right=(1, 2))
    screen.say()
    screen.table(("time", "formula", "measured"), _time_rows(forecast), right=(1, 2))
    screen.say(
        f"\nlongest batch: {len(way.longest)} records, {formula.step.tokens:,} tokens with padding; "
        f"on average {way.tokens:,.0f}"
    )
    for one in advice:
        enough = "enough" if one.enough else "not enough"
        screen.say(f"  {one.change}: {_gib(one.peak)}, {enough} ({one.effect})", whole=True)
    screen.say(_verdict(forecast, advice), whole=True)


def _time_rows(forecast: Forecast) -> list[tuple[str, str, str]]:
    from lorafit.report.text import duration

    way, one, two = forecast.course, forecast.times, forecast.measured_times
    named: list[tuple[str, Callable[[Times], float]]] = [
        ("a step", lambda times: times.step),
        ("a step of the longest batch", lambda times: times.longest),
        (f"steps, {way.steps:,}", lambda times: times.training),
    ]
    if way.evaluations:
        named.append((f"evaluations, {way.evaluations}", lambda times: times.evaluation))
    if way.samples:
        named.append((f"answers, {way.samples} before and after", lambda times: times.answers))
    if way.watched:
        named.append((f"{forecast.watching}, before and after", lambda times: times.watched))
    rows = [(name, duration(of(one)), "" if two is None else duration(of(two))) for name, of in named]
    rows.append(("start and files", "", "" if two is None else duration(two.rest)))
    return [*rows, ("whole run", duration(one.total), "" if two is None else duration(two.total))]


def _verdict(forecast: Forecast, advice: Sequence[Advice]) -> str:
    size, of = forecast.limit.size, forecast.limit.of
    if size is None:
        return f"takes {_gib(forecast.peak)}; nobody tells how much memory there is: --memory 8GB compares with that"
    if forecast.fits:
        tight = ", barely" if forecast.peak > TIGHT * size else ""
        return f"fits{tight}: {_gib(forecast.peak)} of {_gib(size)} ({of})"
    first = next((one for one in advice if one.enough), None)
    what = "no single change above is enough: try a smaller model" if first is None else f"try {first.change}"
    took = "more" if forecast.ended else _gib(forecast.peak)
    return f"does not fit in {_gib(size)} ({of}): it takes {took}; {what}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _as_json(forecast: Forecast, advice: Sequence[Advice]) -> dict[str, Any]:
    formula, way, measured = forecast.formula, forecast.course, forecast.measured
    return {
        "fits": forecast.fits,
        "peak_bytes": forecast.peak,
        "limit_bytes": forecast.limit.size,
        "limit_of": forecast.limit.of,
        "device": str(forecast.device),
        "formula": {
            "parts": {part.name: part.formula for part in forecast.parts},
            "peak_bytes": formula.peak,
            **_seconds(forecast.times),
        },
        "measured": None
        if measured is None or forecast.measured_times is None
        else {
            "peak_bytes": measured.peak,
            "steps": list(measured.seconds),
            **_seconds(forecast.measured_times),
        },
        "not_measured": forecast.not_measured or None,
        "steps": way.steps,
        "micro_batches": way.micro_batches,
        "evaluations": way.evaluations,
        "longest_batch": {"records": len(way.longest), "tokens": formula.step.tokens},
        "tokens_per_batch": way.tokens,
        "advice": [
            {"change": one.change, "effect": one.effect, "peak_bytes": one.peak, "enough": one.enough} for one in advice
        ],
    }


def _seconds(times: Times) -> dict[str, float]:
    return {
        "step_seconds": times.step,
        "longest_step_seconds": times.longest,
        "train_seconds": times.training,
        "evaluation_seconds": times.evaluation,
        "answer_seconds": times.answers,
        "watched_seconds": times.watched,
        "rest_seconds": times.rest,
        "seconds": times.total,
    }
