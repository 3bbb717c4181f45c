"""What a machine has: memory that a run may take, and how fast it multiplies and moves numbers."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import final

import torch

from lorafit.errors import ConfigError
from lorafit.training.planning_shades import Work
from lorafit.training.record import environment

UNITS: Mapping[str, int] = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Files of Linux that say how much memory a container may have, and has (version 2, version 1)."""
SECONDS = 0.1
"""How long each of the three rates is measured."""
CONTEXT = 600 * 2**20
"""Bytes that a process takes of a GPU beside its tensors: the driver's context and the libraries' workspaces."""


@final
@dataclass(frozen=True)
class Limit:
    """So much memory, in bytes, and whose it is; None where nobody tells."""

    size: int | None
    of: str


def parse_memory(text: str) -> int:
    """Bytes of a size such as 8GB, 7.5 GiB or 512MB.

    >>> parse_memory("8GB"), parse_memory("1.5 GiB")
    (8000000000, 1610612736)

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*", text)
    unit = None if found is None else UNITS.get(found[2].upper())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size <= 0:
        raise ConfigError(
            "this is no amount of memory",
            where="--memory",
            found=repr(text),
            expected="a number and a unit: MB, GB (10⁹ bytes), MiB, GiB (2³⁰ bytes)",
            fix="--memory 8GB",
        )
    return size


def limit_of(device: torch.device) -> Limit:
    """What a run could take here now; what this process itself holds will be free again by then."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Limit(int(free), "what is free on the GPU")
    free_here = _available()
    if free_here is None:
        total = environment(device, torch.float32)["memory_bytes"]
        return Limit(total if isinstance(total, int) else None, "this machine's memory")
    return Limit(free_here + resident(), "what is free on this machine")


def _available() -> int | None:
    """Bytes that Linux could hand out now, to this container if it is one."""
    known = [_number(r"^MemAvailable:\s+(\d+) kB", _MEMINFO, 1024)]
    for most, used in _GROUPS:
        highest, taken = _number(r"^(\d+)$", most, 1), _number(r"^(\d+)$", used, 1)
        if highest is not None and taken is not None:
            known.append(max(0, highest - taken))
    return min((one for one in known if one is not None), default=None)


def resident() -> int:
    """Bytes that this process has in memory now; 0 where the system does not tell."""
    return _number(r"^VmRSS:\s+(\d+) kB", _STATUS, 1024) or 0


def _number(pattern: str, path: Path, unit: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * unit


@final
@dataclass(frozen=True)
class Rates:
    """How fast a machine is.

    Attributes:
        flops: floating-point operations of matrix products in a second.
        moved: bytes that elementwise operations read and write in a second.
        call: seconds that an operation takes however small it is.
    """

    flops: float
    moved: float
    call: float

    def seconds(self, work: Mapping[Work, int]) -> float:
        """Time of some operations: each takes as long as the slower of computing and moving, and its call."""
        return sum(
            count * (max(one.flops / self.flops, one.moved / self.moved) + self.call) for one, count in work.items()
        )


def rates(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Rates:
    """Measured on `device` in about 0.3 s, with matrices as the model has them: `rows` tokens of `width` numbers."""
    rows, width = max(16, min(rows, 4096)), max(16, min(width, 4096))
    with torch.no_grad():
        x = torch.rand(rows, width, device=device).to(dtype)
        weight = torch.rand(width, width, device=device).to(dtype)
        tiny = torch.zeros(1, device=device)
        product = _timed(lambda: torch.nn.functional.linear(x, weight), device)
        gate = _timed(lambda: torch.nn.functional.silu(x) * x, device)
        call = _timed(lambda: tiny + tiny, device)
    size = x.numel() * x.element_size()
    return Rates(2 * rows * width * width / product, 5 * size / gate, call)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """The median time of some work, in seconds."""
    work()
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < SECONDS:
        _wait(device)
        before = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - before)
    return median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
