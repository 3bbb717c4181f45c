"""One run among several: what is asked of it, and what it came to. Importing this does not import torch."""

from __future__ import annotations

import enum
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, final

from lorafit import files
from lorafit.errors import CheckpointError, ConfigError, some
from lorafit.training.config import Settings

Notify: TypeAlias = Callable[[str], object]

TRIALS = "trials"
"""The folder of an experiment in which each trial has its own."""
RESULT = "trial.json"
ASKED = "asked"
"""In that file, beside the result: what it is the result of."""


class Kind(enum.Enum):
    """What a trial trains: an adapter, all weights, nothing, or the head alone."""

    ADAPTER = "adapter"
    FULL = "full"
    BASE = "base"
    PROBE = "probe"


@final
@dataclass(frozen=True)
class Trial:
    """One run of an experiment.

    Attributes:
        name: its folder below the experiment's trials, such as "lora/rate-1e-03/seed-0"; no other trial has it.
        settings: those of the run; its `output_dir` is decided by who runs it.
        measured: a file of records on which the finished model is measured, one by one; None for none.
        kind: an adapter is trained, or all weights are, or nothing is.
        forget: whether checkpoints, and the weights of a model that was trained in full, go once it is measured.
    """

    name: str
    settings: Settings
    measured: str | None = None
    kind: Kind = Kind.ADAPTER
    forget: bool = False

    def folder(self, experiment: Path) -> Path:
        """Where it lives."""
        return experiment / TRIALS / self.name

    def placed(self, experiment: Path) -> Settings:
        """Its settings with that folder."""
        return self.settings.model_copy(update={"output_dir": str(self.folder(experiment))})

    def asked(self, experiment: Path) -> dict[str, Any]:
        """What its result depends on; files of the experiment are named as seen from it, which may be moved."""
        from lorafit.training.folder import FREE, FREE_TRAINING

        settings = self.settings.model_dump(mode="json")
        kept = {key: value for key, value in settings.items() if key not in FREE}
        kept["training"] = {key: value for key, value in settings["training"].items() if key not in FREE_TRAINING}
        kept |= {"kind": self.kind.value, "measured": self.measured}
        for name in ("data", "eval_data", "measured"):
            path = None if kept[name] is None else Path(kept[name]).absolute()
            if path is not None and path.is_relative_to(experiment.absolute()):
                kept[name] = path.relative_to(experiment.absolute()).as_posix()
        found: dict[str, Any] = json.loads(json.dumps(kept))
        return found


@final
@dataclass(frozen=True)
class Measured:
    """Held-out records, one by one, in the order of their file.

    Attributes:
        losses: the summed loss of each, in nats; of a regression its squared error, as a share of the labels' variance.
        counts: the predictions of each: tokens, or 1 for a label.
        correct: how many of them were right; None where that is not counted.
        pairs: the number that was predicted of each and the right one, of a regression; None of anything else.
    """

    losses: tuple[float, ...]
    counts: tuple[int, ...]
    correct: tuple[float, ...] | None
    pairs: tuple[tuple[float, float], ...] | None = None

    @property
    def mean(self) -> float:
        """The loss of one prediction."""
        return math.fsum(self.losses) / math.fsum(self.counts)

    @property
    def accuracy(self) -> float | None:
        """The share of the predictions that are right."""
        return None if self.correct is None else math.fsum(self.correct) / math.fsum(self.counts)

    def agreement(self) -> dict[str, float] | None:
        """How well the numbers of a regression were predicted, as records of runs have it; None of anything else."""
        return None if self.pairs is None else _agreement(self.pairs)


