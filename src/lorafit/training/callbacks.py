"""What happens beside the steps of a run: records, a progress bar, and an orderly stop on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.anatomy import Anatomy, anatomy
from lorafit.handle import Handle
from lorafit.sharded import whole
from lorafit.training import ranks
from lorafit.training.meter import Meter, peaks
from lorafit.training.record import Recorder

Notify = Callable[[str], object]


@final
class Timing(TrainerCallback):
    """Times the steps, and reads the meter whenever a loss is logged; comes before those who want the figures.

    Attributes:
        figures: what the meter showed at that time.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.figures: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.start()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.stop()
        self._meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.figures = self._meter.read()


@final
class Recording(TrainerCallback):
    """Writes steps, evaluations and checkpoints into the records, with evaluations what became of the adapter."""

    def __init__(self, recorder: Recorder, timing: Timing, handle: Handle) -> None:
        self._recorder = recorder
        self._timing = timing
        self._handle = handle

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "eval_loss" in logs:
            fields = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            self._recorder.write("evaluation", step=state.global_step, **fields)
            self._record_adapter(state.global_step)
        elif "loss" in logs:
            kept = {key: logs.get(key) for key in ("loss", "learning_rate", "grad_norm")}
            self._recorder.write(
                "step",
                step=state.global_step,
                epoch=state.epoch,
                **kept,
                **self._timing.figures,
                **peaks(),
            )

    def _record_adapter(self, step: int) -> None:
        """Where a schedule stands, and, of methods that part length and direction, how far each has moved."""
        facts = schedule_facts(self._handle)
        if facts:
            self._recorder.write("schedule", **{**facts, "step": step})
        moved = self._moved()
        if not moved:
            return
        self._recorder.write(
            "anatomy",
            step=step,
            magnitude={path: one.magnitude for path, one in moved.items()},
            direction={path: one.direction for path, one in moved.items()},
        )

    def _moved(self) -> dict[str, Anatomy]:
        """Path → how far, of adapters with a gain; one layer at a time, of which all is there for that time alone."""
        moved: dict[str, Anatomy] = {}
        for path, site in self._handle.sites.items():
            adapter = self._handle.adapter(path)
            with whole([site.module]):
                if not moved and adapter.update(site.weight).gain is None:
                    return {}  # the sites of one adapter are alike in this
                moved |= anatomy({path: (site, adapter)})
        return moved

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._recorder.write("saved", step=state.global_step, path=f"checkpoint-{state.global_step}")


def schedule_facts(handle: Handle) -> dict[str, Any]:
    """What a method's schedule says of itself; empty for nothing."""
    if handle.schedule is None:
        return {}
    with whole(handle.entries().values()):
        return handle.schedule.facts()


@final
class Announcing(TrainerCallback):
    """Tells the plan of the method's schedule, which is known once the optimizer is made."""

    def __init__(self, notify: Notify, handle: Handle) -> None:
        self._notify = notify
        self._handle = handle

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told = None if self._handle.schedule is None else self._handle.schedule.told()
        if told is not None:
            self._notify(told)


@contextmanager
def terminated() -> Iterator[None]:
    """Within, SIGTERM is a `KeyboardInterrupt`: whoever is stopped so still writes that it was.

    What else SIGTERM was made to do meanwhile stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@final
class Interrupt(TrainerCallback):
    """Ctrl-C (and SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._before: dict[int, Any] = {}
        self._saved = -1
        self.requested = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._notify("stopping after this step, and saving; once more to stop at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.requested = ranks.any_of(self.requested)  # a signal does not reach all processes in the same step
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.requested = ranks.any_of(self.requested)
        if self.requested and state.global_step < state.max_steps:
            control.should_save = state.global_step != self._saved
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def steps_bar(console: Console, name: str) -> Progress:
    """A bar of steps, with the time that is left; its task has a field `figures`."""
    return Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@final
class Bar(TrainerCallback):
    """A progress bar with loss, tokens per second and time left; plain lines where there is no terminal.

    Args:
        console: where it is shown.
        meter: what it reads the speed of.
        trial: whether what it shows is LoRA-drop's trial, and not the run proper.
    """

    def __init__(self, console: Console, meter: Meter, *, trial: bool = False) -> None:
        self._console = console
        self._meter = meter
        self._name, self._prefix = ("trial", "trial, ") if trial else ("training", "")
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self._console.is_terminal:
            return
        self._progress = steps_bar(self._console, self._name)
        self._progress.start()
        self._task = self._progress.add_task(self._name, total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            figures = f"loss {logs['loss']:.3f}, {self._meter.rate:,.0f} tokens/s"
            if self._progress is not None:
                self._progress.update(self._task, figures=figures)
            elif state.global_step % max(1, state.max_steps // 10) == 0:
                self._console.print(f"{self._prefix}step {state.global_step} of {state.max_steps}: {figures}")
        elif "eval_loss" in logs:
            self._console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was, whatever ended the run."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
