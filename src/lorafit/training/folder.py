"""The folder of a run: whose it is, where it stands, and what it was left with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import files
from lorafit.errors import CheckpointError, ConfigError, some
from lorafit.state import STATE
from lorafit.training import ranks
from lorafit.training.config import Settings

SETTINGS = "settings.json"
RECORDS = "records.jsonl"
REPORT = "report.html"
ADAPTER = "adapter"
RESULT = "result.json"
DATA = "data.json"
COMPLETE = "complete.json"
LABELS = "labels.json"
TASK = "task.json"
PARTS = (STATE, "optimizer.pt", "scheduler.pt", "trainer_state.json")
"""What a checkpoint must hold, beside the states of random generators, so that a run goes on as if it never stopped."""

FREE = frozenset(
    {"output_dir", "samples", "max_new_tokens", "prefix_cache", "recompute", "general", "slice", "target", "shard"}
)
FREE_TRAINING = frozenset(
    {"report_to", "run_name", "project", "save_steps", "save_total_limit", "save_strategy", "dataloader_num_workers"}
)
"""Settings that may differ when a run goes on: they do not enter what it computes."""

PROCESSES = "processes"
"""Key beside the settings in their file: how many processes the run was begun with, if several."""
DIVIDED = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout", "ddp_backend"})
"""Settings that say how the records of a step are divided; how many these are may not differ when a run goes on."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder that is this run's own."""

    path: Path

    @property
    def records(self) -> Path:
        """The JSONL file of records."""
        return self.path / RECORDS

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / REPORT

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / ADAPTER

    def result(self) -> dict[str, Any] | None:
        """What the finished run found, or None while it is not finished."""
        path = self.path / RESULT
        if not path.is_file():
            return None
        fix = "restore the file, or remove it: the same command then goes on from the last checkpoint"
        return _read(path, ("steps", "resumed_from", "shown"), fix)

    def recorded(self, event: str) -> Iterator[dict[str, Any]]:
        """The records of an event so far."""
        if not self.records.is_file():
            return
        for line in self.records.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that a kill cut off
            if isinstance(record, dict) and record.get("event") == event:
                yield record

    def first_evaluation(self) -> float | None:
        """The held-out loss before the first step, as the records have it; None if they do not."""
        return next((one.get("loss") for one in self.recorded("evaluation") if one.get("step") == 0), None)

    def check_data(self, fingerprint: str) -> None:
        """Raises `ConfigError` if the run was begun with other data than these."""
        path = self.path / DATA
        if not path.is_file():
            files.write_text(path, json.dumps({"sha256": fingerprint}))
            return
        known = str(_read(path, ("sha256",), f"restore the file, or remove {self.path}")["sha256"])
        if known != fingerprint:
            raise ConfigError(
                "the data are not those that this run was begun with",
                where=self.path,
                found=fingerprint[:12],
                expected=known[:12],
                fix="put the data back as they were, or choose another output_dir",
            )

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as finished."""
        files.write_text(self.path / RESULT, json.dumps(result, indent=2))

    def checkpoint(self, notify: Callable[[str], object]) -> Path | None:
        """The newest whole checkpoint, or None. Those that a kill cut off are removed, and named.

        Raises:
            CheckpointError: the newest one lacks files that a run needs to go on as it was.
        """
        whole: list[tuple[int, Path]] = []
        for folder in self.path.glob("checkpoint-*"):
            step = folder.name.removeprefix("checkpoint-")
            if not step.isdigit() or not folder.is_dir():
                continue
            if (folder / COMPLETE).is_file():
                whole.append((int(step), folder))
            else:
                notify(f"{folder.name} was cut off while it was written; it is removed")
                shutil.rmtree(folder)
        if not whole:
            return None
        newest = max(whole)[1]
        missing = [name for name in PARTS if not (newest / name).is_file()]
        if not any(newest.glob("rng_state*.pth")):
            missing.append("rng_state.pth")
        if missing:
            raise CheckpointError(
                "the checkpoint is not a whole one",
                where=newest,
                found=f"no {some(missing, 5)}",
                expected=some([*PARTS, "rng_state.pth"]),
                fix=without(newest),
            )
        return newest


def without(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be gone on from."""
    own = int(checkpoint.name.rpartition("-")[2])
    steps = (
        path.parent.name.removeprefix("checkpoint-") for path in checkpoint.parent.glob(f"checkpoint-*/{COMPLETE}")
    )
    before = [int(step) for step in steps if step.isdigit() and int(step) < own]
    place = f"checkpoint-{max(before)}" if before else "the start"
    return f"remove {checkpoint.name}: the same command then goes on from {place}"


