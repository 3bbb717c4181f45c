"""The loss of each record of a file under a finished model, read from the files that a run left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafit.checkpoint import load as load_adapter
from lorafit.experiments.trained import load_head
from lorafit.experiments.trial import Measured, Notify
from lorafit.training.batches import AnyCollator, Collator, LabelCollator, ValueCollator
from lorafit.training.brought import ordered
from lorafit.training.config import Settings
from lorafit.training.data import (
    DataSettings,
    Examples,
    labelled_ones,
    load_data,
    load_examples,
    load_labelled_data,
)
from lorafit.training.forms import label_names
from lorafit.training.headed import Headed
from lorafit.training.loss import SupervisedLoss
from lorafit.training.models import choose_dtype, head_paths, load_classifier, load_tokenizer, locate
from lorafit.training.numbers import Scale
from lorafit.training.objectives import Classes, NextToken, Numbers, Objective
from lorafit.training.pooling import classes_of, pooling_of
from lorafit.training.quantised import load_base, quantise_loaded
from lorafit.training.tasks import CAUSAL, NUMBERS, decide, numbers
from lorafit.training.valued import load_value_data

BATCH = 16


@dataclass(frozen=True)
class Model:
    """A model that can be measured.

    Attributes:
        model: in evaluation mode, on the device that computes.
        tokenizer: its own.
        objective: what a record's loss is.
        head: of a classifier or a regression; None for a language model.
    """

    model: Any
    tokenizer: Any
    objective: Objective
    head: Headed | None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """A classifier's classes by index; None for anything else."""
        return None if self.head is None or self.head.scale is not None else self.head.labels


def bare(settings: Settings, notify: Notify) -> Model:
    """The base model of a run, with nothing on it; a new head has the values that the run starts from."""
    return _loaded(settings, _head(settings), notify, new=True)


def adapted(settings: Settings, adapter: Path, notify: Notify) -> Model:
    """The base model of a run with the adapter that it left."""
    loaded = _loaded(settings, Headed.read(adapter), notify)
    load_adapter(loaded.model, adapter)
    loaded.model.eval()
    return loaded


def whole(settings: Settings, folder: Path, notify: Notify) -> Model:
    """The model of which a run trained all weights, from the folder that it left."""
    return _loaded(settings.model_copy(update={"model": str(folder), "dtype": "float32"}), Headed.read(folder), notify)


def probed(settings: Settings, folder: Path, notify: Notify) -> Model:
    """The base model of a run with the head that it trained alone."""
    loaded = _loaded(settings.model_copy(update={"dtype": "float32"}), Headed.read(folder), notify)
    load_head(loaded.model, folder)
    return loaded


def _head(settings: Settings) -> Headed | None:
    """The head that a run gives a model for its data, as it has it; None if it trains a language model."""
    assert settings.data is not None
    examples = load_examples(DataSettings(settings.data, eval_data=settings.eval_data, columns=settings.columns))
    task = decide(settings.task, [*examples.train, *examples.eval]).task
    if task == CAUSAL:
        return None
    train, held = (labelled_ones(part, examples.form) for part in (examples.train, examples.eval))
    path = locate(settings.model, _quiet).path
    pooling = pooling_of(path, settings.pooling).kind
    if task == NUMBERS:
        return Headed((), Scale.new(numbers(train)), pooling)
    return Headed(ordered(label_names([*train, *held]), classes_of(path)), None, pooling)


def _quiet(line: str) -> None:
    """What the loading of the model says again."""


def _loaded(settings: Settings, head: Headed | None, notify: Notify, *, new: bool = False) -> Model:
    """The base model with a head, which is as the run began with it if it is `new`, and else to be filled or trained.

    A regression's head that the model's own files bring gives the labels themselves.
    """
    located = locate(settings.model, notify)
    tokenizer = load_tokenizer(located)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        device = device if found is None else found
    dtype = choose_dtype(settings.dtype, device)
    objective: Objective
    if head is None:
        # Modules that the adapter brings whole copies of are not quantised, as they were not in training.
        model, _ = load_base(settings.quantise, located, dtype, settings.modules_to_save)
        objective = NextToken(SupervisedLoss.prepare(model))
    else:
        pad, seed = tokenizer.pad_token_id, settings.seed
        model, fresh = load_classifier(located, dtype, head.labels, pad, seed=seed, pooling=head.pooling)
        own = head_paths(model)
        quantise_loaded(settings.quantise, model, [*settings.modules_to_save, *fresh, *own])
        if new and own and not {*own} & {*fresh} and head.scale is not None:
            head = replace(head, scale=head.scale.brought(model.config))
        objective = Classes() if head.scale is None else Numbers(head.scale)
    model.to(device).eval()
    return Model(model, tokenizer, objective, head)


def collator_of(model: Model) -> AnyCollator:
    """What makes batches for a model."""
    pad = model.tokenizer.pad_token_id
    if model.head is None:
        return Collator(pad)
    return LabelCollator(pad) if model.head.scale is None else ValueCollator(pad, model.head.scale)


def measure(model: Model, settings: Settings, path: str) -> Measured:
    """The loss of every record of a file.

    Records are grouped by length alone, so that every model is given the same batches. What became several sequences
    is one record again.

    Raises:
        DataError: the file cannot be read.
    """
    encoded, wheres = _encoded(model, settings, path)
    collator: Any = collator_of(model)
    places = {where: place for place, where in enumerate(dict.fromkeys(wheres))}
    losses, counts, correct = ([0.0] * len(places) for _ in range(3))
    pairs: dict[int, tuple[float, float]] = {}
    counted = False
    order = sorted(range(len(encoded)), key=lambda place: (len(encoded[place]), place))
    device = next(model.model.parameters()).device
    size = int(settings.training.get("per_device_eval_batch_size", BATCH))
    with torch.no_grad():
        for start in range(0, len(order), size):
            batch = [encoded[place] for place in order[start : start + size]]
            given = {key: value.to(device) for key, value in collator(batch).items()}
            tally = model.objective.tally(model.model, given)
            counted = tally.correct is not None
            rows = tally.stacked().tolist()
            for one, (loss, count, right, predicted, expected) in zip(batch, rows, strict=True):
                at = places[one.where]
                losses[at] += loss
                counts[at] += count
                correct[at] += right
                if tally.pairs is not None:
                    pairs[at] = predicted, expected
    return Measured(
        tuple(losses),
        tuple(map(int, counts)),
        tuple(correct) if counted else None,
        tuple(pairs[at] for at in range(len(places))) if pairs else None,
    )


def _encoded(model: Model, settings: Settings, path: str) -> tuple[Sequence[Any], list[str]]:
    wanted = DataSettings(path, columns=settings.columns)
    loaded: Examples = load_examples(wanted)
    length = settings.max_length
    items: Sequence[Any]
    if model.head is None:
        items = load_data(wanted, model.tokenizer, max_length=length, samples=0, loaded=loaded).train
    elif model.head.scale is not None:
        items = load_value_data(model.tokenizer, max_length=length, loaded=loaded, scale=model.head.scale).train
    else:
        items = load_labelled_data(wanted, model.tokenizer, max_length=length, labels=model.labels, loaded=loaded).train
    return items, [one.where for one in items]
