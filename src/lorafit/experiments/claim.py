"""Whose an experiment's folder is: what is trained there is never trained again, so it has to be of these settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorafit import files
from lorafit.errors import CheckpointError, ConfigError, StateError, some
from lorafit.experiments.parts import DATA, PARTS
from lorafit.experiments.trial import TRIALS

LOCK = ".lock"


def claim(folder: Path, name: str, mine: Mapping[str, Any]) -> None:
    """Makes a folder this experiment's, or finds that it is. One in which nothing is trained yet can become another's.

    Args:
        folder: the experiment's.
        name: of the file in it that tells whose it is.
        mine: what the trials depend on, as JSON has it; a mapping in it is compared entry by entry.

    Raises:
        ConfigError: the folder is another experiment's, or holds something else.
        CheckpointError: the file is damaged.
    """
    path = folder / name
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                "the output directory holds something else",
                where=folder,
                found=some(sorted(one.name for one in folder.iterdir()), 3) if folder.is_dir() else "a file",
                expected="a new or empty directory, or that of the same experiment",
                fix="choose another --output-dir",
            )
        files.write_text(path, json.dumps(mine, indent=2))
        return
    old, new = _flat(_read(path)), _flat(mine)
    different = [f"{key} was {old.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if different and any((folder / TRIALS).glob("**/*.json")):
        raise ConfigError(
            "this is the output directory of another experiment",
            where=folder,
            found=some(different, 4),
            expected="the same settings and data, to go on with it",
            fix=f"choose another --output-dir, or remove {folder}",
        )
    if different:
        (folder / DATA / PARTS).unlink(missing_ok=True)  # the records may have to be split in another way
        files.write_text(path, json.dumps(mine, indent=2))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other command works in the folder meanwhile.

    Raises:
        StateError: one does.
    """
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise StateError(
            "another command is at work in this folder",
            where=folder,
            expected="one at a time",
            fix="wait for it, or choose another --output-dir",
        ) from None


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat.update(_flat(value) if isinstance(value, dict) and value else {key: value})
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem: object = f"a {type(found).__name__}"
    except (OSError, ValueError) as error:
        problem = error
    raise CheckpointError(
        f"{path.name} is damaged",
        where=path,
        found=problem,
        expected="the JSON object that lorafit wrote",
        fix="restore the file, or choose another --output-dir",
    )
