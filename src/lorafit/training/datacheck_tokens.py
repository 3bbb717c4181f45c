"""A check of what a tokenizer makes of the records: what is learnt, cut or lost, and whether the template fits."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorafit.errors import DataError
from lorafit.training.config import Settings
from lorafit.training.data import Examples
from lorafit.training.datacheck_findings import Findings, Level
from lorafit.training.datacheck_texts import columns_of
from lorafit.training.encode import Encoder, NoticedWarning
from lorafit.training.examples import Conversation, Document, Example, Labelled
from lorafit.training.layouts import Layout, layout_of
from lorafit.training.prepare import encode
from lorafit.training.valued import AnyData

_TRIED = 200  # conversations whose rendering is compared with their turns
_MEASURED = 1_000  # cut records whose loss is measured
_OUTLIER, _LONG = 10, 256  # times the median, and tokens, from which on a record is an outlier
_UNKNOWN = 0.01  # share of unknown tokens from which on the tokenizer does not fit

_NOTICED = {
    "unstopped": (Level.ERROR, "take a model whose chat template ends a turn with a token, or mend the template"),
    "rewritten": (Level.WARNING, "look at the rendered records; mend the template or the answers"),
    "special": (Level.WARNING, "remove it from the text, unless it is meant"),
    "header": (Level.WARNING, "mend the template: it ignores add_generation_prompt"),
}


def encode_and_note(
    settings: Settings, tokenizer: Any, loaded: Examples, findings: Findings
) -> tuple[Examples, AnyData]:
    """What training would see, and the records that it is made of: those that the template refuses are noted.

    Raises:
        DataError: nothing can be learnt from what is left.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = encode(settings, tokenizer, loaded)
        except DataError:
            taken = _taken(loaded, tokenizer, findings)
            if taken is None:
                raise
            loaded, made = taken, encode(settings, tokenizer, taken)
    for one in caught:
        if not isinstance(one.message, NoticedWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            continue
        level, fix = _NOTICED[one.message.name]
        text, field = _sentence(one.message.text), _field(loaded, one.message.name)
        findings.all(level, one.message.name, text, one.message.places, field=field, fix=fix)
    return loaded, made


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].partition(': remove')[0].partition(': check')[0]}."


def _field(loaded: Examples, name: str) -> str:
    if name in ("unstopped", "header"):
        return "chat_template"
    return columns_of(loaded.form, *(("output", "completion") if name == "rewritten" else _TEXTS))


_TEXTS = ("system", "instruction", "input", "prompt", "text", "pair", "output", "completion")


def _taken(loaded: Examples, tokenizer: Any, findings: Findings) -> Examples | None:
    """What the chat template has a place for, the rest noted; None if it refuses nothing, or all."""
    layout = layout_of(tokenizer)
    before = len(loaded.train) + len(loaded.eval)
    kept = [[one for one in part if _fits(one, layout, loaded, findings)] for part in (loaded.train, loaded.eval)]
    if len(kept[0]) + len(kept[1]) == before or not kept[0] or (loaded.eval and not kept[1]):
        return None
    return replace(loaded, train=kept[0], eval=kept[1])


def _fits(example: Example, layout: Layout, loaded: Examples, findings: Findings) -> bool:
    if not isinstance(example, Conversation):
        return True
    try:
        layout.render([example.turns[:-1]], [example.where], ask=True)
        layout.render([example.turns], [example.where], ask=False)
    except DataError as error:
        findings.raised(error, "template", columns_of(loaded.form, *_TEXTS))
        return False
    return True


def check_tokens(
    settings: Settings,
    tokenizer: Any,
    loaded: Examples,
    made: AnyData,
    findings: Findings,
    positions: int | None,
) -> None:
    """Notes what is lost, odd lengths, and where the tokenizer or its template does not fit."""
    examples = [*loaded.train, *loaded.eval]
    _lost(settings, tokenizer, loaded, made, findings, positions)
    _outliers(made, loaded, findings)
    _unknown(tokenizer, made, loaded, findings)
    _specials(tokenizer, examples, loaded, findings)
    conversations = [example for example in examples if isinstance(example, Conversation)]
    if conversations:
        _rendered(conversations, layout_of(tokenizer), loaded, findings)
    elif isinstance(examples[0], Document) and tokenizer.eos_token is None:
        findings.add(
            Level.WARNING,
            "unstopped",
            "The tokenizer has no end-of-sequence token: the model will not learn where a text ends.",
            examples[0].where,
            field="eos_token",
            fix="set tokenizer.eos_token, or take a model that has one",
            count=len(examples),
        )


