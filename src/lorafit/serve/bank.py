"""Many adapters over one model, of which as many lie in memory as are used.

What is registered costs a name. A request takes its adapter: its file is read once, and what it changes in each layer
is folded into a slot of a table (`lorafit.mixed`). Where memory is limited, the adapter that was used longest ago gives
its slot up. Rows of a batch then have the adapters that `rows` says, and the base model where it says None.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from lorafit.adapted import adapting, banks, mix, unmix
from lorafit.checkpoint import check_room, fitting, ready
from lorafit.errors import CheckpointError, ConfigError, LorafitWarning, StateError, nearest, some
from lorafit.layers import Site, site_of
from lorafit.mixed.assignment import FEW, Assignment, compact
from lorafit.mixed.bucket import Bucket
from lorafit.mixed.changes import Change, fold, folded
from lorafit.mixed.slots import Now, SlotRows
from lorafit.plan import Modules
from lorafit.serve.servable import check_servable, unservable

REMEMBERED = 16
"""So many batches are remembered: rows keep their adapters for many tokens."""
GROWTH = 2.0
"""By this a full bucket grows, where memory allows it."""


class FullError(StateError):
    """Every adapter in memory is in use or pinned, and there is no room for another one."""


@dataclass
class Registered:
    """An adapter that can be asked for.

    Attributes:
        folder: where it is.
        pinned: whether it stays in memory once it is there.
        uses: how many requests have taken it.
        bucket: where it is in memory; None if it is not.
    """

    folder: Path
    pinned: bool
    uses: int = 0
    bucket: Bucket | None = None


@final
class AdapterBank:
    """Adapters over one model.

    Args:
        model: the base, without any adapter attached.
        limit: bytes that adapters may take in memory; None for no limit.

    Raises:
        StateError: the model has adapters already.
    """

    def __init__(self, model: nn.Module, *, limit: int | None = None) -> None:
        if any(len(bank) or bank.mixing is not None for bank in banks(model)):
            raise StateError(
                "the model has adapters attached",
                expected="a plain one",
                fix="detach them, or merge_and_detach() what belongs to the base",
            )
        self._model = model
        self._limit = limit
        self._modules = Modules.of(model)
        self._taken_in: set[str] = set()  # layers that were found to have room for adapters
        self._like = _floating(model)
        self._known: dict[str, Registered] = {}
        self._order: OrderedDict[str, None] = OrderedDict()  # what is in memory, what was used longest ago first
        self._buckets: list[Bucket] = []
        self._mixed: dict[str, SlotRows] = {}
        self._now = Now()
        self._batches: OrderedDict[tuple[str | None, ...], Mapping[int, Assignment]] = OrderedDict()

    # What is known

    def names(self) -> list[str]:
        """All adapters that can be asked for, in the order in which they were registered."""
        return list(self._known)

    def known(self, name: str) -> bool:
        """Whether an adapter can be asked for."""
        return name in self._known

    def resident(self) -> list[str]:
        """The adapters in memory, what was used longest ago first."""
        return list(self._order)

    def used_bytes(self) -> int:
        """What the tables of adapters take in memory."""
        return sum(bucket.slots * bucket.bytes_each + bucket.bytes_beside for bucket in self._buckets)

    def register(self, name: str, folder: Path, *, pinned: bool = False) -> None:
        """Makes an adapter known by a name; only its config and the header of its file are read.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: no adapter there, or one that cannot share a batch with others: says why.
        """
        if name in self._known:
            raise ConfigError(
                "an adapter of this name is here already", where="name", found=repr(name), fix="forget it"
            )
        check_servable(folder)
        self._known[name] = Registered(folder, pinned)

    def forget(self, name: str) -> None:
        """Makes an adapter unknown, and frees its memory.

        Raises:
            StateError: there is none of this name, or it is in use.
        """
        self._check_outside()
        entry = self._entry(name)
        if entry.uses:
            raise StateError(f"adapter {name!r} is in use", found=f"{entry.uses} requests", fix="wait for their end")
        if entry.bucket is not None:
            bucket = entry.bucket
            self._evict(name)
            self._give_back(bucket)
        del self._known[name]

    def _entry(self, name: str) -> Registered:
        if name not in self._known:
            raise StateError(
                "no adapter of this name is registered",
                found=repr(name),
                expected=f"names among {some(self._known)}",
                near=nearest(name, self._known),
                fix="register it first",
            )
        return self._known[name]

    # What is in memory

    def take(self, name: str | None) -> None:
        """Brings an adapter into memory if it is not there, and keeps it there until `drop`; None is the base.

        Raises:
            FullError: there is no room, and what is in memory is in use or pinned.
            StateError: no adapter of this name; within `rows`, one that is not in memory.
            CheckpointError: its file is damaged, or does not fit the model.
        """
        if name is None:
            return
        entry = self._entry(name)
        if entry.bucket is None:
            entry.bucket = self._bring(name, entry)
        self._order[name] = None
        self._order.move_to_end(name)
        entry.uses += 1

    def drop(self, name: str | None) -> None:
        """The end of what `take` began."""
        if name is None:
            return
        entry = self._entry(name)
        assert entry.uses > 0, name
        entry.uses -= 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bring(self, name: str, entry: Registered) -> Bucket:
        self._check_outside()
        changes, sites = self._read(entry.folder)
        bucket = next((each for each in self._buckets if each.takes(changes)), None)
        new = bucket is None
        if bucket is None:
            bucket = Bucket(sites, changes, {path: self._like_at(site) for path, site in sites.items()})
        if not bucket.free:
            self._make_room(bucket, name)
        bucket.put(name, changes)
        if new:
            self._add(bucket, sites)
        self._batches.clear()
        return bucket

    def _read(self, folder: Path) -> tuple[dict[str, Change], dict[str, Site]]:
        found = fitting(self._modules, folder)
        for note in found.notes:
            warnings.warn(note, LorafitWarning, stacklevel=4)
        plain = found.plain()
        if plain is not None:  # nothing has to be made to know what it changes
            for path in plain.keys() - self._taken_in:
                check_room(path, self._modules)
                self._taken_in.add(path)
            return {path: folded(delta) for path, delta in plain.items()}, self._sites(plain)
        made = ready(found)
        changes = {}
        for planned in made.planned:
            adapter = made.adapters[planned.path]
            adapter.to(planned.site.raw_weight.device).eval()
            change = fold(adapter.update(planned.site.weight))
            if change is None:
                raise unservable(folder, made.method)
            changes[planned.path] = change
        return changes, self._sites(changes)

    def _sites(self, paths: Iterable[str]) -> dict[str, Site]:
        return {path: site_of(self._modules.by_path[path]) for path in paths}

    def _like_at(self, site: Site) -> Tensor:
        weight = site.raw_weight
        kept = self._like.dtype if site.packed else weight.dtype  # some models have layers of another type than most
        return self._like.new_empty(0, device=weight.device, dtype=kept)

    def _add(self, bucket: Bucket, sites: Mapping[str, Site]) -> None:
        self._buckets.append(bucket)
        for path, site in sites.items():
            if path not in self._mixed:
                self._mixed[path] = SlotRows(path, type(site), self._now)
                mix(site.module, self._mixed[path], adapting(site))
            self._mixed[path].add(bucket)

    def _make_room(self, bucket: Bucket, name: str) -> None:
        """Gets a free slot: from the limit as long as there is room, then from who was used longest ago."""
        each, beside = bucket.bytes_each, 0 if bucket in self._buckets else bucket.bytes_beside
        wanted = max(1, int(bucket.slots * (GROWTH - 1)))
        if self._limit is None:
            bucket.grow(wanted)
            return
        if each + bucket.bytes_beside > self._limit:
            raise CheckpointError(
                "the adapter is larger than the memory that adapters may take",
                where=name,
                found=f"{(each + bucket.bytes_beside) / 2**20:.1f} MiB",
                expected=f"at most {self._limit / 2**20:.1f} MiB",
                fix="a higher limit (lorafit serve --memory)",
            )
        while not bucket.free:
            room = (self._limit - self.used_bytes() - beside) // each
            if room >= 1:
                bucket.grow(min(wanted, int(room)))
                return
            victim = self._victim(name)
            home = self._known[victim].bucket
            assert home is not None
            self._evict(victim)
            if home is not bucket:
                self._give_back(home, whole=True)

    def _victim(self, name: str) -> str:
        for other in self._order:
            entry = self._known[other]
            if not entry.uses and not entry.pinned:
                return other
        raise FullError(
            f"there is no room for adapter {name!r}",
            found=f"{len(self._order)} in memory, all in use or pinned",
            expected="one that can go",
            fix="wait, or a higher limit (lorafit serve --memory)",
        )

    def _evict(self, name: str) -> None:
        entry = self._known[name]
        assert entry.bucket is not None
        entry.bucket.remove(name)
        entry.bucket = None
        del self._order[name]
        self._batches.clear()

    def _give_back(self, bucket: Bucket, *, whole: bool = False) -> None:
        """Frees the memory of free slots, if there are many or all of it is wanted; a bucket of none goes."""
        if not whole and bucket.free * 2 < bucket.slots:
            return
        bucket.shrink()
        self._batches.clear()
        if bucket.slots:
            return
        self._buckets.remove(bucket)
        for path in bucket.tables:
            mixed = self._mixed[path]
            mixed.remove(bucket)
            if not mixed.parts:
                unmix(self._model.get_submodule(path))
                del self._mixed[path]

    def close(self) -> None:
        """Takes everything out: the model is the plain one that it was."""
        self._check_outside()
        for path in self._mixed:
            unmix(self._model.get_submodule(path))
        self._mixed.clear()
        self._buckets.clear()
        self._order.clear()
        self._batches.clear()
        self._known.clear()

    # Batches

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it each forward pass has `len(names)` rows, and row i the adapter `names[i]`; None is the base.

        Raises:
            StateError: an adapter that is not in memory, or within another such block; in a pass, an input with
                another number of rows.
        """
        self._check_outside()
        assignments = self._assigned(tuple(names))
        self._now.rows, self._now.assignments = len(names), assignments
        try:
            yield
        finally:
            self._now.rows, self._now.assignments = None, {}

    def _check_outside(self) -> None:
        """Slots may move now: what was said of them within `rows` would be wrong."""
        if self._now.rows is not None:
            raise StateError(
                "the rows of a batch have their adapters already", found="within rows", fix="leave that block first"
            )

    def _assigned(self, names: tuple[str | None, ...]) -> Mapping[int, Assignment]:
        if names not in self._batches:
            while len(self._batches) >= REMEMBERED:
                self._batches.popitem(last=False)
            made = self._assign(names)  # which may empty what is remembered
            self._batches[names] = made
        self._batches.move_to_end(names)
        return self._batches[names]

    def _assign(self, names: tuple[str | None, ...]) -> Mapping[int, Assignment]:
        mine: dict[int, tuple[Bucket, set[str]]] = {}
        homes: dict[str, Bucket] = {}
        for name in dict.fromkeys(names):
            if name is None:
                continue
            home = self._entry(name).bucket
            if home is None:
                raise StateError(f"adapter {name!r} is not in memory", fix="take it first")
            homes[name] = home
            mine.setdefault(id(home), (home, set()))[1].add(name)
        for bucket, used in mine.values():
            self._arrange(bucket, used)
        made = {}
        for key, (bucket, used) in mine.items():
            slots = bucket.where()
            made[key] = Assignment([slots[name] if name in used else None for name in names], self._like.device)
        return made

    def _arrange(self, bucket: Bucket, used: set[str]) -> None:
        """Has slots that are used together stand together: a batched product is over a run of slots."""
        slots = bucket.where()
        if len(used) <= FEW or compact(sorted(slots[name] for name in used)):
            return
        # All that requests hold, not only this batch: else two batches in turn would move each other's away.
        bucket.arrange({name for name in slots if self._known[name].uses or name in used})
        self._batches.clear()
        slots = bucket.where()
        if not compact(sorted(slots[name] for name in used)):
            bucket.arrange(used)


def _floating(model: nn.Module) -> Tensor:
    """An empty tensor of the type in which the model computes, where it does."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise StateError(
            "the model lies on several devices, and rows of a batch are told apart on one",
            found=some(sorted(map(str, devices))),
            expected="one device",
            fix="a smaller model, a quantised one, or lorafit export --to vllm",
        )
    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return parameter.detach().new_empty(0)
    raise StateError("the model has no numbers to compute with", expected="a parameter of a floating type")
