"""Labelled texts to token ids and class indices, for sequence classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lorafit.errors import DataError, nearest, some
from lorafit.training.examples import Labelled
from lorafit.training.forms import label_name
from lorafit.training.sequences import check_max_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class EncodedLabel:
    """A sequence and its class.

    Attributes:
        input_ids: (tokens,), with the special tokens that the tokenizer puts around a text or a pair.
        token_type_ids: (tokens,), 0 for the first text and 1 for the second, where the model wants it.
        label: the index of the class.
        where: where the record was read.
        truncated: whether the longer text was cut.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    label: int
    where: str
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@final
@dataclass(frozen=True)
class LabelEncodings:
    """What became of many labelled texts: `items` in order, where `truncated` ones were read, the `longest`."""

    items: list[EncodedLabel]
    truncated: tuple[str, ...]
    longest: int


@final
@dataclass(frozen=True)
class Row:
    """A text, or a pair of texts, as tokens.

    Attributes:
        ids: (tokens,), cut to the length.
        types: (tokens,), 0 for the first text and 1 for the second, where the model wants it.
        length: tokens before the cut.
    """

    ids: list[int]
    types: list[int] | None
    length: int


@final
class TextEncoder:
    """Encodes the texts of labelled examples, whatever their labels are.

    A text that exceeds the length is cut on the right; of a pair, the longer one is. A pair is joined as the
    tokenizer joins pairs; if it has no separator token (decoders have none), by a newline.

    Args:
        tokenizer: a tokenizer of `transformers`.
        max_length: tokens of the longest sequence, special tokens included.

    Raises:
        ConfigError: `max_length` is too small.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        check_max_length(max_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._separates = tokenizer.sep_token is not None

    def encode(self, examples: Sequence[Labelled]) -> list[Row]:
        """The sequences of all examples, of which there is at least one.

        Raises:
            DataError: some examples are pairs and some are not.
        """
        texts, pairs = self._texts(examples)
        whole = self._call(texts, pairs, cut=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        over = [place for place, length in enumerate(lengths) if length > self.max_length]
        if over:
            cut = self._call(
                [texts[place] for place in over],
                None if pairs is None else [pairs[place] for place in over],
                cut=True,
            )
            for key, rows in cut.items():
                for place, row in zip(over, rows, strict=True):
                    whole[key][place] = row
        types = whole.get("token_type_ids", [None] * len(examples))
        return [Row(*each) for each in zip(whole["input_ids"], types, lengths, strict=True)]

    def _texts(self, examples: Sequence[Labelled]) -> tuple[list[str], list[str] | None]:
        texts = [example.text for example in examples]
        pairs = [example.pair for example in examples if example.pair is not None]
        if not pairs:
            return texts, None
        if len(pairs) < len(texts):
            lone = next(example for example in examples if example.pair is None)
            raise DataError(
                "Some records are pairs of texts and some are not.",
                where=lone.where,
                found="one text",
                expected="a pair, as in other records",
                fix="write all records alike",
            )
        if self._separates:
            return texts, pairs
        return [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)], None

    def _call(self, texts: list[str], pairs: list[str] | None, *, cut: bool) -> dict[str, Any]:
        settings = {"truncation": True, "max_length": self.max_length} if cut else {"truncation": False}
        made = self.tokenizer(texts, pairs, return_attention_mask=False, verbose=False, **settings)
        return dict(made)


@final
class LabelEncoder:
    """Encodes labelled texts.

    Args:
        tokenizer: a tokenizer of `transformers`.
        max_length: tokens of the longest sequence, special tokens included.
        labels: the names of the classes; the place of a name is its index.

    Raises:
        ConfigError: `max_length` is too small.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]) -> None:
        self.max_length = max_length
        self.labels = tuple(labels)
        self._encoder = TextEncoder(tokenizer, max_length)
        self._index = {name: index for index, name in enumerate(self.labels)}

    def encode(self, example: Labelled) -> EncodedLabel:
        """The sequence of one labelled text.

        Raises:
            DataError: its label is not one of the classes.
        """
        return self.encode_all([example]).items[0]

    def encode_all(self, examples: Sequence[Labelled]) -> LabelEncodings:
        """The sequences of all examples.

        Raises:
            DataError: a label is not one of the classes, or some examples are pairs and some are not.
        """
        if not examples:
            return LabelEncodings([], (), 0)
        labels = [self._label(example) for example in examples]
        rows = self._encoder.encode(examples)
        items = [
            EncodedLabel(row.ids, row.types, label, example.where, row.length > self.max_length)
            for row, label, example in zip(rows, labels, examples, strict=True)
        ]
        cut = tuple(one.where for one in items if one.truncated)
        return LabelEncodings(items, cut, max(row.length for row in rows))

    def _label(self, example: Labelled) -> int:
        name = label_name(example)
        if name not in self._index:
            raise DataError(
                "The label is not one of the classes.",
                where=example.where,
                found=repr(name),
                expected=some(map(repr, self.labels), 12),
                near=nearest(name, self.labels),
                fix="correct the label, or have the class among the training records",
            )
        return self._index[name]