def _lost(
    settings: Settings,
    tokenizer: Any,
    loaded: Examples,
    made: AnyData,
    findings: Findings,
    positions: int | None,
) -> None:
    """Records of which max_length takes the end, or everything that would be learnt."""
    items = [*made.train, *made.eval]
    kept, cut = {one.where for one in items}, {one.where for one in items if one.truncated}
    examples = [*loaded.train, *loaded.eval]
    gone = [example for example in examples if example.where not in kept]
    short = [example for example in examples if example.where in cut]
    longest = made.info["longest_uncut"]
    if positions is not None and longest > positions:
        enough = f"split it: it has up to {longest:,} tokens, and the model {positions:,} positions"
    else:
        enough = f"--max-length {longest} takes all of it"
    answers = columns_of(loaded.form, "output", "completion") or columns_of(loaded.form, "text")
    findings.all(
        Level.ERROR,
        "untrained",
        f"No learnt token is left within max_length={settings.max_length}: the answer is cut away entirely.",
        [example.where for example in gone],
        field=answers,
        found=_loss(tokenizer, gone, settings) if gone else "",
        fix=f"{enough}; or shorten the prompts",
    )
    findings.all(
        Level.WARNING,
        "truncated",
        f"The record is longer than max_length={settings.max_length}: its end is cut away.",
        [example.where for example in short],
        field=answers,
        found=_loss(tokenizer, short, settings) if short else "",
        fix=enough,
    )


def _loss(tokenizer: Any, examples: Sequence[Example], settings: Settings) -> str:
    """How many tokens are lost of these records; of more than `_MEASURED`, of the first so many."""
    if isinstance(examples[0], Labelled):
        return ""
    measured = examples[:_MEASURED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoticedWarning)
        items = (
            Encoder(tokenizer, sum(len(str(example)) * 8 for example in measured) + 1_000).encode_all(measured).items
        )
    learnt = sum(one.supervised for one in items)
    left = sum(replace(one, labels=one.labels[: settings.max_length]).supervised for one in items)
    part = f" (of the first {len(measured):,})" if len(measured) < len(examples) else ""
    return f"{learnt - left:,} of {learnt:,} learnt tokens are lost{part}"


def _outliers(made: AnyData, loaded: Examples, findings: Findings) -> None:
    lengths = [len(one) for one in made.train]
    bound = max(_LONG, _OUTLIER * statistics.median(lengths))
    longest = max(lengths)
    findings.all(
        Level.NOTE,
        "outlier",
        f"The record is far longer than the others: more than {bound:,.0f} tokens, where half have "
        f"{statistics.median(lengths):,.0f} at most; it decides how much memory the run takes.",
        [one.where for one in made.train if len(one) > bound],
        field=columns_of(loaded.form, *_TEXTS),
        found=f"{longest:,} tokens, the longest",
        fix="split it, or lower max_length",
    )


def _unknown(tokenizer: Any, made: AnyData, loaded: Examples, findings: Findings) -> None:
    """Tokens that the vocabulary does not have. Some tokenizers call the end of a text unknown: that says nothing."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return
    counts = [(one.where, one.input_ids.count(unknown)) for one in made.train]
    total, met = made.info["train_tokens"], sum(count for _, count in counts)
    if met > _UNKNOWN * total:
        findings.all(
            Level.WARNING,
            "unknown-tokens",
            f"The tokenizer does not know what is written: {met:,} of {total:,} tokens are {tokenizer.unk_token}.",
            [where for where, count in counts if count],
            field=columns_of(loaded.form, *_TEXTS),
            fix="take a model that knows this language or alphabet, or mend the text's encoding",
        )


def _specials(tokenizer: Any, examples: Sequence[Example], loaded: Examples, findings: Findings) -> None:
    """Spellings of special tokens in documents and labelled texts; the encoder tells of those in conversations."""
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    if not special or isinstance(examples[0], Conversation):
        return
    spelt = re.compile("|".join(map(re.escape, special)))
    for example in examples:
        text = example.text if isinstance(example, Document | Labelled) else ""
        pair = example.pair if isinstance(example, Labelled) else None
        matched = spelt.search(text) or spelt.search(pair or "")
        if matched is not None:
            findings.add(
                Level.WARNING,
                "special",
                "The text holds the spelling of a special token, and is read as that token.",
                example.where,
                field=columns_of(loaded.form, "text", "pair"),
                found=matched[0],
                fix=_NOTICED["special"][1],
            )


def _rendered(examples: Sequence[Conversation], layout: Layout, loaded: Examples, findings: Findings) -> None:
    """Turns that the layout leaves out without a word, among some conversations."""
    step = max(1, len(examples) // _TRIED)
    for example in examples[::step]:
        text = layout.render([example.turns], [example.where], ask=False)[0]
        for turn in example.turns:
            if turn.role != "assistant" and turn.content.strip() not in text:
                findings.add(
                    Level.ERROR,
                    "left-out",
                    f"The chat template leaves out what a {turn.role} turn says, without a word.",
                    example.where,
                    field=columns_of(loaded.form, "system" if turn.role == "system" else "prompt"),
                    found=repr(turn.content.strip()[:40]),
                    fix="write it into the user's turn, mend the template, or take another model",
                )
