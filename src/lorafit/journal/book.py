"""What is noted of a loop: its steps, its evaluations, how it began and how it ended."""

from __future__ import annotations

import math
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

from lorafit.adapted import plain_class
from lorafit.errors import ConfigError, TrainingError
from lorafit.handle import Handle
from lorafit.journal.measuring import Measured, check_finite
from lorafit.journal.pace import Pace
from lorafit.journal.place import CHECKPOINT, Place, Say
from lorafit.journal.telling import Ended
from lorafit.training import memory, ranks
from lorafit.training.owned import ADAPTER
from lorafit.training.record import Recorder, Unheard, environment
from lorafit.training.verdict import Evaluation, Verdict

HELD_OUT = "held_out"
"""The record of an evaluation's losses, one for each held-out record."""
LAST = 0.25
"""The share of a loop's steps whose training loss stands for that at its end."""


@final
@dataclass(frozen=True)
class Plan:
    """How long a loop is, and what is done on the way.

    Attributes:
        epochs: its rounds, where these are passes over the data.
        steps: its rounds, where these are optimizer steps.
        save_every: rounds from one checkpoint to the next.
        log_every: steps from one record to the next.
        keep_best: whether the best adapter is kept instead of the last.
        seed: of the loop; None where it has none.
        also: the names of what goes on with it.
    """

    epochs: int | None
    steps: int | None
    save_every: int
    log_every: int
    keep_best: bool
    seed: int | None
    also: tuple[str, ...]

    @property
    def rounds(self) -> int | None:
        """How many rounds the loop has, where somebody said so."""
        return self.steps if self.epochs is None else self.epochs

    def told(self) -> str:
        """The length in words."""
        if self.rounds is None:
            return "a loop of no stated length"
        return f"{self.rounds:,} {'steps' if self.epochs is None else 'epochs'}"


