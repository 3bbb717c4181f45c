"""How many steps, rates and seeds a comparison has: as asked, or as many as fit into a time, told in sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, final

from lorafit import files
from lorafit.errors import ConfigError
from lorafit.experiments.candidates import Candidate
from lorafit.experiments.trial import Kind, Result
from lorafit.training.spans import duration

if TYPE_CHECKING:
    from lorafit.training.folder import RunFolder

PLAN = "plan.json"
RATES, FEWEST_RATES = 5, 3
SEEDS, MOST_SEEDS = 3, 5
"""Never fewer than three seeds: with two, nobody can tell a method from its luck."""
ENOUGH, FEWEST_STEPS = 60, 20
"""Steps at which rates are given up rather than steps, and below which no comparison is worth making."""
PROBE_STEPS = 6
RESERVE = 0.9
"""The share of the time left that is planned with: machines have other things to do at times."""
TIMES = {Kind.ADAPTER: 1.3, Kind.FULL: 3.0, Kind.BASE: 0.0, Kind.PROBE: 1.0}
"""A step in steps of the trial that was timed: DoRA, AdaLoRA and Delta-LoRA take longer, LoRA-drop has a trial."""


@final
@dataclass(frozen=True)
class Plan:
    """What is spent.

    Attributes:
        seconds: the time that the user gave; None for none.
        steps: optimizer steps of each run.
        records: training records that a run sees at least once.
        rates: learning rates that are tried for each candidate.
        seeds: of the runs that are reported; that of the search is the one before them.
        said: what fits and what was left out, one sentence each.
    """

    seconds: float | None
    steps: int
    records: int
    rates: int
    seeds: tuple[int, ...]
    said: tuple[str, ...]


@final
@dataclass(frozen=True)
class Speed:
    """What the timed trial showed, in seconds.

    Attributes:
        step: of one step.
        around: of all else in a run: starting, loading, evaluating, measuring.
    """

    step: float
    around: float

    @classmethod
    def of(cls, result: Result, run: RunFolder, wall: float) -> Speed:
        """That of a trial which took `wall` seconds in all, the start of its process among them."""
        steps = [float(one["seconds"]) for one in run.recorded("step")]
        # The first step is slow: memory is handed out and code is chosen.
        return cls(median(steps[1:] or steps), max(0.0, wall - result.seconds))


def asked_steps(candidate: Candidate, records: int) -> int:
    """Optimizer steps of a run, as the settings have them."""
    given = candidate.settings.training
    if int(given.get("max_steps", -1)) > 0:
        return int(given["max_steps"])
    batches = math.ceil(records / int(given["per_device_train_batch_size"]))
    each = max(1, math.ceil(batches / int(given.get("gradient_accumulation_steps", 1))))
    return math.ceil(each * float(given["num_train_epochs"]))


def per_step(candidate: Candidate) -> int:
    """Records of a step."""
    given = candidate.settings.training
    return int(given["per_device_train_batch_size"]) * int(given.get("gradient_accumulation_steps", 1))


def seeds_of(seed: int, count: int) -> tuple[int, ...]:
    """The seeds of the runs that are reported: those after the one of the split and of the search."""
    if count < SEEDS:
        raise ConfigError(
            "too few seeds",
            where="--seeds",
            found=count,
            expected=f"at least {SEEDS}: with fewer, a method cannot be told from its luck",
            fix=f"--seeds {SEEDS}",
        )
    return tuple(range(seed + 1, seed + 1 + count))


def rates_of(candidates: Sequence[Candidate], count: int) -> int:
    """How many rates are tried for each candidate whose rate is not given; 0 where all of them are."""
    if count < 1:
        raise ConfigError("too few rates", where="--rates", found=count, expected="at least 1", fix=f"--rates {RATES}")
    return count if any(one.kind is not Kind.BASE and one.fixed is None for one in candidates) else 0


def plan_freely(candidates: Sequence[Candidate], records: int, rates: int, seeds: int) -> Plan:
    """Everything as it is asked for."""
    rates = rates_of(candidates, rates)
    first = candidates[0]
    steps = asked_steps(first, records)
    chosen = seeds_of(first.settings.seed, seeds)
    seen = min(records, steps * per_step(first))
    said = f"{steps:,} steps on {seen:,} records in each run, {_counted(candidates, rates, len(chosen))}"
    return Plan(None, steps, seen, rates, chosen, (said,))


def _runs(candidates: Sequence[Candidate], rates: int, seeds: int) -> dict[Kind, int]:
    """How many runs there are of each kind."""
    counts = dict.fromkeys(Kind, 0)
    for one in candidates:
        counts[one.kind] += 1 if one.kind is Kind.BASE else seeds + (rates if one.fixed is None else 0)
    return counts


def _counted(candidates: Sequence[Candidate], rates: int, seeds: int) -> str:
    total = sum(_runs(candidates, rates, seeds).values())
    given = [one.fixed is not None for one in candidates if one.kind is not Kind.BASE]
    tried = f"{rates} rate{'' if rates == 1 else 's'}"
    if all(given):
        return f"{seeds} seeds for each candidate: {total:,} runs"
    if any(given):
        return f"{seeds} seeds for each candidate, and {tried} for those without a given one: {total:,} runs"
    return f"{tried} and {seeds} seeds for each candidate: {total:,} runs"


def plan_within(
    seconds: float, spent: float, speed: Speed, candidates: Sequence[Candidate], records: int, rates: int, seeds: int
) -> Plan:
    """The most that fits into a time.

    Steps are given up first, down to a number at which rates still can be told apart; then rates; then steps again.
    Seeds are never fewer than three. What is left over goes into more seeds.

    Args:
        seconds: all of the time.
        spent: what of it is gone.
        speed: of the trial that was timed.
        candidates: what is compared.
        records: that there are to train on.
        rates: how many are wanted.
        seeds: how many are wanted.

    Raises:
        ConfigError: not even the least fits; says what would.
    """
    rates = rates_of(candidates, rates)
    first, time = candidates[0], (seconds - spent) * RESERVE
    wanted, least = asked_steps(first, records), min(FEWEST_STEPS, asked_steps(first, records))
    chosen = seeds_of(first.settings.seed, seeds)

    def cost(steps: int, rates: int, seeds: int) -> float:
        counts = _runs(candidates, rates, seeds)
        return sum(count * (speed.around + TIMES[kind] * speed.step * steps) for kind, count in counts.items())

    def fitting(rates: int, seeds: int) -> int:
        empty, one = cost(0, rates, seeds), cost(1, rates, seeds) - cost(0, rates, seeds)
        return min(wanted, int((time - empty) / one)) if one else wanted

    smallest = min(rates, FEWEST_RATES)
    for tried in [*range(rates, smallest - 1, -1)]:
        if fitting(tried, len(chosen)) >= min(wanted, ENOUGH) or tried == smallest:
            steps, kept = fitting(tried, len(chosen)), tried
            break
    if steps < least:
        need = spent + cost(least, smallest, len(chosen)) / RESERVE
        raise ConfigError(
            "the comparison does not fit into the budget",
            where="--budget",
            found=duration(seconds),
            expected=f"at least {math.ceil(need / 60)} min: "
            f"{_counted(candidates, smallest, len(chosen))} of {least} steps",
            fix=f"--budget {math.ceil(need / 60)}min, or fewer --methods",
        )
    most = len(chosen)
    while most < MOST_SEEDS and steps == wanted and cost(steps, kept, most + 1) <= time:
        most += 1
    chosen = seeds_of(first.settings.seed, most)
    seen = min(records, steps * per_step(first))
    said = [
        f"one step takes {speed.step:.2f} s and a run {speed.around:.0f} s beside its steps, as timed on {first.name}; "
        f"methods that take longer are reckoned with {TIMES[Kind.ADAPTER]:g} times that",
        f"within {duration(seconds)} fit {steps:,} steps in each run, {_counted(candidates, kept, most)}; "
        f"reckoned {duration(spent + cost(steps, kept, most))}",
    ]
    if steps < wanted:
        said.append(
            f"left out: {wanted - steps:,} of {wanted:,} steps, so that a run sees {seen:,} of {records:,} records"
        )
    if kept < rates:
        said.append(f"left out: {rates - kept} of {rates} rates for each candidate")
    if most > seeds:
        said.append(f"there is time for {most} seeds rather than {seeds}")
    return Plan(seconds, steps, seen, kept, chosen, tuple(said))


def remember(plan: Plan, asked: dict[str, Any], folder: Path) -> None:
    """Keeps a plan, so that who comes again has the same."""
    files.write_text(folder / PLAN, json.dumps({"asked": asked, "plan": asdict(plan)}, indent=2))


def remembered(asked: dict[str, Any], folder: Path) -> Plan | None:
    """The plan that was made for the same wishes; None for none."""
    path = folder / PLAN
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["asked"] != asked:
        return None
    return Plan(**{**found["plan"], "seeds": tuple(found["plan"]["seeds"]), "said": tuple(found["plan"]["said"])})
