"""Candidates against each other on the same records: a rate is chosen for each, then several seeds are reported.

Rates are chosen by the validation part. The test part is measured for the runs that are reported and enters no choice.
All runs have the same records, in the same order for a seed, and the same number of steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

from lorafit import __version__, files
from lorafit.errors import ConfigError, some
from lorafit.experiments.candidates import Candidate
from lorafit.experiments.parts import DATA, Parts
from lorafit.experiments.runner import Runner
from lorafit.experiments.spending import PLAN, Plan
from lorafit.experiments.trial import TRIALS, Kind, Result, Trial
from lorafit.experiments.tuning import Search, Tried, best
from lorafit.training.folder import FREE, FREE_TRAINING, RunFolder

FORMAT = 1
COMPARISON = "comparison.json"
SETTINGS = "settings.json"
BEFORE = frozenset({".lock", DATA, TRIALS, PLAN})
"""What a comparison may leave behind that ends before its settings are kept."""
PRICED = frozenset({"prefix_cache", "recompute", "slice"})
"""Settings that a run may go on without, and that its time and memory depend on: a comparison has them alike."""


@final
@dataclass
class Standing:
    """Where one candidate stands.

    Attributes:
        candidate: which.
        rate: the chosen one; None while it is searched, and for the base.
        search: each rate that was tried, and what it came to.
        seeds: each seed that is reported, and what it came to.
        failed: why there is nothing to report; None for nothing.
    """

    candidate: Candidate
    rate: float | None = None
    search: list[tuple[float, Result]] = field(default_factory=list)
    seeds: list[tuple[int, Result]] = field(default_factory=list)
    failed: str | None = None

    @property
    def results(self) -> list[Result]:
        """All runs so far."""
        return [result for _, result in [*self.search, *self.seeds]]

    def as_json(self) -> dict[str, Any]:
        """As comparison.json holds it."""
        return {
            "name": self.candidate.name,
            "kind": self.candidate.kind.value,
            "options": self.candidate.settings.method_options if self.candidate.kind is Kind.ADAPTER else {},
            "rate": self.rate,
            "search": [
                {
                    "rate": rate,
                    "validation": result.validation,
                    "seconds": result.total_seconds,
                    "failed": result.failed,
                }
                for rate, result in self.search
            ],
            "seeds": [_seed(seed, result) for seed, result in sorted(self.seeds, key=lambda one: one[0])],
            "failed": self.failed,
        }


def _seed(seed: int, result: Result) -> dict[str, Any]:
    measured = result.measured
    return {
        "seed": seed,
        "trial": result.name,
        "validation": result.validation,
        "losses": [] if measured is None else list(measured.losses),
        "counts": [] if measured is None else list(measured.counts),
        "correct": None if measured is None or measured.correct is None else list(measured.correct),
        "pairs": None if measured is None or measured.pairs is None else [list(pair) for pair in measured.pairs],
        "agreement": None if measured is None else measured.agreement(),
        "steps": result.steps,
        "extra_steps": result.extra_steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "total_seconds": result.total_seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "peak_device_bytes": result.peak_device_bytes,
        "trainable": result.trainable,
        "adapter_bytes": result.adapter_bytes,
        "curve": [[step, loss] for step, loss in result.curve],
        "failed": result.failed,
    }


Changed: TypeAlias = "Callable[[Comparison, Result | None], object]"


@final
class Comparison:
    """One comparison in its folder.

    Args:
        folder: where it lives.
        candidates: what is compared.
        parts: the data.
        plan: what is spent.
        rates: the rate that each candidate's search begins with.
        runner: runs trials.
        command: how the user asked for it.
        changed: is told of each result, and (with None) when other trials begin.

    Raises:
        ConfigError: the folder is another comparison's.
        MissingExtraError: rates are to be searched, and Optuna is not installed.
    """

    def __init__(
        self,
        folder: Path,
        candidates: Sequence[Candidate],
        parts: Parts,
        plan: Plan,
        rates: Mapping[str, float],
        runner: Runner,
        command: str,
        changed: Changed,
    ) -> None:
        self.folder, self.parts, self.plan = folder, parts, plan
        self.standings = [Standing(one) for one in candidates]
        self.waiting: list[str] = []
        self.ranking: dict[str, Any] | None = None
        self.advice: list[str] = []
        self._runner, self._command, self._changed = runner, command, changed
        self._facts: dict[str, Any] = {}
        own(folder, candidates, plan.steps)
        self._searches = {
            one.candidate.name: Search(folder, one.candidate.name, rates[one.candidate.name], plan.rates)
            for one in self.standings
            if one.candidate.kind is not Kind.BASE and one.candidate.fixed is None
        }

    @property
    def total(self) -> int:
        """How many trials there are in all."""
        return sum(self._wanted(one) for one in self.standings)

    @property
    def done(self) -> int:
        """How many of them are done."""
        return sum(len(one.results) for one in self.standings)

    def _wanted(self, standing: Standing) -> int:
        if standing.failed is not None:
            return len(standing.results)
        if standing.candidate.kind is Kind.BASE:
            return 1
        return len(self.plan.seeds) + (self.plan.rates if standing.candidate.name in self._searches else 0)

    def left(self) -> float | None:
        """Seconds that the rest will take, going by the runs so far; None before the first."""
        every = [result.total_seconds for one in self.standings for result in one.results if result.steps]
        if not every:
            return None
        mean, seconds = math.fsum(every) / len(every), 0.0
        for one in self.standings:
            own_runs = [result.total_seconds for result in one.results if result.steps]
            each = math.fsum(own_runs) / len(own_runs) if own_runs else mean
            seconds += each * (self._wanted(one) - len(one.results))
        return seconds

    def run(self) -> None:
        """Runs what is not done yet; comparison.json is written anew after each trial.

        Raises:
            LorafitError: a trial cannot run. What is done stays.
        """
        references = [one for one in self.standings if one.candidate.kind is Kind.BASE]
        self._measure(references, self._seed_of_search)
        for _ in range(self.plan.rates):
            self._search()
        for one in self.standings:
            self._choose(one)
        able = [one for one in self.standings if one.failed is None and one not in references]
        for seed in self.plan.seeds:
            self._measure(able, seed)
        for one in self.standings:
            if one.seeds and all(result.failed is not None for _, result in one.seeds):
                one.failed = "no seed came to an end: " + str(one.seeds[0][1].failed)
        self.write()

    @property
    def _seed_of_search(self) -> int:
        return self.standings[0].candidate.settings.seed

    def _trial(self, one: Standing, seed: int, rate: float | None, measured: str | None) -> Trial:
        candidate = one.candidate
        settings = candidate.run(self.parts, seed=seed, rate=rate, steps=self.plan.steps)
        name = candidate.name if rate is None else f"{candidate.name}/rate-{rate:.2e}"
        return Trial(f"{name}/seed-{seed}", settings, measured, candidate.kind, forget=True)

    def _search(self) -> None:
        """The next rate of each candidate."""
        tried: dict[str, tuple[Standing, float, bool]] = {}
        trials = []
        for one in self.standings:
            search = self._searches.get(one.candidate.name)
            place = len(one.search)
            if search is None or place >= self.plan.rates:
                continue
            known = search.tried
            rate = known[place].rate if place < len(known) else search.next()
            assert rate is not None
            trial = self._trial(one, self._seed_of_search, rate, None)
            tried[trial.name] = (one, rate, place < len(known))
            trials.append(trial)
        for result in self._results(trials):
            one, rate, told = tried[result.name]
            if not told:
                self._searches[one.candidate.name].tell(rate, result.validation if result.failed is None else None)
            one.search.append((rate, result))
            self._step(result)

    def _choose(self, one: Standing) -> None:
        if one.candidate.name not in self._searches:
            one.rate = one.candidate.fixed
            return
        # By the results, not by what the search was told of them: a trial that failed may have been run again since.
        chosen = best(tuple(Tried(rate, None if each.failed else each.validation) for rate, each in one.search))
        if chosen is None:
            one.failed = f"it failed at each of its rates: {_lost(one)}"
        else:
            one.rate = chosen.rate

    def _measure(self, standings: Sequence[Standing], seed: int) -> None:
        """One seed of each, measured on the test part."""
        trials = {}
        for one in standings:
            rate = None if one.candidate.kind is Kind.BASE else one.rate
            trial = self._trial(one, seed, rate, self.parts.test)
            trials[trial.name] = (trial, one)
        for result in self._results([trial for trial, _ in trials.values()]):
            trials[result.name][1].seeds.append((seed, result))
            self._step(result)

    def _results(self, trials: Sequence[Trial]) -> Any:
        self.waiting = [trial.name for trial in trials]
        if trials:
            self._changed(self, None)
        yield from self._runner.run(trials)

    def _step(self, result: Result) -> None:
        self.waiting.remove(result.name)
        self.write()
        self._changed(self, result)

    def notes(self) -> list[str]:
        """What there is to know of the records and of the choice of rates, in sentences."""
        return self._unread() + [
            f"{one.candidate.name} failed at {lost}" for one in self.standings if (lost := _lost(one))
        ]

    def _unread(self) -> list[str]:
        """What of the records no model has read."""
        data = self._first().get("data", {})
        told, within = [], f"max_length {data.get('max_length')}"
        if cut := data.get("truncated"):
            told.append(
                f"{cut:,} of the {data['train_records'] + data['eval_records']:,} records to train on and to choose by "
                f"are longer than {within}, and were cut; those of the test are cut likewise"
            )
        if dropped := data.get("dropped"):
            told.append(f"{dropped:,} records to train on or to choose by were left out: no answer is within {within}")
        measured = [len(each.measured.losses) for one in self.standings for each in one.results if each.measured]
        if missing := self.parts.test_records - max(measured, default=self.parts.test_records):
            told.append(
                f"{missing:,} of the {self.parts.test_records:,} test records are not measured: "
                f"no answer is within {within}"
            )
        return told

    def write(self) -> None:
        """Puts comparison.json in place."""
        files.write_text(self.folder / COMPARISON, json.dumps(self.as_json(), allow_nan=False))

    def as_json(self) -> dict[str, Any]:
        """What comparison.json holds."""
        plan, parts, facts = self.plan, self.parts, self._first()
        data, shared = facts.get("data", {}), self.standings[0].candidate.settings.model_dump()
        return {
            "format": FORMAT,
            "lorafit": __version__,
            "command": self._command,
            "settings": {key: value for key, value in shared.items() if key not in ("method", "method_options")},
            "data": {
                "name": parts.name,
                "form": parts.form,
                "train_records": parts.train_records,
                "validation_records": parts.validation_records,
                "test_records": parts.test_records,
                "train_tokens": data.get("train_tokens"),
                "longest": data.get("longest"),
                "truncated": data.get("truncated"),
                "dropped": data.get("dropped"),
                "unread": self._unread(),
            },
            "budget": {
                "seconds": plan.seconds,
                "steps": plan.steps,
                "records": plan.records,
                "rates": plan.rates,
                "seeds": list(plan.seeds),
                "said": list(plan.said),
            },
            "environment": facts.get("environment", {}),
            "candidates": [one.as_json() for one in self.standings],
            "ranking": self.ranking,
            "advice": self.advice,
        }

    def _first(self) -> dict[str, Any]:
        """What the records of the first run say of data and machine."""
        names = [result.name for one in self.standings for result in one.results if result.steps]
        if not self._facts and names:
            first = RunFolder(self.folder / TRIALS / names[0])
            for event in ("data", "environment"):
                for one in first.recorded(event):
                    kept = {key: value for key, value in one.items() if key not in ("event", "time", "elapsed")}
                    self._facts[event] = kept
        return self._facts


def _lost(one: Standing) -> str:
    """The rates at which a candidate failed, each with the reason."""
    lost = sorted((rate, result.failed) for rate, result in one.search if result.failed is not None)
    return "; ".join(f"{rate:.3g} ({why})" for rate, why in lost)


def own(folder: Path, candidates: Sequence[Candidate], steps: int) -> None:
    """Makes the folder of a comparison, or finds it if it is this very one's. Candidates may be added to it.

    Raises:
        ConfigError: a candidate had other settings there.
    """
    path = folder / SETTINGS
    check_folder(folder)
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    mine = {one.name: _comparable(one) | {"steps": steps} for one in candidates}
    different = [
        f"{name}: {key} was {kept[name].get(key)!r} and is {value!r}"
        for name, settings in mine.items()
        if name in kept
        for key, value in settings.items()
        if kept[name].get(key) != value
    ]
    if different:
        raise ConfigError(
            "this is the output directory of another comparison",
            where=folder,
            found=some(different, 4),
            expected="the same settings, to go on with it",
            fix=f"choose another output_dir, or remove {folder}",
        )
    files.write_text(path, json.dumps({**kept, **mine}, indent=2))


def check_folder(folder: Path) -> None:
    """Raises `ConfigError` where a folder holds what is no comparison's: a run's, or another experiment's."""
    if not folder.exists():
        return
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    path = folder / SETTINGS
    if folder.is_dir() and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            whole = all(isinstance(one, dict) and "steps" in one for one in found.values())
        except (ValueError, AttributeError):
            whole = False
        if whole:
            return
    elif folder.is_dir() and set(inside) <= BEFORE:  # a comparison that ended before its first trial began
        return
    raise ConfigError(
        "the output directory holds something else",
        where=folder,
        found=some(inside, 4) if folder.is_dir() else "a file",
        expected="a new or empty directory, or that of the same comparison",
        fix="choose another output_dir",
    )


def _comparable(candidate: Candidate) -> dict[str, Any]:
    settings = candidate.settings.model_dump()
    settings["training"] = {key: value for key, value in settings["training"].items() if key not in FREE_TRAINING}
    plain = {key: value for key, value in settings.items() if key not in FREE - PRICED}
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found
