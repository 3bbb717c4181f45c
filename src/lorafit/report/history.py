"""From the lines of a records file to the run they tell: which of several records of one step stands."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

from lorafit.errors import DataError, some
from lorafit.report.lines import Line, read_lines
from lorafit.report.pictures import Sheet
from lorafit.report.records import (
    ENDS,
    Anatomy,
    Drop,
    End,
    Evaluation,
    Pair,
    Process,
    Run,
    Sample,
    Saved,
    Schedule,
    Step,
    Verdict,
)
from lorafit.report.watched import Forgetting, Shift, Slices

_Stepped = TypeVar("_Stepped", Step, Evaluation, Saved, Schedule, Anatomy, Sheet)

_COMMON: Final = frozenset({"event", "time", "elapsed", "nonfinite", "repaired"})
_FREE: Final = frozenset({"environment", "data", "held_out", "watched"})
_READ: Final[Mapping[str, frozenset[str]]] = {
    "run": frozenset({"run", "command", "resumed_from_step"}),
    "config": frozenset({"config", "resolved"}),
    **{
        kind.event: frozenset(part.name for part in fields(kind))
        for kind in (
            *(Step, Evaluation, Sample, Saved, Drop, Schedule, Anatomy, Verdict, End),
            *(Forgetting, Slices, Shift, Sheet),
        )
    },
    Evaluation.event: frozenset({*(part.name for part in fields(Evaluation)), *ENDS}),
}
"""The keys that are read of each event; all keys of the events in `_FREE` are."""


def read_records(path: Path | str) -> Run:
    """Read and check the records of a run.

    A file may hold several processes: the first and those that resumed it. Of several records of one step the
    last one stands, and what an earlier process recorded beyond the step that a later one resumed from falls
    away once the later one has trained. A process that started afresh makes the earlier ones another run,
    which is left out. Whatever is left out is told in `Run.remarks`.

    Args:
        path: a `records.jsonl`.

    Returns:
        The run.

    Raises:
        DataError: the file cannot be read, is empty, or is damaged; the message names file and line.
    """
    path = Path(path)
    lines, remarks = read_lines(path)
    parts = [_part(rows) for rows in _split(lines)]
    fresh = max((at for at, part in enumerate(parts) if part.process.resumed_from_step == 0), default=0)
    if fresh:
        remarks.append(
            f"The file begins with {_several(fresh, 'process', 'processes')} of an earlier run in the same "
            "folder, which this report leaves out."
        )
    parts = parts[fresh:]
    steps, again = _standing([part.steps for part in parts], parts, key=lambda one: one.step)
    if again:
        remarks.append(
            f"{_several(again, 'logged step', 'logged steps')} of an earlier process came after the "
            "checkpoint that a later one resumed from; the curves show what the later process made of them."
        )
    evaluations, _ = _standing([part.evaluations for part in parts], parts, key=lambda one: one.step)
    schedules, _ = _standing([part.schedules for part in parts], parts, key=lambda one: one.step)
    anatomies, _ = _standing([part.anatomies for part in parts], parts, key=lambda one: one.step)
    saved, _ = _standing([part.saved for part in parts], parts, key=lambda one: (one.step, one.path))
    sheets, _ = _standing([part.sheets for part in parts], parts, key=lambda one: one.step)
    return Run(
        path=path,
        processes=tuple(part.process for part in parts),
        config=_last([part.config for part in parts]),
        resolved=_last([part.resolved for part in parts]),
        environment=_last([part.environment for part in parts]),
        data=_last([part.data for part in parts]),
        steps=steps,
        evaluations=evaluations,
        pairs=_pairs([sample for part in parts for sample in part.samples]),
        saved=saved,
        remarks=(*remarks, *_changes(parts), *_unread(lines)),
        drop=next((part.drop for part in reversed(parts) if part.drop is not None), None),
        schedules=schedules,
        anatomies=anatomies,
        verdict=parts[-1].verdict,
        forgetting=parts[-1].forgetting,
        slices=parts[-1].slices,
        shift=parts[-1].shift,
        sheets=sheets,
    )


@dataclass(frozen=True)
class _Part:
    """What one process recorded."""

    process: Process
    config: Mapping[str, Any]
    resolved: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    samples: tuple[Sample, ...]
    saved: tuple[Saved, ...]
    drop: Drop | None
    schedules: tuple[Schedule, ...]
    anatomies: tuple[Anatomy, ...]
    verdict: Verdict | None
    forgetting: Forgetting | None
    slices: Slices | None
    shift: Shift | None
    sheets: tuple[Sheet, ...]

    @property
    def trained(self) -> bool:
        """Whether the process came as far as to log a step."""
        return bool(self.steps)


def _split(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each process; a `run` record begins one."""
    first = lines[0]
    if first.fields["event"] != Process.event:
        raise DataError(
            "the records do not begin with that of a run",
            where=first.where,
            found=f"the event {first.fields['event']!r}",
            expected=f"the event {Process.event!r}",
            fix="give the whole records.jsonl of a run",
        )
    processes: list[list[Line]] = []
    for line in lines:
        if line.fields["event"] == Process.event:
            processes.append([])
        processes[-1].append(line)
    return processes


