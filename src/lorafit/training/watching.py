"""Records that a run measures before and after and never learns from: a general text, and another domain's.

They are read and encoded before a model is loaded, so that what is wrong with them shows at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

from lorafit.errors import DataError, some
from lorafit.training.classify import LabelEncoder
from lorafit.training.config import Settings
from lorafit.training.data import Data, Examples, LabelledData
from lorafit.training.encode import Encoder
from lorafit.training.examples import Example, Labelled
from lorafit.training.forms import announcement, examples, recognise
from lorafit.training.numbers import ValueEncoder
from lorafit.training.sources import read_records
from lorafit.training.valued import AnyData

EMBEDDED, NONE = "embedded", "none"
"""Words that the setting `general` has beside names of files."""
MOST = 200
"""Records of a general text, at most: they are measured twice."""
SHARE = 0.025
"""Tokens of the embedded text for each one trained on: measured twice, they take some 5 % as long as the steps."""
FEWEST = 10
"""Its paragraphs that the shortest run measures: they tell 0.03 nats per token or so, a third of what has a hint."""


@final
@dataclass(frozen=True)
class Part:
    """Records that are watched.

    Attributes:
        name: what people call them.
        records: encoded.
        digest: of the encoded records.
    """

    name: str
    records: list[Any]
    digest: str


@final
@dataclass(frozen=True)
class Watched:
    """What a run watches, and what is said of it."""

    general: Part | None = None
    target: Part | None = None
    told: tuple[str, ...] = ()

    def parts(self) -> list[Part]:
        """What is watched."""
        return [part for part in (self.general, self.target) if part is not None]


def gather(settings: Settings, tokenizer: Any, loaded: Examples, data: AnyData, records: int) -> Watched:
    """Reads and encodes what the settings want to have watched.

    Args:
        settings: of the run.
        tokenizer: of its model.
        loaded: the records, as they were read.
        data: the same, encoded.
        records: that the whole run trains on, each as often as it comes up.

    Raises:
        DataError: it cannot be read, recognised or encoded, or all of it is learnt from.
    """
    told: list[str] = []
    general = target = None
    if settings.general != NONE and not isinstance(data, Data):
        what = "a classifier" if isinstance(data, LabelledData) else "a regression"
        told.append(f"{what} predicts no text, so there is no loss on a general text to tell what it forgets")
    elif settings.general != NONE:
        if settings.general == EMBEDDED:
            trained = records * sum(map(len, data.train)) / len(data.train)
            general = _own(settings, tokenizer, loaded, trained, told)
        else:
            general = _general(settings, tokenizer, loaded, told)
    if settings.target is not None:
        found = _read(settings.target, "target", settings, loaded, told)
        found = _limited(found, settings.eval_limit, "target records", told)
        target = _part(Path(settings.target).name, found, settings, tokenizer, data, told)
    return Watched(general, target, tuple(told))


def _own(settings: Settings, tokenizer: Any, loaded: Examples, trained: float, told: list[str]) -> Part:
    """The embedded text, or, where it would take long beside `trained` tokens of training, some of its paragraphs."""
    source = read_records(_embedded())
    found = _unlearnt(examples(source, recognise(source)), loaded.train, "general records", told)
    whole = _encoded("general text", found, settings, tokenizer, [])
    enough = round(len(found) * SHARE * trained / sum(map(len, whole.records)))
    chosen = _limited(found, max(FEWEST, enough), "paragraphs of the general text, as the run is short", told)
    return whole if chosen is found else _encoded(whole.name, chosen, settings, tokenizer, [])


def _general(settings: Settings, tokenizer: Any, loaded: Examples, told: list[str]) -> Part:
    source = read_records(settings.general)
    form = recognise(source)
    told.append(f"general text: {announcement(source, form)}")
    found = _unlearnt(examples(source, form), loaded.train, "general records", told)
    found = _limited(found, MOST, "general records", told)
    return _encoded(Path(settings.general).name, found, settings, tokenizer, told)


def _embedded() -> Path:
    path = resources.files("lorafit") / "data" / "general.txt"
    if not isinstance(path, Path) or not path.is_file():
        raise DataError(
            "the embedded general text is not where the package should have it",
            where=path,
            expected="a file",
            fix="install lorafit from its wheel, unpacked (pip does that), or set general to a file or to none",
        )
    return path


def _read(name: str, what: str, settings: Settings, loaded: Examples, told: list[str]) -> list[Example]:
    source = read_records(name)
    form = recognise(source, settings.columns)
    told.append(f"{what}, measured and not learnt from: {announcement(source, form)}")
    return _unlearnt(examples(source, form), loaded.train, f"{what} records", told)


def _unlearnt(found: list[Example], train: Sequence[Example], what: str, told: list[str]) -> list[Example]:
    """Without the questions that are learnt from."""
    questions = {example.question() for example in train}
    learnt = [example.where for example in found if example.question() in questions]
    if len(learnt) == len(found):
        raise DataError(
            f"all {what} are among the training records",
            where=some(learnt, 3),
            found=f"{len(learnt):,} records that are learnt from",
            expected="others than those that are learnt from",
            fix="name another file",
        )
    if learnt:
        told.append(f"{len(learnt):,} {what} left out, as they are learnt from ({some(learnt, 3)})")
    return [example for example in found if example.question() not in questions]


def _limited(found: list[Example], limit: int | None, what: str, told: list[str]) -> list[Example]:
    if limit is None or limit >= len(found):
        return found
    told.append(f"{limit:,} of {len(found):,} {what}, evenly chosen")
    return [found[place * len(found) // limit] for place in range(limit)]


def _part(name: str, found: list[Example], settings: Settings, tokenizer: Any, data: AnyData, told: list[str]) -> Part:
    if isinstance(data, Data):
        return _encoded(name, found, settings, tokenizer, told)
    labelled = [example for example in found if isinstance(example, Labelled)]
    if len(labelled) < len(found):
        raise DataError(
            "the target's records have no labels",
            where=found[0].where,
            expected="texts with labels, as the training records",
            fix="name another target, or say which columns they are: columns",
        )
    if not isinstance(data, LabelledData):
        valued = ValueEncoder(tokenizer, settings.max_length).encode_all(labelled)
        _say_cut(valued.truncated, settings, told)
        return Part(name, list(valued.items), _digest([[one.input_ids, one.value] for one in valued.items]))
    made = LabelEncoder(tokenizer, settings.max_length, data.labels).encode_all(labelled)
    _say_cut(made.truncated, settings, told)
    return Part(name, list(made.items), _digest([[one.input_ids, one.label] for one in made.items]))


def _encoded(name: str, found: list[Example], settings: Settings, tokenizer: Any, told: list[str]) -> Part:
    made = Encoder(tokenizer, settings.max_length).encode_all(found)
    _say_cut(made.truncated, settings, told)
    if made.dropped:
        told.append(f"{len(made.dropped):,} records of {name} dropped: nothing to predict within max_length")
    if not made.items:
        raise DataError(
            "there is nothing to measure: no token is predicted",
            where=some([example.where for example in found], 3),
            found=f"{len(found):,} records, all without one within max_length={settings.max_length}",
            expected="at least one",
            fix="raise max_length, or name another file",
        )
    return Part(name, list(made.items), _digest([[one.input_ids, one.labels] for one in made.items]))


def _say_cut(cut: Sequence[str], settings: Settings, told: list[str]) -> None:
    if cut:
        told.append(f"{len(cut):,} records cut to max_length={settings.max_length} on the right ({some(cut, 3)})")


def _digest(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
