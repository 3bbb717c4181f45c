"""Whether records of a batch share rows: what it saves on these data, and whether this model keeps them apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import nn

from lorafit.errors import ConfigError
from lorafit.rest import at_rest
from lorafit.training.batches import Collator, LengthBucketSampler
from lorafit.training.loss import FullLogits, SupervisedLoss, is_half
from lorafit.training.packing import Layout, Limits, Masked, PackingCollator, Restarted, best_layout
from lorafit.training.sequences import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Wanted = bool | Literal["auto"]

WORTH = 0.05
"""The share of the work that packing has to save to be chosen without being asked for."""
BATCHES = 256
"""Batches by which the saving is judged."""
BALANCE = 3
"""Times the model's width: tokens of a row at which attention costs as much as all else in a layer, whose weights are
11 to 12 times the width squared. By numbers of operations it would be 6; attention is the slower kind (as measured)."""

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model may raise that does not take a layout."""


@final
@dataclass(frozen=True)
class Decision:
    """What became of it.

    Attributes:
        collator: makes the batches.
        told: a sentence for the user.
    """

    collator: Collator | PackingCollator
    told: str


@final
@dataclass(frozen=True)
class Saving:
    """Tokens to compute over some batches, padded and packed; and the share of the work saved, attention included."""

    padded: int
    packed: int
    work: float
    padding: float

    def __str__(self) -> str:
        fewer = 100 * (1 - self.packed / self.padded)
        return f"{fewer:.0f} % fewer tokens to compute than in a row for each ({100 * self.padding:.0f} % was padding)"


def decide(
    wanted: Wanted,
    model: PreTrainedModel,
    loss: SupervisedLoss,
    records: Sequence[Encoded],
    plain: Collator,
    *,
    batch_size: int,
    seed: int,
    step: int | None = None,
) -> Decision:
    """Chooses between packed and padded batches.

    The first way of keeping records apart that gives this model's own loss on a batch of these data is taken: the batch
    with the longest record. No row is wider and no packed record longer than those.

    Args:
        wanted: "auto" packs if that saves at least `WORTH` of the work and the model is found to do it right.
        model: the base model, on its device, not yet wrapped. It is left as it was.
        loss: its prepared loss.
        records: the training records.
        plain: pads.
        batch_size: records in a batch.
        seed: of the order of the data.
        step: records of an optimizer step, if it has several batches.

    Raises:
        ConfigError: packing is asked for, and this model cannot do it.
    """
    if wanted is False:
        return Decision(plain, "")
    batches = list(_batches(records, batch_size, seed, step or batch_size))
    limits = Limits(balance=BALANCE * model.get_input_embeddings().weight.shape[1])
    saving, _ = _saving(batches, limits)
    if saving.work <= 0 or (wanted == "auto" and saving.work < WORTH):
        return Decision(plain, "padding: rows of several records would " + _little(saving, batch_size))
    reasons = []
    for isolation in (Masked(_dtype(model)), Restarted(one_row=False), Restarted(one_row=True)):
        own = replace(limits, shares=isolation.shares, one_row=isolation.one_row)
        own = replace(own, balance=math.inf) if isolation.one_row else own  # no dense mask: a kernel for such rows
        saving, layouts = _saving(batches, own)
        if saving.work <= 0 or (wanted == "auto" and saving.work < WORTH):
            continue
        batch, layout = _longest(batches, layouts)
        own = _bounded(own, batch, layout)
        collator = PackingCollator(plain, isolation, own)
        reason = _refusal(model, loss, collator, batch, layout)
        if reason is None:
            saving, _ = _saving(batches, own)
            told = f"packing: several records in a row of up to {own.width} tokens, kept apart by {isolation.name}; "
            return Decision(collator, f"{told}{saving}; --packing false pads")
        reasons.append(f"{isolation.name}: {reason}")
    if wanted is True and reasons:
        raise ConfigError(
            "this model cannot have several records in a row",
            where="packing",
            found="; ".join(reasons),
            expected="the losses that the records have in rows of their own",
            fix='set packing="auto" or leave it out: rows are then padded',
        )
    return Decision(plain, f"padding: no packing with this model ({reasons[0]})" if reasons else "padding")


def _little(saving: Saving, batch_size: int) -> str:
    if batch_size == 1:
        return "save nothing: a batch is one record"
    return f"save {100 * max(0.0, saving.work):.0f} % of the work"


