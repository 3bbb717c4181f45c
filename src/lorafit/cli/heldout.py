"""Which records `lorafit eval` measures on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from lorafit.cli.adapters import Description
    from lorafit.training.data import DataSettings
    from lorafit.training.sequences import Sample

LONGEST = 1024


@dataclass(frozen=True)
class Wanted:
    """What to measure on.

    Attributes:
        data: where the records are.
        split_off: whether they are the held-out part of it, rather than all.
        limit: so many of them at most.
        max_length: tokens of the longest sequence.
    """

    data: DataSettings
    split_off: bool
    limit: int | None
    max_length: int


@dataclass(frozen=True)
class HeldOut:
    """Encoded records, questions among them to answer, and what is known of the data."""

    records: list[Any]
    samples: list[Sample]
    info: dict[str, Any]


def wanted(
    adapter: Path | None,
    data: str | None,
    split: str | None,
    columns: Mapping[str, str] | None,
    limit: int | None,
    max_length: int | None,
    say: Callable[[str], None],
) -> Wanted:
    """What to measure on: the data that are named, those of the adapter's run, or the embedded ones.

    Raises:
        CheckpointError: the adapter's run has no held-out data.
    """
    from lorafit.training.data import DataSettings
    from lorafit.training.embedded_data import embedded_data_path

    run = None if adapter is None else adapter.absolute().parent / "settings.json"
    if data is None and run is not None and run.is_file():
        own = _of_run(run)
        say(f"on the held-out records of the run {run.parent.name}")
        columned = own if columns is None else replace(own, data=replace(own.data, columns=columns))
        return replace(columned, limit=limit or own.limit, max_length=max_length or own.max_length)
    if data is None:
        say("on the embedded evaluation data; --data names others")
    named = data or str(embedded_data_path("eval"))
    return Wanted(DataSettings(data=named, data_split=split, columns=columns), False, limit, max_length or LONGEST)


def _of_run(path: Path) -> Wanted:
    from lorafit.training.config import Settings
    from lorafit.training.prepare import data_settings

    settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    data = data_settings(settings)
    if data.eval_data is None and data.eval_split is None:
        raise CheckpointError(
            "the run that made this adapter held nothing out",
            where=path,
            expected="eval_data or eval_split",
            fix="--data names records to measure on",
        )
    return Wanted(data, True, settings.eval_limit, settings.max_length)


def heldout(request: Wanted, described: Description, samples: int, say: Callable[[str], None]) -> HeldOut:
    """Reads and encodes the records.

    Raises:
        DataError: the data cannot be read or recognised, or have nothing to measure.
    """
    from lorafit.training.data import load_data, load_examples, load_labelled_data
    from lorafit.training.examples import Labelled
    from lorafit.training.models import Located, load_tokenizer
    from lorafit.training.valued import load_value_data

    tokenizer = load_tokenizer(Located(described.tokenizer_path, described.located.name))
    loaded = load_examples(request.data)
    what = "classifier" if described.classifies else "regression"
    labelled = isinstance(loaded.train[0], Labelled)
    if described.headed != labelled:
        raise DataError(
            "the data are not of the adapter's kind",
            where=loaded.train[0].where,
            found=f"{loaded.form.name} form",
            expected=f"texts with labels: the adapter is a {what}" if described.headed else "texts or conversations",
            fix="--data names others; --columns says which columns they are",
        )
    made: Any
    if described.scale is not None:
        made = load_value_data(tokenizer, max_length=request.max_length, loaded=loaded, scale=described.scale)
    elif described.classifies:
        made = load_labelled_data(
            request.data, tokenizer, max_length=request.max_length, labels=described.labels, loaded=loaded
        )
    else:
        made = load_data(request.data, tokenizer, max_length=request.max_length, samples=samples, loaded=loaded)
    for sentence in made.announcements:
        say(sentence)
    records = made.eval if request.split_off else made.train
    if request.limit is not None and request.limit < len(records):
        records = [records[place * len(records) // request.limit] for place in range(request.limit)]
        say(f"{len(records):,} of them, evenly chosen")
    return HeldOut(list(records), [] if described.headed else list(made.samples), made.info)
