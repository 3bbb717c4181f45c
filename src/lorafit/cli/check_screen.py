"""What `lorafit check` shows: rendered records, lengths, counts, findings, and what to fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lorafit.errors import some

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.training.datacheck import Inspected
    from lorafit.training.datacheck_findings import Finding, Findings
    from lorafit.training.examples import Example
    from lorafit.training.valued import AnyData

BINS = 8
WIDTH = 40
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def say_data(seen: Inspected, samples: int, screen: Screen) -> tuple[list[dict[str, Any]], list[tuple[int, int, int]]]:
    """Shows what training would see; gives the rendered records and the histogram, for programs."""
    for sentence in (*seen.made.announcements, *seen.told):
        screen.say(sentence)
    rendered = _render(seen.made, seen.tokenizer, samples, screen)
    bins = histogram([len(one) for one in seen.made.train])
    _draw(bins, screen)
    _say_counts(seen, repetitions(seen.read.train), screen)
    return rendered, bins


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, last, how many) of up to `BINS` ranges of equal width.

    >>> histogram([1, 2, 2, 9])
    [(1, 2, 3), (3, 4, 0), (5, 6, 0), (7, 8, 0), (9, 10, 1)]
    """
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BINS)
    starts = range(low, high + 1, width)
    counts = [0] * len(starts)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(start, start + width - 1, count) for start, count in zip(starts, counts, strict=True)]


def repetitions(examples: Sequence[Example]) -> list[str]:
    """Where questions are that an earlier record has asked."""
    seen = set()
    places = []
    for example in examples:
        question = example.question()
        if question in seen:
            places.append(example.where)
        seen.add(question)
    return places


def _render(made: AnyData, tokenizer: Any, count: int, screen: Screen) -> list[dict[str, Any]]:
    """Shows some records as the model gets them, what is learnt in green, or in [[brackets]] without a terminal."""
    from lorafit.training.data import LabelledData
    from lorafit.training.sequences import decode, rendering
    from lorafit.training.valued import ValueData

    count = min(count, len(made.train))
    if count:
        mark = "in green" if screen.fancy else "in [[brackets]]"
        screen.say(f"\n{count} of {len(made.train):,} records, what is learnt {mark}:")
    shown = []
    for place in range(count):
        at = place * len(made.train) // count
        where = made.train[at].where
        if isinstance(made, LabelledData):
            labelled = made.train[at]
            pieces = [(decode(tokenizer, labelled.input_ids), False), (f" → {made.labels[labelled.label]}", True)]
        elif isinstance(made, ValueData):
            pieces = [(decode(tokenizer, made.train[at].input_ids), False), (f" → {made.train[at].value:g}", True)]
        else:
            pieces = [(piece.text, piece.supervised) for piece in rendering(made.train[at], tokenizer)]
        screen.say(where, style="dim")
        screen.say(_marked(pieces, screen.fancy))
        shown.append({"where": where, "pieces": [{"text": text, "learnt": learnt} for text, learnt in pieces]})
    return shown


def _marked(pieces: Sequence[tuple[str, bool]], fancy: bool) -> Text:
    text = Text()
    for piece, learnt in pieces:
        if fancy:
            text.append(piece, "bold green" if learnt else "")
        else:
            text.append(f"[[{piece}]]" if learnt else piece)
    return text


def _draw(bins: Sequence[tuple[int, int, int]], screen: Screen) -> None:
    screen.say("\ntokens of a record:")
    most = max(count for _, _, count in bins)
    ranges = [str(start) if start == end else f"{start}-{end}" for start, end, _ in bins]
    widest = max(map(len, ranges))
    for name, (_, _, count) in zip(ranges, bins, strict=True):
        bar = ("█" if screen.fancy else "#") * -(-count * WIDTH // most)
        screen.say(f"  {name:>{widest}}  {count:>7,}  {bar}".rstrip())


def _say_counts(seen: Inspected, twice: Sequence[str], screen: Screen) -> None:
    info = seen.made.info
    learnt, total = info["train_supervised_tokens"], info["train_tokens"]
    screen.say()
    if "labels" in info or "label_mean" in info:
        screen.say(f"trained on: {learnt:,} labels of {total:,} tokens of text")
    else:
        screen.say(f"trained on: {learnt:,} of {total:,} tokens ({learnt / total:.1%})")
    held = info["eval_records"]
    screen.say(f"held out:   {f'{held:,} records' if held else 'nothing'}")
    screen.say(f"repeated:   {len(twice):,} ask what an earlier record asks{_at(some(twice, 3))}")
    if held:
        screen.say(f"leaks:      {info['removed']:,} of the training questions are held out too; train leaves them out")
    screen.say(f"nearly:     {seen.near}")
    screen.say(f"cut:        {info['truncated']:,} to max_length={info['max_length']}")
    screen.say(f"dropped:    {info['dropped']:,}")


def _at(places: str) -> str:
    return f" ({places})" if places else ""


# Findings ---------------------------------------------------------------------


def say_findings(findings: Findings, screen: Screen) -> None:
    """Every finding: level, how many, what, field, places, fix."""
    listed = findings.listed()
    if not listed:
        return
    levels = [finding.level.value for finding in listed]
    counted = [f"{levels.count(name)} {name}{'s' * (levels.count(name) != 1)}" for name in STYLES if name in levels]
    screen.say(f"\nfindings: {', '.join(counted)}")
    for finding in listed:
        name = finding.level.value
        line = Text.assemble(
            (f"{name:<7}", STYLES[name] if screen.fancy else ""), f"  {finding.count:,} × {finding.text}"
        )
        screen.say(line)
        if finding.at:
            screen.say(f"         where:  {_places(finding)}", whole=True)
        if finding.field:
            screen.say(f"         field:  {finding.field}")
        if finding.found:
            screen.say(f"         found:  {finding.found}")
        screen.say(f"         fix:    {finding.fix}", whole=True)


def _places(finding: Finding) -> str:
    left = finding.count - len(finding.at)
    return ", ".join(finding.at) + (f" and {left:,} more" if left > 0 else "")


def verdict(seen: Inspected, findings: Findings) -> str:
    """The last lines: what to fix, or that nothing has to be."""
    if findings.errors:
        rows = [
            f"  {number}. {finding.fix} ({_short(finding)})" for number, finding in enumerate(findings.errors, start=1)
        ]
        return "\n".join(["what to fix:", *rows])
    info = seen.made.info
    missed = info["dropped"] + info["truncated"]
    left = f"; {missed:,} are cut or dropped: raise --max-length to {info['longest_uncut']}" if missed else ""
    return f"ok: {len(seen.made.train):,} records to learn from{left}"


def _short(finding: Finding) -> str:
    parts = [f"{finding.count:,} × {finding.name}"]
    parts += [finding.field] if finding.field else []
    parts += [finding.at[0]] if finding.at else []
    return ", ".join(parts)
