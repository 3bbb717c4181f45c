"""What `lorafit check` does: looks at data and settings as a run would see them, without weights.

    inspect
    ├── datacheck_settings   settings against each other, and against the model's config
    ├── datacheck_records    records as they were read: what no form takes, damaged characters
    ├── datacheck_texts      what they mean: repetitions, leaks (leakage), labels, turns
    └── datacheck_tokens     what the tokenizer makes of them: what is learnt, cut, lost

What a run would end with at its first sight is raised; all else is gathered in `Findings`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lorafit.errors import LorafitError
from lorafit.training.config import Settings
from lorafit.training.data import Examples, load_examples
from lorafit.training.datacheck_findings import Findings
from lorafit.training.datacheck_records import Sieve
from lorafit.training.datacheck_settings import Given, check_adapter, check_positions, check_together, room_of
from lorafit.training.datacheck_texts import check_near, check_texts
from lorafit.training.datacheck_tokens import check_tokens, encode_and_note
from lorafit.training.leakage import can_compare_nearly, near
from lorafit.training.models import load_tokenizer, locate
from lorafit.training.prepare import data_settings, training_arguments
from lorafit.training.trainer import records_in_all
from lorafit.training.valued import AnyData
from lorafit.training.watching import EMBEDDED, NONE, gather

NO_NEAR = "near repetitions and near leaks are not looked for: pip install 'lorafit[check]'"


@final
@dataclass
class Clock:
    """Seconds of each part of a check, in their order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def over(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())


@final
@dataclass(frozen=True)
class Inspected:
    """What a check saw.

    Attributes:
        read: the records that can be read, understood.
        made: the same, as training takes them.
        tokenizer: of the model.
        near: what there is to say of the near comparison: how many records, or that it was not made.
        compared: how many training records were compared nearly; None where that was not possible.
        clock: what took how long.
        told: of a general text of the user's and of the target.
    """

    read: Examples
    made: AnyData
    tokenizer: Any
    near: str
    compared: int | None
    clock: Clock
    told: tuple[str, ...] = ()


def inspect(settings: Settings, given: Given, findings: Findings, notify: Callable[[str], object]) -> Inspected:
    """Looks at everything; no weights are loaded.

    Args:
        settings: of the run.
        given: which of them the user gave, and where.
        findings: gathers what is found, also if an error is raised in the end.
        notify: is told what takes a while.

    Raises:
        LorafitError: the data cannot be read or learnt from at all, or there is no such model.
    """
    clock = Clock()
    check_together(settings, given, findings)
    with clock.over("reading"):
        read = load_examples(data_settings(settings), Sieve(findings))
    with clock.over("repetitions"):
        check_texts(read, findings, apart=settings.eval_data is not None, task=settings.task)
    with clock.over("tokenizer"):
        located = locate(settings.model, notify)
        tokenizer = load_tokenizer(located)
        room = room_of(located)
    with clock.over("tokens"):
        read, made = encode_and_note(settings, tokenizer, read, findings)
        check_tokens(settings, tokenizer, read, made, findings, room.positions)
    with clock.over("model"):
        check_positions(settings, given, room, made, findings)
        check_adapter(settings, given, located, made, tokenizer.pad_token_id, findings)
    told = _watched(settings, tokenizer, read, made, findings)
    said, compared = NO_NEAR, None
    if can_compare_nearly():
        with clock.over("near repetitions"):
            found = near(read.train, read.eval)
            check_near(read, found, findings)
        compared = found.compared
        said = f"{compared:,} of {len(read.train):,} training records compared by MinHash"
    return Inspected(read, made, tokenizer, said, compared, clock, told)


def _watched(settings: Settings, tokenizer: Any, read: Examples, made: AnyData, findings: Findings) -> tuple[str, ...]:
    """What is said of the files that a run measures beside its data; what is wrong with them is noted."""
    if settings.target is None and settings.general in (EMBEDDED, NONE):
        return ()
    arguments = training_arguments(settings, Path("unused"))
    try:
        return gather(settings, tokenizer, read, made, records_in_all(arguments, len(made.train))).told
    except LorafitError as error:
        findings.raised(error, "watched")
        return ()
