"""What the steps since the last record came to: their loss, and how fast they went."""

from __future__ import annotations

import time
from typing import Any, final

from torch import Tensor

from lorafit.journal import asked


@final
class Pace:
    """Adds up losses, examples and seconds of steps.

    A loss stays on its device until it is read: asking a GPU for a number at every step would make it wait.

    Attributes:
        seconds: time in steps so far, that in which batches were made included.
        rate: examples per second so far; None where a step did not say how many it had.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._examples: int | None = 0
        self._mark = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._loss: Tensor | float = 0.0
        self._here = 0.0
        self._seen: int | None = 0

    @property
    def rate(self) -> float | None:
        """Examples per second of all steps, or None."""
        return self._examples / self.seconds if self._examples and self.seconds else None

    def begin(self) -> None:
        """Steps begin, or go on, now: what was done since the last one was none."""
        self._mark = time.perf_counter()

    def add(self, loss: Tensor | float, examples: int | None) -> None:
        """A step is over.

        Raises:
            ConfigError: the loss is not one number.
        """
        value, now = asked.number("loss", loss), time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.seconds += passed
        self._here += passed
        self._steps += 1
        self._loss = self._loss + value
        self._seen = None if examples is None or self._seen is None else self._seen + examples
        self._examples = None if examples is None or self._examples is None else self._examples + examples

    def read(self) -> dict[str, Any] | None:
        """The figures since the last reading, which then begin anew; None where there was no step."""
        if not self._steps:
            return None
        figures = {
            "loss": float(self._loss) / self._steps,
            "examples": self._seen,
            "examples_per_second": self._seen / self._here if self._seen and self._here else None,
            "seconds": self._here,
        }
        self._clear()
        return figures
