"""The folder of a loop's journal: whose it is, its checkpoints, the best adapter, and what came of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lorafit import files
from lorafit.errors import CheckpointError, ConfigError, some
from lorafit.training.owned import ADAPTER, COMPLETE, RECORDS, REPORT, RESULT, differing, lines, read

BEGUN = "journal.json"
FINISHED = "finished"
CHECKPOINT = "checkpoint"
BEST = "best"
KEPT = 2
"""How many checkpoints are kept: the one before stays in case that the newest cannot be read."""

Say = Callable[[str], object]


@final
@dataclass(frozen=True)
class Whole:
    """A folder of some step that was written to its end.

    Attributes:
        path: the folder.
        step: optimizer steps until then.
        facts: what was noted with it.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]


@final
@dataclass(frozen=True)
class Place:
    """The folder of one loop."""

    path: Path

    @property
    def records(self) -> Path:
        """The file of records."""
        return self.path / RECORDS

    def open(self, mine: Mapping[str, Any]) -> None:
        """Makes the folder, or finds it if it is this very loop's.

        Args:
            mine: what the loop trains, and for how long.

        Raises:
            ConfigError: it is another loop's (says what differs), or holds something else.
            CheckpointError: its file is damaged, or it cannot be written.
        """
        wanted = json.loads(json.dumps(mine, default=str))
        begun = self.path / BEGUN
        if begun.is_file():
            theirs = read(begun, (), f"restore the file, choose another folder, or remove {self.path}")
            different = differing(theirs, wanted)
            if different and not self._left_nothing():
                raise ConfigError(
                    "this is the folder of another loop",
                    where=self.path,
                    found=some(different, 4),
                    expected="the same adapter and the same length, to go on",
                    fix=f"choose another folder, or remove {self.path}",
                )
        elif self.path.exists() and (not self.path.is_dir() or any(map(_counts, self.path.iterdir()))):
            raise ConfigError(
                "the folder holds something else",
                where=self.path,
                found=some(sorted(child.name for child in self.path.iterdir()), 3) if self.path.is_dir() else "a file",
                expected="a new or empty folder, or that of the same loop",
                fix="choose another folder",
            )
        files.write_text(begun, json.dumps(wanted, indent=2, ensure_ascii=False))
        self._sweep()

    def _sweep(self) -> None:
        """Takes away what kills left of files that were being written."""
        left = [child for name in (BEGUN, RESULT, REPORT) for child in self.path.glob(f".{name}.*.tmp")]
        left += [child for name in (ADAPTER, FINISHED) for child in (self.path / name).glob(".*.tmp")]
        for child in left:
            child.unlink(missing_ok=True)

    def _left_nothing(self) -> bool:
        """Whether the loop there saved nothing from which anything could go on."""
        return not (self.path / RESULT).exists() and not any(self.path.glob(f"{CHECKPOINT}-*/{COMPLETE}"))

    def result(self) -> dict[str, Any] | None:
        """What the finished loop came to, or None while it is not finished."""
        path = self.path / RESULT
        return read(path, (), f"restore the file, or remove {self.path}") if path.is_file() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Marks the loop as finished, and takes away what only going on needs."""
        files.write_text(self.path / RESULT, json.dumps(result, indent=2, ensure_ascii=False))
        self.clear()

    def clear(self) -> None:
        """Takes away what only going on needs; again, where a kill came before all of it was gone."""
        for kind in (CHECKPOINT, BEST):
            for folder in self.path.glob(f"{kind}-*"):
                discard(folder)

    def recorded(self, events: Sequence[str], until: int) -> dict[str, list[dict[str, Any]]]:
        """Event → its records up to a step, as they stand.

        What came after the step that a later process went on from does not stand any more, and nothing of what came
        before one that began anew.
        """
        found: dict[str, list[dict[str, Any]]] = {event: [] for event in events}
        for record in lines(self.records):
            event = record.get("event")
            if event == "run":
                since = record.get("resumed_from_step") or 0
                found = {name: [one for one in rows if 0 < since >= one["step"]] for name, rows in found.items()}
            elif event in found and isinstance(record.get("step"), int):
                found[event].append(record)
        return {name: [one for one in rows if one["step"] <= until] for name, rows in found.items()}

    def fresh(self, kind: str, step: int) -> Path:
        """A new empty folder of a step, which does not count before `complete`."""
        folder = self.path / f"{kind}-{step}"
        discard(folder)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the folder {folder.name}: {error}",
                where=folder,
                expected="a folder that can be written",
                fix="free some space or change the permissions; the same program then goes on from the last checkpoint",
            ) from error
        return folder

    def whole(self, kind: str) -> list[Whole]:
        """The folders of this kind that were written to their end, in the order of their steps."""
        found = []
        for folder in self.path.glob(f"{kind}-*"):
            step = folder.name.rpartition("-")[2]
            if step.isdigit() and (folder / COMPLETE).is_file():
                facts = read(folder / COMPLETE, (), f"remove {folder}: the same program then goes on from before it")
                found.append(Whole(folder, int(step), facts))
        return sorted(found, key=lambda one: one.step)

    def newest(self, say: Say) -> Whole | None:
        """The newest checkpoint. Those that a kill cut off are removed, and named."""
        for folder in sorted(self.path.glob(f"{CHECKPOINT}-*")):
            if folder.is_dir() and not (folder / COMPLETE).is_file():
                say(f"{folder.name} was cut off while it was written; it is removed")
                discard(folder)
        return next(reversed(self.whole(CHECKPOINT)), None)

    def tidy(self, best: int | None) -> None:
        """Takes away old checkpoints, and what was the best adapter once."""
        for one in self.whole(CHECKPOINT)[:-KEPT]:
            discard(one.path)
        for one in self.whole(BEST):
            if one.step != best:
                discard(one.path)


def complete(folder: Path, facts: Mapping[str, Any]) -> None:
    """Marks a folder as written to its end: the last thing of all."""
    files.write_text(folder / COMPLETE, json.dumps(facts))


def discard(folder: Path) -> None:
    """Removes a folder; a kill on the way leaves one that does not count."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _counts(child: Path) -> bool:
    """Whether a file in a folder is more than what a kill left of one that was being written."""
    return not (child.name.startswith(".") and child.name.endswith(".tmp"))
