"""Several linear layers with updates that read the same x, such as q, k and v of attention, as one operation.

What each computes is that of `lorafit.kernels.linear`. Together they read x once for all H = x [A₁; A₂; …]ᵀ and once
for all dA, and sum dx where it lies, for which autograd would add up the layers' own in as many passes:
dx = Σ dyᵢ Wᵢ + [dH₁ dH₂ …] [A₁; A₂; …]. A frozen A that all share (VeRA's) is multiplied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.kernels.frozen import Frozen
from lorafit.kernels.linear import ADDING, FORMING, KEEP, allows, linear
from lorafit.kernels.masks import add_masked_product_, keep_mask, masked_outer, masked_product
from lorafit.kernels.parts import (
    Operands,
    added,
    as_rows,
    formed,
    gain_gradient,
    product,
    rows_times,
    scaled,
    through,
    twice,
    typed,
    up_gradient,
)
from lorafit.kernels.precision import as_forward, own_precision, wanted
from lorafit.kernels.scratch import shaped

OWN = 4
"""Tensors of a member before those of its frozen weight: A, B, g, b."""
KEPT = 8
"""Those that are kept for the backward pass: the same, H, mask, y before g and W + s B A."""


class Member(NamedTuple):
    """One layer with its update, as `lorafit.kernels.linear.linear` takes them."""

    frozen: Frozen
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float
    gain: Tensor | None
    dropout: float

    def alone(self, x: Tensor) -> Tensor:
        """The layer's output for x (..., in)."""
        return linear(x, self.frozen, self.bias, self.down, self.up, self.scale, gain=self.gain, dropout=self.dropout)


class _Fixed(NamedTuple):
    """What of the members is no tensor.

    Attributes:
        frozen, scales, dropouts: theirs; s divided by 1 - p.
        counts: how many tensors each frozen weight is.
        columns: which columns of H are whose; None for those with dropout.
        dtype: of the operation.
        kept, merged: the order, as `lorafit.kernels.linear.order` gives it for one layer.
    """

    frozen: tuple[Frozen, ...]
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    counts: tuple[int, ...]
    columns: tuple[slice | None, ...]
    dtype: torch.dtype
    kept: bool
    merged: bool


class _Tensors(NamedTuple):
    """One member's."""

    down: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None
    stored: tuple[Tensor, ...]


def siblings(x: Tensor, members: Sequence[Member]) -> list[Tensor] | None:
    """The outputs of layers that read the same x; None where they are better computed one by one.

    Args:
        x: (..., in).
        members: at least two layers.

    Returns:
        For each member what `Member.alone` gives, up to the rounding of sums.
    """
    kinds = {(wanted(x, one.frozen.dtype), one.frozen.dtype) for one in members}
    if len(kinds) > 1:
        return None
    ((dtype, own),) = kinds
    if dtype != own:
        with own_precision(x.device):
            return _apply(x, members, dtype)
    return _apply(x, members, dtype)


def order(
    columns: Sequence[slice | None], members: Sequence[Member], tokens: int, dtype: torch.dtype
) -> tuple[bool, bool]:
    """(kept, merged) for all members: as for one layer, but for x, which all read together.

    Args:
        columns: which of H are whose.
        members: the layers.
        tokens: rows of x.
        dtype: of the operation.
    """
    if not all(allows(one.frozen, dtype, one.dropout) for one in members):
        return False, False
    widths, inn = [one.down.shape[0] for one in members], members[0].frozen.shape[1]
    outs = [one.frozen.shape[0] for one in members]
    wide = max(each.stop for each in columns if each is not None)
    adding = tokens * (inn * (wide + ADDING) + sum(out * (r + ADDING) for out, r in zip(outs, widths, strict=True)))
    forming = sum(inn * out * (r + FORMING) for out, r in zip(outs, widths, strict=True))
    kept = min(widths) > KEEP * tokens and inn <= tokens
    return kept, adding > (1 if kept else 2) * forming


