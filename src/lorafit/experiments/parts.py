"""The user's records in three files: to train on, to choose by, and to report on. No question is in two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lorafit import files
from lorafit.errors import ConfigError, DataError
from lorafit.experiments.counted import check_several
from lorafit.training.config import Settings
from lorafit.training.embedded_data import embedded_data_path
from lorafit.training.examples import Example
from lorafit.training.formats import Record
from lorafit.training.forms import announcement, examples, recognise
from lorafit.training.sources import Source, read_records
from lorafit.training.split import groups_of, split_examples, without_leaks
from lorafit.training.tasks import CLASSES, NUMBERS, decide

DATA = "data"
PARTS = "parts.json"
SHARE = 0.1
"""Of the records in the validation part, and again in the test part, where the user says nothing."""
VALIDATION, TEST = 100, 200
"""Records that these parts have at most, where the user says nothing: each trial is measured on them."""


@final
@dataclass(frozen=True)
class Parts:
    """The files, and what there is to say of them.

    Attributes:
        train, validation, test: files of records, as JSON lines.
        name: of the data, for people.
        form: how the records are read.
        train_records, validation_records, test_records: how many there are.
        classifies: whether the records are texts with classes.
        said: one sentence each, to be said to the user.
        numbers: whether they are texts with numbers to predict.
    """

    train: str
    validation: str
    test: str
    name: str
    form: str
    train_records: int
    validation_records: int
    test_records: int
    classifies: bool
    said: tuple[str, ...]
    numbers: bool = False

    @property
    def labelled(self) -> bool:
        """Whether a model needs a head for the records."""
        return self.classifies or self.numbers


def part(settings: Settings, experiment: Path) -> Parts:
    """Splits the data of `settings` once and for all: who comes again finds the files.

    `eval_data` is the test part if it is given; else `eval_split` of the data is, and as much of the rest is the
    validation part. `eval_limit` is the size of both at most.

    Raises:
        DataError: the data cannot be read, recognised or split, or the test part is one record.
        ConfigError: they are not those that the experiment was begun with.
    """
    folder = (experiment / DATA).resolve()  # the same from wherever the command is given again
    source, held = _sources(settings)
    fingerprint = _fingerprint(settings, source, held)
    known = _known(folder, fingerprint)
    if known is not None:
        return known
    form = recognise(source, settings.columns)
    used = () if settings.group is None else (settings.group,)
    said = [announcement(source, form, used)]
    if settings.eval_split == 0:
        raise ConfigError(
            "an experiment needs held-out records",
            where="eval_split",
            found="0",
            expected="a share or a number of the records",
            fix="leave eval_split out",
        )
    train = _Readable(source.records, examples(source, form))
    if held is None:
        train, test = train.split(_wanted(settings, len(train.records), TEST), settings, "test")
    else:
        held_form = recognise(held, settings.columns)
        said.append(f"test part: {announcement(held, held_form)}")
        test = _Readable(held.records, examples(held, held_form)).limited(settings.eval_limit or TEST)
    check_several(test.records, source.name if held is None else held.name)
    train = train.without(test)
    train, validation = train.split(_wanted(settings, len(train.records), VALIDATION), settings, "validation")
    train = train.without(validation)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [one.write(folder / name) for one, name in ((train, "train"), (validation, "validation"), (test, "test"))]
    counts = [len(one.records) for one in (train, validation, test)]
    said.append(
        f"{counts[0]:,} records to train on, {counts[1]:,} to choose by (validation), "
        f"{counts[2]:,} to report on (test); no question is in two parts; split by seed {settings.seed}"
    )
    decided = decide(settings.task, [*train.examples, *validation.examples, *test.examples])
    if decided.said:
        said.append(decided.said)
    left = len(source.records) + (0 if held is None else len(held.records)) - sum(counts)
    if left:
        said.append(
            f"{left:,} records are in no part: their questions are in a held-out one, or it is full (eval_limit)"
        )
    made = Parts(
        train=str(paths[0]),
        validation=str(paths[1]),
        test=str(paths[2]),
        name=source.name,
        form=form.name,
        train_records=counts[0],
        validation_records=counts[1],
        test_records=counts[2],
        classifies=decided.task == CLASSES,
        said=tuple(said),
        numbers=decided.task == NUMBERS,
    )
    files.write_text(folder / PARTS, json.dumps({"fingerprint": fingerprint, **asdict(made)}, indent=2))
    return made


@final
@dataclass(frozen=True)
class _Readable:
    """Records, and what each means."""

    records: Sequence[Record]
    examples: Sequence[Example]

    def chosen(self, keep: set[int]) -> _Readable:
        pairs = [pair for pair in zip(self.records, self.examples, strict=True) if id(pair[1]) in keep]
        return _Readable([record for record, _ in pairs], [example for _, example in pairs])

    def split(self, wanted: int, settings: Settings, salt: str) -> tuple[_Readable, _Readable]:
        """What is left, and what is held out."""
        groups = None if settings.group is None else groups_of(self.records, settings.group)
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed} {salt}".encode()).digest()[:4], "big")
        left, held = split_examples(self.examples, wanted, seed, groups)
        return self.chosen({id(one) for one in left}), self.chosen({id(one) for one in held})

    def without(self, other: _Readable) -> _Readable:
        """Those whose questions the other does not ask."""
        kept, _ = without_leaks(self.examples, other.examples)
        return self.chosen({id(one) for one in kept})

    def limited(self, limit: int) -> _Readable:
        """At most so many, evenly chosen."""
        count = len(self.examples)
        if limit >= count:
            return self
        return self.chosen({id(self.examples[place * count // limit]) for place in range(limit)})

    def write(self, stem: Path) -> Path:
        path = stem.with_suffix(".jsonl")
        files.write_text(path, "".join(_line(record) + "\n" for record in self.records))
        return path


def _sources(settings: Settings) -> tuple[Source, Source | None]:
    """The data, and the held-out data where they are given."""
    if settings.data is None:
        held = settings.eval_data or str(embedded_data_path("eval"))
        return read_records(str(embedded_data_path("train"))), read_records(held, split=settings.eval_data_split)
    source = read_records(settings.data, split=settings.data_split)
    if settings.eval_data is None:
        return source, None
    split = settings.eval_data_split
    if split is None and settings.eval_data == settings.data:
        split = "validation"
    return source, read_records(settings.eval_data, split=split)


def _wanted(settings: Settings, count: int, most: int) -> int:
    """How many records to hold out: what `eval_split` says, else a tenth and `most` at most; within `eval_limit`."""
    share, limit = settings.eval_split, settings.eval_limit
    if share is None:
        share, limit = SHARE, limit or most
    wanted = share if isinstance(share, int) else max(1, round(share * count))
    wanted = wanted if limit is None else min(wanted, limit)
    if wanted >= count:
        raise DataError(
            "the records are too few to train on, to choose by and to report on",
            found=f"{count} records where these are taken from, {wanted} to be held out",
            expected="at least three, and better some hundreds",
            fix="add records, or lower eval_split",
        )
    return wanted


def _line(record: Record) -> str:
    # A date or another thing that JSON has no type for is the text that a reader of CSV would have met.
    return json.dumps(record.fields, ensure_ascii=False, default=str)


def _fingerprint(settings: Settings, source: Source, held: Source | None) -> str:
    digest = hashlib.sha256()
    wanted: list[Any] = [settings.seed, settings.eval_split, settings.eval_limit, settings.columns, settings.group]
    digest.update(json.dumps(wanted, sort_keys=True).encode())
    for one in (source, *(() if held is None else (held,))):
        digest.update(f"\n{len(one.records)}\n".encode())
        for record in one.records:
            digest.update(_line(record).encode())
    return digest.hexdigest()


def _known(folder: Path, fingerprint: str) -> Parts | None:
    path = folder / PARTS
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("fingerprint", None) != fingerprint:
        raise ConfigError(
            "the data, or how they are split, are not those that this experiment was begun with",
            where=folder,
            fix="put them back as they were, or choose another output_dir",
        )
    # The folder may have been moved since.
    placed = {name: str(folder / Path(found[name]).name) for name in ("train", "validation", "test")}
    return Parts(**{**found, **placed, "said": tuple(found["said"])})
