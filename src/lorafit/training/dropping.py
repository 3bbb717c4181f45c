"""The trial of LoRA-drop: a short training whose adapter is scored and thrown away, before the run proper.

What it found is kept in the run's folder before the run proper begins, so that a run that is killed goes on with the
same choice. A trial that is killed leaves nothing, and is repeated with the same result.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, final

import numpy
import torch
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from lorafit import files
from lorafit.handle import Handle
from lorafit.importance import importance
from lorafit.method import Around, Method
from lorafit.methods.lora_drop import LoRADrop
from lorafit.training import ranks
from lorafit.training.batches import Records
from lorafit.training.callbacks import Bar, Timing
from lorafit.training.config import UNRECORDED, Settings
from lorafit.training.folder import FREE, FREE_TRAINING, RunFolder
from lorafit.training.objectives import NextToken
from lorafit.training.prepare import Task, training_arguments
from lorafit.training.record import Recorder
from lorafit.training.trainer import AdapterTrainer, planned_steps, records_per_step

Notify: TypeAlias = Callable[[str], object]

DROP = "drop.json"
"""Name of the file with the choice, in the run's folder."""

TRIAL: Mapping[str, Any] = {
    **UNRECORDED,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "warmup_steps": 0,
    "warmup_ratio": None,
}
"""What differs from the run's own training arguments: one pass, no warm-up (it could outlast the trial), and nothing is
measured or saved. None: as if it was not given."""


@dataclass(frozen=True)
class Choice:
    """What a trial found; the fields are those of the record "drop".

    Attributes:
        scores: module path → Iᵢ.
        kept: paths of the sites with adapters of their own.
        shared: shape as text → how many sites share the adapters of that shape.
        rest: what becomes of the sites that are not kept, "share" or "freeze".
        threshold: T.
        sample_records: how many records the trial saw.
        steps: its optimizer steps.
    """

    scores: dict[str, float]
    kept: list[str]
    shared: dict[str, int]
    rest: str
    threshold: float
    sample_records: int
    steps: int

    def told(self) -> str:
        """The choice in one line."""
        if len(self.kept) == len(self.scores):
            return f"keeps all {len(self.kept)} sites"
        share = 100 * math.fsum(self.scores[path] for path in self.kept)
        rest = f"the rest share {len(self.shared)} adapter{'' if len(self.shared) == 1 else 's'}"
        return f"keeps {len(self.kept)} of {len(self.scores)} sites with {share:.0f} % of the importance; " + (
            "the rest stay as they are" if self.rest == "freeze" else rest
        )


