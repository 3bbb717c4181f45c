"""Sequences to batches: padding, and an order of the records that wastes little of it.

The order of an epoch is a function of (seed, epoch) alone, so a resumed run meets the batches it would have met.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lorafit.errors import ConfigError
from lorafit.training.classify import EncodedLabel
from lorafit.training.numbers import EncodedValue, Scale
from lorafit.training.sequences import IGNORED, Encoded

TOKENS = "tokens"
"""Key of a batch under which it says how many tokens its records have, where no attention mask tells; no model's."""


RECORDS = "records"
"""Key of a batch under which it says, (rows, width) int64, to which of its records each place belongs, where rows are
not records; no model's."""


VALUES = "values"
"""Key of a batch of a regression under which its numbers are, (records,) float32; `labels` says which count.

They are what the head has to give: large labels that lie close together are one number in float32.
"""


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch of labelled texts is the model's, and not the loss's."""
    return {key: value for key, value in batch.items() if key not in ("labels", VALUES)}


def _padded(rows: Sequence[Sequence[int]], value: int, multiple: int | None) -> Tensor:
    """(batch, longest) int64, the rows on the left and `value` on their right."""
    width = max(map(len, rows))
    if multiple is not None:
        width = -(-width // multiple) * multiple
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows], dtype=torch.int64)


def _check_padding(pad_token_id: int, multiple: int | None) -> None:
    if pad_token_id < 0:
        raise ConfigError(
            "The padding token has no place in a vocabulary.",
            found=pad_token_id,
            expected="a token id",
            fix="pass the end-of-sequence token's id where the tokenizer has no padding token",
        )
    if multiple is not None and multiple < 1:
        raise ConfigError(
            "pad_to_multiple_of is too small.", found=multiple, expected="at least 1, or None", fix="try 8"
        )


@final
class Collator:
    """Pads sequences to the longest of their batch, on the right.

    Args:
        pad_token_id: fills `input_ids`; which token does not matter, as it is neither attended to nor learnt.
        pad_to_multiple_of: rounds the length of a batch up to a multiple of it.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        _check_padding(pad_token_id, pad_to_multiple_of)
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (0 on padding) and `labels` (-100 on padding), (batch, longest) int64."""
        multiple = self.pad_to_multiple_of
        return {
            "input_ids": _padded([one.input_ids for one in batch], self.pad_token_id, multiple),
            "attention_mask": _padded([[1] * len(one) for one in batch], 0, multiple),
            "labels": _padded([one.labels for one in batch], IGNORED, multiple),
        }


@final
class LabelCollator:
    """Pads sequences for classification, on the right.

    Args:
        pad_token_id: fills `input_ids`. A decoder with a classification head finds the last token of a text by
            it: it must be the model's `config.pad_token_id`.
        pad_to_multiple_of: rounds the length of a batch up to a multiple of it.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        _check_padding(pad_token_id, pad_to_multiple_of)
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, batch: Sequence[EncodedLabel]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, perhaps `token_type_ids`, (batch, longest) int64; `labels` (batch,)."""
        padded = _texts(batch, self.pad_token_id, self.pad_to_multiple_of)
        return {**padded, "labels": torch.tensor([one.label for one in batch], dtype=torch.int64)}


@final
class ValueCollator:
    """Pads sequences for regression, on the right.

    Args:
        pad_token_id: as `LabelCollator` has it.
        scale: how the head's outputs become labels.
        pad_to_multiple_of: rounds the length of a batch up to a multiple of it.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, pad_token_id: int, scale: Scale, pad_to_multiple_of: int | None = None) -> None:
        _check_padding(pad_token_id, pad_to_multiple_of)
        self.pad_token_id = pad_token_id
        self.scale = scale
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, batch: Sequence[EncodedValue]) -> dict[str, Tensor]:
        """As `LabelCollator`; `values` (batch,) float32, what the head should give; `labels` (batch,), 0 or -100."""
        padded = _texts(batch, self.pad_token_id, self.pad_to_multiple_of)
        counted = torch.tensor([0 if one.known else IGNORED for one in batch], dtype=torch.int64)
        outputs = [self.scale.output(one.value) for one in batch]
        return {**padded, "labels": counted, VALUES: torch.tensor(outputs, dtype=torch.float32)}


AnyCollator: TypeAlias = Collator | LabelCollator | ValueCollator
"""What makes batches of a row for each record."""


def _texts(batch: Sequence[EncodedLabel | EncodedValue], pad: int, multiple: int | None) -> dict[str, Tensor]:
    """Token ids, mask and, where the model wants them, token type ids."""
    padded = {
        "input_ids": _padded([one.input_ids for one in batch], pad, multiple),
        "attention_mask": _padded([[1] * len(one) for one in batch], 0, multiple),
    }
    types = [one.token_type_ids for one in batch if one.token_type_ids is not None]
    if types:
        padded["token_type_ids"] = _padded(types, 0, multiple)
    return padded


