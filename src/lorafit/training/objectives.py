"""What a run minimises and how it is judged: next tokens of a language model, or classes of a classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.errors import DataError
from lorafit.training.batches import RECORDS, TOKENS
from lorafit.training.loss import SupervisedLoss
from lorafit.training.sequences import IGNORED

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tally:
    """A held-out batch, record by record, on the CPU in float64.

    Attributes:
        losses: (records,), the summed loss of each.
        counts: (records,), the predictions of each.
        correct: (records,), how many of them are right (classification); None where that is not counted.
    """

    losses: Tensor
    counts: Tensor
    correct: Tensor | None

    def stacked(self) -> Tensor:
        """(records, 3): losses, counts, correct, which is -1 where it is not counted."""
        correct = torch.full_like(self.counts, -1) if self.correct is None else self.correct
        return torch.stack([self.losses, self.counts, correct], dim=1)


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
    """A loss to train on and a tally to judge by."""

    task_type: str
    description: str

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """A scalar: the mean, or the sum divided by `num_items` of the whole accumulated batch."""

    @abstractmethod
    def tally(self, model: nn.Module, batch: Batch) -> Tally:
        """The records of one held-out batch."""

    @abstractmethod
    def counted(self, batch: Batch) -> int:
        """How many predictions of the batch are trained on."""

    @final
    def tokens(self, batch: Batch) -> int:
        """How many tokens the batch's records have, padding left out, however they are laid out."""
        return int(batch[TOKENS] if TOKENS in batch else batch["attention_mask"].sum())


@final
class NextToken(Objective):
    """Cross-entropy on the supervised tokens alone."""

    task_type = "CAUSAL_LM"

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


@final
class Classes(Objective):
    """Cross-entropy over classes, in float32."""

    task_type = "SEQ_CLS"
    description = "cross-entropy over classes"

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

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits.float(), batch["labels"]
