"""From the name of the data to what training takes: `load_examples`, then `load_data` or `load_labelled_data`.

Whatever is left out, cut, dropped or removed on the way is in `info`, with places, and said in `announcements`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from lorafit.errors import ConfigError, DataError, some
from lorafit.training.brought import ordered
from lorafit.training.classify import EncodedLabel, LabelEncoder
from lorafit.training.encode import Encoded, Encoder, Encodings, Sample
from lorafit.training.examples import Example, Labelled
from lorafit.training.forms import Form, announcement, examples, label_names, left_out, recognise
from lorafit.training.layouts import Layout
from lorafit.training.slices import Slicing, counted, slicing
from lorafit.training.sources import HubLoader, Source, load_hub, read_records
from lorafit.training.split import groups_of, repeated, split_examples, without_leaks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.training.classify import LabelEncodings
    from lorafit.training.numbers import ValueEncodings

Sift = Callable[[Source, Form], Source]
"""Leaves out records before they are understood: what `lorafit check` does, which notes them."""

_SHOWN = 5  # places that `info` names of records that were cut, dropped or removed


@final
@dataclass(frozen=True)
class DataSettings:
    """Which data, and how they are split.

    Attributes:
        data: a file, a directory or a hub name; see `sources.read_records`.
        data_split: the split of a hub data set or of a directory with splits; `train` if None.
        eval_data: the same, for evaluation.
        eval_data_split: `validation` if None and `eval_data` is `data`.
        eval_split: instead of `eval_data`, a share (0.1) or number (200) of the records of `data` to hold out.
        seed: of the split.
        columns: role to column, where the columns go by other names; see `forms.recognise`.
        group: a column whose groups the split keeps whole.
        slice: a column by which held-out records are told apart; None is one of `slices.NAMES`, if there is one.
        hub: fetches hub data sets.
    """

    data: str
    data_split: str | None = None
    eval_data: str | None = None
    eval_data_split: str | None = None
    eval_split: float | None = None
    seed: int = 0
    columns: Mapping[str, str] | None = None
    group: str | None = None
    slice: str | None = None
    hub: HubLoader = load_hub

    def __post_init__(self) -> None:
        if self.eval_data is not None and self.eval_split is not None:
            raise ConfigError(
                "Both eval_data and eval_split are given.",
                found=f"eval_data={self.eval_data!r}, eval_split={self.eval_split!r}",
                expected="one of them",
                fix="leave one away",
            )
        if self.group is not None and self.eval_split is None:
            raise ConfigError(
                "group says what a split keeps whole, and there is no split.",
                found=f"group={self.group!r}",
                expected="group together with eval_split",
                fix="set eval_split=0.1, or leave group away",
            )
        if self.slice is not None and self.eval_split is None and self.eval_data is None:
            raise ConfigError(
                "slice says how held-out records are told apart, and nothing is held out.",
                found=f"slice={self.slice!r}",
                expected="slice together with eval_split or eval_data",
                fix="set eval_split=0.1, or leave slice away",
            )


@final
@dataclass(frozen=True)
class Examples:
    """What was read, before any tokenizer.

    Attributes:
        train: to learn from.
        eval: held out, or empty.
        form: how the records of `data` are read.
        announcements: one sentence each, to be said to the user.
        info: what is known of the data so far.
        slicing: how the held-out records are told apart, None if they are not.
        removed: what was taken out of training, because its questions are held out.
    """

    train: list[Example]
    eval: list[Example]
    form: Form
    announcements: tuple[str, ...]
    info: dict[str, Any]
    slicing: Slicing | None = None
    removed: tuple[Example, ...] = ()


@final
@dataclass(frozen=True)
class Data:
    """What a causal language model trains on.

    Attributes:
        train: to learn from.
        eval: held out, or empty.
        samples: questions from the held-out data (from the training data if there are none).
        announcements: one sentence each, to be said to the user.
        info: the fields of the `data` record.
        slicing: how the held-out records are told apart, None if they are not.
    """

    train: list[Encoded]
    eval: list[Encoded]
    samples: list[Sample]
    announcements: tuple[str, ...]
    info: dict[str, Any]
    slicing: Slicing | None = None


@final
@dataclass(frozen=True)
class LabelledData:
    """What a classifier trains on; as `Data`, and `labels` are the names of the classes by index."""

    train: list[EncodedLabel]
    eval: list[EncodedLabel]
    labels: tuple[str, ...]
    announcements: tuple[str, ...]
    info: dict[str, Any]
    slicing: Slicing | None = None


@final
@dataclass
class Report:
    """Gathers what is said of the data.

    Attributes:
        sentences: one each, to be said to the user.
        info: the fields of the `data` record.
    """

    sentences: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def places(self, key: str, wheres: Sequence[str], sentence: str) -> None:
        """Notes a count and a few places, and says the sentence if the count is not zero."""
        self.info[key] = len(wheres)
        self.info[f"{key}_at"] = list(wheres[:_SHOWN])
        if wheres:
            records = "record" if len(wheres) == 1 else "records"
            self.sentences.append(f"{len(wheres):,} {records} {sentence} ({some(wheres, 3)})")

    def encoded(
        self, train: LabelEncodings | ValueEncodings, held: LabelEncodings | ValueEncodings, max_length: int
    ) -> None:
        """Notes what became of texts of which each has one label; what was cut is said."""
        self.places("truncated", train.truncated + held.truncated, f"cut to max_length={max_length} on the right")
        self.places("dropped", (), "dropped")
        self.info.update(
            train_records=len(train.items),
            eval_records=len(held.items),
            train_tokens=sum(map(len, train.items)),
            train_supervised_tokens=len(train.items),
            eval_supervised_tokens=len(held.items),
            longest=max(map(len, [*train.items, *held.items])),
            longest_uncut=max(train.longest, held.longest),
            max_length=max_length,
        )


def load_examples(settings: DataSettings, sift: Sift | None = None) -> Examples:
    """Reads, recognises and splits the data. Needs no tokenizer and does not import torch.

    Args:
        settings: which data, and how they are split.
        sift: leaves out records that cannot be understood; if None, the first of them is raised.

    Raises:
        DataError: the data cannot be read, recognised or split.
        ConfigError: a setting has a value it cannot have.
    """
    report = Report()
    source = read_records(settings.data, split=settings.data_split, hub=settings.hub)
    form = recognise(source, settings.columns)
    sliced = slicing(source.records, form.columns.values(), settings.slice) if settings.eval_split is not None else None
    used = () if settings.group is None else (settings.group,)
    used = used if sliced is None else (*used, sliced.column)
    report.sentences.append(announcement(source, form, used))
    source = source if sift is None else sift(source, form)
    train, held, split = examples(source, form), list[Example](), "none"
    if settings.eval_data is not None:
        held_source, held, sliced = _held_out(settings, report, sift)
        split = f"evaluation data: {held_source.name}"
    elif settings.eval_split is not None:
        groups = None if settings.group is None else groups_of(source.records, settings.group)
        train, held = split_examples(train, settings.eval_split, settings.seed, groups)
        whole = f", groups of {settings.group!r} kept whole" if settings.group else ""
        split = f"{len(held):,} of {len(source.records):,} held out by seed {settings.seed}{whole}"
        report.sentences.append(split)
    if sliced is not None:
        report.sentences.append(counted(sliced, [example.where for example in held]))
    everything = train
    train, removed = without_leaks(everything, held)
    report.info.update(
        source=source.name,
        format=source.format,
        form=f"{form.name} ({form.describe()})",
        columns_not_used=list(left_out(source, form, used)),
        split=split,
        repeated=repeated(train),
    )
    report.places("removed", removed, "removed from training: their questions are held out for evaluation")
    places = set(removed)
    gone = tuple(example for example in everything if example.where in places)
    return Examples(train, held, form, tuple(report.sentences), report.info, sliced, gone)


def _held_out(
    settings: DataSettings, report: Report, sift: Sift | None
) -> tuple[Source, list[Example], Slicing | None]:
    name = settings.eval_data or ""
    split = settings.eval_data_split
    if split is None and name == settings.data:
        split = "validation"
    source = read_records(name, split=split, hub=settings.hub)
    form = recognise(source, settings.columns)
    sliced = slicing(source.records, form.columns.values(), settings.slice)
    used = () if sliced is None else (sliced.column,)
    report.sentences.append(f"evaluation data: {announcement(source, form, used)}")
    return source, examples(source if sift is None else sift(source, form), form), sliced


def load_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    samples: int = 3,
    layout: Layout | None = None,
    loaded: Examples | None = None,
) -> Data:
    """Everything that training a causal language model takes.

    Args:
        settings: which data, and how they are split.
        tokenizer: the model's.
        max_length: tokens of the longest sequence; longer ones are cut on the right, and counted.
        samples: how many questions to choose for generation.
        layout: how conversations are written; the tokenizer's own way if None.
        loaded: what `load_examples` gave for these settings, where it was called already.

    Raises:
        DataError: the data cannot be read, recognised, split or learnt from.
        ConfigError: a setting has a value it cannot have.
    """
    loaded = load_examples(settings) if loaded is None else loaded
    report = Report(list(loaded.announcements), dict(loaded.info))
    encoder = Encoder(tokenizer, max_length, layout=layout)
    train, held = encoder.encode_all(loaded.train), encoder.encode_all(loaded.eval)
    _check_learnt(train, loaded.train, max_length)
    if loaded.eval:
        _check_learnt(held, loaded.eval, max_length)
    report.sentences.append(f"written by {encoder.layout.description}")
    unrolled = train.unrolled + held.unrolled
    if unrolled:
        report.sentences.append(
            f"{unrolled:,} conversation{'s' * (unrolled != 1)} became one sequence for each answer, because "
            "earlier answers are written or tokenized differently once the conversation goes on"
        )
    report.places("truncated", train.truncated + held.truncated, f"cut to max_length={max_length} on the right")
    report.places("dropped", train.dropped + held.dropped, f"dropped: no answer left within max_length={max_length}")
    report.info.update(
        encoding=encoder.layout.description,
        unrolled=unrolled,
        train_records=len(train.items),
        eval_records=len(held.items),
        train_tokens=sum(map(len, train.items)),
        train_supervised_tokens=sum(one.supervised for one in train.items),
        eval_supervised_tokens=sum(one.supervised for one in held.items),
        longest=max(map(len, train.items + held.items)),
        longest_uncut=max(train.longest, held.longest),
        max_length=max_length,
    )
    chosen = _chosen(held if loaded.eval else train, loaded.eval or loaded.train, samples)
    return Data(
        train.items,
        held.items,
        [encoder.sample(example) for example in chosen],
        tuple(report.sentences),
        report.info,
        loaded.slicing,
    )


def _check_learnt(made: Encodings, read: Sequence[Example], max_length: int) -> None:
    if not made.items:
        raise DataError(
            "There is nothing to learn: not one token of the data is supervised.",
            where=some([example.where for example in read], 3),
            found=f"{len(read):,} records, all without a token of the answer within max_length={max_length}",
            expected="at least one learnt token",
            fix=f"raise max_length (the longest record has {made.longest} tokens), or shorten the prompts",
        )


def _chosen(made: Encodings, read: Sequence[Example], count: int) -> list[Example]:
    """`count` examples, evenly spaced among those that were not dropped."""
    kept = {one.where for one in made.items}
    able = [example for example in read if example.where in kept]
    count = max(0, min(count, len(able)))
    return [able[place * len(able) // count] for place in range(count)]


def load_labelled_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labels: Sequence[str] | None = None,
    loaded: Examples | None = None,
    known: Sequence[str] = (),
) -> LabelledData:
    """Everything that training a classifier takes.

    Args:
        settings: which data, and how they are split.
        tokenizer: the model's.
        max_length: tokens of the longest sequence; longer ones are cut on the right, and counted.
        labels: the names of the classes in the order of the model's head; gathered from the data and sorted if
            None.
        loaded: what `load_examples` gave for these settings, where it was called already.
        known: the classes of a head that the model's files bring: labels of the same names are put in their order.

    Raises:
        DataError: the data cannot be read, recognised, split or learnt from.
        ConfigError: a setting has a value it cannot have.
    """
    loaded = load_examples(settings) if loaded is None else loaded
    report = Report(list(loaded.announcements), dict(loaded.info))
    learnt, held_out = labelled_ones(loaded.train, loaded.form), labelled_ones(loaded.eval, loaded.form)
    label_names(learnt)  # classes enough to train on, before those of the evaluation data are added
    names = ordered(label_names([*learnt, *held_out]), known) if labels is None else tuple(labels)
    encoder = LabelEncoder(tokenizer, max_length, names)
    train, held = encoder.encode_all(learnt), encoder.encode_all(held_out)
    counts = [0] * len(names)
    for one in train.items:
        counts[one.label] += 1
    said = ", ".join(f"{name} ({count:,})" for name, count in zip(names, counts, strict=True))
    report.sentences.append(f"{len(names)} classes, with their training records: {said}")
    report.info.update(labels=list(names), label_counts=counts)
    report.encoded(train, held, max_length)
    return LabelledData(train.items, held.items, names, tuple(report.sentences), report.info, loaded.slicing)


def labelled_ones(read: Sequence[Example], form: Form) -> list[Labelled]:
    """The records, all of which are texts with labels.

    Raises:
        DataError: one of them is something else.
    """
    labelled = [example for example in read if isinstance(example, Labelled)]
    if len(labelled) < len(read):
        wrong = next(example for example in read if not isinstance(example, Labelled))
        raise DataError(
            "The records have no labels.",
            where=wrong.where,
            found=f"{form.name} form ({form.describe()})",
            expected="a text or a pair of texts, and a label",
            fix='say which columns they are: columns={"text": "...", "label": "..."}',
        )
    return labelled