def _apply(x: Tensor, members: Sequence[Member], dtype: torch.dtype) -> list[Tensor]:
    flat: list[Tensor | None] = []
    for one in members:
        flat += (one.down, one.up, one.gain, one.bias, *one.frozen.tensors)
    columns, tokens = _columns(members), x.numel() // max(1, x.shape[-1])
    fixed = _Fixed(
        tuple(one.frozen for one in members),
        tuple(one.scale / (1 - one.dropout) for one in members),
        tuple(one.dropout for one in members),
        tuple(len(one.frozen.tensors) for one in members),
        columns,
        dtype,
        *order(columns, members, tokens, dtype),
    )
    trained = any(each is not None and each.requires_grad for each in (x, *flat))
    if trained and torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _Siblings.apply(x, fixed, *flat)  # type: ignore[no-untyped-call]
        return list(outputs)
    return [shaped(x, each.y) for each in _forward(x, fixed, _split(fixed, flat), early=False)[1]]


def _columns(members: Sequence[Member]) -> tuple[slice | None, ...]:
    """Where in [H₁ H₂ …] the columns of each are; a frozen A that is the same memory has one place."""
    places: dict[object, slice] = {}
    found: list[slice | None] = []
    end = 0
    for index, one in enumerate(members):
        down = one.down
        key: object = index if down.requires_grad else (down.data_ptr(), down.shape, down.stride(), down.dtype)
        if one.dropout:
            found.append(None)
            continue
        if key not in places:
            places[key] = slice(end, end + down.shape[0])
            end += down.shape[0]
        found.append(places[key])
    return tuple(found)


def _split(fixed: _Fixed, flat: Sequence[Tensor | None]) -> list[_Tensors]:
    result, start = [], 0
    for count in fixed.counts:
        down, up, gain, bias = flat[start : start + OWN]
        stored = flat[start + OWN : start + OWN + count]
        assert down is not None and up is not None
        result.append(_Tensors(down, up, gain, bias, tuple(each for each in stored if each is not None)))
        start += OWN + count
    return result


