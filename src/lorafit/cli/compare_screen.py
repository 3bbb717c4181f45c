"""What a comparison shows while it runs, and its table at the end."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

from lorafit.cli.screen import Screen

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from lorafit.experiments.comparison import Comparison, Standing
    from lorafit.experiments.ranking import Ranking
    from lorafit.experiments.trial import Result

TAIL = 4096
"""Bytes of a run's records in which its last step is looked for."""


class Progress(ABC):
    """What people see of a comparison that runs."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def said(self, line: str) -> None:
        """Whoever runs trials says something."""

    @abstractmethod
    def changed(self, comparison: Comparison, result: Result | None) -> None:
        """A trial is done, or others begin."""

    def close(self) -> None:  # noqa: B027 (lines need no end)
        """Leaves the terminal as it was."""


def progress(screen: Screen, folder: Path) -> Progress:
    """A table that changes on a terminal, lines elsewhere."""
    return Drawn(screen, folder) if screen.fancy else Lines(screen)


@final
class Lines(Progress):
    """One line for each trial that is done."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def said(self, line: str) -> None:
        if not line.startswith("runs "):
            self._screen.say(line)

    def changed(self, comparison: Comparison, result: Result | None) -> None:
        if result is not None:
            self._screen.say(f"{comparison.done} of {comparison.total}: {told(result)}{_left(comparison)}")


def told(result: Result) -> str:
    """A trial in a line."""
    if result.failed is not None:
        return f"{result.name}: {result.failed}"
    losses = [] if result.validation is None else [f"validation loss {result.validation:.4f}"]
    if result.measured is not None:
        losses.append(f"test loss {result.measured.mean:.4f}")
    return f"{result.name}: {', '.join(losses)}; {result.total_seconds:.0f} s"


def _left(comparison: Comparison) -> str:
    from lorafit.training.spans import duration

    seconds = comparison.left()
    return "" if seconds is None or comparison.done >= comparison.total else f"; about {duration(seconds)} left"


@final
class Drawn(Progress):
    """A table with a row for each candidate, and a line on the trial that runs."""

    def __init__(self, screen: Screen, folder: Path) -> None:
        self._screen, self._folder = screen, folder
        self._live: Live | None = None
        self._comparison: Comparison | None = None

    def said(self, line: str) -> None:
        if not line.startswith("runs "):
            self._screen.say(line)

    def changed(self, comparison: Comparison, result: Result | None) -> None:
        from rich.live import Live

        self._comparison = comparison
        if self._live is None:
            self._live = Live(
                console=self._screen.console, refresh_per_second=1, get_renderable=self._table, transient=True
            )
            self._live.start()
        if result is not None and result.failed is not None:
            self._screen.say(told(result))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        comparison = self._comparison
        assert comparison is not None
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, caption_justify="left")
        for name, right in (("", False), ("rates", True), ("rate", True), ("validation", True), ("test", True)):
            table.add_column(name, justify="right" if right else "left")
        for standing in comparison.standings:
            table.add_row(*_row(standing))
        now = ""
        if comparison.waiting:
            from lorafit.experiments.trial import TRIALS

            name = comparison.waiting[0]
            step = last_step(self._folder / TRIALS / name / "records.jsonl")
            now = f": {name}" + ("" if step is None else f", step {step} of {comparison.plan.steps}")
        table.caption = f"{comparison.done} of {comparison.total} trials done{now}{_left(comparison)}"
        return table


def _row(standing: Standing) -> tuple[str, ...]:
    tried = [result.validation for _, result in standing.search if result.validation is not None]
    measured = [result.measured.mean for _, result in standing.seeds if result.measured is not None]
    test = f"{sum(measured) / len(measured):.4f} ({len(measured)})" if measured else ""
    rate = "" if standing.rate is None else f"{standing.rate:.3g}"
    return (
        standing.candidate.name,
        str(len(standing.search)) if standing.search else "",
        rate,
        f"{min(tried):.4f}" if tried else "",
        test if standing.failed is None else standing.failed,
    )


def last_step(records: Path) -> int | None:
    """The last step that a run has told of; None before the first."""
    if not records.is_file():
        return None
    with records.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut off, at the begin or by being written right now
        if isinstance(found, dict) and found.get("event") == "step":
            return int(found["step"])
    return None


def final_table(comparison: Comparison, ranking: Ranking) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows and the columns to align on the right: the best first, those that failed last."""
    from lorafit.experiments.ranking import DEVICE

    standings = {one.candidate.name: one for one in comparison.standings}
    score = f"test {ranking.metric}"
    classifies = comparison.parts.classifies
    other = ["accuracy" if ranking.metric == "loss" else "loss"] if classifies else []
    header = ["", "", "rate", score, f"{ranking.level:.0%} interval", *other]
    memory = "memory of the device" if ranking.memory == DEVICE else "peak memory"
    header += ["steps", "seconds", "in steps", memory, "trained"]
    rows = []
    tied = sum(place.tied for place in ranking.places)
    for place in ranking.places:
        standing = standings[place.name]
        rows.append(
            [
                "=" if place.tied and tied > 1 else str(place.place),
                place.name,
                "" if standing.rate is None else f"{standing.rate:.3g}",
                f"{place.score:.4f}",
                f"{place.low:.4f} to {place.high:.4f}",
                *([_other(standing, other[0])] if other else []),
                *_costs(standing, place.cost["memory"]),
            ]
        )
    for name, reason in ranking.failed:
        rows.append(["-", name, "", "failed", reason, *[""] * (len(header) - 5)])
    return header, rows, [2, 3, *range(5, len(header))]


def agreement_table(comparison: Comparison, ranking: Ranking) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows on how well numbers were predicted, the best first; None where none are."""
    rows = []
    candidates = {one["name"]: one for one in comparison.as_json()["candidates"]}
    for place in ranking.places:
        known = [one["agreement"] for one in candidates[place.name]["seeds"] if one["agreement"]]
        if known:
            rows.append([place.name, *(_told(known, key) for key in ("mean_absolute_error", "pearson", "spearman"))])
    return (["", "mean absolute error", "Pearson", "Spearman"], rows) if rows else None


def _told(found: Sequence[Mapping[str, float]], key: str) -> str:
    """A mean over seeds, with the means of the ends."""
    known = [each for each in found if f"{key}_low" in each]
    if not known:
        return "not defined"
    value, low, high = (sum(each[name] for each in known) / len(known) for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _other(standing: Standing, metric: str) -> str:
    found: list[Any] = [result.measured for _, result in standing.seeds if result.measured is not None]
    values = [one.accuracy if metric == "accuracy" else one.mean for one in found]
    return f"{sum(values) / len(values):.4f}" if values else ""


def _costs(standing: Standing, memory: float | None) -> list[str]:
    results = [result for _, result in standing.seeds if result.measured is not None]
    extra = max((result.extra_steps for result in results), default=0)
    return [
        f"{max(result.steps for result in results)}" + (f" + {extra} of a trial" if extra else ""),
        _mean([result.total_seconds for result in results]),
        _mean([result.seconds for result in results]),
        "" if memory is None else f"{memory / 2**30:.2f} GiB",
        f"{results[-1].trainable:,}",
    ]


def _mean(seconds: list[float]) -> str:
    """Their mean, in as many digits as tell something."""
    mean = sum(seconds) / len(seconds)
    return f"{mean:.0f}" if mean >= 10 else f"{mean:.1f}"
