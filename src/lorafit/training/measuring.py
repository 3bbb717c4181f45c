"""Measures what a run watches: with the adapter switched off, and at the end with the one that is kept.

Nothing that training draws or computes is touched. What was measured before is recorded, and a run that goes on reads
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, final

import torch

from lorafit.handle import Handle
from lorafit.training import ranks
from lorafit.training.findings import Findings, Moved, Slices
from lorafit.training.folder import RunFolder
from lorafit.training.objectives import CORRECT, COUNTS, LOSSES
from lorafit.training.prepare import Task
from lorafit.training.record import Recorder
from lorafit.training.shift import Doing, Reading, forgetting, shifted
from lorafit.training.slices import sliced
from lorafit.training.trainer import AdapterTrainer
from lorafit.training.verdict import Evaluation
from lorafit.training.watching import Part

EVENT = "watched"
"""The record of the losses of a general text or of the target, one for each of its records."""
TOKENS = 1024
"""Tokens of a batch, at most: of a text all of them have logits."""


@final
class Watch:
    """Measures what a run watches, and says what became of it.

    Args:
        task: of the run.
        trainer: what it trains with.
        handle: the adapter.
        recorder: receives what was measured and found.
        folder: the run's.
        notify: is told.
    """

    def __init__(
        self,
        task: Task,
        trainer: AdapterTrainer,
        handle: Handle,
        recorder: Recorder,
        folder: RunFolder,
        notify: Callable[[str], object],
    ) -> None:
        self._task = task
        self._trainer = trainer
        self._handle = handle
        self._recorder = recorder
        self._folder = folder
        self._notify = notify
        self._unit = task.objective.unit.replace(" per ", "/")
        self._before: dict[str, Reading] = {}

    def before(self, *, resumed: bool) -> None:
        """Measures without the adapter, or, of a run that goes on, reads what was measured."""
        for what, part in self._parts():
            known = ranks.first(partial(self._recalled, what, part)) if resumed else None
            if known is None:
                with self._handle.disabled():
                    known = self._measured(what, "before", 0, part)
                self._notify(
                    f"{part.name} before training: {known.losses.mean:.3f} {self._unit} ({len(part.records):,} records)"
                )
            self._before[what] = known

    def after(self, evaluations: Sequence[Evaluation], last: Evaluation | None) -> Findings:
        """Measures again, and compares.

        Args:
            evaluations: those of the held-out records so far.
            last: that of the adapter which is kept, None without held-out records.
        """
        first = evaluations[0] if evaluations and evaluations[0].step == 0 else None
        held = None if first is None or last is None else (first, last)
        step = self._trainer.state.global_step if self._trainer.restored is None else self._trainer.restored
        now = {what: self._measured(what, "after", step, part) for what, part in self._parts()}
        watched, text, shift = self._task.watched, None, None
        if watched.general is not None:
            pair = self._before["general"].losses, now["general"].losses
            text = forgetting(watched.general.name, *pair, self._doing(step, held))
        if watched.target is not None:
            shift = shifted(
                str(self._task.data.info["source"]),
                watched.target.name,
                None if held is None else (Reading(held[0]), Reading(held[1])),
                (self._before["target"], now["target"]),
                self._accuracies(held),
                self._unit,
            )
        found = Findings(text, self._slices(held), shift)
        for event, finding in vars(found).items():
            if finding is not None:
                self._recorder.write(event, **asdict(finding))
        return found

    def _parts(self) -> Iterator[tuple[str, Part]]:
        for what, part in (("general", self._task.watched.general), ("target", self._task.watched.target)):
            if part is not None:
                yield what, part

    def _slices(self, held: tuple[Evaluation, Evaluation] | None) -> Slices | None:
        slicing = self._task.data.slicing
        if slicing is None or held is None:
            if slicing is not None:
                self._notify(f"no losses by {slicing.column}: those before the first step were not recorded")
            return None
        # As many as were measured: `dataloader_drop_last` leaves some out at the end.
        records = self._trainer.eval_dataset
        names = [slicing.values[records[place].where] for place in range(len(held[1].losses))]
        return sliced(slicing.column, names, *held)

    def _doing(self, step: int, held: tuple[Evaluation, Evaluation] | None) -> Doing:
        rank = self._handle.method.settings().get("r")
        gained = None if held is None else Moved.of(*held)
        return Doing(
            step,
            float(self._trainer.args.learning_rate),
            rank if isinstance(rank, int) else None,
            gained if gained is not None and gained.fell else None,
        )

    def _accuracies(self, held: tuple[Evaluation, Evaluation] | None) -> tuple[float, float] | None:
        """Those on the held-out records, as the records of their evaluations have them."""
        if held is None:
            return None
        known = {one["step"]: one["accuracy"] for one in self._folder.recorded("evaluation") if "accuracy" in one}
        if held[0].step not in known or held[1].step not in known:
            return None
        return known[held[0].step], known[held[1].step]

    def _recalled(self, what: str, part: Part) -> Reading | None:
        found = None
        for one in self._folder.recorded(EVENT):
            if (one["what"], one["phase"], one["digest"]) == (what, "before", part.digest):
                found = one
        if found is None:
            return None
        correct = None if found["correct"] is None else tuple(found["correct"])
        return Reading(Evaluation.of(found["step"], found["losses"], found["counts"]), correct)

    def _measured(self, what: str, phase: str, step: int, part: Part) -> Reading:
        found = measure(self._trainer, self._task, part.records, step)
        self._recorder.write(
            EVENT,
            what=what,
            phase=phase,
            step=step,
            name=part.name,
            digest=part.digest,
            losses=list(found.losses.losses),
            counts=list(found.losses.counts),
            correct=None if found.correct is None else list(found.correct),
        )
        return found


def measure(trainer: AdapterTrainer, task: Task, records: Sequence[Any], step: int) -> Reading:
    """The records as the model predicts them now. Changes nothing of the run, its random numbers among it."""
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    parts = []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for some_records in batches(records, trainer.args.eval_batch_size):
                batch = trainer._prepare_inputs(task.layout(some_records))
                with trainer.accelerator.autocast():
                    parts.append(task.objective.tally(model, batch).stacked())
    finally:
        model.train(was_training)
    table = torch.cat(parts)
    losses, counts, correct = table[:, LOSSES], table[:, COUNTS], table[:, CORRECT]
    right = None if bool((correct < 0).any()) else tuple(correct.tolist())
    return Reading(Evaluation.of(step, losses.tolist(), counts.tolist()), right)


def batches(records: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """The records in their order: so many in a batch, of so many tokens, at most; one alone may have more."""
    batch: list[Any] = []
    longest = 0
    for one in records:
        longest = max(longest, len(one))
        if batch and (len(batch) == size or longest * (len(batch) + 1) > TOKENS):
            yield batch
            batch, longest = [], len(one)
        batch.append(one)
    if batch:
        yield batch
