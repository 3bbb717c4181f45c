"""Writing files so that a kill at any moment leaves the old content or the new, never half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorafit.errors import CheckpointError


def stage(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a temporary file beside `path` and brings it to the disk; `commit` then puts it in place.

    Args:
        path: the file that shall come to be.
        write: fills the temporary file whose path it is given.

    Raises:
        CheckpointError: the disk is full, read-only or not writable; the temporary file is gone, `path` as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            raise CheckpointError(
                f"cannot write {path.name}: {error}",
                where=path,
                expected="a writable folder with enough free space",
                fix="free some space or choose another folder; what was there before is untouched",
            ) from error
        raise
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Puts a staged file in place, in one step that a kill cannot split.

    Raises:
        CheckpointError: it cannot be put there; `path` and the temporary file are as they were.
    """
    try:
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path.name}: {error}",
            where=path,
            expected="a file or nothing of that name, in a writable folder",
            fix="choose another folder",
        ) from error
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file in one step."""
    commit(stage(path, lambda temporary: temporary.write_bytes(text.encode())), path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