def _stacked(fixed: _Fixed, downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """[A₁; A₂; …] of the members without dropout."""
    parts, end = [], 0
    for columns, down in zip(fixed.columns, downs, strict=True):
        if columns is not None and columns.start == end:
            parts.append(down.to(dtype))
            end = columns.stop
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Made(NamedTuple):
    """What one member's forward pass made.

    Attributes:
        y: its output.
        h, mask: H and mask of its own if it has dropout.
        whole: y before its gain, if it has one.
        merged: W + s B A, if that is kept.
    """

    y: Tensor
    h: Tensor | None
    mask: Tensor | None
    whole: Tensor | None
    merged: Tensor | None


def _forward(
    x: Tensor, fixed: _Fixed, tensors: Sequence[_Tensors], *, early: bool
) -> tuple[Tensor | None, list[_Made]]:
    """([H₁ H₂ …], what each made); `early`: H is wanted in the merged order too."""
    rows, dtype = as_rows(x, fixed.dtype), fixed.dtype
    stacked = _stacked(fixed, [one.down for one in tensors], dtype) if early or not fixed.merged else None
    together = None if stacked is None else rows @ stacked.t()
    made = []
    for index, one in enumerate(tensors):
        bias, columns, dropout = typed(one.bias, dtype), fixed.columns[index], fixed.dropouts[index]
        weight, scale = fixed.frozen[index].form(one.stored, dtype), fixed.scales[index]
        own = mask = None
        if fixed.merged:
            weight = formed(weight, one.down, one.up, scale, kept=fixed.kept)
        y = F.linear(rows, weight, bias)
        if columns is None:
            mask = keep_mask(rows, dropout)
            own = masked_product(rows, mask, one.down.to(dtype))
            y = added(y, own, one.up.to(dtype).t(), scale)
        elif not fixed.merged:
            assert together is not None
            y = added(y, together[:, columns], one.up.to(dtype).t(), scale)
        whole = None if one.gain is None else y
        made.append(_Made(scaled(y, one.gain, bias), own, mask, whole, weight if fixed.kept and fixed.merged else None))
    return together, made


class _Siblings(torch.autograd.Function):
    """dHᵢ = s dyᵢ Bᵢ; dBᵢ = s dyᵢᵀ Hᵢ; [dA₁; dA₂; …] = [dH₁ dH₂ …]ᵀ x; dx as above, dyᵢ times gᵢ first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *flat: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors = _split(fixed, flat)
        needs = _needs(ctx, fixed)
        need_down, need_up = any(need[1] for need in needs), any(need[2] for need in needs)
        together, made = _forward(x, fixed, tensors, early=need_up and not need_down)
        kept: list[Tensor | None] = []
        for one, each, need in zip(made, tensors, needs, strict=True):
            bias = None if each.gain is None else typed(each.bias, fixed.dtype)
            whole = one.whole if need[3] else None
            merged = one.merged if need[0] else None
            kept += (each.down, each.up, each.gain, bias, one.h, one.mask, whole, merged, *each.stored)
        # A frozen A needs no x in the backward pass: then r numbers a token are kept instead of `in`.
        ctx.save_for_backward(x if need_down else None, together, *kept)
        ctx.fixed, ctx.x = fixed, (x.shape, x.dtype)
        return tuple(shaped(x, one.y) for one in made)

    @staticmethod
    @as_forward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, together, *kept = ctx.saved_tensors
        parts, start = [], 0
        for count in ctx.fixed.counts:
            parts.append(_Part._make([*kept[start : start + KEPT], tuple(kept[start + KEPT : start + KEPT + count])]))
            start += KEPT + count
        work = _Backward(ctx, x, together, parts)
        dx, own = work.twice(grads) if torch.is_grad_enabled() else work.once(grads)
        result: list[Tensor | None] = [dx, None]
        for three, part in zip(own, parts, strict=True):
            result += (*three, None, *(None for _ in part.stored))
        return tuple(result)


class _Part(NamedTuple):
    """What is kept of one member for the backward pass."""

    down: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None
    h: Tensor | None
    mask: Tensor | None
    whole: Tensor | None
    merged: Tensor | None
    stored: tuple[Tensor, ...]


def _needs(ctx: Any, fixed: _Fixed) -> list[tuple[bool, bool, bool, bool]]:
    """For each member whether the gradients by x, A, B and g are asked for."""
    asked, start, result = ctx.needs_input_grad, 2, []
    for count in fixed.counts:
        result.append((asked[0], asked[start], asked[start + 1], asked[start + 2]))
        start += OWN + count
    return result


_Own = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients by A, B and g of one member."""


class _Backward:
    """One backward pass."""

    def __init__(self, ctx: Any, x: Tensor | None, together: Tensor | None, parts: Sequence[_Part]) -> None:
        self.fixed: _Fixed = ctx.fixed
        self.shape, self.kind = ctx.x
        self.x, self.together, self.parts = x, together, parts
        self.needs = _needs(ctx, self.fixed)
        self.need_x = bool(ctx.needs_input_grad[0])
        self.dx: Tensor | None = None
        self.dh: Tensor | None = None
        self.written: set[int] = set()

    def once(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, list[_Own]]:
        """The gradients by x, and by what is each member's own."""
        stacked = _stacked(self.fixed, [part.down for part in self.parts], self.fixed.dtype)
        if self.together is None and stacked is not None and self.x is not None:
            self.together = as_rows(self.x, stacked.dtype) @ stacked.t()
        if self.together is not None:
            self.dh = torch.empty_like(self.together)
        own = [(None, None, None) if dy is None else self._member(index, dy) for index, dy in enumerate(grads)]
        if self.dh is None:
            return self._shaped(), own
        for columns in self.fixed.columns:
            if columns is not None and columns.start not in self.written:
                self.dh[:, columns].zero_()
        if self.dx is not None and not self.fixed.merged:
            assert stacked is not None
            self.dx = added(self.dx, self.dh, stacked)
        return self._shaped(), self._with_downs(own, grads)

    def _member(self, index: int, grad: Tensor) -> _Own:
        part, columns = self.parts[index], self.fixed.columns[index]
        scale = self.fixed.scales[index]
        _, need_down, need_up, need_gain = self.needs[index]
        dy = grad.reshape(-1, grad.shape[-1])
        up = part.up.to(dy.dtype)
        dgain = dup = ddown = dh = None
        if need_gain:
            assert part.gain is not None and part.whole is not None
            dgain = gain_gradient(dy, part.whole, part.bias, part.gain.dtype)
        if need_down or (self.need_x and not (self.fixed.merged and columns is not None)):
            b = up if part.gain is None else rows_times(up, part.gain)
            if columns is None:
                dh = product(dy, b, scale)
            else:
                self._into(columns, dy, b, scale)
        if need_up:
            dup = up_gradient(dy, self._h(index), scale, part.gain, part.up)
        if self.need_x:
            self.dx = through(dy, self._weight(index), part.gain, self.dx)
        if part.mask is not None and dh is not None:
            if need_down:
                assert self.x is not None
                ddown = masked_outer(dh, as_rows(self.x, dy.dtype), part.mask).to(part.down.dtype)
            if self.dx is not None:
                add_masked_product_(self.dx, dh, part.down.to(dy.dtype), part.mask)
        return ddown, dup, dgain

    def _weight(self, index: int) -> Tensor:
        part = self.parts[index]
        if part.merged is not None:
            return part.merged
        weight = self.fixed.frozen[index].form(part.stored, self.fixed.dtype)
        if not self.fixed.merged:
            return weight
        return formed(weight, part.down, part.up, self.fixed.scales[index], kept=False)

    def _h(self, index: int) -> Tensor:
        own, columns = self.parts[index].h, self.fixed.columns[index]
        if own is not None:
            return own
        assert self.together is not None
        return self.together[:, columns]

    def _into(self, columns: slice, dy: Tensor, b: Tensor, scale: float) -> None:
        """Writes s dy B into its columns, on top of that of another member with the same A."""
        assert self.dh is not None
        into = self.dh[:, columns]
        torch.addmm(into, dy, b, beta=1 if columns.start in self.written else 0, alpha=scale, out=into)
        self.written.add(columns.start)

    def _with_downs(self, own: list[_Own], grads: Sequence[Tensor | None]) -> list[_Own]:
        wanted_by = [
            columns is not None and need[1] and grad is not None
            for columns, need, grad in zip(self.fixed.columns, self.needs, grads, strict=True)
        ]
        if not any(wanted_by):
            return own
        assert self.x is not None and self.dh is not None
        every = self.dh.t() @ as_rows(self.x, self.dh.dtype)
        return [
            (every[columns].to(part.down.dtype), dup, dgain) if want and columns is not None else (ddown, dup, dgain)
            for want, columns, part, (ddown, dup, dgain) in zip(
                wanted_by, self.fixed.columns, self.parts, own, strict=True
            )
        ]

    def _shaped(self) -> Tensor | None:
        return None if self.dx is None else self.dx.view(self.shape).to(self.kind)

    def twice(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, list[_Own]]:
        """The same, in a way that can be differentiated again."""
        dx: Tensor | None = None
        own: list[_Own] = []
        for index, (part, grad) in enumerate(zip(self.parts, grads, strict=True)):
            if grad is None:
                own.append((None, None, None))
                continue
            operands = Operands(self.x, part.mask, part.down, part.up, part.gain, part.bias)
            weight = self.fixed.frozen[index].form(part.stored, self.fixed.dtype).clone()
            by_x, ddown, dup, dgain = twice(operands, weight, self.fixed.scales[index], grad, self.needs[index])
            dx = by_x if dx is None else (dx if by_x is None else dx + by_x)
            own.append((ddown, dup, dgain))
        return dx, own
