"""The folder of an export: it appears under its name only when it is whole."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import CheckpointError, ConfigError, some


def check_free(path: Path) -> None:
    """Raises `ConfigError` unless there is nothing at `path`, or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            "the output directory is not empty",
            where=path,
            found=some(sorted(child.name for child in path.iterdir()), 3) if path.is_dir() else "a file",
            expected="a new or empty directory",
            fix="choose another --output-dir",
        )


STALE = 3600.0
"""Seconds without a write after which what lies there is of a process that was killed."""


@contextmanager
def fresh(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into; it takes that name if nothing is raised, and else is gone.

    An empty directory that cannot be replaced (a mount point, the current directory, one whose parent is not writable)
    is filled at the end instead, file by file.

    Raises:
        CheckpointError: the disk is full or not writable; nothing is left behind.
    """
    partial: Path | None = None
    try:
        place = output.resolve()
        inside = place.is_dir() and not _replaceable(place)
        beside = place if inside else place.parent
        beside.mkdir(parents=True, exist_ok=True)
        start = f".{place.name}.partial-"
        _sweep(beside, start)
        partial = Path(tempfile.mkdtemp(prefix=start, dir=beside))
        partial.chmod(0o755)
        yield partial
        _brought_to_disk(partial)
        if inside:
            for child in sorted(partial.iterdir()):
                child.rename(place / child.name)
        else:
            if place.is_dir():
                place.rmdir()  # it is empty, and a rename onto a directory is not everywhere possible
            partial.rename(place)
    except Exception as error:
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        said = error.message if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"the folder cannot be written: {said}",
            where=output,
            expected="a writable folder with enough free space",
            fix="free some space or choose another folder; nothing was left behind",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # gone already unless something was raised


def _replaceable(folder: Path) -> bool:
    """Whether another directory can take the name of this one."""
    return not folder.is_mount() and folder != Path.cwd() and os.access(folder.parent, os.W_OK)


def _sweep(beside: Path, start: str) -> None:
    """Removes what killed processes left of the same export, once no writer can still be at work on it."""
    for left in beside.glob(f"{glob.escape(start)}*"):
        newest = max((path.lstat().st_mtime for path in (left, *left.rglob("*"))), default=0.0)
        if time.time() - newest > STALE:
            shutil.rmtree(left, ignore_errors=True)


def _brought_to_disk(folder: Path) -> None:
    mode = 0o666 & ~_umask()
    for path in (each for each in folder.rglob("*") if each.is_file()):
        path.chmod(mode)  # some writers of weights leave them to their owner alone
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
