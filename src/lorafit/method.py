"""What a member of the household is: the abstract classes, and nothing else.

A `Method` is a frozen set of hyperparameters that makes one `Adapter` per site. An `Adapter` turns its parameters into
an `Update` of its site's weight. A `Schedule` is what a method does around the optimizer step, if anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafit.delta import Update
from lorafit.layers import Shape


class Adapter(nn.Module, ABC):
    """One method at one site.

    Attributes:
        dropout: probability with which the adapter's own input is dropped in training.
    """

    dropout: float = 0.0

    @abstractmethod
    def update(self, weight: Callable[[], Tensor]) -> Update:
        """The update of the site's weight, given a way to get that weight as a matrix (out, in).

        `weight` is called only by methods that need the weight: a quantised one is expensive to form.
        """


class Schedule(ABC):
    """What a method does around the optimizer step.

    With `optimizer.step(closure)` the gradients come inside the step: `before_step` then runs before they exist.
    """

    @abstractmethod
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs after backward, clipping and unscaling, before the optimizer changes a parameter."""

    @abstractmethod
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs after the optimizer changed the parameters."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue exactly."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""


@dataclass(frozen=True)
class Method(ABC):
    """One member of the household: its hyperparameters, validated when constructed."""

    name: ClassVar[str]
    paper: ClassVar[str]
    trains: ClassVar[str]

    @abstractmethod
    def adapter(self, shape: Shape, *, generator: torch.Generator | None = None) -> Adapter:
        """A new adapter for a site of this shape, on the CPU, drawn from `generator` (torch's own when None)."""

    @abstractmethod
    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        """The paper's count of trained numbers for sites of these shapes, (out, in) or `Shape`."""

    @abstractmethod
    def at(self, *, r: int | None = None, alpha: float | None = None) -> Method:
        """The same method with another rank or alpha, for one site. Raises `ConfigError` where it has no such thing."""

    def impossible(self, shape: Shape) -> str | None:
        """Why a site of this shape cannot take this method at all; None when it can."""
        return None

    def wasteful(self, shape: Shape) -> str | None:
        """Why a new adapter of this method makes no sense on a site of this shape; None when it does."""
        return None

    @abstractmethod
    def adapter_settings(self) -> tuple[object, ...]:
        """What two adapters at one site must share for one to take the other's values: rank, scale and the like."""

    def settings(self) -> dict[str, object]:
        """The resolved figures that a run announces, in the order in which they are read."""
        return {}

    def param_groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """Optimizer parameter groups for these trained parameters at base learning rate `lr`."""
        return [{"params": [parameter for _, parameter in named], "lr": lr}]

    def schedule(self, adapters: Sequence[Adapter]) -> Schedule | None:
        """What this method does around each optimizer step, for the adapters of one handle; None for nothing."""
        return None
