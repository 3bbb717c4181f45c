"""Texts whose labels are numbers, to token ids and values, for regression; and the scale on which they are learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

from torch import Tensor

from lorafit.errors import DataError
from lorafit.training.classify import TextEncoder
from lorafit.training.examples import Labelled
from lorafit.training.tasks import numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCALE: Final = "lorafit_scale"
"""Key of a merged model's config under which a scale is that its head has no bias to hold."""
ROUNDING: Final = 2.0**-50
"""The share of their size by which numbers differ that are the same but for rounding."""


@final
@dataclass(frozen=True)
class Scale:
    """How a head's one output becomes a label: `offset + factor · output`; and how far labels lie apart.

    A new head is trained on labels of mean 0 and spread 1, whatever they count: stars from 1 to 5 and prices in the
    thousands want the same learning rate then. A head that a checkpoint brings gives the labels themselves.

    Attributes:
        offset: the label where the output is 0.
        factor: what an output of 1 adds.
        spread: the standard deviation of the training labels, in which errors are counted: the loss is the mean
            squared error divided by its square, so that 1 is what the mean of the labels itself comes to.
    """

    offset: float
    factor: float
    spread: float

    @classmethod
    def new(cls, values: Sequence[float]) -> Scale:
        """That of a new head, from the training labels.

        Raises:
            DataError: they are all the same number, but for rounding, or too far apart to be squared.

        >>> Scale.new([1.0, 3.0])
        Scale(offset=2.0, factor=1.0, spread=1.0)
        """
        least, most, many = min(values), max(values), f"{len(values):,} training records"
        try:
            mean = math.fsum(values) / len(values)
            spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        except OverflowError:
            raise DataError(
                "The labels are too large to be learnt.",
                found=f"{least:g} to {most:g} on {many}",
                expected="numbers whose squares are numbers, too (below 1e150)",
                fix="count them in a larger unit, or learn their logarithms",
            ) from None
        # Of one number many times over the mean may be another one, by rounding.
        if not spread > ROUNDING * max(abs(least), abs(most)):
            raise DataError(
                "All labels are the same number, so there is nothing to predict.",
                found=f"{values[0]:g} on all {many}",
                expected="at least two numbers that differ by more than rounding",
                fix="check that the column of labels is the right one",
            )
        return cls(mean, spread, spread)

    @property
    def kept(self) -> Scale:
        """That of a head which gives the labels themselves."""
        return Scale(0.0, 1.0, self.spread)

    def brought(self, config: Any) -> Scale:
        """That of a head which a model's files bring: it gives the labels themselves, unless its config has a scale."""
        told = config.to_dict().get(SCALE)
        return self.kept if told is None else replace(Scale.read(told), spread=self.spread)

    def output(self, label: float) -> float:
        """The output that means a label, in Python's own float64.

        >>> Scale(1.7e9, 60.0, 60.0).output(1.7e9 + 30)
        0.5
        """
        return (label - self.offset) / self.factor

    def label(self, output: Tensor) -> Tensor:
        """The labels that outputs mean."""
        return output * self.factor + self.offset

    def as_json(self) -> dict[str, float]:
        """As it is written to files."""
        return {"offset": self.offset, "factor": self.factor, "spread": self.spread}

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Scale:
        """What `as_json` wrote."""
        return cls(float(found["offset"]), float(found["factor"]), float(found["spread"]))


@final
@dataclass(frozen=True)
class EncodedValue:
    """A sequence and its number; `known` is false for an idle record, of which nothing is learnt.

    The other attributes are those of `classify.EncodedLabel`.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    value: float
    where: str
    truncated: bool = False
    known: bool = True

    def __len__(self) -> int:
        return len(self.input_ids)


@final
@dataclass(frozen=True)
class ValueEncodings:
    """What became of many texts: `items` in order, where `truncated` ones were read, the `longest`."""

    items: list[EncodedValue]
    truncated: tuple[str, ...]
    longest: int


@final
class ValueEncoder:
    """Encodes texts whose labels are numbers; texts and pairs are cut and joined as for classes.

    Args:
        tokenizer: a tokenizer of `transformers`.
        max_length: tokens of the longest sequence, special tokens included.

    Raises:
        ConfigError: `max_length` is too small.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        self._texts = TextEncoder(tokenizer, max_length)

    def encode_all(self, examples: Sequence[Labelled]) -> ValueEncodings:
        """The sequences of all examples.

        Raises:
            DataError: a label is no number, or some examples are pairs and some are not.
        """
        if not examples:
            return ValueEncodings([], (), 0)
        values = numbers(examples)
        rows = self._texts.encode(examples)
        items = [
            EncodedValue(row.ids, row.types, value, example.where, row.length > self.max_length)
            for row, value, example in zip(rows, values, examples, strict=True)
        ]
        cut = tuple(one.where for one in items if one.truncated)
        return ValueEncodings(items, cut, max(row.length for row in rows))