@final
class Book:
    """The records of one loop.

    Args:
        place: its folder.
        handle: the adapter.
        optimizer: trains it.
        plan: the loop's length.
        data: what is said of the data.
        say: is told what people want to know at once.

    Attributes:
        pace: what the steps came to.
        evaluations: the held-out losses so far.
        resumed_from: the step that this process went on from.
    """

    def __init__(
        self,
        place: Place,
        handle: Handle,
        optimizer: torch.optim.Optimizer | None,
        plan: Plan,
        data: Mapping[str, Any],
        say: Say,
    ) -> None:
        self._place = place
        self._handle = handle
        self._optimizer = optimizer
        self._plan = plan
        self._data = dict(data)
        self._say = say
        self._recorder: Recorder = (Recorder if ranks.speaks() else Unheard)(place.records)
        self._began = time.perf_counter()
        self._losses: dict[int, float] = {}
        self._accuracies: dict[int, float | None] = {}
        self.pace = Pace()
        self.evaluations: list[Evaluation] = []
        self.resumed_from = 0

    def take_up(self, step: int) -> None:
        """Takes up what the records have up to a step."""
        found = ranks.first(lambda: self._place.recorded((HELD_OUT, "step", "evaluation"), step))
        known = {one["step"]: Evaluation.of(one["step"], one["losses"], one["counts"]) for one in found[HELD_OUT]}
        self.evaluations = [known[each] for each in sorted(known)]
        self._losses = {one["step"]: one["loss"] for one in found["step"] if one.get("loss") is not None}
        self._accuracies = {one["step"]: one.get("accuracy") for one in found["evaluation"]}

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss, the earliest of several."""
        return min(self.evaluations, key=lambda one: one.mean) if self.evaluations else None

    def begin(self, taken: int, rounds: int) -> None:
        """Records that a process begins, and says what it will do."""
        handle, plan = self._handle, self._plan
        self.resumed_from = taken
        command = shlex.join(["python", *sys.argv])
        self._recorder.write("run", run=uuid.uuid4().hex[:12], command=command, resumed_from_step=taken)
        self._say(handle.summary())
        rate = self._rate()
        self._say(plan.told() + ("" if rate is None else f", learning rate {rate:.2g}"))
        told = None if handle.schedule is None else handle.schedule.told()
        if told is not None:
            self._say(told)
        if taken or rounds:
            self._say(f"goes on from step {taken:,}, after {rounds:,} rounds")
        resolved = {
            "model": plain_class(handle.model).__name__,
            "method": handle.method.name,
            **handle.method.settings(),
            "learning_rate": rate,
            "sites": len(handle.sites),
            "trainable": handle.num_trainable,
            "total": handle.num_total,
            "share": handle.num_trainable / max(1, handle.num_total),
            "train_steps": plan.steps,
            "processes": ranks.count(),
            "task": "a loop of its own",
        }
        self._recorder.write("config", config=asdict(plan), resolved=resolved)
        weight = next(handle.model.parameters())
        self._recorder.write("environment", **environment(weight.device, weight.dtype, plan.seed))
        if self._data:
            self._recorder.write("data", **self._data)
        self.pace.begin()

    def _rate(self) -> float | None:
        return None if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])

    def log(self, taken: int, rounds: int, norm: float | None) -> None:
        """Records the steps since the last record, if there were any.

        Raises:
            TrainingError: their loss is not finite.
        """
        figures = self.pace.read()
        if figures is None:
            return
        epoch = None if self._plan.epochs is None else float(rounds)
        known = {"learning_rate": self._rate(), "grad_norm": norm, **memory.peaks()}
        self._recorder.write("step", step=taken, epoch=epoch, **figures, **known)
        loss = figures["loss"]
        if ranks.any_of(not math.isfinite(loss)):
            raise TrainingError(
                "the training loss is not finite",
                where=f"step {taken}, or one of those since the record before it",
                found=loss,
                expected="a finite loss",
                fix="lower the learning rate or warm up for longer; in float16, use bfloat16 instead",
            )
        self._losses[taken] = loss

    def measured(self, one: Evaluation, found: Measured, seconds: float) -> None:
        """Records an evaluation that is about to be noted.

        Raises:
            ConfigError: it is of other records than those before.
            TrainingError: a loss is not finite.
        """
        known = len(self.evaluations[0].losses) if self.evaluations else len(found.losses)
        if len(found.losses) != known:
            raise ConfigError(
                "these are not the held-out records of the evaluations before",
                where="Journal.evaluate",
                found=f"{len(found.losses):,} records",
                expected=f"the {known:,} of step {self.evaluations[0].step:,}",
                fix="measure the same records in the same order every time: without shuffling, with the last batch",
            )
        if "eval_records" not in self._data:
            self._data["eval_records"] = known
            self._recorder.write("data", **self._data)
        right = {} if found.accuracy is None else {"accuracy": found.accuracy}
        self._recorder.write("evaluation", step=one.step, loss=one.mean, seconds=seconds, **right)
        check_finite(found, one.step)

    def note(self, one: Evaluation, accuracy: float | None) -> None:
        """Notes an evaluation, and says it."""
        self.evaluations.append(one)
        self._accuracies[one.step] = accuracy
        self._recorder.write(HELD_OUT, step=one.step, losses=list(one.losses), counts=list(one.counts))
        schedule = self._handle.schedule
        facts = {} if schedule is None else schedule.facts()
        if facts:
            self._recorder.write("schedule", **{**facts, "step": one.step})
        when = "before training" if one.step == 0 else f"at step {one.step:,}"
        share = "" if accuracy is None else f", accuracy {accuracy:.1%}"
        self._say(f"held-out loss {when}: {one.mean:.3f}{share}")

    def saved(self, taken: int) -> None:
        """Records a checkpoint."""
        self._recorder.write("saved", step=taken, path=f"{CHECKPOINT}-{taken}")

    def trained(self, taken: int) -> float | None:
        """The mean training loss of the last steps."""
        late = [loss for step, loss in self._losses.items() if step > (1 - LAST) * taken]
        return math.fsum(late) / len(late) if late else None

    def end(self, taken: int, adapter: Path, verdict: Verdict | None, kept: Evaluation | None) -> Ended:
        """Records how the loop ended; gives what it came to."""
        first = self.evaluations[0] if self.evaluations and self.evaluations[0].step == 0 else None
        last = kept or (self.evaluations[-1] if self.evaluations and self.evaluations[-1].step else None)
        ended = Ended(
            steps=taken,
            resumed_from=self.resumed_from,
            before=None if first is None else first.mean,
            after=None if last is None else last.mean,
            accuracy_before=None if first is None else self._accuracies.get(0),
            accuracy_after=None if last is None else self._accuracies.get(last.step),
            train_seconds=self.pace.seconds,
            seconds=time.perf_counter() - self._began,
            rate=self.pace.rate,
            **memory.peaks(),
            adapter=str(adapter),
            sentence=None if verdict is None else verdict.sentence,
            hints=() if verdict is None else verdict.hints,
            kept=None if kept is None else kept.step,
        )
        if verdict is not None:
            told = {"sentence": verdict.sentence, "hints": verdict.hints, "kept": ended.kept}
            self._recorder.write("verdict", kind=verdict.kind.value, **told)
        losses = {"eval_loss_before": ended.before, "eval_loss_after": ended.after}
        self._recorder.write("end", status="done", **self._costs(taken), **losses, adapter=ADAPTER, message="")
        return ended

    def failed(self, taken: int, error: BaseException) -> None:
        """Records that the loop was stopped, or could not go on."""
        stopped = isinstance(error, KeyboardInterrupt)
        message = "stopped by the user" if stopped else f"{type(error).__name__}: {error}"
        status = "interrupted" if stopped else "failed"
        self._recorder.write("end", status=status, **self._costs(taken), message=message)

    def _costs(self, taken: int) -> dict[str, Any]:
        return {
            "steps": taken,
            "seconds": time.perf_counter() - self._began,
            "train_seconds": self.pace.seconds,
            **memory.peaks(),
        }
