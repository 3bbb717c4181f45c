"""Where a measurement was made: processor, cores, threads, versions, commit, and who else was at work."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """The cores that this process may use; two threads of one core count once."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        path = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    return len(siblings)


def processor() -> str:
    """The processor's name, as the system gives it."""
    information = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE) if information.is_file() else None
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "src"))}
    except (OSError, subprocess.CalledProcessError):
        return {"hash": None, "changed": None}


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that take part."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def load() -> dict[str, Any]:
    """The load before a measurement: averages, and how many others were running just now (the most of some looks)."""
    path = Path("/proc/loadavg")
    if not path.is_file():
        return {"averages": list(os.getloadavg()), "others": None}
    others = 0
    for _ in range(10):
        parts = path.read_text().split()
        others = max(others, int(parts[3].partition("/")[0]) - 1)  # this process is one of those that run
        time.sleep(0.05)
    return {"averages": [float(part) for part in parts[:3]], "others": others}


def warnings_of(found: dict[str, Any]) -> list[str]:
    """What makes times from now on doubtful."""
    if found["others"]:
        return [f"{found['others']} other processes or threads are running: times will be too long, ratios noisy"]
    return []


def describe(threads: int) -> dict[str, Any]:
    """All of it, in JSON's types."""
    import torch

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": physical_cores(),
            "threads": threads,
            "memory_bytes": memory_bytes(),
            "platform": platform.platform(),
        },
    }


def gemm_rate(rows: int = 1024, inner: int = 576, columns: int = 1536, repeats: int = 20) -> float:
    """Floating-point operations per second of a float32 product of the size that a layer has: the best of some."""
    import torch

    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    best = float("inf")
    with torch.no_grad():
        for _ in range(repeats):
            begun = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = min(best, time.perf_counter() - begun)
    return 2 * rows * inner * columns / best


def resident() -> dict[str, int]:
    """Resident memory of this process in bytes: now, and at its highest.

    VmHWM and not `ru_maxrss`: a process that a larger one started inherits that one's `ru_maxrss`.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status.read_text(), re.MULTILINE))
        return {"now": int(found["VmRSS"]) * 1024, "peak": int(found["VmHWM"]) * 1024}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"now": peak, "peak": peak}
