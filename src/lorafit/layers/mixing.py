"""A way for the rows of a batch to have different changes: what stands in an adapted module for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class Mixing(ABC):
    """Decides, row by row, what acts in one module. It is asked instead of the module's adapters."""

    @abstractmethod
    def output(self, module: nn.Module, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module gives for its input.

        Args:
            module: it.
            base: its own forward, without any adapter: ``base(module, *args, **kwargs)``.
            *args: its input, (rows, ...).
            **kwargs: the same.

        Raises:
            StateError: the input has another number of rows than the batch, or its rows cannot be told apart.
        """
