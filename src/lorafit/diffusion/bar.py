"""How far a run is: a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

from typing import Any, final

from rich.console import Console
from rich.progress import Progress

from lorafit.training.callbacks import steps_bar


@final
class Bar:
    """A bar with loss, pictures per second and time left.

    Args:
        console: where it is shown.
        total: steps of the run.
        done: steps that were done before.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console = console
        self._total = total
        self._progress: Progress | None = None
        self._task: Any = None
        if console.is_terminal:
            self._progress = steps_bar(console, "training")
            self._progress.start()
            self._task = self._progress.add_task("training", total=total, completed=done, figures="")

    def show(self, step: int, loss: float, rate: float) -> None:
        """After a step: its number from 1, its loss, pictures per second."""
        figures = f"loss {loss:.4f}, {rate:,.1f} pictures/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif step % max(1, self._total // 10) == 0:
            self._console.print(f"step {step} of {self._total}: {figures}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text)

    def close(self) -> None:
        """Leaves the terminal as it was, whatever ended the run."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
