"""The folder of a run: whose it is, where it stands, and what it was left with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from lorafit.state import STATE
from lorafit.training import ranks
from lorafit.training.config import Settings
from lorafit.training.owned import DATA, OwnedFolder, check_whole, claim, differing, lines, newest

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


@final
@dataclass(frozen=True)
class RunFolder(OwnedFolder):
    """The folder of a run on records of text."""

    learnt: ClassVar[str] = "the data"
    needed: ClassVar[tuple[str, ...]] = ("steps", "resumed_from", "shown")

    def recorded(self, event: str) -> Iterator[dict[str, Any]]:
        """The records of an event so far."""
        return (record for record in lines(self.records) if record.get("event") == event)

    def first_evaluation(self) -> float | None:
        """The held-out loss before the first step, as the records have it; None if they do not."""
        return next((one.get("loss") for one in self.recorded("evaluation") if one.get("step") == 0), None)

    def checkpoint(self, notify: Callable[[str], object]) -> Path | None:
        """The newest whole checkpoint, or None. Those that a kill cut off are removed, and named.

        Raises:
            CheckpointError: the newest one lacks files that a run needs to go on as it was.
        """
        found = newest(self.path, notify)
        if found is not None:
            missing = [name for name in PARTS if not (found / name).is_file()]
            if not any(found.glob("rng_state*.pth")):
                missing.append("rng_state.pth")
            check_whole(found, missing, [*PARTS, "rng_state.pth"])
        return found


def open_folder(settings: Settings) -> RunFolder:
    """Makes the folder of a run, or finds it if it is this very run's.

    Raises:
        ConfigError: the folder is another run's (names what differs), or holds something else.
        CheckpointError: its settings are damaged.
    """
    mine = json.loads(json.dumps(settings.model_dump()))
    if ranks.count() > 1:
        mine[PROCESSES] = ranks.count()
    claim(settings.folder, mine, lambda theirs: _differences(theirs, mine), stale=[DATA])
    return RunFolder(settings.folder)


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
        rows += differing(old, new, free | {"training", "method_options"})
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
