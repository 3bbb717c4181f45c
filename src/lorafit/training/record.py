"""What a run did, as JSON lines: one object a line, appended, never rewritten.

A line reaches the disk before `Recorder.write` returns, so a run that is killed keeps all that it said.
This module knows nothing of the report that is drawn from the file, and importing it does not import torch.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorafit import __version__
from lorafit.errors import TrainingError, some

if TYPE_CHECKING:
    import torch

PEFT_LAYOUT: Final = "0.21.2"
"""The release of PEFT whose adapter layout this library writes."""

RESERVED: Final = ("event", "time", "elapsed", "nonfinite", "repaired")
"""Keys that the recorder sets by itself."""


class Recorder:
    """Appends records to a JSONL file.

    Every call opens, writes, syncs and closes the file: there is nothing to close, a second recorder on the
    same path goes on where the first one ended, and a line that a kill left half-written is ended before the
    next one (which then carries `"repaired": true`, so that a reader can tell this from other damage).

    Args:
        path: the file; it and its folder are created when missing.

    `elapsed` of every record is counted from the construction of the recorder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._start = time.monotonic()

    def write(self, event: str, **fields: Any) -> None:
        """Append one record and sync it to the disk.

        Numbers that are not finite become null and their keys are listed under `nonfinite` (keys inside of
        containers with dots, as in `config.weight_decay`). Paths become strings and tuples become lists.

        Args:
            event: what the record is, such as `step`.
            **fields: its further keys; values of JSON's types, tuples and paths.

        Raises:
            TrainingError: a field is none of these or is named as a key that the recorder sets, or the file
                cannot be written.
        """
        taken = [name for name in RESERVED if name in fields]
        if taken:
            raise TrainingError(
                f"a record of event {event!r} has a key that the recorder sets by itself",
                found=some(taken),
                expected=f"other keys than {', '.join(RESERVED)}",
                fix="rename the field",
            )
        nonfinite: list[str] = []
        record: dict[str, Any] = {
            "event": event,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "elapsed": round(time.monotonic() - self._start, 6),
        }
        for name, value in fields.items():
            record[name] = _plain(value, name, event, nonfinite)
        if nonfinite:
            record["nonfinite"] = nonfinite
        try:
            self._append(record)
        except OSError as error:
            raise TrainingError(
                f"the record of event {event!r} could not be written",
                where=self.path,
                found=error,
                fix="free the disk or choose an output folder that can be written",
            ) from error

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered and in append mode: a line goes out in one call and never lands on top of another.
        with self.path.open("a+b", buffering=0) as file:
            repaired = _ends_within_a_line(file)
            line = _line(record | {"repaired": True}) if repaired else _line(record)
            rest = memoryview(b"\n" + line if repaired else line)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())


class Unheard(Recorder):
    """Writes nothing: in a process of a run whose first process records it."""

    def write(self, event: str, **fields: Any) -> None:
        """Leaves it to the first process."""


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair (a badly decoded path or text) has no UTF-8; JSON's own escapes can hold it.
        return json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _ends_within_a_line(file: FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _plain(value: Any, key: str, event: str, nonfinite: list[str]) -> Any:
    """`value` in JSON's types; the keys of numbers that are not finite are added to `nonfinite`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(key)
        return None
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {name: _plain(part, f"{key}.{name}", event, nonfinite) for name, part in _named(value, key, event)}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{key}.{at}", event, nonfinite) for at, part in enumerate(value)]
    raise TrainingError(
        f"a record of event {event!r} holds a value that JSON cannot",
        where=f"key {key!r}",
        found=f"{type(value).__module__}.{type(value).__qualname__}",
        expected="a number, text, true, false, null, a path, or a list or mapping of these",
        fix="convert it first, for example with .item() or str()",
    )


def _named(mapping: Mapping[Any, Any], key: str, event: str) -> Iterator[tuple[str, Any]]:
    for name, part in mapping.items():
        if not isinstance(name, str):
            raise TrainingError(
                f"a record of event {event!r} holds a mapping with a key that is not text",
                where=f"key {key!r}",
                found=repr(name),
                expected="text",
                fix="convert the mapping's keys with str()",
            )
        yield name, part


def environment(
    device: torch.device | str, dtype: torch.dtype | str, seed: int | None = None
) -> dict[str, str | int | None]:
    """Where a run takes place: the fields of the `environment` record. What is not known is None.

    Args:
        device: the device that computes, such as `cpu` or `cuda:0`.
        dtype: the type of the base model's weights.
        seed: the seed of the run.

    Returns:
        The releases of this library, Python, torch, transformers and the PEFT layout; platform, device and
        dtype; the number of cores that this process may use, torch's threads, the machine's memory in bytes;
        the seed.
    """
    import torch

    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _release("transformers"),
        "peft_layout": PEFT_LAYOUT,
        "platform": platform.platform(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "seed": seed,
    }


def _release(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int | None:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    else:  # noqa: RET505  (a type checker takes what follows a platform's return for dead code)
        return os.cpu_count()


def _memory_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):  # not every POSIX system knows SC_PHYS_PAGES
        return None
