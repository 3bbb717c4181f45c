"""Adapters that change the same layers in the same form: one slot each, in a table for each layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorafit.layers import Site
from lorafit.mixed.changes import Change, Vectors
from lorafit.mixed.tables import Table, table_for


class Bucket:
    """Slots for adapters that are alike.

    Args:
        sites: module path → layer.
        changes: module path → what the first of these adapters changes; it is not put in yet.
        like: module path → type and device of the layer's output.

    Attributes:
        bytes_beside: what is kept for all slots together, such as the one A and B of VeRA.
    """

    def __init__(self, sites: Mapping[str, Site], changes: Mapping[str, Change], like: Mapping[str, Tensor]) -> None:
        casts = _Casts()
        self.tables: dict[str, Table] = {
            path: table_for(sites[path], casts.of(change, like[path].dtype), like=like[path])
            for path, change in changes.items()
        }
        self._names: list[str | None] = []
        memory = [each.untyped_storage() for table in self.tables.values() for each in table.beside]
        self.bytes_beside = sum({each.data_ptr(): each.nbytes() for each in memory}.values())

    def takes(self, changes: Mapping[str, Change]) -> bool:
        """Whether an adapter that changes this can have a slot here."""
        return changes.keys() == self.tables.keys() and all(
            self.tables[path].takes(change) for path, change in changes.items()
        )

    @property
    def slots(self) -> int:
        """How many there are, used or free."""
        return len(self._names)

    @property
    def free(self) -> int:
        """How many are free."""
        return self._names.count(None)

    @property
    def bytes_each(self) -> int:
        """What one slot takes in all layers."""
        return sum(table.bytes_each for table in self.tables.values())

    def slot(self, name: str) -> int:
        """The slot of an adapter that is here."""
        return self._names.index(name)

    def where(self) -> dict[str, int]:
        """The slot of each adapter that is here."""
        return {name: slot for slot, name in enumerate(self._names) if name is not None}

    def grow(self, slots: int) -> None:
        """Adds so many free slots."""
        for table in self.tables.values():
            table.resize(self.slots + slots)
        self._names += [None] * slots

    def put(self, name: str, changes: Mapping[str, Change]) -> None:
        """Puts an adapter into a free slot; there must be one."""
        slot = self._names.index(None)
        for path, change in changes.items():
            self.tables[path].write(slot, change)
        self._names[slot] = name

    def remove(self, name: str) -> None:
        """Frees the slot of an adapter."""
        slot = self.slot(name)
        for table in self.tables.values():
            table.clear(slot)
        self._names[slot] = None

    def shrink(self) -> None:
        """Gives up the memory of free slots."""
        self.arrange(set(self.where()))
        self._names = [name for name in self._names if name is not None]
        for table in self.tables.values():
            table.resize(len(self._names))

    def arrange(self, first: Collection[str]) -> None:
        """Has these adapters, all of them here, stand in the first slots; few change their place."""
        holes = [slot for slot in range(len(first)) if self._names[slot] not in first]
        astray = [slot for slot in range(len(first), self.slots) if self._names[slot] in first]
        for hole, slot in zip(holes, astray, strict=True):
            for table in self.tables.values():
                table.swap(hole, slot)
            self._names[hole], self._names[slot] = self._names[slot], self._names[hole]


class _Casts:
    """A and B that layers share, once in each type."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def of(self, change: Change, dtype: torch.dtype) -> Change:
        """The change with what it shares in a type."""
        if isinstance(change, Vectors):
            return replace(change, down=self._cast(change.down, dtype), up=self._cast(change.up, dtype))
        return change

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, dtype)
        # The original is kept as well: another one could come to lie at its address.
        _, cast = self._made.setdefault(key, (tensor, tensor.to(dtype)))
        return cast