def _read(path: Path, keys: tuple[str, ...], fix: str) -> dict[str, Any]:
    """A file of the folder; raises `CheckpointError`, with this fix, where it is not what was written there."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise CheckpointError(
            f"{path.name} is damaged", where=path, found=error, expected="the JSON that this run wrote", fix=fix
        ) from None
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        lacks = sorted(set(keys) - set(found)) if isinstance(found, dict) else []
        raise CheckpointError(
            f"{path.name} is damaged",
            where=path,
            found=f"no {some(lacks)}" if lacks else type(found).__name__,
            expected="the JSON object that this run wrote",
            fix=fix,
        )
    return found


def open_folder(settings: Settings) -> RunFolder:
    """Makes the folder of a run, or finds it if it is this very run's.

    Raises:
        ConfigError: the folder is another run's (names what differs), or holds something else.
        CheckpointError: its settings are damaged.
    """
    path = settings.folder
    mine = json.loads(json.dumps(settings.model_dump()))
    if ranks.count() > 1:
        mine[PROCESSES] = ranks.count()
    kept = path / SETTINGS
    if kept.is_file():
        fix = f"restore the file, choose another output_dir, or remove {path}"
        theirs = _read(kept, (), fix)
        different = _differences(theirs, mine)
        if _left_nothing(path):
            (path / DATA).unlink(missing_ok=True)
            files.write_text(kept, json.dumps(mine, indent=2))
            return RunFolder(path)
        if different:
            raise ConfigError(
                "this is the output directory of another run",
                where=path,
                found=some(different, 4),
                expected="the same settings, to go on with that run",
                fix=f"choose another output_dir, or remove {path}",
            )
        return RunFolder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            "the output directory holds something else",
            where=path,
            found=some(sorted(child.name for child in path.iterdir()), 3) if path.is_dir() else "a file",
            expected="a new or empty directory, or that of the same run",
            fix="choose another output_dir",
        )
    files.write_text(kept, json.dumps(mine, indent=2))
    return RunFolder(path)


def _left_nothing(path: Path) -> bool:
    """Whether the run there is over and saved nothing, as one does whose data or targets were misspelt.

    Another may then take its place: who mends a command does not have to clear up after it.
    """
    if (path / RESULT).is_file() or (path / ADAPTER).exists() or any(path.glob("checkpoint-*")):
        return False
    records = path / RECORDS
    if not records.is_file():
        return True
    last = records.read_text(errors="replace").splitlines()[-1:]
    try:
        return bool(last) and json.loads(last[0])["event"] == "end"
    except (json.JSONDecodeError, KeyError, TypeError):
        return False  # cut off by a kill


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    rows = []
    before, now = _records_per_step(theirs), _records_per_step(mine)
    if before is not None and before != now:
        rows.append(f"records of a step were {before} and are {now}")
    parts = ((None, FREE | {PROCESSES}), ("training", FREE_TRAINING | DIVIDED), ("method_options", frozenset[str]()))
    for part, free in parts:
        old = theirs if part is None else theirs.get(part, {})
        if not isinstance(old, dict):
            rows.append(f"{part} was {old!r}")
            continue
        new = mine if part is None else mine.get(part, {})
        for key in sorted({*old, *new} - free - {"training", "method_options"}):
            if old.get(key) != new.get(key):
                rows.append(f"{key} was {old.get(key)!r} and is {new.get(key)!r}")
    return rows


def _records_per_step(settings: dict[str, Any]) -> int | None:
    """Records of an optimizer step by a file of settings; None if it does not say."""
    training = settings.get("training")
    if not isinstance(training, dict):
        return None
    size, accumulated = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps", 1)
    processes = settings.get(PROCESSES, 1)
    known = isinstance(size, int) and isinstance(accumulated, int) and isinstance(processes, int)
    return size * accumulated * processes if known else None
