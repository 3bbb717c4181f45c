"""What stands in a layer whose adapters lie in slots: the tables there, and a look at the batch that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from lorafit.errors import StateError
from lorafit.layers import Mixing, Site, alone
from lorafit.mixed.assignment import Assignment
from lorafit.mixed.bucket import Bucket
from lorafit.mixed.tables import Table


@dataclass
class Now:
    """What the layers look at: the batch of the pass that runs, if any.

    Attributes:
        rows: how many it has.
        assignments: by the identity of a bucket, the slots of the rows that have one there.
    """

    rows: int | None = None
    assignments: Mapping[int, Assignment] = field(default_factory=dict)


@final
class SlotRows(Mixing):
    """The adapters of one layer, by slots.

    Args:
        path: the layer's.
        kind: of layer.
        now: the batch.
    """

    def __init__(self, path: str, kind: type[Site], now: Now) -> None:
        self._path, self._kind, self._now = path, kind, now
        self.parts: list[tuple[int, Table]] = []

    def add(self, bucket: Bucket) -> None:
        """Has a bucket's adapters act here, too."""
        self.parts.append((id(bucket), bucket.tables[self._path]))

    def remove(self, bucket: Bucket) -> None:
        """The opposite."""
        self.parts = [part for part in self.parts if part[0] != id(bucket)]

    def output(self, module: nn.Module, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x = alone(self._path, args, kwargs)
        y: Tensor = base(module, x)
        if not self._now.assignments:
            return y
        if x.shape[0] != self._now.rows:
            raise StateError(
                "the layer's input has not one row for each name",
                where=self._path,
                found=f"shape {tuple(x.shape)}",
                expected=f"({self._now.rows}, ...)",
                fix="serve a model whose layers see a batch row by row",
            )
        if y.requires_grad and torch.is_grad_enabled():
            raise StateError(
                "rows of adapters in slots have no gradients",
                where=self._path,
                expected="a pass within torch.inference_mode() or torch.no_grad()",
                fix="attach or load the adapters, and train with Handle.rows",
            )
        site = self._kind(module)
        for key, table in self.parts:
            assignment = self._now.assignments.get(key)
            if assignment is not None:
                table.add_(site, y, x, assignment)
        return y
