"""The folder of a DreamBooth run: whose it is, where it stands, and what it was left with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from lorafit import files
from lorafit.diffusion.settings import Settings
from lorafit.errors import CheckpointError, TrainingError
from lorafit.handle import Handle
from lorafit.state import STATE, load_state, save_state
from lorafit.training.owned import (
    COMPLETE,
    DAMAGE,
    DATA,
    OwnedFolder,
    check_whole,
    checkpoints,
    claim,
    differing,
    newest,
    read,
    without,
)

SAMPLES = "samples"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"

FREE = frozenset({"output_dir", "sample_prompts", "sample_every", "sample_count", "save_every", "save_total_limit"})
"""Settings that may differ when a run goes on: they do not enter what it computes."""
PLACE = "pipeline_folder"
"""Beside the settings: the whole path of a pipeline that is a directory, for `lorafit draw` in any other one."""


@final
@dataclass(frozen=True)
class RunFolder(OwnedFolder):
    """The folder of a DreamBooth run."""

    learnt: ClassVar[str] = "the pictures or captions"
    needed: ClassVar[tuple[str, ...]] = ("steps", "resumed_from", "eval_loss_before")

    def sheet(self, step: int) -> Path:
        """The sheet of samples of a step."""
        return self.path / SAMPLES / f"step-{step:06d}.png"

    def sheets(self) -> tuple[Path, ...]:
        """All sheets that there are, in the order of their steps."""
        return tuple(sorted((self.path / SAMPLES).glob("step-*.png")))

    # Checkpoints

    def checkpoint(self, notify: Callable[[str], object]) -> Path | None:
        """The newest whole checkpoint, or None. Those that a kill cut off are removed, and named.

        Raises:
            CheckpointError: the newest one lacks files.
        """
        found = newest(self.path, notify)
        if found is not None:
            missing = [name for name in (OPTIMIZER, PROGRESS) if not (found / name).is_file()]
            if not any(found.glob(f"*/{STATE}")):
                missing.append(STATE)
            check_whole(found, missing, [OPTIMIZER, PROGRESS, STATE])
        return found

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
        for old in checkpoints(self.path)[:-keep]:
            (old / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
        return folder


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


def open_folder(settings: Settings) -> RunFolder:
    """Makes the folder of a run, or finds it if it is this very run's.

    Raises:
        ConfigError: the folder is another run's (names what differs), or holds something else.
        CheckpointError: its settings are damaged.
    """
    place = Path(settings.pipeline)
    mine = json.loads(json.dumps(settings.model_dump()))
    mine[PLACE] = str(place.resolve()) if place.is_dir() else None
    free = FREE | {PLACE}  # a project may be moved with its pipeline
    # Pictures of the class stay: they say themselves what they were drawn from.
    claim(settings.folder, mine, lambda theirs: differing(theirs, mine, free), stale=[DATA, "drop.json"])
    return RunFolder(settings.folder)
