"""The loss of each record of a file under a finished model, read from the files that a run left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.checkpoint import load as load_adapter
from lorafit.experiments.trial import Measured, Notify
from lorafit.training.batches import Collator, LabelCollator
from lorafit.training.config import Settings
from lorafit.training.data import DataSettings, Examples, load_data, load_examples, load_labelled_data
from lorafit.training.examples import Labelled
from lorafit.training.folder import LABELS
from lorafit.training.forms import label_names
from lorafit.training.loss import SupervisedLoss
from lorafit.training.models import choose_dtype, load_classifier, load_tokenizer, locate
from lorafit.training.objectives import Classes, NextToken, Objective
from lorafit.training.quantised import load_base, quantise_loaded

BATCH = 16


@dataclass(frozen=True)
class Model:
    """A model that can be measured.

    Attributes:
        model: in evaluation mode, on the device that computes.
        tokenizer: its own.
        objective: what a record's loss is.
        labels: a classifier's classes by index; None for a language model.
    """

    model: Any
    tokenizer: Any
    objective: Objective
    labels: tuple[str, ...] | None


def bare(settings: Settings, notify: Notify) -> Model:
    """The base model of a run, with nothing on it; a classifier's new head has the values that the run starts from."""
    labels = _labels(settings)
    return _loaded(settings, labels, notify)


def adapted(settings: Settings, adapter: Path, notify: Notify) -> Model:
    """The base model of a run with the adapter that it left."""
    named = adapter / LABELS
    labels = tuple(json.loads(named.read_text(encoding="utf-8"))) if named.is_file() else None
    loaded = _loaded(settings, labels, notify, adapter)
    load_adapter(loaded.model, adapter)
    loaded.model.eval()
    return loaded


def _labels(settings: Settings) -> tuple[str, ...] | None:
    """The classes of a run's data, as the run has them; None if it trains a language model."""
    assert settings.data is not None
    examples = load_examples(DataSettings(settings.data, eval_data=settings.eval_data, columns=settings.columns))
    labelled = [one for one in [*examples.train, *examples.eval] if isinstance(one, Labelled)]
    classifies = settings.task == "sequence-classification" or (settings.task == "auto" and bool(labelled))
    return label_names(labelled) if classifies else None


def _loaded(settings: Settings, labels: tuple[str, ...] | None, notify: Notify, adapter: Path | None = None) -> Model:
    located = locate(settings.model, notify)
    tokenizer = load_tokenizer(located)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        device = device if found is None else found
    dtype = choose_dtype(settings.dtype, device)
    objective: Objective
    if labels is None:
        # Modules that the adapter brings whole copies of are not quantised, as they were not in training.
        model, _ = load_base(settings.quantise, located, dtype, settings.modules_to_save)
        objective = NextToken(SupervisedLoss.prepare(model))
    else:
        model, head = load_classifier(located, dtype, labels, tokenizer.pad_token_id, seed=settings.seed)
        quantise_loaded(settings.quantise, model, [*settings.modules_to_save, *head])
        objective = Classes()
    model.to(device).eval()
    return Model(model, tokenizer, objective, labels)


def measure(model: Model, settings: Settings, path: str) -> Measured:
    """The loss of every record of a file.

    Records are grouped by length alone, so that every model is given the same batches. What became several sequences
    is one record again.

    Raises:
        DataError: the file cannot be read.
    """
    encoded, wheres = _encoded(model, settings, path)
    pad = model.tokenizer.pad_token_id
    collator: Any = Collator(pad) if model.labels is None else LabelCollator(pad)
    places = {where: place for place, where in enumerate(dict.fromkeys(wheres))}
    losses, counts, correct = ([0.0] * len(places) for _ in range(3))
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
            for one, (loss, count, right) in zip(batch, rows, strict=True):
                at = places[one.where]
                losses[at] += loss
                counts[at] += count
                correct[at] += right
    return Measured(tuple(losses), tuple(map(int, counts)), tuple(correct) if counted else None)


def _encoded(model: Model, settings: Settings, path: str) -> tuple[Sequence[Any], list[str]]:
    wanted = DataSettings(path, columns=settings.columns)
    loaded: Examples = load_examples(wanted)
    length = settings.max_length
    items: Sequence[Any]
    if model.labels is None:
        items = load_data(wanted, model.tokenizer, max_length=length, samples=0, loaded=loaded).train
    else:
        items = load_labelled_data(wanted, model.tokenizer, max_length=length, labels=model.labels, loaded=loaded).train
    return items, [one.where for one in items]
