"""What a model remembers of its adapters, beside its own attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LEDGER = "_lorafit"
"""The attribute of the model under which it is kept, from the first adapter to the last."""


class Ledger:
    """What a model remembers of its adapters.

    Attributes:
        names: the adapters', in the order of attaching.
        trainable: which of the model's parameters were trainable before the first one.
        lifted: the merged adapter that `disabled` has taken out of the weights for a while, or None.
    """

    lifted: str | None = None

    def __init__(self, trainable: Sequence[str]) -> None:
        self.trainable = tuple(trainable)
        self.names: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made within `disabled()` is in no block that would end.
        return {**vars(self), "lifted": None}
