"""How much memory a process has used at most: its own, and that of the device it computes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypedDict, final

_RU_MAXRSS_UNIT: Final[Mapping[str, int]] = MappingProxyType({"linux": 1024, "darwin": 1})
"""Bytes in one unit of getrusage's `ru_maxrss`: Linux counts KiB, macOS bytes."""

_STATUS: Final = Path("/proc/self/status")
"""What Linux says of this process; there is no such file elsewhere."""


COUNTED: Final = ("cuda", "xpu")
"""Kinds of accelerators that know their peak; AMD's are called cuda."""


@final
class Peaks(TypedDict):
    """Both, by the names that they have in records."""

    peak_rss_bytes: int | None
    peak_device_bytes: int | None


UNKNOWN: Final[Peaks] = {"peak_rss_bytes": None, "peak_device_bytes": None}
"""Of a process that is gone."""


def peak_rss_bytes() -> int | None:
    """The most memory that this process has had resident so far, in bytes; None where the system does not tell."""
    unit = _RU_MAXRSS_UNIT.get(sys.platform)
    if unit is None:
        return None
    return _high_water_mark(_STATUS) or _ru_maxrss() * unit


def _high_water_mark(status: Path) -> int | None:
    """`VmHWM` of a Linux status file in bytes; None where the kernel does not give it.

    It is preferred over `ru_maxrss`, which a process that a larger one started inherits across exec: there it
    tells the peak of the parent.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _ru_maxrss() -> int:
    """The peak in the system's own unit."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_device_bytes() -> int | None:
    """The most memory that this process has had allocated on its accelerator so far, in bytes.

    None without an accelerator, where nothing was computed on it, and on a kind that keeps no peak (MPS).
    """
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type not in COUNTED:
        return None
    return int(torch.get_device_module(device).max_memory_allocated()) or None


def peaks() -> Peaks:
    """What this process has used at most so far."""
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes()}
