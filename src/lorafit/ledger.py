"""What a model remembers of its adapters, beside its own attributes."""

from __future__ import annotations

from collections.abc import Sequence

LEDGER = "_lorafit"
"""The attribute of the model under which it is kept, from the first adapter to the last."""


class Ledger:
    """What a model remembers of its adapters: their names in order, and which of its parameters were trainable."""

    def __init__(self, trainable: Sequence[str]) -> None:
        self.trainable = tuple(trainable)
        self.names: tuple[str, ...] = ()
