"""Encoded sequences: what training sees of a record, and how to show it to people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from lorafit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


@final
@dataclass(frozen=True)
class Encoded:
    """A sequence for a causal language model.

    Attributes:
        input_ids: (tokens,).
        labels: (tokens,), the token itself where it is learnt, else -100. The first is never learnt: nothing
            predicts it. So the number of learnt labels is the number of terms of the loss.
        where: where the record was read.
        truncated: whether the right end was cut.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """How many tokens are learnt."""
        return len(self.labels) - self.labels.count(IGNORED)


@final
@dataclass(frozen=True)
class Encodings:
    """What became of many examples.

    Attributes:
        items: the sequences, in the order of the examples.
        truncated: where those were read whose right end was cut and that still teach something.
        dropped: where those were read of whose answer nothing was left within the length.
        unrolled: how many conversations became one sequence for each answer, because earlier answers are
            written by the template, or tokenized, differently once the conversation goes on.
        longest: tokens of the longest sequence before the cut.
    """

    items: list[Encoded]
    truncated: tuple[str, ...]
    dropped: tuple[str, ...]
    unrolled: int
    longest: int


@final
@dataclass(frozen=True)
class Sample:
    """A question for the model, to be generated from: `input_ids` end where the answer `gold` begins."""

    prompt: str
    input_ids: list[int]
    gold: str
    where: str


class Piece(NamedTuple):
    """A run of text that is learnt, or that is not."""

    text: str
    supervised: bool


def rendering(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The text of `encoded` in runs of learnt and not learnt tokens; together they are the decoded whole."""
    ids, labels = encoded.input_ids, encoded.labels
    pieces: list[Piece] = []
    before, start = "", 0
    for end in range(1, len(ids) + 1):
        learnt = labels[start] != IGNORED
        if end == len(ids) or (labels[end] != IGNORED) != learnt:
            # Decoded from the start each time: some tokenizers drop the space in front of a lone run.
            text = decode(tokenizer, ids[:end])
            pieces.append(Piece(text[len(before) :], learnt))
            before, start = text, end
    return pieces


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens and spaces as they are."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def check_max_length(max_length: int) -> None:
    """Raises ConfigError unless a sequence of `max_length` tokens can teach something."""
    if max_length < 2:
        raise ConfigError(
            "max_length is too small.",
            found=max_length,
            expected="at least 2: a token to predict, and one to predict it from",
            fix="set max_length to a few hundred",
        )
