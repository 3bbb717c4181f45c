"""`lorafit check`: what training would see of the data. No model weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.training.config import Settings
    from lorafit.training.data import Data, LabelledData
    from lorafit.training.examples import Example

BINS = 8
WIDTH = 40


def check(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA", help="A file, a directory or a hub name. Default: the embedded data.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|NAME",
            help="Whose tokenizer and chat template are used. Default: the embedded SmolLM2-135M-Instruct.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    data_split: options.DataSplit = None,
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    columns: options.Columns = None,
    task: options.Task = None,
    max_length: options.MaxLength = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Records to render.", rich_help_panel=options.ANSWERS)
    ] = 3,
    seed: options.Seed = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Look at data as training would see them.

    Says how they are read, renders some records with the learnt text marked, and counts lengths, repetitions, leaks
    between training and evaluation, and what would be cut or dropped. Takes the same settings as train.
    """
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved

    screen = Screen(as_json)
    flags = {
        "data": data,
        "model": model,
        "data_split": data_split,
        "eval_data": eval_data,
        "eval_split": eval_split,
        "columns": columns,
        "task": task,
        "max_length": max_length,
        "seed": seed,
    }
    _look(resolved(gather(config=config, sets=set_ or (), flags=flags), screen.say), samples, screen)


def _look(settings: Settings, samples: int, screen: Screen) -> None:
    from lorafit.cli.quiet import quiet
    from lorafit.training.data import load_examples
    from lorafit.training.models import load_tokenizer, locate
    from lorafit.training.prepare import data_settings, encode

    quiet()
    tokenizer = load_tokenizer(locate(settings.model, screen.say))
    read = load_examples(data_settings(settings))
    made = encode(settings, tokenizer, read)
    for sentence in made.announcements:
        screen.say(sentence)
    rendered = _render(made, tokenizer, samples, screen)
    bins = histogram([len(one) for one in made.train])
    _draw(bins, screen)
    twice = repetitions(read.train)
    _say_counts(made.info, twice, screen)
    screen.say(_verdict(made))
    screen.result({"ok": True, **made.info, "repeated_at": twice[:5], "lengths": bins, "samples": rendered})


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


def _render(made: Data | LabelledData, tokenizer: Any, count: int, screen: Screen) -> list[dict[str, Any]]:
    """Shows some records as the model gets them, what is learnt in green, or in [[brackets]] without a terminal."""
    from lorafit.training.data import LabelledData
    from lorafit.training.sequences import decode, rendering

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


def _say_counts(info: dict[str, Any], twice: Sequence[str], screen: Screen) -> None:
    from lorafit.errors import some

    learnt, total = info["train_supervised_tokens"], info["train_tokens"]
    screen.say()
    if "labels" in info:
        screen.say(f"trained on: {learnt:,} labels of {total:,} tokens of text")
    else:
        screen.say(f"trained on: {learnt:,} of {total:,} tokens ({learnt / total:.1%})")
    held = info["eval_records"]
    screen.say(f"held out:   {f'{held:,} records' if held else 'nothing'}")
    screen.say(f"repeated:   {len(twice):,} ask what an earlier record asks{_at(some(twice, 3))}")
    if held:
        screen.say(f"leaks:      {info['removed']:,} of the training questions are held out too; train leaves them out")
    screen.say(f"cut:        {info['truncated']:,} to max_length={info['max_length']}")
    screen.say(f"dropped:    {info['dropped']:,}")


def _at(places: str) -> str:
    return f" ({places})" if places else ""


def _verdict(made: Data | LabelledData) -> str:
    info = made.info
    missed = info["dropped"] + info["truncated"]
    left = f"; {missed:,} are cut or dropped: raise --max-length to {info['longest_uncut']}" if missed else ""
    return f"ok: {len(made.train):,} records to learn from{left}"