@final
class LengthBucketSampler(Sampler[int]):
    """Indices in an order whose consecutive `batch_size` ones are of like length, and that is random all the same.

    Records are shuffled and taken in megabatches of many batches, each sorted by length and cut into batches;
    then the batches are shuffled. It yields single indices, for a loader that cuts them into batches of
    `batch_size` (`transformers.Trainer` does, by its train sampler). The batch that is not full is the last.

    Call `set_epoch` before each epoch, as with `DistributedSampler`; accelerate's loaders do.

    Args:
        lengths: tokens of each record.
        batch_size: records that are of like length: those of an optimizer step, over all processes and accumulated
            batches, so that the order does not depend on how a step is divided among them.
        seed: of the order.
        megabatch: batches in a megabatch, at most; of small data fewer, so that the order stays random.
        longest_first: whether the first batch of epoch 0 is the one with the longest record, so that memory
            that does not suffice shows at once.

    Raises:
        ConfigError: a setting is out of range, or there are no records.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        megabatch: int = 50,
        longest_first: bool = True,
    ) -> None:
        for name, value in (("lengths", len(lengths)), ("batch_size", batch_size), ("megabatch", megabatch)):
            if value < 1:
                raise ConfigError(
                    f"{name} is too small for batches.",
                    found=value,
                    expected="at least 1",
                    fix=f"raise {name}" if name != "lengths" else "give it at least one record",
                )
        if seed < 0:
            raise ConfigError("The seed is negative.", found=seed, expected="0 or more", fix="set seed=0")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.megabatch = megabatch
        self.longest_first = longest_first
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of `epoch`, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # A product and not a sum: seed 0 in epoch 1 must not be seed 1 in epoch 0.
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        count, size = len(self.lengths), self.batch_size
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        longest = max(range(count), key=self.lengths.__getitem__)
        first = self.longest_first and self.epoch == 0
        full = count - count % size
        if first and full and longest in order[full:]:
            # The batch that is not full comes last; the longest record must not be in it.
            place = order.index(longest)
            order[place], order[0] = order[0], longest
        batches = self._batches(order[:full], full)
        shuffled = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
        if first and full:
            place = next(place for place, batch in enumerate(shuffled) if longest in batch)
            shuffled[0], shuffled[place] = shuffled[place], shuffled[0]
        for batch in shuffled:
            yield from batch
        yield from order[full:]

    def _batches(self, order: list[int], full: int) -> list[list[int]]:
        """Full batches of like length, from megabatches of at most a quarter of the records."""
        size = self.batch_size
        step = max(1, min(self.megabatch, full // (4 * size))) * size
        batches = []
        for start in range(0, full, step):
            mega = sorted(order[start : start + step], key=self.lengths.__getitem__, reverse=True)
            batches += [mega[place : place + size] for place in range(0, len(mega), size)]
        return batches


@final
class Records(Dataset[Any]):
    """Encoded records, as a loader takes them; a negative index gives one that says nothing.

    Such an idle record stands where a process has none of its own in a batch that the others have a record of.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index] if index >= 0 else _idle(self._records[-1 - index])


def _idle(record: Encoded | EncodedLabel | EncodedValue) -> Encoded | EncodedLabel | EncodedValue:
    """A record of which nothing is learnt, as short as one can be."""
    ids = record.input_ids[:2]
    if isinstance(record, Encoded):
        return replace(record, input_ids=ids, labels=[IGNORED] * len(ids))
    types = None if record.token_type_ids is None else record.token_type_ids[:2]
    if isinstance(record, EncodedLabel):
        return replace(record, input_ids=ids, token_type_ids=types, label=IGNORED)
    return replace(record, input_ids=ids, token_type_ids=types, known=False)


@final
class SharedBatches(Sampler[list[int]]):
    """Of an order that all processes have, the batches of one of them.

    Records in a row, `size` for each process, are one batch of all of them, as one process would have it alone. Where
    the last batch is not full, its records are shared out as evenly as can be, and a process that gets none has an idle
    one (see `Records`): all have as many batches, and no record counts twice.

    Args:
        order: of the records.
        size: records of a process in a batch.
        number: which process this is, from 0.
        count: how many there are.
        drop_last: leave out a batch that is not full.
    """

    def __init__(self, order: LengthBucketSampler, size: int, *, number: int, count: int, drop_last: bool) -> None:
        self.sampler = order
        self.batch_size = size
        self.number = number
        self.count = count
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of `epoch`, from 0."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        together = self.batch_size * self.count
        return len(self.sampler) // together if self.drop_last else -(-len(self.sampler) // together)

    def __iter__(self) -> Iterator[list[int]]:
        order, together = list(self.sampler), self.batch_size * self.count
        for start in range(0, len(self) * together, together):
            batch = order[start : start + together]
            own = batch[self.number * len(batch) // self.count : (self.number + 1) * len(batch) // self.count]
            yield own or [-1 - batch[0]]
