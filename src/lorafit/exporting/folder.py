"""The folder of an export: it appears under its name only when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
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


@contextmanager
def fresh(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into; it takes that name if nothing is raised, and else is gone.

    Raises:
        CheckpointError: the disk is full or not writable; nothing is left behind.
    """
    partial: Path | None = None
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.absolute().parent))
        partial.chmod(0o755)
        yield partial
        _brought_to_disk(partial)
        if output.is_dir():
            output.rmdir()  # it is empty, and a rename onto a directory is not everywhere possible
        partial.rename(output)
    except Exception as error:
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        raise CheckpointError(
            f"the folder cannot be written: {error}",
            where=output,
            expected="a writable folder with enough free space",
            fix="free some space or choose another folder; nothing was left behind",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # gone already unless something was raised


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
