"""What `suggest` finds: which layers are adapted at which rank, and why, to be read, changed and attached."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from lorafit.adapted import walk
from lorafit.errors import some
from lorafit.handle import AnyOptimizer, Handle
from lorafit.inject import attach
from lorafit.layers.running import keeps_statistics
from lorafit.method import Method, Sample
from lorafit.targets import Targets

LEFT = frozenset({"layer", "weight", "what", "why"})
"""Columns of the table that are words: the others are numbers, and end on the right."""


class Fate(enum.Enum):
    """What becomes of a layer."""

    ADAPTED = "adapted"
    FULL = "trained in full"
    FROZEN = "stays as it is"
    REFUSED = "cannot be adapted"


@final
@dataclass(frozen=True)
class Row:
    """Layers of one type and size to which the same happens for the same reason.

    Attributes:
        fate: what happens.
        kind: the layers' type.
        weight: the sizes of the weight, seen as a matrix; empty where there is none.
        paths: the layers.
        rank: of the adapters; None where there are none.
        trained: numbers that are trained in all of them.
        why: the reason.
    """

    fate: Fate
    kind: str
    weight: str
    paths: tuple[str, ...]
    rank: int | None
    trained: int
    why: str

    def cells(self) -> tuple[str, ...]:
        """The row as a table shows it."""
        rank = "" if self.rank is None else str(self.rank)
        trained = f"{self.trained:,}" if self.trained else ""
        return (self.kind, self.weight, str(len(self.paths)), self.fate.value, rank, trained, self.why)


@final
@dataclass(frozen=True)
class Suggestion:
    """Where adapters go, at which ranks, and why; `print` shows it as a table, `attach` does it.

    All of it is a start: what is right for a task is told by the loss on records that were held out.
    `dataclasses.replace` makes another suggestion of it, and its fields are what `lorafit.attach` takes.

    Attributes:
        method: the method, at the rank that most layers have.
        targets: the layers to adapt.
        rank_pattern, alpha_pattern: layers that have another rank, and the α that goes with it.
        modules_to_save: modules that are trained in full: heads.
        rate: a learning rate to begin with, for Adam and its kind.
        full_rate: the same for what is trained in full.
        rows: every layer with weights or statistics, by type, size and what happens to it.
        remarks: what to know beside the table.
        trained, total: numbers that are trained, and numbers of the model.
        model: the class of the model.
    """

    method: Method
    targets: Targets
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    rate: float
    full_rate: float
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    trained: int
    total: int
    model: str

    def attach(
        self, model: nn.Module, *, name: str = "default", seed: int | None = None, sample: Sample | None = None
    ) -> Handle:
        """Adapts a model as suggested: `lorafit.attach` with the fields of this.

        Args:
            model: the one that was looked at, or another one of the same layers.
            name: the adapter's name.
            seed: makes the initial values reproducible.
            sample: a part of the data, for methods that look at data first.

        Raises:
            LorafitError: as `lorafit.attach`.
        """
        return attach(
            model,
            self.method,
            self.targets,
            name=name,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            modules_to_save=self.modules_to_save,
            seed=seed,
            sample=sample,
        )

    def optimizer(
        self, handle: Handle, kind: type[AnyOptimizer], *, total_steps: int | None = None, **options: Any
    ) -> AnyOptimizer:
        """An optimizer at the suggested rates: `Handle.optimizer` with those of this.

        Args:
            handle: what `attach` gave.
            kind: the class, such as ``torch.optim.AdamW``.
            total_steps: optimizer steps of the whole run, for methods whose schedule is a share of it (AdaLoRA).
            options: further arguments of `kind`.

        Raises:
            LorafitError: as `Handle.optimizer`.
        """
        return handle.optimizer(kind, self.rate, total_steps=total_steps, copies_lr=self.full_rate, **options)

    def train(self, model: nn.Module) -> None:
        """Sets a model to training as `model.train()` does, but for layers that keep running statistics.

        Those go on using the statistics that they came with. In training mode they would change them, and an adapter's
        file does not hold what they became: the adapter would be read beside others than it was trained with.
        """
        model.train()
        for _, module, _ in walk(model):
            if keeps_statistics(module):
                module.eval()

    def paths(self, fate: Fate) -> tuple[str, ...]:
        """The layers to which this happens."""
        return tuple(path for row in self.rows if row.fate is fate for path in row.paths)

    def __str__(self) -> str:
        head = (
            f"{self.model}: {self.trained:,} numbers to train beside {self.total:,} "
            f"({self.trained / max(1, self.total):.2%}), by {self.method.name}, learning rate {self.rate:.2g} to begin"
        )
        table = _table([row.cells() for row in self.rows])
        return "\n".join([head, "", *table, "", *(f"- {remark}" for remark in self.remarks)])


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns with two spaces between them."""
    header = ("layer", "weight", "layers", "what", "r", "trained", "why")
    lines = [header, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def few(paths: Sequence[str]) -> str:
    """Some of these paths between quotation marks.

    >>> few(["stem", "blocks.0", "blocks.1", "blocks.2"])
    "'stem', 'blocks.0', 'blocks.1' and 1 more"
    """
    return some([repr(path) for path in paths], 3)
