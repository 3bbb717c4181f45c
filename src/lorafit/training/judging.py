"""What a run does with its evaluations: keeps the best adapter, stops early if it is asked to, and has it judged."""

from __future__ import annotations

import json
import shutil
from typing import Any, final

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState

from lorafit import files
from lorafit.distributed import is_sharded
from lorafit.handle import Handle
from lorafit.state import load_state, save_state
from lorafit.training import ranks
from lorafit.training.folder import RunFolder
from lorafit.training.record import Recorder
from lorafit.training.trainer import AdapterTrainer
from lorafit.training.verdict import Evaluation, Kind, Verdict, judge

BEST = "best"
STEP = "step.json"
EVENT = "held_out"
"""The record of an evaluation's losses, one for each held-out record."""
LAST = 0.25
"""The share of a run's steps whose training loss stands for that at its end."""


class StoppedThereError(Exception):
    """The run goes on from the very step at which it was stopped: there is nothing left to train."""


@final
class Judging(TrainerCallback):
    """Follows the evaluations of one run.

    Args:
        trainer: evaluates.
        handle: the adapter.
        recorder: receives each evaluation's losses.
        folder: the run's; the best adapter so far is kept in its folder `best`.
        keep_best: whether it is kept, and put back at the end.
        stop: whether the run ends once it overfits.
    """

    def __init__(
        self,
        trainer: AdapterTrainer,
        handle: Handle,
        recorder: Recorder,
        folder: RunFolder,
        *,
        keep_best: bool,
        stop: bool,
    ) -> None:
        self._trainer = trainer
        self._handle = handle
        self._recorder = recorder
        self._folder = folder
        self._best = folder.path / BEST
        self._keep_best = keep_best
        self._stop = stop
        self.evaluations: list[Evaluation] = []
        self.stopped: Verdict | None = None

    def recall(self, step: int) -> None:
        """Takes up the evaluations that the records have up to `step`, from which the run goes on."""
        self.evaluations = ranks.first(lambda: self._recorded(step))

    def _recorded(self, step: int) -> list[Evaluation]:
        found = (Evaluation.of(one["step"], one["losses"], one["counts"]) for one in self._folder.recorded(EVENT))
        known = {one.step: one for one in found if one.step <= step}
        return [known[each] for each in sorted(known)]

    def add(self) -> bool:
        """Notes the evaluation that was just made, if there was none of that step; says whether it did."""
        found = self._trainer.last_records
        if found is None or any(one.step == found.step for one in self.evaluations):
            return False
        self.evaluations.append(found)
        self._recorder.write(EVENT, step=found.step, losses=list(found.losses), counts=list(found.counts))
        return True

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluates the step that a run goes on from, if that was due there and the stop came first.

        Raises:
            StoppedThereError: the run was stopped there because it overfits. The trainer looks at what it is told only
                after a step, so it cannot be told otherwise.
        """
        there = 0 < state.global_step < state.max_steps and self._trainer.eval_dataset is not None
        if not there:
            return
        if all(one.step != state.global_step for one in self.evaluations):
            if _due(args, state):
                self._trainer.evaluate()
        elif self._stop:
            self.stopped = self._overfitting()
        if self.stopped is not None:
            raise StoppedThereError

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if not self.add():
            return control
        newest = self.evaluations[-1]
        if self._keep_best and newest.step and newest.mean <= min(one.mean for one in self.evaluations):
            ranks.agreed(lambda: self._save(newest.step))
        if self._stop and state.global_step < state.max_steps:
            self.stopped = self._overfitting()
            control.should_training_stop = control.should_training_stop or self.stopped is not None
        return control

    def _overfitting(self) -> Verdict | None:
        found = judge(self.evaluations)
        return found if found is not None and found.kind is Kind.OVERFITTING else None

    def restore(self) -> Evaluation | None:
        """Puts the best adapter back if it is not the last one; gives its evaluation."""
        if not self._keep_best or len(self.evaluations) < 2 or self._trainer.restored is not None:
            return None
        best = min(self.evaluations, key=lambda one: one.mean)
        if best is self.evaluations[-1] or best.step == 0:
            return None
        if ranks.first(self._kept) != best.step:  # of steps that a kill took back, and that came out otherwise then
            return None
        load_state(self._handle, self._best)
        self._trainer.restored = best.step
        return best

    def _save(self, step: int) -> None:
        if ranks.speaks() or is_sharded(self._handle):
            save_state(self._handle, self._best)
        if ranks.speaks():
            files.write_text(self._best / STEP, json.dumps({"step": step}))

    def _kept(self) -> int | None:
        path = self._best / STEP
        return json.loads(path.read_text())["step"] if path.is_file() else None

    def verdict(self) -> Verdict | None:
        """The verdict on the run as it went, whatever adapter is kept of it."""
        return judge(self.evaluations, self._trained())

    def _trained(self) -> float | None:
        history = [one for one in self._trainer.state.log_history if "loss" in one]
        late = [one["loss"] for one in history if one["step"] > (1 - LAST) * self._trainer.state.global_step]
        return sum(late) / len(late) if late else None

    def remove(self) -> None:
        """Takes the folder of the best adapter away, once the run has written its own."""
        if ranks.speaks():
            shutil.rmtree(self._best, ignore_errors=True)


def _due(args: Any, state: TrainerState) -> bool:
    """Whether an evaluation follows the step that a run stands at, by the trainer's own rule."""
    asked, flow = TrainerControl(), DefaultFlowCallback()
    flow.on_step_end(args, state, asked)
    if float(state.epoch or 0).is_integer():
        flow.on_epoch_end(args, state, asked)
    return bool(asked.should_evaluate)
