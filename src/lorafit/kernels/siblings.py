"""Several linear layers with updates that read the same x, such as q, k and v of attention, as one operation.

What each computes is that of `lorafit.kernels.linear`. Together they read x once for all H = x [A₁; A₂; …]ᵀ and once
for all dA, and sum dx where it lies, for which autograd would add up the layers' own in as many passes:
dx = Σ dyᵢ Wᵢ + [dH₁ dH₂ …] [A₁; A₂; …]. A frozen A that all share (VeRA's) is multiplied once.

With dropout one mask is drawn for all of them: x is dropped once, as in the layers for merged q, k and v of
Microsoft's loralib (`loralib.MergedLinear`). Each layer's update sees what it would see alone.
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
    rows_times,
    scaled,
    through,
    twice,
    typed,
    up_gradient,
)
from lorafit.kernels.precision import as_forward, own_precision, wanted
from lorafit.kernels.scratch import shaped


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
        frozen, scales: theirs; s divided by 1 - p.
        counts: how many tensors each frozen weight is.
        columns: which columns of [H₁ H₂ …] are whose.
        dropout: p.
        dtype: of the operation.
        kept, merged: the order, as `lorafit.kernels.linear.order` gives it for one layer.
    """

    frozen: tuple[Frozen, ...]
    scales: tuple[float, ...]
    counts: tuple[int, ...]
    columns: tuple[slice, ...]
    dropout: float
    dtype: torch.dtype
    kept: bool
    merged: bool


