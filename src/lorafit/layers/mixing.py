"""A way for the rows of a batch to have different changes: what stands in an adapted module for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafit.errors import StateError, some


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


def alone(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer that is called with nothing else.

    Raises:
        StateError: it is called with more, as an output size or a cache, of which rows cannot be told apart.
    """
    if len(args) == 1 and not kwargs:
        x: Tensor = args[0]
        return x
    raise StateError(
        "a layer whose rows have different adapters is called with more than its input",
        where=path,
        found=f"{some([*(type(each).__name__ for each in args[1:]), *kwargs])} beside the input",
        expected="the input alone: of the rest it cannot be told what belongs to which row",
        fix="one batch for each adapter, or attach with exclude=, which leaves such a layer out",
    )