def _part(lines: Sequence[Line]) -> _Part:
    by: defaultdict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by[line.fields["event"]].append(line)
        line.moment("time")  # checked in every record
    steps = tuple(Step.read(line) for line in by[Step.event])
    ends = [End.read(line) for line in by[End.event]]
    return _Part(
        process=_process(lines, steps, ends[-1] if ends else None),
        config=_last([line.mapping("config") for line in by["config"]]),
        resolved=_last([line.mapping("resolved") for line in by["config"]]),
        environment=_last([_own(line) for line in by["environment"]]),
        data=_last([_own(line) for line in by["data"]]),
        steps=steps,
        evaluations=tuple(Evaluation.read(line) for line in by[Evaluation.event]),
        samples=tuple(Sample.read(line) for line in by[Sample.event]),
        saved=tuple(Saved.read(line) for line in by[Saved.event]),
        drop=next((Drop.read(line) for line in reversed(by[Drop.event])), None),
        schedules=tuple(Schedule.read(line) for line in by[Schedule.event]),
        anatomies=tuple(Anatomy.read(line) for line in by[Anatomy.event]),
        verdict=next((Verdict.read(line) for line in reversed(by[Verdict.event])), None),
        forgetting=next((Forgetting.read(line) for line in reversed(by[Forgetting.event])), None),
        slices=next((Slices.read(line) for line in reversed(by[Slices.event])), None),
        shift=next((Shift.read(line) for line in reversed(by[Shift.event])), None),
        sheets=tuple(Sheet.read(line) for line in by[Sheet.event]),
    )


def _process(lines: Sequence[Line], steps: Sequence[Step], end: End | None) -> Process:
    run = lines[0]
    elapsed = [seconds for line in lines if (seconds := line.number("elapsed")) is not None]
    told = None if end is None else end.seconds
    return Process(
        run=run.text("run"),
        command=run.text("command"),
        resumed_from_step=run.count("resumed_from_step") or 0,
        began=run.moment("time"),
        seconds=max(elapsed, default=None) if told is None else told,
        last_step=steps[-1].step if steps else None,
        end=end,
    )


def _own(line: Line) -> Mapping[str, Any]:
    return {key: value for key, value in line.fields.items() if key not in _COMMON}


def _last(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((one for one in reversed(found) if one), {})


def _standing(
    found: Sequence[Sequence[_Stepped]], parts: Sequence[_Part], key: Callable[[_Stepped], Hashable]
) -> tuple[tuple[_Stepped, ...], int]:
    """The records that stand, by step, and how many of earlier processes do not."""
    kept: dict[Hashable, _Stepped] = {}
    lost = 0
    for records, part in zip(found, parts, strict=True):
        if part.trained:
            stale = [at for at, one in kept.items() if one.step > part.process.resumed_from_step]
            lost += len(stale)
            for at in stale:
                del kept[at]
        kept.update((key(one), one) for one in records)
    return tuple(sorted(kept.values(), key=lambda one: one.step)), lost


def _pairs(samples: Iterable[Sample]) -> tuple[Pair, ...]:
    """The samples of each prompt side by side; of several of one phase the last one."""
    phases: defaultdict[tuple[int, str], dict[str, Sample]] = defaultdict(dict)
    for sample in samples:
        phases[sample.index, sample.prompt][sample.phase] = sample
    pairs = []
    for (index, prompt), found in phases.items():
        before, after = found.get("before"), found.get("after")
        golds = [one.gold for one in (after, before) if one is not None and one.gold is not None]
        pairs.append(
            Pair(
                index=index,
                prompt=prompt,
                gold=golds[0] if golds else None,
                before=None if before is None else before.output,
                after=None if after is None else after.output,
            )
        )
    return tuple(sorted(pairs, key=lambda pair: pair.index))


def _changes(parts: Sequence[_Part]) -> list[str]:
    """Remarks on settings and surroundings that were others after a resume."""
    remarks = []
    for what, of in (("settings", _settings), ("environment", _environment)):
        changed = {
            name
            for old, new in pairwise([of(part) for part in parts if of(part)])
            for name in old.keys() | new.keys()
            if old.get(name) != new.get(name)
        }
        if changed:
            remarks.append(
                f"The {what} changed when the run was resumed: {some(sorted(changed), 8)}. The report shows the last."
            )
    return remarks


def _settings(part: _Part) -> Mapping[str, Any]:
    return part.config


def _environment(part: _Part) -> Mapping[str, Any]:
    return part.environment


def _unread(lines: Iterable[Line]) -> list[str]:
    """Remarks on events and keys that this report does not know."""
    events: Counter[str] = Counter()
    keys: set[str] = set()
    for line in lines:
        event = line.fields["event"]
        if event in _READ:
            keys.update(f"{event}.{key}" for key in line.fields.keys() - _READ[event] - _COMMON)
        elif event not in _FREE:
            events[event] += 1
    remarks = []
    if events:
        told = some([f"{name} ({count})" for name, count in events.items()])
        remarks.append(f"Records of kinds that this report does not know are not shown: {told}.")
    if keys:
        remarks.append(f"Keys that this report does not know are not shown: {some(sorted(keys), 8)}.")
    return remarks


def _several(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
