"""Folding updates into weights, exactly undoable, and never into a weight that another layer shares unasked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorafit.activation import check_read
from lorafit.adapted import bank_of, banks, rescales
from lorafit.delta import LowRank
from lorafit.errors import LorafitWarning, MergeError, some
from lorafit.finite import all_finite
from lorafit.layers import Site
from lorafit.method import Adapter
from lorafit.sharded import in_parts, whole
from lorafit.shared import shared_memory


@dataclass(frozen=True, eq=False)
class Folded:
    """One changed tensor of a module, and what it was."""

    module: nn.Module
    attribute: str
    tensor: Tensor
    original: Tensor
    untied: bool

    def undo(self) -> None:
        """Puts the original back, bit for bit."""
        if self.untied:
            setattr(self.module, self.attribute, self.tensor)
        else:
            with torch.no_grad():  # into what stands there now: `.to(...)` puts another tensor in a buffer's place
                getattr(self.module, self.attribute).copy_(self.original)


@dataclass(frozen=True, eq=False)
class _Row:
    """One tensor that a merge changes.

    Attributes:
        name, module, attribute, tensor: which.
        value: computes what it becomes.
        certain: whether that can be computed and is finite, if it is known without computing it.
    """

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor
    value: Callable[[], Tensor]
    certain: Callable[[], bool]


def change(site: Site, adapter: Adapter) -> Tensor:
    """W' − W of one site in its weight's own shape, in at least single precision."""
    with torch.no_grad(), whole([site.module, adapter]):
        return site.unfold(adapter.update(site.weight).change(site.weight()))


def check_unmerged(model: nn.Module) -> None:
    """Raises `MergeError` if an adapter is merged already, or if no weight is whole."""
    if in_parts(model):
        raise MergeError(
            "the model is sharded: of its weights each process keeps a part",
            expected="whole weights",
            fix="handle.save(folder) in all processes, then lorafit.load(model, folder).merge() on a plain model",
        )
    for bank in banks(model):
        if bank.merged:
            raise MergeError(
                f"adapter {bank.merged[0]!r} is merged already",
                expected="unmerged weights",
                fix="unmerge it first, or use merge_and_detach() for the first of two",
            )


def check_alone(sites: Mapping[str, Site], name: str, *, keep: bool) -> None:
    """Raises `MergeError` for an adapter on these sites that would take the merged weight for the base's.

    Args:
        sites: module path → site, those of the adapter to be merged.
        name: the adapter to be merged.
        keep: the merge can be undone: adapters that do not act then do no harm.
    """
    for path, site in sites.items():
        bank = bank_of(site.module)
        assert bank is not None
        for other in bank.active if keep else bank:
            if other != name and rescales(site.module, other):
                raise MergeError(
                    f"merging {name!r} would change what adapter {other!r} does here: it rescales the rows of W + Δ "
                    "(DoRA), and would take the merged weight for W",
                    where=path,
                    found=f"{other!r}, {'active' if other in bank.active else 'attached'}",
                    expected="no adapter with magnitudes beside the merged one",
                    fix=f"activate({name!r}) alone and merge it, or activate and merge {other!r} alone"
                    if keep
                    else f"detach {other!r} first, or merge {other!r} alone",
                )


def fold(
    model: nn.Module,
    sites: Mapping[str, Site],
    copies: Mapping[str, nn.Module],
    name: str,
    *,
    untie: bool,
    keep: bool,
) -> list[Folded]:
    """Folds adapter `name` into the weights of its sites and its trained copies into the modules they stand for.

    All new values are computed and checked before the first weight changes; a failure after that undoes what was done,
    unless nothing was kept. Where originals are kept, so are the new values until their turn: each gives its room to
    an original. Else bounds are looked at first, and only what they leave in doubt is computed for the check alone.

    Args:
        model: the model, for finding weights that are shared.
        sites: module path → site.
        copies: module path → module with a trained copy.
        name: the adapter.
        untie: give a shared weight a copy of its own instead of refusing.
        keep: keep what is needed to undo; without it the list returned is empty.

    Raises:
        MergeError: a shared weight, or values that are not finite in the weight's own precision.
        StateError: a weight that the model does not read, since another layer has a copy of it.
    """
    check_read(model, [(path, site.module) for path, site in sites.items()], "merge")
    rounding = _Rounding()
    rows = [*_site_rows(sites, name, rounding), *_copy_rows(copies, name)]
    shared = shared_memory(model, [(row.name, row.module, row.tensor) for row in rows])
    if shared and not untie:
        path = next(iter(shared))
        raise MergeError(
            "merging would change another layer, which shares this weight",
            where=path,
            found=f"shared with {some(shared[path])}",
            expected="weights of their own for merged layers",
            fix="merge(untie=True) gives the merged layer a copy of its own",
        )
    with _ordinary():
        waiting: list[Tensor] = []
        for row in rows:
            if keep:
                waiting.append(_checked(row))
            elif not row.certain():
                _checked(row)
        waiting.reverse()
        rounding.tell(name)
        folded: list[Folded] = []
        try:
            for row in rows:
                untied = row.name in shared
                value = waiting.pop() if keep else row.value()
                original = row.tensor.detach().clone() if keep and not untied else row.tensor
                if untied:
                    parameter = nn.Parameter(value, requires_grad=row.tensor.requires_grad)
                    setattr(row.module, row.attribute, parameter)
                else:
                    row.tensor.copy_(value)
                if keep:
                    folded.append(Folded(row.module, row.attribute, row.tensor, original, untied))
        except BaseException:  # out of memory, or an impatient user: what was merged so far goes back
            for done in reversed(folded):
                done.undo()
            raise
    return folded


@contextmanager
def _ordinary() -> Iterator[None]:
    """Without gradients, but never with tensors that inference mode would keep from training for good."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def lift(folded: Sequence[Folded]) -> list[tuple[Folded, Tensor]]:
    """The merged values, for `refold`; what `undo` leaves behind is theirs alone."""
    with _ordinary():
        return [(row, getattr(row.module, row.attribute).detach().clone()) for row in folded]