def _batches(records: Sequence[Encoded], batch_size: int, seed: int, step: int) -> Iterator[list[Encoded]]:
    """The first batches of the first epoch, the longest record among them."""
    order = iter(LengthBucketSampler([len(one) for one in records], step, seed))
    for _ in range(BATCHES):
        batch = [records[place] for place in islice(order, batch_size)]
        if not batch:
            return
        yield batch


def _saving(batches: Sequence[Sequence[Encoded]], limits: Limits) -> tuple[Saving, list[Layout | None]]:
    layouts = [best_layout(batch, limits) for batch in batches]
    padded = packed = own = 0
    before = after = 0.0
    for batch, layout in zip(batches, layouts, strict=True):
        longest = max(map(len, batch))
        padded += len(batch) * longest
        own += sum(map(len, batch))
        packed += len(batch) * longest if layout is None else layout.tokens
        before += limits.cost(len(batch), longest)
        after += limits.cost(len(batch), longest) if layout is None else limits.cost(len(layout.rows), layout.width)
    return Saving(padded, packed, 1 - after / before, 1 - own / padded), layouts


def _longest(
    batches: Sequence[Sequence[Encoded]], layouts: Sequence[Layout | None]
) -> tuple[Sequence[Encoded], Layout]:
    """The packed batch with the longest record; its row is one of the widest, as its records are of like length."""
    packed = [(batch, layout) for batch, layout in zip(batches, layouts, strict=True) if layout is not None]
    return max(packed, key=lambda pair: (max(map(len, pair[0])), pair[1].width))


def _bounded(limits: Limits, batch: Sequence[Encoded], layout: Layout) -> Limits:
    """Limits within which layouts are like that one."""
    return replace(limits, width=layout.width, longest=max(map(len, batch)), shares=limits.shares and layout.shared > 0)


def _refusal(
    model: PreTrainedModel, loss: SupervisedLoss, collator: PackingCollator, batch: Sequence[Encoded], layout: Layout
) -> str | None:
    """Why the model cannot be given batches in such layouts, or None if it can."""
    if isinstance(loss, FullLogits):
        return "its own loss has to be used, which may count padding (the router of a mixture of experts does)"
    half = is_half(model)
    window = min(_windows(model.config.to_dict()), default=math.inf)
    if collator.isolation.shares and window < max(map(len, batch)):
        return f"a mask of ours would take away its attention window of {window} tokens"
    if half and collator.isolation.shares and window < layout.width:
        return f"in 16 bits it cannot be seen whether its attention window of {window} tokens is kept"
    with at_rest(model):
        try:
            silent, beside = _neighbours(batch, layout)
            expected = _mean(model, loss, collator.plain(silent))
            found, other = (_mean(model, loss, collator.packed(part, layout)) for part in (silent, beside))
        except _FAILURES as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not math.isclose(found, other, rel_tol=1e-4 if half else 1e-6):
        return f"records see their neighbours: the loss is {found:.4f}, and {other:.4f} beside another record"
    if not math.isclose(found, expected, rel_tol=2e-2 if half else 5e-5):
        return f"the loss is {found:.4f} and not {expected:.4f}"
    return None


def _mean(model: PreTrainedModel, loss: SupervisedLoss, batch: Mapping[str, torch.Tensor]) -> float:
    device = model.get_input_embeddings().weight.device
    return float(loss(model, {name: value.to(device) for name, value in batch.items()}))


def _neighbours(batch: Sequence[Encoded], layout: Layout) -> tuple[list[Encoded], list[Encoded]]:
    """The batch twice, the first record of its fullest row learning nothing; the second time that record is another."""
    place = max(layout.rows, key=len)[0]
    record = batch[place]
    start, own = record.input_ids[: layout.shared], record.input_ids[layout.shared :]
    other = own[::-1] if own[::-1] != own else [batch[place - 1].input_ids[-1]] * len(own)

    def with_own(tokens: list[int]) -> list[Encoded]:
        replaced = replace(record, input_ids=[*start, *tokens], labels=[IGNORED] * len(record))
        return [*batch[:place], replaced, *batch[place + 1 :]]

    return with_own(own), with_own(other)


def _windows(settings: Mapping[str, Any]) -> Iterator[int]:
    """The lengths of attention windows that a model's settings name, if any."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _windows(value)
        elif isinstance(value, int) and name in ("sliding_window", "window_size", "attention_chunk_size"):
            yield value


def _dtype(model: nn.Module) -> torch.dtype:
    return next(one.dtype for one in model.parameters() if one.dtype.is_floating_point)