class _Tensors(NamedTuple):
    """One member's: those that it came with, and those that its forward pass made.

    Attributes:
        whole: y before its gain, for the gradient of g.
        merged: W + s B A, if that is kept for the backward pass.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None
    whole: Tensor | None
    merged: Tensor | None
    stored: tuple[Tensor, ...]


GIVEN, KEPT = 4, 6
"""Tensors of a member before those of its frozen weight: as they come, and as they are kept."""


def siblings(x: Tensor, members: Sequence[Member]) -> list[Tensor] | None:
    """The outputs of layers that read the same x; None for layers that differ in type or dropout.

    Args:
        x: (..., in).
        members: at least two layers.

    Returns:
        For each member what `Member.alone` gives, up to the rounding of sums; with dropout, for the same mask.
    """
    first = members[0]
    dtype, own = wanted(x, first.frozen.dtype), first.frozen.dtype
    if any(one.frozen.dtype != own or one.dropout != first.dropout for one in members):
        return None
    if dtype != own:
        with own_precision(x.device):
            return _apply(x, members, dtype)
    return _apply(x, members, dtype)


def spent(output: Tensor) -> bool:
    """Whether an output of `siblings` went through a backward pass: what that needs of the others is gone."""
    return output.grad_fn is not None and bool(output.grad_fn.spent)  # type: ignore[attr-defined]


def order(columns: Sequence[slice], members: Sequence[Member], tokens: int, dtype: torch.dtype) -> tuple[bool, bool]:
    """(kept, merged) for all members: as for one layer, but for x, which all read together.

    Args:
        columns: which of [H₁ H₂ …] are whose.
        members: the layers.
        tokens: rows of x.
        dtype: of the operation.
    """
    if not all(allows(one.frozen, dtype, one.dropout) for one in members):
        return False, False
    widths, inn = [one.down.shape[0] for one in members], members[0].frozen.shape[1]
    outs = [one.frozen.shape[0] for one in members]
    reading = inn * (max(each.stop for each in columns) + ADDING)
    adding = tokens * (reading + sum(out * (r + ADDING) for out, r in zip(outs, widths, strict=True)))
    forming = sum(inn * out * (r + FORMING) for out, r in zip(outs, widths, strict=True))
    kept = min(widths) > KEEP * tokens and inn <= tokens
    return kept, adding > (1 if kept else 2) * forming


def _apply(x: Tensor, members: Sequence[Member], dtype: torch.dtype) -> list[Tensor]:
    flat: list[Tensor | None] = []
    for one in members:
        flat += (one.down, one.up, one.gain, one.bias, *one.frozen.tensors)
    columns, dropout = _columns(members), members[0].dropout
    fixed = _Fixed(
        tuple(one.frozen for one in members),
        tuple(one.scale / (1 - dropout) for one in members),
        tuple(len(one.frozen.tensors) for one in members),
        columns,
        dropout,
        dtype,
        *order(columns, members, x.numel() // max(1, x.shape[-1]), dtype),
    )
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *flat)):
        outputs: tuple[Tensor, ...] = _Siblings.apply(x, fixed, *flat)  # type: ignore[no-untyped-call]
        return list(outputs)
    return [shaped(x, y) for y in _forward(x, fixed, _given(fixed, flat), early=False).outputs]


def _columns(members: Sequence[Member]) -> tuple[slice, ...]:
    """Where in [H₁ H₂ …] the columns of each are; a frozen A that is the same memory has one place."""
    places: dict[object, slice] = {}
    found: list[slice] = []
    end = 0
    for index, one in enumerate(members):
        down = one.down
        key: object = index if down.requires_grad else (down.data_ptr(), down.shape, down.stride(), down.dtype)
        if key not in places:
            places[key] = slice(end, end + down.shape[0])
            end += down.shape[0]
        found.append(places[key])
    return tuple(found)


def _given(fixed: _Fixed, flat: Sequence[Any]) -> list[_Tensors]:
    result, start = [], 0
    for count in fixed.counts:
        end = start + GIVEN
        result.append(_Tensors._make([*flat[start:end], None, None, tuple(flat[end : end + count])]))
        start = end + count
    return result


def _stacked(fixed: _Fixed, tensors: Sequence[_Tensors]) -> Tensor:
    """[A₁; A₂; …]."""
    parts, end = [], 0
    for columns, one in zip(fixed.columns, tensors, strict=True):
        if columns.start == end:
            parts.append(one.down.to(fixed.dtype))
            end = columns.stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Made(NamedTuple):
    """What a forward pass made: y of each, and before its gain; [H₁ H₂ …]; the mask; W + s B A where it is kept."""

    outputs: list[Tensor]
    wholes: list[Tensor]
    together: Tensor | None
    mask: Tensor | None
    merged: list[Tensor | None]


def _forward(x: Tensor, fixed: _Fixed, tensors: Sequence[_Tensors], *, early: bool) -> _Made:
    """One forward pass; `early`: H is wanted in the merged order too."""
    rows, dtype = as_rows(x, fixed.dtype), fixed.dtype
    mask = keep_mask(rows, fixed.dropout) if fixed.dropout else None
    together = None
    if early or not fixed.merged:
        stacked = _stacked(fixed, tensors)
        together = rows @ stacked.t() if mask is None else masked_product(rows, mask, stacked)
    made = _Made([], [], together, mask, [])
    for frozen, scale, columns, one in zip(fixed.frozen, fixed.scales, fixed.columns, tensors, strict=True):
        bias, weight = typed(one.bias, dtype), frozen.form(one.stored, dtype)
        if fixed.merged:
            weight = formed(weight, one.down, one.up, scale, kept=fixed.kept)
        y = F.linear(rows, weight, bias)
        if not fixed.merged:
            assert together is not None
            y = added(y, together[:, columns], one.up.to(dtype).t(), scale)
        made.outputs.append(scaled(y, one.gain, bias))
        made.wholes.append(y)
        made.merged.append(weight if fixed.merged and fixed.kept else None)
    return made


class _Siblings(torch.autograd.Function):
    """dHᵢ = s dyᵢ Bᵢ; dBᵢ = s dyᵢᵀ Hᵢ; [dA₁; dA₂; …] = [dH₁ dH₂ …]ᵀ x; dx as above, dyᵢ times gᵢ first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *flat: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors, needs = _given(fixed, flat), _needs(ctx, fixed)
        need_down, need_up = any(need.down for need in needs), any(need.up for need in needs)
        made = _forward(x, fixed, tensors, early=need_up and not need_down)
        kept: list[Tensor | None] = []
        for one, need, whole, merged in zip(tensors, needs, made.wholes, made.merged, strict=True):
            kept += (one.down, one.up, one.gain, None if one.gain is None else typed(one.bias, fixed.dtype))
            kept += (whole if need.gain else None, merged if need.x else None, *one.stored)
        # A frozen A needs no x in the backward pass: then r numbers a token are kept instead of `in`.
        ctx.save_for_backward(x if need_down else None, made.together, made.mask, *kept)
        ctx.fixed, ctx.x, ctx.spent = fixed, (x.shape, x.dtype), False
        return tuple(shaped(x, y) for y in made.outputs)

    @staticmethod
    @as_forward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.spent = True
        x, together, mask, *kept = ctx.saved_tensors
        parts, start = [], 0
        for count in ctx.fixed.counts:
            end = start + KEPT
            parts.append(_Tensors._make([*kept[start:end], tuple(kept[end : end + count])]))
            start = end + count
        work = _Backward(ctx, x, together, mask, parts)
        dx, own = work.twice(grads) if torch.is_grad_enabled() else work.once(grads)
        result: list[Tensor | None] = [dx, None]
        for gradients, part in zip(own, parts, strict=True):
            result += (*gradients, None, *(None for _ in part.stored))
        return tuple(result)


class _Needs(NamedTuple):
    """Which gradients of a member are asked for."""

    x: bool
    down: bool
    up: bool
    gain: bool


def _needs(ctx: Any, fixed: _Fixed) -> list[_Needs]:
    asked, start, result = ctx.needs_input_grad, 2, []
    for count in fixed.counts:
        result.append(_Needs(asked[0], *asked[start : start + 3]))
        start += GIVEN + count
    return result