@final
@dataclass(frozen=True)
class Trial:
    """What a trial needs of the run.

    Attributes:
        task: model, data and objective.
        settings: the run's settings.
        arguments: its training arguments, the learning rate decided.
        sites: paths of the run's layers.
        attach: attaches a method to the run's layers.
        notify: is told what is done.
        console: for the progress bar.
    """

    task: Task
    settings: Settings
    arguments: TrainingArguments
    sites: tuple[str, ...]
    attach: Callable[[Method], Handle]
    notify: Notify
    console: Console

    def run(self, method: Method, drop: LoRADrop) -> Choice:
        """Trains a method on a part of the data and chooses by what its sites then put out; the model stays as it was.

        Raises:
            DataError: the adapter learnt nothing.
            TrainingError: its loss was not finite.
        """
        records = self._sample(drop.sample)
        with _undisturbed(self.task.model, self.arguments.device):
            handle = self.attach(method)
            try:
                steps, scores = self._score(handle, records)
                kept = drop.chosen(scores).keep or ()
                shared = Counter(_shape(handle, path) for path in scores if path not in kept and drop.rest == "share")
            finally:
                handle.detach()
        return Choice(scores, list(kept), dict(shared), drop.rest, drop.threshold, len(records), steps)

    def _sample(self, share: float) -> list[Any]:
        """The records of the trial: a share of the training data, from one step's to half of the run's."""
        records, arguments = self.task.data.train, self.arguments
        step = records_per_step(arguments)
        most = step * max(1, planned_steps(arguments, len(records)) // 2)  # a trial is not to outlast the run
        count = min(len(records), max(step, min(most, math.ceil(share * len(records)))))
        generator = torch.Generator().manual_seed(self.settings.seed)
        places = sorted(torch.randperm(len(records), generator=generator)[:count].tolist())
        return [records[place] for place in places]

    def _score(self, handle: Handle, records: list[Any]) -> tuple[int, dict[str, float]]:
        trainer = self._trainer(handle, records)
        self.notify(
            f"trial: {trainer.planned_steps():,} steps on {len(records):,} of {len(self.task.data.train):,} records, "
            "to see which layers matter"
        )
        bar = Bar(self.console, trainer.meter, trial=True)
        for callback in (Timing(trainer.meter), bar):
            trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            bar.close()
        size = self.arguments.eval_batch_size
        ordered = sorted(records, key=len)
        batches = (self.task.collator(ordered[start : start + size]) for start in range(0, len(ordered), size))
        with trainer.accelerator.autocast():
            scores = importance(handle, batches, forward=self._forward(handle))
        trainer.accelerator.free_memory()
        return trainer.state.global_step, scores

    def _trainer(self, handle: Handle, records: list[Any]) -> AdapterTrainer:
        merged = {**self.settings.training, **TRIAL}
        training = {key: value for key, value in merged.items() if key not in TRIAL or value is not None}
        arguments = training_arguments(
            self.settings.model_copy(update={"training": training}), self.arguments.output_dir
        )
        arguments.learning_rate = self.arguments.learning_rate
        trainer = AdapterTrainer(
            handle=handle,
            objective=self.task.objective,
            lengths=[len(one) for one in records],
            base_model=self.task.located.name,
            model=self.task.model,
            args=arguments,
            train_dataset=Records(records),
            data_collator=self.task.layout,
            processing_class=self.task.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def _forward(self, handle: Handle) -> Callable[[nn.Module, Any], object]:
        """How the model runs for the score: as in evaluation, which spares most logits."""
        objective = self.task.objective
        if isinstance(objective, NextToken):
            head = self.task.model.get_output_embeddings()
            if any(site.module is head for site in handle.sites.values()):
                # An output head that is adapted must see every position, as every other layer does.
                return lambda model, batch: model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                )
        return objective.tally


def settle(method: Method, trial: Trial, folder: RunFolder, recorder: Recorder) -> Method:
    """The method as the run proper trains it: with its sites chosen, where there is LoRA-drop in it.

    Args:
        method: any method.
        trial: makes the choice, unless the folder has it.
        folder: the run's; the choice is written there before anything is trained with it.
        recorder: is told the choice.

    Raises:
        DataError, TrainingError: as for `Trial.run`.
    """
    drop = _drop(method)
    if drop is None or drop.keep is not None:
        return method
    fingerprint = _fingerprint(trial)
    choice = ranks.first(lambda: _known(folder, fingerprint, trial.sites))
    if choice is None:
        found = trial.run(method, drop)
        text = json.dumps({"fingerprint": fingerprint, **asdict(found)}, indent=2, ensure_ascii=False)

        def keep() -> Choice:
            files.write_text(folder.path / DROP, text)
            return found  # that of the first process, which may differ in a last digit

        choice = ranks.first(keep)
    else:
        trial.notify("which layers matter was found before")
    recorder.write("drop", **asdict(choice))
    trial.notify(choice.told())
    return _chosen(method, tuple(choice.kept))


def _drop(method: Method) -> LoRADrop | None:
    """The LoRA-drop in a method, at whatever depth."""
    while isinstance(method, Around):
        if isinstance(method, LoRADrop):
            return method
        method = method.within
    return None


def _chosen(method: Method, kept: tuple[str, ...]) -> Method:
    if isinstance(method, LoRADrop):
        return replace(method, keep=kept)
    assert isinstance(method, Around)
    return method.around(_chosen(method.within, kept))


def _shape(handle: Handle, path: str) -> str:
    """What sites must have in common to share an adapter, as text."""
    shape = handle.sites[path].shape
    groups = f" in {shape.groups} groups" if shape.groups > 1 else ""
    rank = handle.method_at(path).settings().get("r")
    own = handle.method.settings().get("r")
    return f"{shape.out} × {shape.inn}{groups}" + ("" if rank == own else f", r {rank}")


def _fingerprint(trial: Trial) -> str:
    """Of everything that the choice depends on."""
    settings = {key: value for key, value in trial.settings.model_dump().items() if key not in FREE}
    training = {key: value for key, value in trial.settings.training.items() if key not in FREE_TRAINING}
    text = json.dumps([{**settings, "training": training}, trial.task.fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _known(folder: RunFolder, fingerprint: str, sites: Collection[str]) -> Choice | None:
    """The choice that the folder has, or None if it has none that was made with these settings."""
    path = folder.path / DROP
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if found.pop("fingerprint") != fingerprint:
            return None
        choice = Choice(**found)
        return choice if _sound(choice, sites) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # not what this library writes: the trial gives the same again


def _sound(choice: Choice, sites: Collection[str]) -> bool:
    """Whether what was read is a choice among these sites."""
    scores, kept, shared = choice.scores, choice.kept, choice.shared
    return (
        isinstance(scores, dict)
        and scores.keys() == set(sites)
        and all(_number(score) and 0 <= score <= 1 for score in scores.values())
        and isinstance(kept, list)
        and 0 < len(kept) == len({name for name in kept if isinstance(name, str) and name in scores})
        and isinstance(shared, dict)
        and all(_number(count) for count in shared.values())
        and choice.rest in ("share", "freeze")
        and all(_number(each) for each in (choice.threshold, choice.sample_records, choice.steps))
    )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards the model has the modes and attributes that it had, and every generator is where it was."""
    modes = {module: module.training for module in model.modules()}
    own = set(vars(model))
    python, arrays = random.getstate(), numpy.random.get_state()
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    kind = device.type if accelerators else "cuda"
    try:
        with torch.random.fork_rng(devices=accelerators, device_type=kind):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        for module, mode in modes.items():
            module.training = mode
        for name in set(vars(model)) - own:  # accelerate marks and wraps a model in place, and would not do so again
            delattr(model, name)
