"""Examples to token ids, and which of them are learnt.

The learnt tokens of an answer are exactly those that the model has to write at inference: everything after the
prompt that `apply_chat_template(..., add_generation_prompt=True)` makes, up to and including the token that ends
the turn. That the prompt's tokens are the first tokens of the whole is checked for every answer; where it does
not hold, the sequence is mended so that it does, or refused.

Truncation cuts the right end. A record that has no learnt token left is dropped. Both are counted and named.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, final

from lorafit.errors import DataError, LorafitWarning, some
from lorafit.training.examples import Conversation, Document, Example, Turn
from lorafit.training.layouts import Layout, head_of, layout_of
from lorafit.training.sequences import (
    IGNORED,
    Encoded,
    Encodings,
    Piece,
    Sample,
    check_max_length,
    decode,
    rendering,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "Encoder", "Encodings", "NoticedWarning", "Piece", "Sample", "rendering"]

_CHUNK = 1000  # examples tokenized in one call: enough to be fast, few enough to stay small


class _Rendered(NamedTuple):
    """One answer as text: `full` is `prompt` and what the model has to write after it."""

    example: int
    where: str
    prompt: str
    full: str
    turns: tuple[Turn, ...]
    head: tuple[int, ...]

    @property
    def written(self) -> str:
        """What the model has to write."""
        return self.full[len(self.prompt) :]


class _Learnt(NamedTuple):
    """A sequence and its learnt spans, each (start, stop)."""

    ids: list[int]
    spans: list[tuple[int, int]]


@final
class NoticedWarning(LorafitWarning):
    """What was noticed while records were encoded, for people (its text) and for a check (its attributes).

    Args:
        name: which of the things that are noticed it is.
        text: what it is.
        places: where the records were read.
    """

    def __init__(self, name: str, text: str, places: Sequence[str]) -> None:
        self.name = name
        self.text = text
        self.places = tuple(places)
        super().__init__(f"{len(places):,} record{'s' * (len(places) != 1)} ({some(places, 3)}): {text}")


@dataclass
class _Noticed:
    """Places of what does not stop the encoding and still must be said."""

    unstopped: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    header_checked: bool = False  # once is enough: it is the template's doing, not the record's

    def warn(self) -> None:
        for name, places, text in (
            (
                "unstopped",
                self.unstopped,
                "the chat template puts no special token after the answer: the model will not learn to stop",
            ),
            (
                "rewritten",
                self.rewritten,
                "the chat template does not write the answer as it stands in the data: check the rendering",
            ),
            (
                "special",
                self.special,
                "the text holds the spelling of a special token, and is read as that token: remove it, if it "
                "is not meant",
            ),
            (
                "header",
                self.header,
                "the chat template ignores add_generation_prompt: the header in front of an answer is learnt "
                "with it, as the model has to write it",
            ),
        ):
            if places:
                warnings.warn(NoticedWarning(name, text, places), stacklevel=4)


@final
class Encoder:
    """Encodes conversations and documents for a causal language model.

    A conversation is written by the tokenizer's chat template, or, if it has none, as prompt, newline,
    completion and end-of-sequence token; its answers are learnt, with the token that ends a turn, without the
    header in front of them. A document is followed by the end-of-sequence token, if there is one, and learnt as
    a whole. Tokens after the last learnt one are left off: in a causal model they change nothing.

    Args:
        tokenizer: a tokenizer of `transformers`.
        max_length: tokens of the longest sequence, at least 2.
        layout: how conversations are written; the tokenizer's own way if None.

    Raises:
        ConfigError: `max_length` is too small.
        DataError: the tokenizer has neither a chat template nor an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, layout: Layout | None = None) -> None:
        check_max_length(max_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.layout = layout_of(tokenizer) if layout is None else layout
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(sorted({*added, *tokenizer.all_special_tokens}))
        self._head = head_of(tokenizer)
        self._same: dict[int, int] = {}

    def encode(self, example: Example) -> Encoded:
        """The one sequence of `example`.

        Raises:
            DataError: as `encode_all`, and if the example becomes no sequence or several.
        """
        made = self.encode_all([example])
        if len(made.items) != 1:
            raise DataError(
                "The record does not become one sequence.",
                where=example.where,
                found=f"{len(made.items)} sequences, the longest of {made.longest} tokens",
                expected=f"one of at most max_length={self.max_length} tokens with some of the answer in it",
                fix="raise max_length" if made.dropped else "use encode_all, which gives one for each answer",
            )
        return made.items[0]

    def encode_all(self, examples: Sequence[Example]) -> Encodings:
        """The sequences of all examples.

        Raises:
            DataError: an example is for classification, the chat template refuses it, or what is learnt cannot
                be told apart exactly.
        """
        noticed = _Noticed()
        items: list[Encoded] = []
        truncated: list[str] = []
        dropped: list[str] = []
        unrolled = longest = 0
        for example, sequences in self._all(examples, noticed):
            unrolled += len(sequences) > 1
            for sequence in sequences:
                longest = max(longest, len(sequence.ids))
                encoded = self._finish(sequence, example.where)
                if encoded.supervised == 0:
                    dropped.append(encoded.where)
                    continue
                items.append(encoded)
                if encoded.truncated:
                    truncated.append(encoded.where)
        noticed.warn()
        return Encodings(items, tuple(truncated), tuple(dropped), unrolled, longest)

    def sample(self, example: Example) -> Sample:
        """`example` as a question: all turns before the last, or the first half of a document (64 tokens at most).

        Raises:
            DataError: as `encode_all`.
        """
        if isinstance(example, Conversation):
            text = self.layout.render([example.turns[:-1]], [example.where], ask=True)[0]
            ids = _with_head(self._ids([text])[0], self.layout.head)
            asked = [turn.content for turn in example.turns[:-1] if turn.role == "user"]
            return Sample(asked[-1], ids, example.turns[-1].content, example.where)
        if isinstance(example, Document):
            ids = self._ids([example.text])[0]
            cut = max(1, min(len(ids) // 2, 64))
            prompt = decode(self.tokenizer, ids[:cut])
            gold = decode(self.tokenizer, ids)[len(prompt) :]
            return Sample(prompt, _with_head(ids[:cut], self._head), gold, example.where)
        raise _not_causal(example)

    def _all(self, examples: Sequence[Example], noticed: _Noticed) -> Iterator[tuple[Example, list[_Learnt]]]:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            yield from zip(chunk, self._chunk(chunk, noticed), strict=True)

    def _chunk(self, chunk: Sequence[Example], noticed: _Noticed) -> list[list[_Learnt]]:
        """The sequences of each example of `chunk`: one, or one for each answer."""
        rendered = self._render(chunk)
        broken = {one.example for one in rendered if not one.full.startswith(one.prompt)}
        learnt: list[list[_Learnt]] = [[] for _ in chunk]
        for one in rendered:
            if one.example in broken and not learnt[one.example]:
                learnt[one.example].append(self._marked(chunk[one.example], one))
        rendered = [one for one in rendered if one.example not in broken]
        prompts = self._ids([one.prompt for one in rendered])
        fulls = self._ids([one.full for one in rendered])
        for one, prompt, full in zip(rendered, prompts, fulls, strict=True):
            learnt[one.example].append(self._joined(one, prompt, full))
        self._notice(chunk, rendered, noticed)
        return [_nested(sequences) for sequences in learnt]

    def _render(self, chunk: Sequence[Example]) -> list[_Rendered]:
        """Every answer of every example, as text."""
        rendered: list[_Rendered] = []
        asked: list[tuple[Turn, ...]] = []
        answered: list[tuple[Turn, ...]] = []
        owners: list[int] = []
        for index, example in enumerate(chunk):
            if isinstance(example, Conversation):
                for place, turn in enumerate(example.turns):
                    if turn.role == "assistant":
                        asked.append(example.turns[:place])
                        answered.append(example.turns[: place + 1])
                        owners.append(index)
            elif isinstance(example, Document):
                end = self.tokenizer.eos_token or ""
                full = example.text if example.text.endswith(end) else example.text + end
                rendered.append(_Rendered(index, example.where, "", full, (), self._head))
            else:
                raise _not_causal(example)
        wheres = [chunk[index].where for index in owners]
        prompts = self.layout.render(asked, wheres, ask=True)
        fulls = self.layout.render(answered, wheres, ask=False)
        for index, where, turns, prompt, full in zip(owners, wheres, answered, prompts, fulls, strict=True):
            rendered.append(_Rendered(index, where, prompt, self._trimmed(full), turns, self.layout.head))
        return rendered

    def _trimmed(self, full: str) -> str:
        """`full` without the white space after the token that ends the last turn: nobody writes that."""
        bare = full.rstrip()
        return bare if bare.endswith(self._special) else full

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _joined(self, one: _Rendered, prompt: list[int], full: list[int]) -> _Learnt:
        """The sequence of one answer, which begins with the very tokens that inference gives the model."""
        prompt = _with_head(prompt, one.head)
        full = _with_head(full, one.head)
        if full[: len(prompt)] != prompt:
            # A token reaches over the border, as a line break of the header and one of the answer do.
            mended = prompt + self._ids([one.written])[0]
            if decode(self.tokenizer, mended) != decode(self.tokenizer, full):
                raise DataError(
                    "The answer cannot be told apart from its prompt: a token holds parts of both.",
                    where=one.where,
                    found=f"{one.prompt[-20:]!r} + {one.written[:20]!r}",
                    expected="a border between tokens where the answer begins",
                    fix="take white space off the start of the answer and the end of the prompt",
                )
            full = mended
        return _Learnt(full, [(len(prompt), len(full))])

    def _marked(self, example: Example, one: _Rendered) -> _Learnt:
        """The sequence of a conversation whose template marks the answers itself."""
        marked = self.layout.marked(example) if isinstance(example, Conversation) else None
        if marked is None:
            same = next(
                (place for place, (a, b) in enumerate(zip(one.prompt, one.full, strict=False)) if a != b),
                min(len(one.prompt), len(one.full)),
            )
            raise DataError(
                "The chat template does not begin an answered conversation as it begins one to be answered.",
                where=one.where,
                found=f"{one.full[same : same + 40]!r} where the prompt has {one.prompt[same : same + 40]!r}",
                expected="the generation prompt, and then the answer",
                fix="set tokenizer.chat_template to one that keeps its generation prompt, or that marks answers "
                "with {% generation %}",
            )
        ids, mask = marked
        return _Learnt(ids, [(place, place + 1) for place, mark in enumerate(mask) if mark])

    def _notice(self, chunk: Sequence[Example], rendered: Iterable[_Rendered], noticed: _Noticed) -> None:
        for one in rendered:
            if not one.turns:
                continue
            if not one.full.endswith(self._special):
                noticed.unstopped.append(one.where)
            answer = one.turns[-1].content.strip()
            if answer not in one.written:
                noticed.rewritten.append(one.where)
            elif not (noticed.header_checked or one.written.lstrip().startswith(answer)):
                noticed.header_checked = True
                if self.layout.render([one.turns[:-1]], [one.where], ask=False)[0] == one.prompt:
                    noticed.header.append(one.where)
        for example in chunk:
            if isinstance(example, Conversation) and any(
                token in turn.content for turn in example.turns for token in self._special
            ):
                noticed.special.append(example.where)

    def _finish(self, sequence: _Learnt, where: str) -> Encoded:
        """Labels, and the cuts: what follows the last learnt token, and what exceeds the length."""
        last = max((stop for _, stop in sequence.spans), default=0)
        # One int object for each id, not for each token: ten times less memory on large data.
        same = self._same.setdefault
        ids = [same(token, token) for token in sequence.ids[: min(last, self.max_length)]]
        labels = [IGNORED] * len(ids)
        for start, stop in sequence.spans:
            labels[start:stop] = ids[start:stop]
        if labels:
            labels[0] = IGNORED
        return Encoded(ids, labels, where, truncated=last > self.max_length)


def _with_head(ids: list[int], head: tuple[int, ...]) -> list[int]:
    """`ids` behind `head`, unless they begin with it already: no beginning-of-sequence token twice."""
    return ids if tuple(ids[: len(head)]) == head else [*head, *ids]


def _nested(sequences: list[_Learnt]) -> list[_Learnt]:
    """Joins each sequence into a later one that begins with it; the others stay on their own."""
    hosts: list[_Learnt] = []
    for sequence in reversed(sequences):
        for host in hosts:
            if host.ids[: len(sequence.ids)] == sequence.ids:
                host.spans.extend(sequence.spans)
                break
        else:
            hosts.append(sequence)
    return hosts[::-1]


def _not_causal(example: Example) -> DataError:
    return DataError(
        "A labelled text is for classification, not for a causal language model.",
        where=example.where,
        expected="a conversation or a document",
        fix='train a classifier, or learn the text alone with columns={"text": "..."}',
    )
