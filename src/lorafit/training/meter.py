"""How fast a run trains: tokens of all its processes, and the seconds that its steps take."""

from __future__ import annotations

import time
from typing import Any

from lorafit.training import memory, ranks


class Meter:
    """Counts tokens and seconds of training since it was last read; `rate` is tokens per second up to that reading."""

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised = 0
        self.seconds = 0.0
        self.rate = 0.0
        self.total_seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """The step is over."""
        if self._started is not None:
            passed = time.perf_counter() - self._started
            self.seconds += passed
            self.total_seconds += passed
            self._started = None

    def count(self, tokens: int, supervised: int) -> None:
        """A batch went through."""
        self.tokens += tokens
        self.supervised += supervised

    def read(self) -> dict[str, Any]:
        """The figures of all processes since the last reading, which are then set to zero; seconds are this one's."""
        tokens, supervised = map(int, ranks.total([self.tokens, self.supervised]))
        self.rate = tokens / self.seconds if self.seconds else 0.0
        figures = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": self.rate or None,
            "seconds": self.seconds,
        }
        self.tokens = self.supervised = 0
        self.seconds = 0.0
        return figures


def peaks() -> memory.Peaks:
    """The most memory that a process of this run has had so far, resident and on its device."""
    own = memory.peaks()
    return {
        "peak_rss_bytes": _largest(own["peak_rss_bytes"]),
        "peak_device_bytes": _largest(own["peak_device_bytes"]),
    }


def _largest(own: int | None) -> int | None:
    most = ranks.largest(float("-inf") if own is None else own)
    return None if own is None else int(most)
