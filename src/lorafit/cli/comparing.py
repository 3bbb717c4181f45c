"""What `lorafit compare` does, from the words of the command to the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorafit.cli.exits import usage
from lorafit.cli.quiet import quiet
from lorafit.cli.screen import Screen
from lorafit.errors import ConfigError, MissingExtraError, StateError, TrainingError, nearest

if TYPE_CHECKING:
    from lorafit.experiments.candidates import Candidate
    from lorafit.experiments.parts import Parts
    from lorafit.experiments.ranking import Ranking
    from lorafit.experiments.runner import Runner
    from lorafit.experiments.spending import Plan
    from lorafit.training.spelling import Layer

REPORT = "comparison.html"
METRICS = ("loss", "accuracy")


@dataclass(frozen=True)
class Wishes:
    """What the command says."""

    layers: Sequence[Layer]
    methods: Sequence[str] | None
    references: Sequence[str]
    budget: str | None
    rates: int
    seeds: int
    metric: str
    ray: str | None
    output_dir: str | None
    command: str


def go(wishes: Wishes, screen: Screen) -> None:
    """Compares, and shows what it came to."""
    from filelock import FileLock, Timeout

    from lorafit.experiments.spending import rates_of, seeds_of
    from lorafit.methods import METHODS
    from lorafit.training.spans import read_duration

    started = time.monotonic()
    quiet()
    with usage():
        if wishes.metric not in METRICS:
            near = nearest(wishes.metric, METRICS)
            raise ConfigError(
                "no such metric",
                where="--metric",
                found=repr(wishes.metric),
                expected=" or ".join(METRICS),
                near=near,
                fix=f"--metric {next(iter([*near, *METRICS]))}",
            )
        seconds = None if wishes.budget is None else read_duration(wishes.budget)
        made = _candidates(wishes, list(METHODS), screen)
        seeds_of(made[0].settings.seed, wishes.seeds)
        rates_of(made, wishes.rates)
    _check_search(made)
    from lorafit.experiments.comparison import check_folder

    folder = _folder(wishes, made)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _compare(wishes, made, folder, seconds, started, screen)
    except Timeout:
        raise StateError(
            "another command is at work in this folder",
            where=folder,
            expected="one at a time",
            fix="wait for it, or choose another output_dir",
        ) from None


def _candidates(wishes: Wishes, household: Sequence[str], screen: Screen) -> list[Candidate]:
    from lorafit.experiments.candidates import candidates
    from lorafit.training.prepare import training_arguments

    references = list(dict.fromkeys(["base", *wishes.references]))
    made = candidates(wishes.layers, wishes.methods or household, references, screen.say)
    for one in made:
        training_arguments(one.settings, Path("unused"))
    return made


def _check_search(made: Sequence[Candidate]) -> None:
    """Raises `MissingExtraError` if rates are to be searched and what searches is missing: before data are read."""
    from lorafit.experiments.trial import Kind
    from lorafit.experiments.tuning import optuna

    if any(one.kind is not Kind.BASE and one.fixed is None for one in made):
        optuna()


def _folder(wishes: Wishes, made: Sequence[Candidate]) -> Path:
    if wishes.output_dir:
        return Path(wishes.output_dir)
    data = made[0].settings.data
    return Path("runs") / f"{'python-qa' if data is None else Path(data).name.partition('.')[0] or 'data'}-compare"


def _compare(
    wishes: Wishes, made: Sequence[Candidate], folder: Path, seconds: float | None, started: float, screen: Screen
) -> None:
    from lorafit.cli.compare_screen import progress
    from lorafit.experiments.advice import advise
    from lorafit.experiments.candidates import check_probe, default_rates, with_heads
    from lorafit.experiments.comparison import COMPARISON, Comparison
    from lorafit.experiments.parts import part

    view = progress(screen, folder)
    runner = _runner(wishes, folder, view.said)
    parts = part(made[0].settings, folder)
    if wishes.metric == "accuracy" and not parts.classifies:
        raise ConfigError(
            "these records have no classes to be right about", where="--metric", found="accuracy", fix="--metric loss"
        )
    for sentence in parts.said:
        screen.say(sentence)
    check_probe(made, labelled=parts.labelled)
    made = with_heads(made, screen.say, labelled=parts.labelled)
    rates = default_rates(made, screen.say, labelled=parts.labelled)
    plan = _plan(wishes, made, parts, rates, folder, runner, seconds, started, screen)
    for sentence in plan.said:
        screen.say(sentence)
    comparison = Comparison(folder, made, parts, plan, rates, runner, wishes.command, view.changed)
    with view:
        comparison.run()
    ranking = _ranked(comparison, wishes.metric)
    unit = "as a share of the labels' variance" if parts.numbers else "nats"
    comparison.ranking = {**ranking.to_json(), "unit": unit}
    comparison.advice = advise(comparison.as_json())
    comparison.write()
    _show(comparison, ranking, screen)
    report = _report(comparison.as_json(), folder, screen)
    screen.say(f"comparison: {folder / COMPARISON}", whole=True)
    if report is not None:
        screen.say(f"report: {report}", whole=True)
    screen.result({**comparison.as_json(), "folder": folder, "report": report})


def _runner(wishes: Wishes, folder: Path, notify: Any) -> Runner:
    if wishes.ray is not None:
        from lorafit.experiments.ray_runner import Ray

        return Ray(folder, wishes.ray, notify)
    from lorafit.experiments.runner import Local

    return Local(folder, notify)


def _plan(
    wishes: Wishes,
    made: Sequence[Candidate],
    parts: Parts,
    rates: dict[str, float],
    folder: Path,
    runner: Runner,
    seconds: float | None,
    started: float,
    screen: Screen,
) -> Plan:
    from lorafit.experiments import spending
    from lorafit.experiments.trial import Trial
    from lorafit.training.folder import RunFolder

    records = parts.train_records
    if seconds is None:
        return spending.plan_freely(made, records, wishes.rates, wishes.seeds)
    first = made[0]
    asked: dict[str, Any] = {
        "seconds": seconds,
        "rates": wishes.rates,
        "seeds": wishes.seeds,
        "candidates": [one.name for one in made],
        "steps": spending.asked_steps(first, records),
    }
    known = spending.remembered(asked, folder)
    if known is not None:
        return known
    screen.say("times two short runs, to see what fits")
    rate, result, wall = first.fixed or rates[first.name], None, 0.0
    # The first finds cold caches and waits for imports, which no later one does.
    for name, steps in (("first", 1), ("second", min(spending.PROBE_STEPS, asked["steps"]))):
        settings = first.run(parts, seed=first.settings.seed, rate=rate, steps=steps)
        trial = Trial(f"speed/{first.name}/{name}", settings, parts.test, forget=True)
        began = time.monotonic()
        result = next(iter(runner.run([trial])))
        wall = max(time.monotonic() - began, result.total_seconds)
    assert result is not None
    if result.failed is not None:
        raise TrainingError(
            "the run by which a budget is planned failed",
            where=trial.folder(folder),
            found=result.failed,
            expected="a run to time",
            fix="leave --budget out and say what is spent: --max-steps, --rates; or a smaller --learning-rate",
        )
    speed = spending.Speed.of(result, RunFolder(trial.folder(folder)), wall)
    spent = time.monotonic() - started
    plan = spending.plan_within(seconds, spent, speed, made, records, wishes.rates, wishes.seeds)
    spending.remember(plan, asked, folder)
    return plan


def _ranked(comparison: Any, metric: str) -> Ranking:
    from lorafit.experiments.ranking import Metric, rank

    return rank([one.as_json() for one in comparison.standings], metric=cast("Metric", metric))


def _show(comparison: Any, ranking: Ranking, screen: Screen) -> None:
    from lorafit.cli.compare_screen import agreement_table, final_table

    header, rows, right = final_table(comparison, ranking)
    screen.say()
    screen.table(header, rows, right=right, whole=range(2))
    agreed = agreement_table(comparison, ranking)
    if agreed is not None:
        screen.say()
        screen.table(*agreed, right=(1, 2, 3))
        screen.say("means over the seeds, in brackets those of the ends of each seed's 95 % interval over test records")
    for sentence in [*comparison.notes(), *ranking.sentences(), *comparison.advice]:
        screen.say(sentence)


def _report(found: dict[str, Any], folder: Path, screen: Screen) -> Path | None:
    from lorafit.report.comparison_page import write_comparison

    try:
        return write_comparison(found, folder / REPORT)
    except MissingExtraError as error:
        screen.say(f"no report: {error.message}; {error.fix}")
        return None
