"""Peaks of memory: of the process, and of the accelerator where there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorafit.training import costs, memory, meter, ranks
from lorafit.training.memory import peak_device_bytes, peak_rss_bytes

ALLOCATE = (
    "from lorafit.training.memory import peak_rss_bytes\n"
    "before = peak_rss_bytes(); block = bytearray(b'x') * (200 * 2**20); del block\n"
    "print(before, peak_rss_bytes())"
)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="only known on Linux and macOS")
def test_the_peak_is_in_bytes_and_stays() -> None:
    # In a process of its own, since this one may have had its peak already.
    run = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert 190 * 2**20 < after - before < 230 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is inherited across exec on Linux only")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    parent = (
        "import subprocess, sys\n"
        "block = bytearray(b'x') * (300 * 2**20)\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    child = "from lorafit.training.memory import peak_rss_bytes; print(peak_rss_bytes())"
    run = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 2**20 < int(run.stdout) < 150 * 2**20


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_units_where_only_getrusage_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, unit: int
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_ru_maxrss", lambda: 5000)
    assert peak_rss_bytes() == 5000 * unit
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t  9 kB\n")
    assert peak_rss_bytes() == 5000 * unit


def test_a_system_that_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_rss_bytes() is None


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a device of this kind, which has used so much."""

    def there(kind: str, most: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        module = SimpleNamespace(max_memory_allocated=lambda: most)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    return there


def test_the_peak_of_the_device(accelerator: Callable[..., None]) -> None:
    accelerator("cuda", 3 * 2**30)
    assert peak_device_bytes() == 3 * 2**30
    assert memory.peaks()["peak_device_bytes"] == 3 * 2**30


@pytest.mark.parametrize(("kind", "most"), [("cuda", 0), ("mps", 7)], ids=["unused", "uncounted"])
def test_a_device_that_was_not_used_or_does_not_count_has_none(
    accelerator: Callable[..., None], kind: str, most: int
) -> None:
    accelerator(kind, most)
    assert peak_device_bytes() is None


def test_without_an_accelerator_there_is_no_peak_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert peak_device_bytes() is None


def test_of_several_processes_the_largest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: 5)
    monkeypatch.setattr(memory, "peak_device_bytes", lambda: None)
    monkeypatch.setattr(ranks, "largest", lambda own: max(own, 7.0))
    assert meter.peaks() == {"peak_rss_bytes": 7, "peak_device_bytes": None}


@dataclass
class Ran:
    steps: int = 24
    resumed_from: int = 0
    train_seconds: float = 20.42
    seconds: float = 150.0
    peak_rss_bytes: int | None = 2**31
    peak_device_bytes: int | None = None


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Ran(), "24 steps in 20.4 s, 570 tokens/s; 2 min 30 s in all; peak memory 2.00 GiB"),
        (Ran(peak_device_bytes=5 * 2**30), "in all; peak memory 5.00 GiB on the device, 2.00 GiB beside it"),
        (Ran(peak_rss_bytes=None), "2 min 30 s in all"),
        (Ran(resumed_from=4), "20 steps (after 4 of an earlier start) in 20.4 s"),
    ],
)
def test_what_a_run_took_is_one_line(run: Ran, said: str) -> None:
    told = costs.line(run, "570 tokens/s")
    assert told.startswith(said) or told.endswith(said)
