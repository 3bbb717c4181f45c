"""The folder of a run, of whatever kind: whose it is, which of its checkpoints are whole, what it says of itself."""

from __future__ import annotations

import json
import pickle
import shutil
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorafit import files
from lorafit.errors import CheckpointError, ConfigError, some

SETTINGS = "settings.json"
RECORDS = "records.jsonl"
REPORT = "report.html"
ADAPTER = "adapter"
RESULT = "result.json"
DATA = "data.json"
COMPLETE = "complete.json"

DAMAGE = (
    ArithmeticError,
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


@dataclass(frozen=True)
class OwnedFolder(ABC):
    """A run's folder that is this run's own.

    Attributes:
        path: the folder.
        learnt: what the run learns from, in the words of its errors.
        needed: keys that its result has.
    """

    path: Path
    learnt: ClassVar[str]
    needed: ClassVar[tuple[str, ...]]

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
        return read(path, self.needed, fix)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Marks the run as finished."""
        files.write_text(self.path / RESULT, json.dumps(result, indent=2))

    def check_data(self, fingerprint: str) -> None:
        """Raises `ConfigError` if the run was begun with other data than these."""
        path = self.path / DATA
        if not path.is_file():
            files.write_text(path, json.dumps({"sha256": fingerprint}))
            return
        known = str(read(path, ("sha256",), f"restore the file, or remove {self.path}")["sha256"])
        if known != fingerprint:
            raise ConfigError(
                f"{self.learnt} are not those that this run was begun with",
                where=self.path,
                found=fingerprint[:12],
                expected=known[:12],
                fix=f"put {self.learnt} back as they were, or choose another output_dir",
            )


def read(path: Path, keys: Sequence[str], fix: str) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        CheckpointError: with this fix, where it is not what was written there, or lacks one of these keys.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no JSON, or no text
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


def lines(records: Path) -> Iterator[dict[str, Any]]:
    """The records of a run so far; none while there is no file."""
    if not records.is_file():
        return
    for line in records.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a kill cut off
        if isinstance(record, dict):
            yield record


def claim(
    path: Path, mine: Mapping[str, Any], differences: Callable[[dict[str, Any]], Sequence[str]], stale: Sequence[str]
) -> None:
    """Makes the folder of a run, or finds that it is this very run's.

    Args:
        path: the folder.
        mine: the run's settings, as JSON has them.
        differences: what differs from the settings that are given to it, one sentence each.
        stale: files of a run that saved nothing, which go with it.

    Raises:
        ConfigError: the folder is another run's (names what differs), or holds something else.
        CheckpointError: its settings are damaged.
    """
    kept = path / SETTINGS
    if kept.is_file():
        different = differences(read(kept, (), f"restore the file, choose another output_dir, or remove {path}"))
        if left_nothing(path):
            for name in stale:
                (path / name).unlink(missing_ok=True)
            files.write_text(kept, json.dumps(mine, indent=2))
        elif different:
            raise ConfigError(
                "this is the output directory of another run",
                where=path,
                found=some(different, 4),
                expected="the same settings, to go on with that run",
                fix=f"choose another output_dir, or remove {path}",
            )
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            "the output directory holds something else",
            where=path,
            found=some(sorted(child.name for child in path.iterdir()), 3) if path.is_dir() else "a file",
            expected="a new or empty directory, or that of the same run",
            fix="choose another output_dir",
        )
    files.write_text(kept, json.dumps(mine, indent=2))


def differing(theirs: Mapping[str, Any], mine: Mapping[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
    """What differs between two sets of settings, `free` ones left out.

    >>> differing({"r": 4, "seed": 1}, {"r": 8}, frozenset({"seed"}))
    ['r was 4 and is 8']
    """
    keys = sorted({*theirs, *mine} - free)
    return [
        f"{key} was {theirs.get(key)!r} and is {mine.get(key)!r}" for key in keys if theirs.get(key) != mine.get(key)
    ]


def left_nothing(path: Path) -> bool:
    """Whether the run there is over and saved nothing, as one does whose data or targets were misspelt.

    Another may then take its place: who mends a command does not have to clear up after it.
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


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint's folder by its name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def checkpoints(path: Path) -> list[Path]:
    """All whole ones, oldest first."""
    found = [folder for folder in path.glob("checkpoint-*") if (folder / COMPLETE).is_file()]
    return sorted((folder for folder in found if step_of(folder) is not None), key=lambda folder: step_of(folder) or 0)


def newest(path: Path, notify: Callable[[str], object]) -> Path | None:
    """The newest whole checkpoint, or None. Those that a kill cut off are removed, and named."""
    for folder in sorted(path.glob("checkpoint-*")):
        if folder.is_dir() and step_of(folder) is not None and not (folder / COMPLETE).is_file():
            notify(f"{folder.name} was cut off while it was written; it is removed")
            shutil.rmtree(folder)
    return next(reversed(checkpoints(path)), None)


def check_whole(checkpoint: Path, missing: Sequence[str], parts: Sequence[str]) -> None:
    """Raises `CheckpointError` for a checkpoint that lacks files which a run needs to go on as it was."""
    if missing:
        raise CheckpointError(
            "the checkpoint is not a whole one",
            where=checkpoint,
            found=f"no {some(missing, 5)}",
            expected=some(parts),
            fix=without(checkpoint),
        )


def without(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be gone on from."""
    own = step_of(checkpoint) or 0
    before = [folder.name for folder in checkpoints(checkpoint.parent) if (step_of(folder) or 0) < own]
    place = before[-1] if before else "the start"
    return f"remove {checkpoint.name}: the same command then goes on from {place}"
