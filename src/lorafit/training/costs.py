"""What a run took, in a line for people: the same of every kind of run."""

from __future__ import annotations

from typing import Protocol

from lorafit.training.spans import duration


class Costs(Protocol):
    """What a run knows of its steps, its time in seconds, and its peaks of memory in bytes."""

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""

    @property
    def resumed_from(self) -> int:
        """The step from which this process went on."""

    @property
    def train_seconds(self) -> float:
        """In steps."""

    @property
    def seconds(self) -> float:
        """In all."""

    @property
    def peak_rss_bytes(self) -> int | None:
        """Resident; None where the system does not tell."""

    @property
    def peak_device_bytes(self) -> int | None:
        """On the accelerator; None without one."""


def line(run: Costs, rate: str = "") -> str:
    """Steps, time, speed and memory.

    Args:
        run: what it is about.
        rate: the speed, such as "570 tokens/s"; empty where it is not known.
    """
    steps = f"{run.steps - run.resumed_from:,} steps"
    if run.resumed_from:
        steps += f" (after {run.resumed_from:,} of an earlier start)"
    speed = f", {rate}" if rate else ""
    return f"{steps} in {_time(run.train_seconds)}{speed}; {_time(run.seconds)} in all{_peaks(run)}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 59.95 else duration(seconds)


def _peaks(run: Costs) -> str:
    device, rss = run.peak_device_bytes, run.peak_rss_bytes
    parts = [] if device is None else [f"{device / 2**30:.2f} GiB on the device"]
    if rss is not None:
        parts.append(f"{rss / 2**30:.2f} GiB{' beside it' if parts else ''}")
    return f"; peak memory {', '.join(parts)}" if parts else ""
