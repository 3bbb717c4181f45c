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
from lorafit.training.batches import TOKENS
from lorafit.training.loss import SupervisedLoss

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tally:
    """Sums over held-out data: `total` loss over `count` predictions, `correct` of them right (classification)."""

    total: Tensor
    count: Tensor
    correct: Tensor | None

    def stacked(self) -> Tensor:
        """As one float64 vector, so that processes can add theirs up; correct is -1 where it is not counted."""
        correct = torch.tensor(-1.0) if self.correct is None else self.correct
        return torch.stack(
            [part.detach().to(self.total.device, torch.float64) for part in (self.total, self.count, correct)]
        )


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
        """The sums over one held-out batch."""

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
        sums = self._supervised.sums(model, batch)
        return Tally(sums.total, torch.tensor(sums.tokens), None)

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
        right = (logits.argmax(-1) == labels).sum()
        return Tally(F.cross_entropy(logits, labels, reduction="sum"), torch.tensor(len(labels)), right)

    def counted(self, batch: Batch) -> int:
        return len(batch["labels"])

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits.float(), batch["labels"]
