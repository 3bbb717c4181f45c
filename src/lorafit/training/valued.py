"""What a regression trains on: texts and numbers. `load_any` chooses among all that can be learnt from records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, final

from lorafit.training.config import Task
from lorafit.training.data import (
    Data,
    DataSettings,
    Examples,
    LabelledData,
    Report,
    labelled_ones,
    load_data,
    load_labelled_data,
)
from lorafit.training.numbers import EncodedValue, Scale, ValueEncoder
from lorafit.training.slices import Slicing
from lorafit.training.tasks import CAUSAL, NUMBERS, decide, numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class ValueData:
    """What a regression trains on; as `data.LabelledData`, and `scale` is that of a new head."""

    train: list[EncodedValue]
    eval: list[EncodedValue]
    scale: Scale
    announcements: tuple[str, ...]
    info: dict[str, Any]
    slicing: Slicing | None = None


AnyData: TypeAlias = Data | LabelledData | ValueData
"""What a language model, a classifier or a regression trains on."""


def load_value_data(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int, loaded: Examples, scale: Scale | None = None
) -> ValueData:
    """Everything that training a regression takes.

    Args:
        tokenizer: the model's.
        max_length: tokens of the longest sequence; longer ones are cut on the right, and counted.
        loaded: what `load_examples` gave.
        scale: of the model's head where it is trained already; that of the training labels if None.

    Raises:
        DataError: a label is no number, or all of them are the same.
        ConfigError: `max_length` is too small.
    """
    report = Report(list(loaded.announcements), dict(loaded.info))
    learnt, held_out = labelled_ones(loaded.train, loaded.form), labelled_ones(loaded.eval, loaded.form)
    values = numbers(learnt)
    known = scale is not None
    scale = Scale.new(values) if scale is None else scale
    encoder = ValueEncoder(tokenizer, max_length)
    train, held = encoder.encode_all(learnt), encoder.encode_all(held_out)
    mean = sum(values) / len(values)
    told = f"labels are numbers from {min(values):g} to {max(values):g}, mean {mean:.3g}"
    if known:
        told += "; the loss is the mean squared error as a share of the variance of the labels that were learnt, "
        told += f"whose spread was {scale.spread:.3g}"
    else:
        told += f", spread {scale.spread:.3g}; the loss is the mean squared error as a share of that spread's square: "
        told += "1 is what their mean comes to"
    report.sentences.append(told)
    report.info.update(
        label_least=min(values),
        label_most=max(values),
        label_mean=mean,
        label_spread=scale.spread,
    )
    report.encoded(train, held, max_length)
    return ValueData(train.items, held.items, scale, tuple(report.sentences), report.info, loaded.slicing)


def load_any(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    max_length: int,
    samples: int,
    loaded: Examples,
    known: Callable[[], Sequence[str]] = tuple,
) -> AnyData:
    """The records as training takes them, whatever is learnt from them; what was guessed is said.

    Args:
        settings: which data, and how they are split.
        tokenizer: the model's.
        task: what is learnt, or "auto".
        max_length: tokens of the longest sequence.
        samples: how many questions to choose for generation.
        loaded: what `load_examples` gave for these settings.
        known: gives the classes by index of a head that the model's files bring; none without one.

    Raises:
        DataError: they cannot be learned from.
        ConfigError: a setting has a value it cannot have.
    """
    decided = decide(task, [*loaded.train, *loaded.eval])
    if decided.task == CAUSAL:
        return load_data(settings, tokenizer, max_length=max_length, samples=samples, loaded=loaded)
    if decided.said:
        loaded = replace(loaded, announcements=(*loaded.announcements, decided.said))
    if decided.task == NUMBERS:
        return load_value_data(tokenizer, max_length=max_length, loaded=loaded)
    return load_labelled_data(settings, tokenizer, max_length=max_length, loaded=loaded, known=known())


def class_names(data: AnyData) -> Sequence[str]:
    """The classes of a classifier's data; none of any other's."""
    return data.labels if isinstance(data, LabelledData) else ()
