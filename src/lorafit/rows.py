"""A batch whose rows have different adapters: what `Handle.rows` puts into each layer for a while.

Where there is something to differentiate, and in layers or by methods that have no table, the rows of each adapter go
through the plain twin, group by group. Else each layer keeps what the adapters change there in tables of slots
(`lorafit.mixed`), and computes its own output once for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from lorafit.adapted import Bank, adapting, bank_of, by_copy, mix, replaced, unmix, walk
from lorafit.errors import ConfigError, StateError, check_attached
from lorafit.kernels.scratch import transformed
from lorafit.layers import Mixing, Site, alone, apply, site_of
from lorafit.memo import STEPS
from lorafit.method import Adapter, Sharing
from lorafit.mixed.assignment import Assignment
from lorafit.mixed.changes import Change, fold
from lorafit.mixed.tables import Table, table_for

Name = str | None
"""An adapter's name; None is the base model."""


class Group(NamedTuple):
    """The rows of one adapter."""

    name: Name
    rows: tuple[int, ...]


@final
class Batch:
    """Which row has which adapter, and what all layers need of that.

    Args:
        names: an adapter's name for each row.
    """

    def __init__(self, names: Sequence[Name]) -> None:
        self.names = tuple(names)
        rows: dict[Name, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        self.groups = tuple(Group(name, tuple(each)) for name, each in rows.items())
        self._indices: dict[tuple[Name, torch.device], Tensor] = {}
        self._back: dict[torch.device, Tensor] = {}
        self._assignments: dict[tuple[tuple[int | None, ...], torch.device], Assignment] = {}

    @property
    def used(self) -> tuple[str, ...]:
        """The names of the adapters, each once."""
        return tuple(group.name for group in self.groups if group.name is not None)

    def index(self, group: Group, device: torch.device) -> Tensor:
        """A group's rows as a tensor."""
        key = (group.name, device)
        if key not in self._indices:
            with torch.inference_mode(False):  # it may be wanted for gradients later
                self._indices[key] = torch.tensor(group.rows, device=device)
        return self._indices[key]

    def back(self, device: torch.device) -> Tensor:
        """For each row of the batch, where it is when the groups stand one after the other."""
        if device not in self._back:
            with torch.inference_mode(False):
                order = torch.tensor([row for group in self.groups for row in group.rows], device=device)
                self._back[device] = torch.argsort(order)
        return self._back[device]

    def assignment(self, slots: Mapping[str, int], device: torch.device) -> Assignment:
        """The rows of those adapters that have a slot."""
        each = tuple(None if name is None else slots.get(name) for name in self.names)
        if (each, device) not in self._assignments:
            self._assignments[each, device] = Assignment(each, device)
        return self._assignments[each, device]

    def check(self, path: str, tensor: Tensor) -> None:
        """Raises `StateError` for the input of a layer that has another number of rows."""
        if tensor.dim() == 0 or tensor.shape[0] != len(self.names):
            raise StateError(
                "the layer's input has not one row for each name",
                where=path,
                found=f"shape {tuple(tensor.shape)}",
                expected=f"({len(self.names)}, ...)",
                fix="give one name for each row that the model gets; beams and copies of a row count as rows",
            )


@contextmanager
def rows(model: nn.Module, known: Sequence[str], names: Sequence[Name]) -> Iterator[None]:
    """Has row i of a batch use the adapter `names[i]` of those that are `known`; see `Handle.rows`."""
    _check(model, known, names)
    batch = Batch(names)
    changed = []
    try:
        for path, module, _ in walk(model):
            bank = bank_of(module)
            if bank is None:
                continue
            changed.append(module)
            if _adapts(bank):
                site = site_of(module)
                mix(module, SiteRows(path, type(site), bank, batch), adapting(site))
            else:
                mix(module, CopyRows(path, bank, batch), replaced)
        yield
    finally:
        for module in changed:
            unmix(module)


def _adapts(bank: Bank) -> bool:
    return all(isinstance(entry, Adapter) for entry in bank.values())


def _standing(bank: Bank) -> tuple[object, ...]:
    return (bank.active, bank.merged, tuple(bank._modules))


def _check_standing(path: str, bank: Bank, before: tuple[object, ...]) -> None:
    """Raises `StateError` where adapters were merged, disabled or taken out since rows got theirs."""
    if _standing(bank) != before:
        raise StateError(
            "the adapters of the model have changed while the rows of a batch have theirs",
            where=path,
            found="an adapter that was activated, disabled, merged, attached or detached within",
            expected="what it was when the block began",
            fix="do that outside of the block; None is the base model's name in it",
        )


def _check(model: nn.Module, known: Sequence[str], names: Sequence[Name]) -> None:
    if isinstance(names, str) or not names:
        raise ConfigError(
            "rows takes one name for each row of the batch",
            where="names",
            found=repr(names),
            expected="a sequence of adapters' names, None for the base model",
            fix=f'rows(["{known[0]}", None]) for a batch of two rows',
        )
    for name in dict.fromkeys(names):
        if name is not None:
            check_attached(name, known)
    for path, module, _ in walk(model):
        bank = bank_of(module)
        if bank is not None and bank.merged:
            raise StateError(
                f"adapter {bank.merged[0]!r} is merged into the weights, and so acts on every row",
                where=path,
                fix="unmerge it first",
            )
        if bank is not None and bank.mixing is not None:
            raise StateError(
                "the rows of a batch have their adapters already", where=path, fix="leave that block first"
            )


@final
class SiteRows(Mixing):
    """The adapters of one layer, row by row.

    Args:
        path: the layer's.
        kind: of layer.
        bank: its adapters.
        batch: which row has which.
    """

    def __init__(self, path: str, kind: type[Site], bank: Bank, batch: Batch) -> None:
        self._path, self._kind, self._bank, self._batch = path, kind, bank, batch
        self._here = tuple(name for name in batch.used if name in bank)
        self._before = _standing(bank)
        self._inside = [*dict.fromkeys(inner for name in self._here for inner in _inside(bank[name]))]
        self._stores = _stores(self._inside)
        self._seen: _Seen | None = None
        self._tables: list[tuple[Table, Assignment]] | None = []

    def output(self, module: nn.Module, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x = alone(self._path, args, kwargs)
        self._batch.check(self._path, x)
        _check_standing(self._path, self._bank, self._before)
        y: Tensor = base(module, x)
        if not self._here:
            return y
        site = self._kind(module)
        tables = None if self._differentiated(x, y) else self._current(site, y)
        if tables is None:
            return self._plain(site, x, y)
        for table, assignment in tables:
            table.add_(site, y, x, assignment)
        return y

    def _differentiated(self, x: Tensor, y: Tensor) -> bool:
        """Whether what is done here is seen by anything but this pass: then it is done by the plain twin."""
        if torch.is_grad_enabled() and (y.requires_grad or any(each.requires_grad for each in _tensors(self._stores))):
            return True
        return torch.is_autocast_enabled(x.device.type) or transformed() or torch.compiler.is_compiling()

    def _current(self, site: Site, y: Tensor) -> list[tuple[Table, Assignment]] | None:
        """The layer's tables, made anew where an adapter has changed; None where one of them has no place there."""
        held = _tensors(self._stores) + _tensors(_stores([site.module]))  # DoRA's gains are those of this weight
        now = (STEPS.now, y.dtype, y.device, [each.training for each in self._inside])
        if self._seen is None or not self._seen.holds(held, now):
            seen = _Seen(held, now)
            self._tables = self._made(site, y)
            self._seen = seen  # last: where making them failed, they are made again
        return self._tables

    def _made(self, site: Site, y: Tensor) -> list[tuple[Table, Assignment]] | None:
        kinds: list[tuple[Table, dict[str, Change]]] = []
        with torch.no_grad():
            for name in self._here:
                update, dropout = self._bank.said(name, site)
                change = None if dropout else fold(update)
                if change is None:
                    return None
                kind = next((changes for table, changes in kinds if table.takes(change)), None)
                if kind is None:
                    kinds.append((table_for(site, change, like=y), {name: change}))
                else:
                    kind[name] = change
            return [(_filled(table, changes), self._assigned(changes, y)) for table, changes in kinds]

    def _assigned(self, changes: Mapping[str, Change], y: Tensor) -> Assignment:
        return self._batch.assignment({name: slot for slot, name in enumerate(changes)}, y.device)

    def _plain(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        parts = []
        for group in self._batch.groups:
            index = self._batch.index(group, y.device)
            part = y.index_select(0, index)
            if group.name in self._here:
                assert group.name is not None
                part = apply(site, x.index_select(0, index), part, [self._bank.said(group.name, site)])
            parts.append(part)
        return torch.cat(parts).index_select(0, self._batch.back(y.device))


def _filled(table: Table, changes: Mapping[str, Change]) -> Table:
    table.resize(len(changes))
    for slot, change in enumerate(changes.values()):
        table.write(slot, change)
    return table


def _inside(entry: nn.Module) -> Iterator[nn.Module]:
    """An adapter's modules, with those of an adapter that it shares with other layers."""
    for inner in entry.modules():
        yield inner
        if isinstance(inner, Sharing):
            yield from inner.common.modules()


def _stores(modules: Sequence[nn.Module]) -> list[Mapping[str, Tensor | None]]:
    """Where modules keep their own tensors, those of their children left out."""
    return [store for module in modules for store in (module._parameters, module._buffers) if store]


def _tensors(stores: Sequence[Mapping[str, Tensor | None]]) -> list[Tensor]:
    return [each for store in stores for each in store.values() if each is not None]


@final
class _Seen:
    """Tensors and their versions at one time; it holds on to them, so that no other can pass for one of them."""

    def __init__(self, tensors: list[Tensor], also: object) -> None:
        self._tensors, self._also = tensors, also
        self._counted = [each for each in tensors if not each.is_inference()]  # the others count no versions
        self._versions = [each._version for each in self._counted]

    def holds(self, tensors: list[Tensor], also: object) -> bool:
        """Whether all is as it was."""
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and also == self._also and self._versions == [each._version for each in self._counted]


@final
class CopyRows(Mixing):
    """A module of which adapters bring copies of their own, row by row.

    Args:
        path: the module's.
        bank: the copies.
        batch: which row has which.
    """

    def __init__(self, path: str, bank: Bank, batch: Batch) -> None:
        self._path, self._bank, self._batch = path, bank, batch
        self._before = _standing(bank)

    def output(self, module: nn.Module, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _check_standing(self._path, self._bank, self._before)
        groups = self._batch.groups
        if not any(name in self._bank for name in self._batch.used):
            return base(module, *args, **kwargs)
        if len(groups) == 1:
            return self._given(groups[0], module, base, args, kwargs)
        parts = [self._part(group, module, base, args, kwargs) for group in groups]
        return torch.cat(parts).index_select(0, self._batch.back(parts[0].device))

    def _part(
        self,
        group: Group,
        module: nn.Module,
        base: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        mine = tuple(self._taken(value, group) for value in args)
        named = {key: self._taken(value, group) for key, value in kwargs.items()}
        part = self._given(group, module, base, mine, named)
        if not isinstance(part, Tensor) or part.dim() == 0 or part.shape[0] != len(group.rows):
            raise self._refused(f"its output is {_shown(part)}", "a tensor with one row for each of its input's")
        return part

    def _given(
        self,
        group: Group,
        module: nn.Module,
        base: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if group.name is None or group.name not in self._bank:
            return base(module, *args, **kwargs)
        return by_copy(module, self._bank[group.name], args, kwargs)

    def _taken(self, value: object, group: Group) -> object:
        if isinstance(value, Tensor):
            self._batch.check(self._path, value)
            return value.index_select(0, self._batch.index(group, value.device))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise self._refused(f"it is given {_shown(value)}", "tensors with one row for each name, and plain values")

    def _refused(self, found: str, expected: str) -> StateError:
        return StateError(
            "adapters of this batch bring copies of a module whose rows cannot be told apart",
            where=self._path,
            found=found,
            expected=expected,
            fix="one batch for each adapter",
        )


def _shown(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
