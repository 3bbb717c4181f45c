"""Runs one trial in this process: trains, measures, and puts the figures of the run's records together."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorafit.errors import LorafitError
from lorafit.experiments.measuring import Model, adapted, bare, measure, probed, whole
from lorafit.experiments.trial import Kind, Measured, Notify, Result, Trial, keep
from lorafit.training import memory
from lorafit.training.findings import finite
from lorafit.training.owned import RECORDS
from lorafit.training.trainer import DivergedError

WEIGHTS = ("adapter/adapter_model.safetensors", "model/model*.safetensors", "head/head.safetensors")
NO_ROOM = re.compile(r"can't allocate memory|not enough memory")
"""What torch says where the main memory is full, in an error that has no class of its own."""


def run(trial: Trial, experiment: Path, notify: Notify) -> Result:
    """As `trial.run_trial`, of a trial that is not done."""
    folder = trial.folder(experiment)
    base = trial.kind is Kind.BASE
    try:
        result = _measured_base(trial, experiment, notify) if base else _trained(trial, folder, notify)
    except (MemoryError, RuntimeError) as error:
        if not _full(error):
            raise
        return given_up(trial, experiment, f"memory ran out: {(str(error).splitlines() or [''])[0]}")
    keep(trial, experiment, result)
    return result


def _full(error: Exception) -> bool:
    """Whether there was no room, on the device or in main memory."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or bool(NO_ROOM.search(str(error)))


def given_up(trial: Trial, experiment: Path, why: str) -> Result:
    """The result of a trial that cannot be brought to an end: what its records tell, and why."""
    result = _result(trial, trial.folder(experiment), None, None, why, memory.UNKNOWN, 0.0)
    keep(trial, experiment, result)
    return result


def _measured_base(trial: Trial, experiment: Path, notify: Notify) -> Result:
    started = time.perf_counter()
    settings = trial.placed(experiment)
    model = bare(settings, notify)
    validation = None if settings.eval_data is None else finite(measure(model, settings, settings.eval_data).mean)
    measured = None if trial.measured is None else measure(model, settings, trial.measured)
    failed = None
    if measured is not None and not math.isfinite(measured.mean):
        measured, failed = None, "the loss of the measured records is not finite before any training"
    return Result(
        name=trial.name,
        steps=0,
        tokens=0,
        trainable=0,
        seconds=0.0,
        total_seconds=time.perf_counter() - started,
        **memory.peaks(),
        adapter_bytes=None,
        validation=validation,
        curve=() if validation is None else ((0, validation),),
        measured=measured,
        failed=failed,
    )


def _trained(trial: Trial, folder: Path, notify: Notify) -> Result:
    settings = trial.settings.model_copy(update={"output_dir": str(folder)})
    quiet = Console(quiet=True)
    validation, failed = None, None
    try:
        if trial.kind in (Kind.FULL, Kind.PROBE):
            from lorafit.experiments.full import train_full
            from lorafit.experiments.trained import Everything, Probe

            validation = train_full(settings, notify, Everything() if trial.kind is Kind.FULL else Probe())
        else:
            from lorafit.training.run import train

            outcome = train(settings, command=f"trial {trial.name}", notify=notify, console=quiet)
            if outcome.status == "interrupted":
                raise KeyboardInterrupt
            validation = outcome.eval_after
    except DivergedError as error:
        failed = f"{error.message} at {error.where}"
    except (LorafitError, ValueError, ArithmeticError, TypeError):
        failed = _lost(folder)
        if failed is None:
            raise
    if validation is not None and not math.isfinite(validation):
        validation, failed = None, "the held-out loss is not finite at the end"
    peaks, started = memory.peaks(), time.perf_counter()
    measured = None
    if failed is None and trial.measured is not None:
        measured = measure(_finished(trial, settings, folder, notify), settings, trial.measured)
        if not math.isfinite(measured.mean):
            measured, failed = None, "the loss of the measured records is not finite"
    return _result(trial, folder, validation, measured, failed, peaks, time.perf_counter() - started)


def _finished(trial: Trial, settings: Any, folder: Path, notify: Notify) -> Model:
    """The model with what was trained, read from the files that the run left."""
    if trial.kind is Kind.FULL:
        return whole(settings, folder / "model", notify)
    if trial.kind is Kind.PROBE:
        return probed(settings, folder / "head", notify)
    return adapted(settings, folder / "adapter", notify)


def _result(
    trial: Trial,
    folder: Path,
    validation: float | None,
    measured: Measured | None,
    failed: str | None,
    peaks: memory.Peaks,
    measuring: float,
) -> Result:
    records = list(_records(folder))
    steps = {one["step"]: one for one in records if one["event"] == "step"}
    curve = {one["step"]: one["loss"] for one in records if one["event"] == "evaluation"}
    configs = [one for one in records if one["event"] == "config"]
    drops = [one for one in records if one["event"] == "drop"]
    sizes = [path.stat().st_size for name in WEIGHTS for path in folder.glob(name)]  # large models are in shards
    return Result(
        name=trial.name,
        steps=max(steps, default=0),
        tokens=sum(one["tokens"] for one in steps.values()),
        trainable=configs[-1]["resolved"]["trainable"] if configs else 0,
        seconds=math.fsum(one["seconds"] for one in steps.values()),
        total_seconds=_elapsed(records) + measuring,
        peak_rss_bytes=_most(peaks["peak_rss_bytes"], steps, "peak_rss_bytes"),
        peak_device_bytes=_most(peaks["peak_device_bytes"], steps, "peak_device_bytes"),
        adapter_bytes=sum(sizes) if sizes else None,
        validation=validation,
        curve=tuple((step, loss) for step, loss in sorted(curve.items()) if loss is not None),
        measured=measured,
        failed=failed,
        extra_steps=int(drops[-1]["steps"]) if drops else 0,
    )


def _most(last: int | None, steps: Mapping[int, Mapping[str, Any]], name: str) -> int | None:
    """The largest figure of a run, whose earlier processes have left theirs in the records."""
    return max((value for value in (last, *(one.get(name) for one in steps.values())) if value), default=None)


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / RECORDS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a kill cut off


def _elapsed(records: list[dict[str, Any]]) -> float:
    """Seconds of the run as if it had not been stopped: what was lost by a kill and done again counts once."""
    begins = [place for place, one in enumerate(records) if one["event"] == "run"]
    total = 0.0
    ends = [*begins[1:], len(records)] if begins else []  # none where not even a run began
    for place, after in zip(begins, ends, strict=True):
        mine = records[place:after]
        if after < len(records):
            step = int(records[after]["resumed_from_step"])
            mine = [one for one in mine if _until(one, step)]
        total += max((float(one["elapsed"]) for one in mine), default=0.0)
    return total


def _until(record: Mapping[str, Any], step: int) -> bool:
    """Whether the next process built on what this record tells of."""
    return record["event"] == "drop" or (record["event"] in ("step", "saved") and 0 < record["step"] <= step)


def _lost(folder: Path) -> str | None:
    """Where the records have a loss that is not finite; None if they have none."""
    for one in _records(folder):
        if "loss" in one.get("nonfinite", ()) or (one["event"] == "held_out" and one.get("nonfinite")):
            return f"the loss is not finite at step {one.get('step')}"
    return None