def refold(merged: Sequence[tuple[Folded, Tensor]]) -> list[Folded]:
    """Puts merged values back that were undone for a while, bit for bit."""
    with _ordinary():
        for row, value in merged:
            if row.untied:
                setattr(row.module, row.attribute, nn.Parameter(value, requires_grad=row.tensor.requires_grad))
            else:
                getattr(row.module, row.attribute).copy_(value)
    return [row for row, _ in merged]


def _site_rows(sites: Mapping[str, Site], name: str, rounding: _Rounding) -> Iterator[_Row]:
    for path, site in sites.items():
        tensors, parts = {**site.module._parameters, **site.module._buffers}, _Parts(site, name, rounding)
        certain = partial(_bounded, site, _adapter(site, name))
        for attribute in site.parts:
            tensor = tensors[attribute]
            assert tensor is not None
            yield _Row(f"{path}.{attribute}", site.module, attribute, tensor, partial(parts.take, attribute), certain)


class _Parts:
    """The tensors of one merged layer, computed together before the first of them is written, and again after all."""

    def __init__(self, site: Site, name: str, rounding: _Rounding) -> None:
        self._site, self._name, self._rounding = site, name, rounding
        self._left: dict[str, Tensor] = {}
        self._seen = False

    def take(self, attribute: str) -> Tensor:
        """One of them; each is taken once before all are computed again."""
        if not self._left:
            delta = change(self._site, _adapter(self._site, self._name))
            self._left = self._site.merged(delta)
            if self._site.packed and not self._seen:
                self._rounding.add(self._site, delta, self._left)
                self._seen = True
        return self._left.pop(attribute)


class _Rounding:
    """What is lost where weights are kept in a form that cannot hold every sum: squares of it and of the changes."""

    def __init__(self) -> None:
        self._lost = self._size = 0.0

    def add(self, site: Site, delta: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Counts one site, before it changes.

        Args:
            site: a packed one.
            delta: what is added to its weight.
            parts: what the site keeps of the sum.
        """
        exact = site.unfold(site.weight()) + delta
        self._lost += float((site.kept(parts) - exact).square().sum(dtype=torch.float64))
        self._size += float(delta.square().sum(dtype=torch.float64))

    def tell(self, name: str) -> None:
        """Warns of it."""
        if self._size:
            warnings.warn(
                f"adapter {name!r} is merged into quantised weights, which are rounded again: what changes them is off "
                f"by {math.sqrt(self._lost / self._size):.1%} of its size. dequantise(model) before merging keeps all "
                "of it",
                LorafitWarning,
                stacklevel=5,
            )


def _bounded(site: Site, adapter: Adapter) -> bool:
    """Whether bounds show that the merged weight is finite: |Δ| is at most ‖row of up‖ ‖column of down‖."""
    weight, shape = site.raw_weight, site.shape
    if site.packed or weight.dtype.itemsize == 1 or not weight.numel():
        return False
    update = adapter.update(site.weight)
    if not isinstance(update.delta, LowRank):
        return False
    up, down = update.delta.to(torch.promote_types(weight.dtype, torch.float32)).fold()
    if down.shape[1] != shape.inn:  # no change of this weight
        return False
    change = float(up.norm(dim=1).max()) * float(down.norm(dim=0).max())
    gain = 1.0 if update.gain is None else float(update.gain.abs().max())
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high), 0.0) if low.isfinite() and high.isfinite() else math.inf
    return (1 + gain) * (largest + change) < torch.finfo(weight.dtype).max / 2  # False where one is not a number


def _copy_rows(copies: Mapping[str, nn.Module], name: str) -> Iterator[_Row]:
    for path, module in copies.items():
        bank = bank_of(module)
        assert bank is not None
        copy = bank[name]
        for key, value in [*copy.named_parameters(), *copy.named_buffers()]:
            prefix, _, attribute = key.rpartition(".")
            owner = module.get_submodule(prefix)
            tensor = getattr(owner, attribute)
            taken = partial(value.detach().to, tensor.dtype, copy=True)
            yield _Row(f"{path}.{key}", owner, attribute, tensor, taken, partial(bool, False))


def _adapter(site: Site, name: str) -> Adapter:
    bank = bank_of(site.module)
    assert bank is not None
    adapter = bank[name]
    assert isinstance(adapter, Adapter)
    return adapter


def _checked(row: _Row) -> Tensor:
    """What the tensor of a row becomes. Raises `MergeError` for a value that is not finite."""
    value = row.value()
    if not all_finite(value):
        raise MergeError(
            "the merged weight is not finite",
            where=row.name,
            found=f"{int((~torch.isfinite(value)).sum())} values that are infinite or not a number in {value.dtype}",
            expected="finite values",
            fix="merge into float32 (model.float()), or look for a run that diverged",
        )
    return value