class _Own(NamedTuple):
    """The gradients by what is a member's own."""

    down: Tensor | None = None
    up: Tensor | None = None
    gain: Tensor | None = None


class _Backward:
    """One backward pass."""

    def __init__(
        self, ctx: Any, x: Tensor | None, together: Tensor | None, mask: Tensor | None, parts: Sequence[_Tensors]
    ) -> None:
        self.fixed: _Fixed = ctx.fixed
        self.shape, self.kind = ctx.x
        self.x, self.together, self.mask, self.parts = x, together, mask, parts
        self.needs = _needs(ctx, self.fixed)
        self.need_down = any(need.down for need in self.needs)
        self.need_x = bool(ctx.needs_input_grad[0])
        self.dx: Tensor | None = None
        self.dh: Tensor | None = None
        self.written: set[int] = set()

    def once(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, list[_Own]]:
        """The gradients by x, and by what is each member's own."""
        through_h = self.need_x and not self.fixed.merged
        stacked = _stacked(self.fixed, self.parts) if through_h or self.together is None else None
        if self.together is None and self.x is not None:
            assert stacked is not None
            self.together = as_rows(self.x, stacked.dtype) @ stacked.t()
        if self.together is not None and (self.need_down or through_h):
            self.dh = torch.empty_like(self.together)
        own = [_Own() if dy is None else self._member(index, dy) for index, dy in enumerate(grads)]
        if self.dh is not None:
            for columns in self.fixed.columns:
                if columns.start not in self.written:
                    self.dh[:, columns].zero_()
            if self.dx is not None and stacked is not None and through_h:
                self._add_through_h(self.dx, self.dh, stacked)
            if self.need_down:
                own = self._with_downs(own, grads)
        return None if self.dx is None else self.dx.view(self.shape).to(self.kind), own

    def _add_through_h(self, dx: Tensor, dh: Tensor, stacked: Tensor) -> None:
        if self.mask is None:
            self.dx = added(dx, dh, stacked)
        else:
            add_masked_product_(dx, dh, stacked, self.mask)

    def _member(self, index: int, grad: Tensor) -> _Own:
        part, columns, scale = self.parts[index], self.fixed.columns[index], self.fixed.scales[index]
        dy = grad.reshape(-1, grad.shape[-1])
        dgain = dup = None
        if self.needs[index].gain:
            assert part.gain is not None and part.whole is not None
            dgain = gain_gradient(dy, part.whole, part.bias, part.gain.dtype)
        if self.dh is not None:
            b = part.up.to(dy.dtype)
            b, into = b if part.gain is None else rows_times(b, part.gain), self.dh[:, columns]
            again = columns.start in self.written  # on top of that of another member with the same A
            torch.addmm(into, dy, b, beta=1 if again else 0, alpha=scale, out=into)
            self.written.add(columns.start)
        if self.needs[index].up:
            assert self.together is not None
            dup = up_gradient(dy, self.together[:, columns], scale, part.gain, part.up)
        if self.need_x:
            self.dx = through(dy, self._weight(index), part.gain, self.dx)
        return _Own(None, dup, dgain)

    def _weight(self, index: int) -> Tensor:
        part = self.parts[index]
        if part.merged is not None:
            return part.merged
        weight = self.fixed.frozen[index].form(part.stored, self.fixed.dtype)
        if not self.fixed.merged:
            return weight
        return formed(weight, part.down, part.up, self.fixed.scales[index], kept=False)

    def _with_downs(self, own: Sequence[_Own], grads: Sequence[Tensor | None]) -> list[_Own]:
        assert self.x is not None and self.dh is not None
        rows = as_rows(self.x, self.dh.dtype)
        every = self.dh.t() @ rows if self.mask is None else masked_outer(self.dh, rows, self.mask)
        return [
            one._replace(down=every[columns].to(part.down.dtype)) if need.down and dy is not None else one
            for one, columns, part, need, dy in zip(own, self.fixed.columns, self.parts, self.needs, grads, strict=True)
        ]

    def twice(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, list[_Own]]:
        """The same, in a way that can be differentiated again."""
        dx: Tensor | None = None
        own: list[_Own] = []
        for index, (part, grad) in enumerate(zip(self.parts, grads, strict=True)):
            if grad is None or not any(self.needs[index]):
                own.append(_Own())
                continue
            operands = Operands(self.x, self.mask, part.down, part.up, part.gain, part.bias)
            weight = self.fixed.frozen[index].form(part.stored, self.fixed.dtype).clone()
            by_x, *rest = twice(operands, weight, self.fixed.scales[index], grad, self.needs[index])
            dx = by_x if dx is None or by_x is None else dx + by_x
            own.append(_Own(*rest))
        return dx, own