@final
@dataclass(frozen=True)
class Result:
    """What a trial came to. Its file is written last of all: a trial that has one is never run again.

    Attributes:
        name: the trial's.
        steps: optimizer steps.
        tokens: tokens trained on, padding left out.
        trainable: trained parameters.
        seconds: time in optimizer steps.
        total_seconds: time of the whole trial: loading, a trial of LoRA-drop's, evaluations, measuring.
        peak_rss_bytes: peak memory of the training process; None where the system does not tell.
        peak_device_bytes: peak memory on its accelerator; None without one.
        adapter_bytes: size of the trained weights' file; None where there is none.
        validation: mean loss on the run's own held-out part, of what was kept; None without such a part.
        curve: (step, held-out loss), in order.
        measured: the records of the trial's file; None without one, or after a failure.
        failed: what went wrong in it, for people: a run that diverged is a result. None for nothing.
        extra_steps: steps that the method took beside those of training, as LoRA-drop does to choose layers.
    """

    name: str
    steps: int
    tokens: int
    trainable: int
    seconds: float
    total_seconds: float
    peak_rss_bytes: int | None
    adapter_bytes: int | None
    validation: float | None
    curve: tuple[tuple[int, float], ...]
    measured: Measured | None
    failed: str | None
    extra_steps: int = 0
    peak_device_bytes: int | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Result:
        """As `keep` wrote it."""
        measured = found["measured"]
        return cls(
            **{
                **{key: value for key, value in found.items() if key != ASKED},
                "curve": tuple((step, loss) for step, loss in found["curve"]),
                "measured": None
                if measured is None
                else Measured(
                    tuple(measured["losses"]),
                    tuple(measured["counts"]),
                    None if measured["correct"] is None else tuple(measured["correct"]),
                    _pairs(measured.get("pairs")),
                ),
            }
        )


@cache
def _agreement(pairs: tuple[tuple[float, float], ...]) -> dict[str, float] | None:
    """Made once: a comparison's file, which is written after each trial, has that of all."""
    import torch

    from lorafit.training.agreement import agreement

    table = torch.tensor(pairs, dtype=torch.float64)
    return agreement(table).figures() if bool(table.isfinite().all()) else None


def _pairs(found: Any) -> tuple[tuple[float, float], ...] | None:
    return None if found is None else tuple((float(predicted), float(right)) for predicted, right in found)


def keep(trial: Trial, experiment: Path, result: Result) -> None:
    """Puts a result into the trial's folder, whole or not at all, once what is to be forgotten is gone."""
    folder = trial.folder(experiment)
    if trial.forget:  # before the result is there: a trial that has one is never looked at again
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        if trial.kind is Kind.FULL:
            shutil.rmtree(folder / "model", ignore_errors=True)
    told = asdict(result) | {ASKED: trial.asked(experiment)}
    files.write_text(folder / RESULT, json.dumps(told, allow_nan=False))


def finished(trial: Trial, experiment: Path) -> Result | None:
    """The result of a trial that is done; None for one that is not.

    Raises:
        CheckpointError: its file is damaged.
        ConfigError: it is that of other settings.
    """
    path = trial.folder(experiment) / RESULT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        result = Result.of(found)
        _check_asked(found.get(ASKED), trial, experiment)
        return result
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the result of a trial is damaged",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected="the JSON that the trial wrote",
            fix=f"remove {path.parent}: the same command runs this trial again",
        ) from None


def _check_asked(before: Mapping[str, Any] | None, trial: Trial, experiment: Path) -> None:
    now = trial.asked(experiment)
    # Files of before results told of their settings have none; a setting that is new has none in older ones.
    different = [
        f"{key} was {before[key]!r} and is {value!r}"
        for key, value in now.items()
        if before is not None and key in before and before[key] != value
    ]
    if different:
        raise ConfigError(
            f"the trial {trial.name} was done with other settings",
            where=trial.folder(experiment),
            found=some(different, 4),
            expected="the same settings, to read its result",
            fix="choose another output_dir, or remove this folder: the trial is then run again",
        )


def run_trial(trial: Trial, folder: Path, notify: Notify) -> Result:
    """Runs a trial in this process, or goes on where it was stopped, or reads what it came to.

    Args:
        trial: what to run.
        folder: the experiment's folder.
        notify: is told what the run finds and decides, line by line.

    Raises:
        LorafitError: the settings, the data or the folder do not do.
        KeyboardInterrupt: it was stopped; what it did so far is saved.
    """
    done = finished(trial, folder)
    if done is not None:
        return done
    from lorafit.experiments.running import run

    return run(trial, folder, notify)
