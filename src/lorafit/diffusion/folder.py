"""The folder of a DreamBooth run: whose it is, where it stands, and what it was left with."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorafit import files
from lorafit.diffusion.settings import Settings
from lorafit.errors import CheckpointError, ConfigError, TrainingError, some
from lorafit.handle import Handle
from lorafit.state import STATE, load_state, save_state

SETTINGS = "settings.json"
RECORDS = "records.jsonl"
REPORT = "report.html"
ADAPTER = "adapter"
SAMPLES = "samples"
RESULT = "result.json"
DATA = "data.json"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"
COMPLETE = "complete.json"

DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What reading a damaged file of torch's leads to."""
FREE = frozenset({"output_dir", "sample_prompts", "sample_every", "sample_count", "save_every", "save_total_limit"})
"""Settings that may differ when a run goes on: they do not enter what it computes."""


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

    def sheet(self, step: int) -> Path:
        """The sheet of samples of a step."""
        return self.path / SAMPLES / f"step-{step:06d}.png"

    def sheets(self) -> tuple[Path, ...]:
        """All sheets that there are, in the order of their steps."""
        return tuple(sorted((self.path / SAMPLES).glob("step-*.png")))

    def result(self) -> dict[str, Any] | None:
        """What the finished run found, or None while it is not finished."""
        path = self.path / RESULT
        if not path.is_file():
            return None
        fix = "restore the file, or remove it: the same command then goes on from the last checkpoint"
        return read(path, ("steps", "resumed_from", "eval_loss_before"), fix)

    def check_data(self, fingerprint: str) -> None:
        """Raises `ConfigError` if the run was begun with other pictures than these."""
        path = self.path / DATA
        if not path.is_file():
            files.write_text(path, json.dumps({"sha256": fingerprint}))
            return
        known = str(read(path, ("sha256",), f"restore the file, or remove {self.path}")["sha256"])
        if known != fingerprint:
            raise ConfigError(
                "the pictures or captions are not those that this run was begun with",
                where=self.path,
                found=fingerprint[:12],
                expected=known[:12],
                fix="put them back as they were, or choose another output_dir",
            )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Marks the run as finished."""
        files.write_text(self.path / RESULT, json.dumps(result, indent=2))

    # Checkpoints

    def checkpoint(self, notify: Callable[[str], object]) -> Path | None:
        """The newest whole checkpoint, or None. Those that a kill cut off are removed, and named.

        Raises:
            CheckpointError: the newest one lacks files.
        """
        for folder in sorted(self.path.glob("checkpoint-*")):
            if folder.is_dir() and step_of(folder) is not None and not (folder / COMPLETE).is_file():
                notify(f"{folder.name} was cut off while it was written; it is removed")
                shutil.rmtree(folder)
        whole = self.checkpoints()
        if not whole:
            return None
        missing = [name for name in (OPTIMIZER, PROGRESS) if not (whole[-1] / name).is_file()]
        if missing or not any(whole[-1].glob(f"*/{STATE}")):
            raise CheckpointError(
                "the checkpoint is not a whole one",
                where=whole[-1],
                found=f"no {some([*missing, *([] if missing else [STATE])])}",
                expected=some([OPTIMIZER, PROGRESS, STATE]),
                fix=without(whole[-1]),
            )
        return whole[-1]

    def checkpoints(self) -> list[Path]:
        """All whole ones, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if (path / COMPLETE).is_file()]
        return sorted((path for path in found if step_of(path) is not None), key=lambda path: step_of(path) or 0)

    def save(
        self, step: int, handles: Mapping[str, Handle], state: Mapping[str, Any], progress: Mapping[str, Any], keep: int
    ) -> Path:
        """Writes a checkpoint; older ones than the last `keep` are then removed.

        Raises:
            TrainingError: it cannot be written; the checkpoints before are untouched.
        """
        folder = self.path / f"checkpoint-{step}"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for part, handle in handles.items():
                save_state(handle, folder / part)
            files.commit(files.stage(folder / OPTIMIZER, partial(torch.save, dict(state))), folder / OPTIMIZER)
            files.write_text(folder / PROGRESS, json.dumps({"step": step, **progress}))
        except (OSError, RuntimeError, CheckpointError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.path).free / 2**20
            raise TrainingError(
                "the checkpoint cannot be written",
                where=folder,
                found=f"{type(error).__name__}: {error}; {free:,.0f} MiB free",
                expected="a folder with enough free space",
                fix="free some space; the same command then goes on from the checkpoint before",
            ) from error
        # Last of all: a checkpoint without it was cut off by a kill and is not resumed from.
        files.write_text(folder / COMPLETE, json.dumps({"step": step}))
        for old in self.checkpoints()[:-keep]:
            (old / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
        return folder


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint's folder by its name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def without(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be gone on from."""
    return f"remove {checkpoint.name}: the same command then goes on from the one before, or from the start"


def restored(checkpoint: Path, handles: Mapping[str, Handle]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gives adapters the values of a checkpoint.

    Returns:
        The optimizer's state, and the progress.

    Raises:
        CheckpointError: it is damaged, or of other adapters.
    """
    fix = without(checkpoint)
    progress = read(checkpoint / PROGRESS, ("step", "evaluations"), fix)
    for part, handle in handles.items():
        load_state(handle, checkpoint / part)
    try:
        state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= {"optimizer", "schedule", "scaler"}:
            raise ValueError("it holds something else")
    except DAMAGE as error:
        raise CheckpointError(
            "the state of the optimizer is damaged",
            where=checkpoint / OPTIMIZER,
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="the file as the run wrote it",
            fix=fix,
        ) from error
    return state, progress


def read(path: Path, keys: tuple[str, ...], fix: str) -> dict[str, Any]:
    """A JSON object of the folder. Raises `CheckpointError`, with this fix, where it is not what was written there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    path, mine = settings.folder, json.loads(json.dumps(settings.model_dump()))
    kept = path / SETTINGS
    if kept.is_file():
        theirs = read(kept, (), f"restore the file, choose another output_dir, or remove {path}")
        if _left_nothing(path):
            for name in (DATA, "drop.json"):
                (path / name).unlink(missing_ok=True)
            files.write_text(kept, json.dumps(mine, indent=2))
            return RunFolder(path)
        different = [
            f"{key} was {theirs.get(key)!r} and is {mine.get(key)!r}"
            for key in sorted({*theirs, *mine} - FREE)
            if theirs.get(key) != mine.get(key)
        ]
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
    """Whether the run there is over and saved nothing, as one does whose pictures or targets were misspelt.

    Pictures of the class stay: they say themselves what they were drawn from.
    """
    if (path / RESULT).is_file() or (path / ADAPTER).exists() or any(path.glob("checkpoint-*")):
        return False
    records = path / RECORDS
    if not records.is_file():
        return True
    last = records.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    try:
        return bool(last) and json.loads(last[0])["event"] == "end"
    except (ValueError, KeyError, TypeError):
        return False  # cut off by a kill
