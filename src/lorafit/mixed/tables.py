"""The slots of one layer: what each adapter changes there, one below the other, and how rows of a batch get theirs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from lorafit.layers import Site, VectorSite
from lorafit.mixed.assignment import Assignment, Batched, Segment
from lorafit.mixed.changes import Change, Pair, Vectors, padded


class Table(ABC):
    """The slots of one layer. A slot holds the change of one adapter; a free one holds zeros.

    Args:
        site: the layer.
        gained: whether its changes have gains.
        like: what the numbers of the layer's output are: type and device.
    """

    def __init__(self, site: Site, *, gained: bool, like: Tensor) -> None:
        self._like = like
        # g − 1, in single precision at least: in bfloat16 a gain of 1.003 is 1.
        exact = torch.promote_types(like.dtype, torch.float32)
        self._gains = like.new_zeros(0, site.shape.out, dtype=exact) if gained else None

    @property
    @abstractmethod
    def stacks(self) -> tuple[Tensor, ...]:
        """The tensors whose first dimension is the slots, without the gains."""

    @abstractmethod
    def _set_stacks(self, stacks: tuple[Tensor, ...]) -> None:
        """Takes these in their place."""

    @abstractmethod
    def _parts(self, change: Change) -> tuple[Tensor, ...]:
        """A change as rows of `stacks`."""

    @abstractmethod
    def _add(self, site: Site, y: Tensor, x: Tensor, assignment: Assignment) -> None:
        """Adds to each row of y what its slot makes of x, gains left out, in place."""

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.stacks[0].shape[0]

    @property
    def beside(self) -> tuple[Tensor, ...]:
        """What is kept for all slots together."""
        return ()

    @property
    def bytes_each(self) -> int:
        """What one slot takes."""
        return sum(math.prod(stack.shape[1:]) * stack.element_size() for stack in self._whole())

    def _whole(self) -> tuple[Tensor, ...]:
        return self.stacks if self._gains is None else (*self.stacks, self._gains)

    def takes(self, change: Change) -> bool:
        """Whether a change can be put into a slot here."""
        return (change.gain is None) == (self._gains is None) and self._takes(change)

    @abstractmethod
    def _takes(self, change: Change) -> bool:
        """The same, gains left out."""

    @torch.inference_mode(False)  # what it makes is written to in other modes, too
    @torch.no_grad()
    def resize(self, slots: int) -> None:
        """Makes room for so many slots, or gives up the last ones; those that stay hold what they held."""
        self._set_stacks(tuple(_resized(stack, slots) for stack in self.stacks))
        if self._gains is not None:
            self._gains = _resized(self._gains, slots)

    def write(self, slot: int, change: Change) -> None:
        """Puts a change into a slot."""
        for stack, part in zip(self.stacks, self._parts(change), strict=True):
            stack[slot].zero_()
            stack[slot][tuple(slice(size) for size in part.shape)].copy_(part)
        if self._gains is not None:
            assert change.gain is not None
            self._gains[slot].copy_(change.gain - 1)

    def clear(self, slot: int) -> None:
        """Makes a slot change nothing."""
        for stack in self._whole():
            stack[slot].zero_()

    def swap(self, one: int, other: int) -> None:
        """Has two slots change places."""
        for stack in self._whole():
            kept = stack[one].clone()
            stack[one].copy_(stack[other])
            stack[other].copy_(kept)

    def add_(self, site: Site, y: Tensor, x: Tensor, assignment: Assignment) -> None:
        """Makes of the layer's own output y for x, row by row, what it is with the change of the row's slot.

        Args:
            site: the layer.
            y: (rows, ..., out) or, for convolutions, (rows, out, ...); changed in place.
            x: the layer's input, (rows, ...).
            assignment: the slot of each row.
        """
        self._add(site, y, x, assignment)
        if self._gains is not None:
            _stretch(site, y, self._gains, assignment)


def _resized(stack: Tensor, slots: int) -> Tensor:
    made = stack.new_zeros(slots, *stack.shape[1:])
    kept = min(slots, stack.shape[0])
    made[:kept].copy_(stack[:kept])
    return made


def _stretch(site: Site, y: Tensor, gains: Tensor, assignment: Assignment) -> None:
    """``y ← y + (g − 1)(y − b)`` for the rows of an assignment: the bias has no gain."""
    run = assignment.run
    mine = y.index_select(0, assignment.index) if run is None else y[slice(*run)]
    bias = site.bias()
    linear = mine if bias is None else mine - site.channel(bias.to(y.dtype))
    factors = gains.index_select(0, assignment.slot_index).to(y.dtype)
    shape = site.channel(factors[0]).shape
    ones = (1,) * (y.dim() - 1 - len(shape))
    more = linear * factors.view(len(factors), *ones, *shape)
    if run is None:
        y.index_add_(0, assignment.index, more)
    else:
        mine.add_(more)


@final
class VectorPairs(Table):
    """A and B of each slot, for layers that multiply vectors: padded with zeros to one rank.

    Args:
        site: the layer.
        rank: the highest that a slot takes.
        gained: whether its changes have gains.
        like: type and device of the layer's output.
    """

    def __init__(self, site: Site, rank: int, *, gained: bool, like: Tensor) -> None:
        super().__init__(site, gained=gained, like=like)
        self._set_stacks((like.new_zeros(0, rank, site.shape.inn), like.new_zeros(0, rank, site.shape.out)))

    @property
    def stacks(self) -> tuple[Tensor, ...]:
        return self._down, self._up

    def _set_stacks(self, stacks: tuple[Tensor, ...]) -> None:
        self._down, self._up = stacks
        self._down_t = self._down.transpose(1, 2)
        # Views are made once: a product of one row takes hardly longer than a view.
        self._each = [*zip(self._down_t.unbind(0), self._up.unbind(0), strict=True)] if len(self._down) else []

    def _takes(self, change: Change) -> bool:
        return isinstance(change, Pair) and padded(change.rank) == self._down.shape[1]

    def _parts(self, change: Change) -> tuple[Tensor, ...]:
        assert isinstance(change, Pair)
        return change.down, change.up.t()

    def _add(self, site: Site, y: Tensor, x: Tensor, assignment: Assignment) -> None:
        rows, inn, out = x.shape[0], x.shape[-1], y.shape[-1]
        x = x.to(y.dtype)
        if len(assignment.groups) == 1 and len(assignment.rows) == rows:
            down, up = self._each[assignment.slots[0]]
            _into(y.view(-1, out), x.reshape(-1, inn), down, up)
            return
        tokens = x.numel() // max(1, rows * inn)
        batched, segments, direct = assignment.steps(tokens)
        y, x = y.view(rows, tokens, out), x.reshape(rows, tokens, inn)
        if batched is not None:
            self._batched(y, x, batched)
        if direct:
            self._in_place(y.view(-1, out), x.reshape(-1, inn), tokens, 0, segments)
        elif segments:
            self._segments(y, x, segments, assignment)

    def _batched(self, y: Tensor, x: Tensor, batched: Batched) -> None:
        slots, (_, tokens, out) = batched.last - batched.first, y.shape
        start, stop = batched.start, (batched.start or 0) + len(batched.take)
        taken = x.index_select(0, batched.take) if start is None else x[start:stop]
        h = torch.bmm(taken.reshape(slots, -1, x.shape[-1]), self._down_t[batched.first : batched.last])
        up = self._up[batched.first : batched.last]
        if start is not None:
            y[start:stop].view(slots, -1, out).baddbmm_(h, up)
            return
        z = torch.bmm(h, up).view(-1, tokens, out)
        y.index_add_(0, batched.rows, z if batched.kept is None else z.index_select(0, batched.kept))

    def _in_place(self, y: Tensor, x: Tensor, tokens: int, first: int, segments: tuple[Segment, ...]) -> None:
        for slot, start, stop in segments:
            part = slice((first + start) * tokens, (first + stop) * tokens)
            _into(y[part], x[part], *self._each[slot])

    def _segments(self, y: Tensor, x: Tensor, segments: tuple[Segment, ...], assignment: Assignment) -> None:
        _, tokens, out = y.shape
        inn, run = x.shape[-1], assignment.run
        if run is not None:
            self._in_place(y.view(-1, out), x.reshape(-1, inn), tokens, run[0], segments)
            return
        xs = x.index_select(0, assignment.index).view(-1, inn)
        whole = sum(stop - start for _, start, stop in segments) == len(assignment.rows)
        zs = xs.new_empty(xs.shape[0], out) if whole else xs.new_zeros(xs.shape[0], out)
        for slot, start, stop in segments:
            down, up = self._each[slot]
            part = slice(start * tokens, stop * tokens)
            torch.mm(torch.mm(xs[part], down), up, out=zs[part])
        y.index_add_(0, assignment.index, zs.view(-1, tokens, out))


def _into(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> None:
    y.addmm_(torch.mm(x, down), up)


@final
class AnyPairs(Table):
    """A and B of each slot for any layer: group by group, through the layer's own operation."""

    def __init__(self, site: Site, change: Change, *, gained: bool, like: Tensor) -> None:
        super().__init__(site, gained=gained, like=like)
        self._site, shape, rank = site, site.shape, _room(site, change)
        # PEFT's A of a grouped convolution sees the channels of all groups, and so has more columns than W.
        down = like.new_zeros(0, rank, change.down.shape[1])
        self._set_stacks((down, like.new_zeros(0, shape.out, rank // shape.groups)))

    @property
    def stacks(self) -> tuple[Tensor, ...]:
        return self._down, self._up

    def _set_stacks(self, stacks: tuple[Tensor, ...]) -> None:
        self._down, self._up = stacks

    def _takes(self, change: Change) -> bool:
        return (_room(self._site, change), change.down.shape[1]) == tuple(self._down.shape[1:])

    def _parts(self, change: Change) -> tuple[Tensor, ...]:
        pair = change.pair() if isinstance(change, Vectors) else change
        return pair.down, pair.up

    def _add(self, site: Site, y: Tensor, x: Tensor, assignment: Assignment) -> None:
        for slot, start, stop in assignment.groups:
            index = assignment.index[start:stop]
            h = site.project(x.index_select(0, index), self._down[slot])
            y.index_add_(0, index, site.expand(h, self._up[slot]).to(y.dtype))


@final
class SharedVectors(Table):
    """Vectors of each slot around one A and B for all of them (VeRA): two products, whatever the number of adapters.

    Args:
        site: the layer.
        down, up: A (r, in) and B (out, r), in any type.
        gained: whether its changes have gains.
        like: type and device of the layer's output.
    """

    def __init__(self, site: Site, down: Tensor, up: Tensor, *, gained: bool, like: Tensor) -> None:
        super().__init__(site, gained=gained, like=like)
        self._down, self._up = down.to(like.dtype), up.to(like.dtype)
        self._set_stacks((like.new_zeros(0, down.shape[0]), like.new_zeros(0, up.shape[0])))

    @property
    def beside(self) -> tuple[Tensor, ...]:
        return self._down, self._up

    @property
    def stacks(self) -> tuple[Tensor, ...]:
        return self._mid, self._out

    def _set_stacks(self, stacks: tuple[Tensor, ...]) -> None:
        self._mid, self._out = stacks

    def _takes(self, change: Change) -> bool:
        return isinstance(change, Vectors) and _same(self._down, change.down) and _same(self._up, change.up)

    def _parts(self, change: Change) -> tuple[Tensor, ...]:
        assert isinstance(change, Vectors)
        return change.mid, change.out

    def _add(self, site: Site, y: Tensor, x: Tensor, assignment: Assignment) -> None:
        run, slots = assignment.run, assignment.slot_index
        taken = x.index_select(0, assignment.index) if run is None else x[slice(*run)]
        h = site.project(taken, self._down)
        h = h * _broadcast(self._mid.index_select(0, slots), h)
        z = site.expand(h, self._up)
        z = (z * _broadcast(self._out.index_select(0, slots), z)).to(y.dtype)
        if run is None:
            y.index_add_(0, assignment.index, z)
        else:
            y[slice(*run)].add_(z)


def _broadcast(rows: Tensor, like: Tensor) -> Tensor:
    """(n, channels) against (n, ..., channels)."""
    return rows.view(rows.shape[0], *(1,) * (like.dim() - 2), rows.shape[1])


def table_for(site: Site, change: Change, *, like: Tensor) -> Table:
    """A table without slots for changes like this one."""
    gained = change.gain is not None
    if not isinstance(site, VectorSite):
        return AnyPairs(site, change, gained=gained, like=like)
    if isinstance(change, Vectors):
        return SharedVectors(site, change.down, change.up, gained=gained, like=like)
    return VectorPairs(site, padded(change.rank), gained=gained, like=like)


def _room(site: Site, change: Change) -> int:
    """The rank of a table for a change; rows of A that belong to groups of channels cannot be padded at their end."""
    return change.rank if site.shape.groups > 1 else padded(change.rank)


def _same(mine: Tensor, its: Tensor) -> bool:
    if mine.data_ptr() == its.data_ptr() and mine.stride() == its.stride() and mine.shape == its.shape:
        return True
    return mine.shape == its.shape and torch.equal(mine, its.to(mine.device, mine.dtype))
