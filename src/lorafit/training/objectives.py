"""What a run minimises and how it is judged: next tokens of a language model, classes, or numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.errors import DataError
from lorafit.training.agreement import agreement
from lorafit.training.batches import RECORDS, TOKENS, VALUES, inputs_of
from lorafit.training.config import Task
from lorafit.training.loss import SupervisedLoss
from lorafit.training.numbers import Scale
from lorafit.training.sequences import IGNORED
from lorafit.training.tasks import CAUSAL, CLASSES, NUMBERS

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tally:
    """A held-out batch, record by record, on the CPU in float64.

    Attributes:
        losses: (records,), the summed loss of each.
        counts: (records,), the predictions of each.
        correct: (records,), how many of them are right (classification); None where that is not counted.
        pairs: (records, 2), the number that was predicted and the right one (regression); None of anything else.
    """

    losses: Tensor
    counts: Tensor
    correct: Tensor | None
    pairs: Tensor | None = None

    def stacked(self) -> Tensor:
        """(records, 5): losses, counts, correct, -1 where it is not counted, and the pairs, NaN where there are none.

        `COLUMNS` says what is where; so that records of several processes can be gathered as one tensor.
        """
        correct = torch.full_like(self.counts, -1) if self.correct is None else self.correct
        nothing = torch.full((len(self.counts), 2), torch.nan, dtype=self.counts.dtype)
        pairs = nothing if self.pairs is None else self.pairs
        return torch.cat([torch.stack([self.losses, self.counts, correct], dim=1), pairs], dim=1)


LOSSES, COUNTS, CORRECT, PREDICTED, EXPECTED = COLUMNS = tuple(range(5))
"""The columns of `Tally.stacked`."""


def mean_loss(total: float, count: float) -> float:
    """The loss of one prediction, given the sum over all of them.

    Raises:
        DataError: there is none, so there is nothing that could be measured.
    """
    if count == 0:
        raise DataError(
            "There is nothing to measure: not one held-out token or record is predicted.",
            found="0 predictions",
            expected="at least one token with a label other than -100 after the first of a record, or one class",
            fix="measure on records with an answer within max_length",
        )
    return total / count


class Objective(ABC):
    """A loss to train on and a tally to judge by.

    Attributes:
        task: what is learnt, in the word of the setting.
        task_type: PEFT's word for it.
        description: how the loss is computed, for people.
        unit: what a loss counts, behind a number.
    """

    task: Task
    task_type: str
    description: str
    unit: str

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """A scalar: the mean, or the sum divided by `num_items` of the whole accumulated batch."""

    @abstractmethod
    def tally(self, model: nn.Module, batch: Batch) -> Tally:
        """The records of one held-out batch."""

    @abstractmethod
    def counted(self, batch: Batch) -> int:
        """How many predictions of the batch are trained on."""

    @abstractmethod
    def figures(self, table: Tensor) -> dict[str, float]:
        """What is told of held-out records, stacked tallies, beside their mean loss; by the name it has in records."""

    @final
    def tokens(self, batch: Batch) -> int:
        """How many tokens the batch's records have, padding left out, however they are laid out."""
        return int(batch[TOKENS] if TOKENS in batch else batch["attention_mask"].sum())


@final
class NextToken(Objective):
    """Cross-entropy on the supervised tokens alone."""

    task: Task = CAUSAL
    task_type = "CAUSAL_LM"
    unit = "nats per token"

    def __init__(self, supervised: SupervisedLoss) -> None:
        self._supervised = supervised
        self.description = supervised.description

    def loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        return self._supervised(model, batch, num_items)

    def tally(self, model: nn.Module, batch: Batch) -> Tally:
        values, owners = (each.cpu() for each in self._supervised.each(model, batch))
        number = int(batch[RECORDS].max()) + 1 if RECORDS in batch else len(batch["labels"])
        nothing = torch.zeros(number, dtype=torch.float64)
        losses = nothing.index_add(0, owners, values.double())
        return Tally(losses, nothing.index_add(0, owners, torch.ones(len(owners), dtype=torch.float64)), None)

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def figures(self, table: Tensor) -> dict[str, float]:
        return _perplexity(table)


@final
class Classes(Objective):
    """Cross-entropy over classes, in float32."""

    task: Task = CLASSES
    task_type = "SEQ_CLS"
    description = "cross-entropy over classes"
    unit = "nats per record"

    def loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        logits, labels = self._logits(model, batch)
        total = F.cross_entropy(logits, labels, reduction="sum")
        return total / (len(labels) if num_items is None else num_items)

    def tally(self, model: nn.Module, batch: Batch) -> Tally:
        logits, labels = self._logits(model, batch)
        losses = F.cross_entropy(logits, labels, reduction="none").cpu().double()
        return Tally(losses, torch.ones_like(losses), (logits.argmax(-1) == labels).cpu().double())

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def figures(self, table: Tensor) -> dict[str, float]:
        return {**_perplexity(table), "accuracy": table[:, CORRECT].sum().item() / table[:, COUNTS].sum().item()}

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits: Tensor = model(**inputs_of(batch)).logits
        return logits.float(), batch["labels"]


@final
class Numbers(Objective):
    """The squared error of predicted numbers in float32, in squares of the labels' spread.

    Errors are those of the head's outputs: labels may be large and lie close together. Figures in the labels' own unit
    are computed in float64.

    Args:
        scale: how outputs become labels; that of the batches, too.
    """

    task: Task = NUMBERS
    task_type = "SEQ_CLS"  # PEFT and transformers call so a head of one output, too
    unit = "of the labels' variance"

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.description = f"mean squared error in float32, of labels that lie {scale.spread:.3g} apart (spread)"

    def loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        outputs, counted = self._outputs(model, batch)
        total = self._squares(outputs, batch).mul(counted).sum()
        return total / (counted.sum().clamp(min=1) if num_items is None else num_items)

    def tally(self, model: nn.Module, batch: Batch) -> Tally:
        outputs, _ = self._outputs(model, batch)
        losses = self._squares(outputs, batch).cpu().double()
        pairs = torch.stack([outputs, batch[VALUES]], dim=1).cpu().double()
        return Tally(losses, torch.ones_like(losses), None, self.scale.label(pairs))

    def counted(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def figures(self, table: Tensor) -> dict[str, float]:
        # Predictions may lie close together far from zero: there their differences would pass for rounding.
        pairs = table[:, [PREDICTED, EXPECTED]] - self.scale.offset
        return agreement(pairs).figures() if len(pairs) and bool(pairs.isfinite().all()) else {}

    def _outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(records,): what the head gives, and whether each record counts."""
        logits: Tensor = model(**inputs_of(batch)).logits
        return logits.float().squeeze(-1), (batch["labels"] != IGNORED).float()

    def _squares(self, outputs: Tensor, batch: Batch) -> Tensor:
        return ((outputs - batch[VALUES]) * (self.scale.factor / self.scale.spread)).square()


def _perplexity(table: Tensor) -> dict[str, float]:
    loss = mean_loss(table[:, LOSSES].sum().item(), table[:, COUNTS].sum().item())
    return {"perplexity": math.exp(min(loss, 700))}
