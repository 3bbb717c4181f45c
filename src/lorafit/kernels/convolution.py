"""A convolution with its update as one operation: y = g ∘ (W * x + s E (A * (x ∘ mask))) + b, W and b frozen.

`*` is the layer's convolution and E a product at each position (a 1 × 1 convolution). The plain twin is
`lorafit.layers.apply` on a convolution's site. Three ways give the same numbers, and the one with the least work
is taken (`order`):

- low-rank: s E H is added to the layer's own output in place, H = A * (x ∘ mask). Kept for the backward pass: x (where
  A is trained), H, a mask of one byte a number where there is dropout, the output before g where g is trained.
- merged: W' = W + s E A is formed and there is no other convolution; H is formed on the way back. Kept: x, and the
  output before g where g is trained.
- merged, by the whole gradient: dE and dA follow from G = dL/dW', which costs what the layer costs and is less than two
  thin convolutions where r is large or the layer has many groups. Kept: x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafit.errors import StateError
from lorafit.kernels.geometry import Geometry, channels_last, in_order
from lorafit.kernels.masks import keep_mask
from lorafit.kernels.pointwise import added_upward, downward, outer
from lorafit.kernels.precision import as_forward, own_precision, wanted
from lorafit.kernels.scratch import recorded, scratch

FULL = (torch.float32, torch.float64)
"""Types in which a small change of a weight is not rounded away."""

GRAIN = {"cpu": 16}
"""Channels of a group that a device computes together, by its type: fewer cost as much, as measured."""


class Order(NamedTuple):
    """Whether W' is formed, and whether the gradients come from that of the whole of W'."""

    merged: bool = False
    whole: bool = False


class _Fixed(NamedTuple):
    """What of a convolution is no tensor."""

    geometry: Geometry
    thin: Geometry
    scale: float
    dropout: float
    source: torch.dtype
    kind: torch.dtype
    order: Order


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    geometry: Geometry,
    *,
    gain: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """A convolution with a low-rank update.

    Args:
        x: (N, channels, *size), or one sample without N.
        weight: W (out, channels / groups, *kernel), frozen.
        bias: b (out,), frozen, or None.
        down: A (r, channels / groups · kernel); with the channels of all groups it mixes them.
        up: E (out, r / groups), all vectors folded in.
        scale: s.
        geometry: strides, padding, dilation and groups.
        gain: g (out,), or None for ones.
        dropout: probability with which each number of x is dropped on its way into A.

    Returns:
        (N, out, *size'), in the type and the order of memory that the layer itself would give.

    Raises:
        StateError: second derivatives are asked for where x was not kept.
    """
    if x.dim() == weight.dim() - 1:
        options: dict[str, Any] = {"gain": gain, "dropout": dropout}
        return convolution(x.unsqueeze(0), weight, bias, down, up, scale, geometry, **options).squeeze(0)
    channels = down.shape[1] // weight[0, 0].numel()
    a = down.reshape(down.shape[0], channels, *weight.shape[2:])
    kind = wanted(x, weight.dtype)
    how = Order() if dropout or kind not in FULL else order(x, weight, a, up, gain, geometry)
    # PEFT's A sees the channels of all groups of W.
    thin = geometry._replace(groups=weight.shape[1] * geometry.groups // channels)
    fixed = _Fixed(geometry, thin, scale, dropout, wanted(x, x.dtype), kind, how)
    function = _Merged if how.merged else _LowRank
    with own_precision(x.device):
        result: Tensor = function.apply(x, a, up, gain, bias, weight, fixed)  # type: ignore[no-untyped-call]
    return result


def order(x: Tensor, weight: Tensor, a: Tensor, up: Tensor, gain: Tensor | None, geometry: Geometry) -> Order:
    """The way with the least work, the layer's own left out, for W of full precision without dropout.

    What changes how the output is rounded depends on shapes alone, as if all were trained: an adapter has the same
    output, bit for bit, while it is trained, when it is evaluated and when it was loaded.
    """
    if a.shape[1] != weight.shape[1] or x.dim() != weight.dim():
        return Order()
    inn, places = weight[0].numel(), geometry.positions(tuple(x.shape), tuple(weight.shape[2:]))
    # A convolution with A and a product with E, forward; then twice as much for dE, dH, dA and dx. Merged, W' is formed
    # twice, and one of the three is left out: H is formed on the way back.
    grain, r = GRAIN.get(x.device.type, 1), max(1, up.shape[1])
    times = -(-r // grain) * grain / r
    thin, form = times * places * (a.shape[0] * inn + up.numel()), up.numel() * inn
    trained = 2 if gain is not None else int(a.requires_grad) + int(up.requires_grad)
    whole = places * weight.numel() + form * trained < thin * trained
    if gain is None and not a.requires_grad:
        whole = whole and x.numel() <= places * a.shape[0]  # H is what is kept otherwise
    return Order(merged=min(2 * form, places * weight.numel() + 4 * form - 2 * thin) < thin, whole=whole)


class _LowRank(torch.autograd.Function):
    """The low-rank order: dH = s Eᵀ dy, dE = s dy Hᵀ; dA and dx by the layer's convolution backwards, dy times g first.

    (Hu et al. 2021, eq. 3, differentiated.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        up: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        fixed: _Fixed,
    ) -> Tensor:
        _, need_a, _, need_gain, *_ = ctx.needs_input_grad
        geometry, thin, scale, dropout, _, kind, _ = fixed
        source = x.to(fixed.source)
        b = None if bias is None else bias.to(kind)
        padded = geometry.padded(source)
        y = geometry.convolve(padded, weight.to(kind), b)
        mask = _mask(source, dropout) if dropout else None
        h = thin.convolve(padded if mask is None else geometry.padded(source * mask), a.to(kind))
        y = added_upward(y, h, up.to(kind), scale / (1 - dropout), geometry.groups)
        whole = y if need_gain else None
        if gain is not None:
            y = _scaled(y, gain, b, kept=need_gain)
        ctx.save_for_backward(x if need_a else None, h, mask, a, up, gain, bias, whole, weight)
        ctx.fixed, ctx.x, ctx.last = fixed, (x.shape, x.dtype), channels_last(y)
        return y

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, mask, a, up, gain, bias, whole, weight = ctx.saved_tensors
        need_x, need_a, need_up, need_gain, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _twice(ctx, grad, _Operands(x, mask, a, up, gain, bias, weight))
        geometry, thin, scale, dropout, _, kind, _ = ctx.fixed
        scale = scale / (1 - dropout)
        dy, factor, e = in_order(grad, last=ctx.last), a.to(kind), _times(up, gain, scale).to(kind)
        dgain = _gain_gradient(dy, whole, bias, gain.dtype) if need_gain else None
        dup = _times(outer(dy, h, geometry.groups).to(up.dtype), gain, scale).to(up.dtype) if need_up else None
        dh = downward(dy, e, geometry.groups) if need_a or need_x else None
        da = dx = None
        if need_a:
            source = x.to(ctx.fixed.source)
            source = geometry.padded(source if mask is None else source * mask)
            da = thin.gradients(dh, source, factor, need_weight=True)[1].to(a.dtype)
        if need_x:
            dx = geometry.input_gradient(dy, _times(weight, gain).to(kind), ctx.x[0], x)
            part = thin.input_gradient(dh, factor, ctx.x[0], x)
            dx = dx.add_(part) if mask is None else dx.addcmul_(part, mask)
            dx = dx.to(ctx.x[1])
        return dx, da, dup, dgain, None, None, None


class _Merged(torch.autograd.Function):
    """The merged order: y = (g ∘ W') * x + b with W' = W + s E A.

    dx is that of one convolution. dE = s dy Hᵀ and dA as in the other order; or, with G = dL/d(g ∘ W'),
    dE = s (g ∘ G) Aᵀ, dA = s Eᵀ (g ∘ G) and dg = Σ G ∘ W'.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        up: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        fixed: _Fixed,
    ) -> Tensor:
        _, need_a, need_up, need_gain, *_ = ctx.needs_input_grad
        geometry, kind = fixed.geometry, fixed.kind
        b = None if bias is None else bias.to(kind)
        apart = gain is not None and not fixed.order.whole
        source = geometry.padded(x.to(fixed.source))
        merged = _merged(weight.to(kind), a.to(kind), up.to(kind), fixed)
        y = geometry.convolve(source, merged if apart else _times(merged, gain).to(kind), b)
        before = y if apart and need_gain else None
        if apart:
            assert gain is not None
            y = _scaled(y, gain, b, kept=before is not None)
        by_x = need_a or (fixed.order.whole and (need_up or need_gain))
        h = geometry.convolve(source, a.to(kind)) if need_up and not by_x else None
        ctx.save_for_backward(x if by_x else None, h, a, up, gain, bias, before, weight)
        ctx.fixed, ctx.x, ctx.last = fixed, (x.shape, x.dtype), channels_last(y)
        return y

    @staticmethod
    @as_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, up, gain, bias, before, weight = ctx.saved_tensors
        need_x, need_a, need_up, need_gain, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _twice(ctx, grad, _Operands(x, None, a, up, gain, bias, weight))
        geometry, _, scale, _, _, kind, how = ctx.fixed
        dy, factor, e = in_order(grad, last=ctx.last), a.to(kind), up.to(kind)
        merged = _merged(weight.to(kind), factor, e, ctx.fixed) if need_x or (need_gain and how.whole) else None
        source = None if x is None else geometry.padded(x.to(ctx.fixed.source))
        if how.whole and source is not None:
            scaled = weight if merged is None else _times(merged, gain).to(kind)
            dx, dwhole = geometry.gradients(dy, source, scaled, need_x=need_x, need_weight=True)
            assert dwhole is not None
            da, dup, dgain = _of_whole(dwhole, merged, factor, e, gain, ctx)
            dx = None if dx is None else geometry.unpadded(dx)
        else:
            da = dup = dx = None
            dgain = _gain_gradient(dy, before, bias, gain.dtype) if need_gain else None
            if need_up:
                h = geometry.convolve(source, factor) if h is None else h
                dup = _times(outer(dy, h, geometry.groups), gain, scale)
            if need_a:
                dh = downward(dy, _times(e, gain, scale).to(kind), geometry.groups)
                da = geometry.gradients(dh, source, factor, need_weight=True)[1]
            if merged is not None:
                dx = geometry.input_gradient(dy, _times(merged, gain).to(kind), ctx.x[0], x)
        dx = None if dx is None else dx.to(ctx.x[1])
        da, dup = None if da is None else da.to(a.dtype), None if dup is None else dup.to(up.dtype)
        return dx, da, dup, dgain, None, None, None


def _merged(weight: Tensor, a: Tensor, e: Tensor, fixed: _Fixed) -> Tensor:
    """W + s E A in the order of memory of W, in memory that the next call for any layer uses again."""
    groups, last = fixed.geometry.groups, not weight.is_contiguous() and channels_last(weight)
    if last:
        weight, a = weight.movedim(1, -1), a.movedim(1, -1)
    w = weight.reshape(groups, weight.shape[0] // groups, -1)
    ups, downs = e.reshape(groups, w.shape[1], -1), a.reshape(groups, -1, w.shape[2])
    into = None if recorded() else scratch("merged", tuple(w.shape), w.dtype, w.device)
    merged = torch.baddbmm(w, ups, downs, alpha=fixed.scale, out=into).view(weight.shape)
    return merged.movedim(-1, 1) if last else merged


def _of_whole(
    dwhole: Tensor, merged: Tensor | None, a: Tensor, e: Tensor, gain: Tensor | None, ctx: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dA, dE, dg) given G = dL/d(g ∘ W')."""
    _, need_a, need_up, need_gain, *_ = ctx.needs_input_grad
    groups, scale = ctx.fixed.geometry.groups, ctx.fixed.scale
    dgain = None
    if need_gain:
        assert gain is not None and merged is not None
        dgain = (dwhole * merged).flatten(1).sum(dim=1).to(gain.dtype)
    g = _times(dwhole, gain, scale).to(e.dtype).reshape(groups, e.shape[0] // groups, -1)
    ups, downs = e.reshape(groups, g.shape[1], -1), a.reshape(groups, -1, g.shape[2])
    dup = torch.bmm(g, downs.transpose(1, 2)).view(e.shape) if need_up else None
    da = torch.bmm(ups.transpose(1, 2), g).view(a.shape) if need_a else None
    return da, dup, dgain


def _mask(x: Tensor, dropout: float) -> Tensor:
    """A mask like x, in the order of its memory: 0 with probability `dropout`, else 1."""
    last = channels_last(x)
    flat = x.movedim(1, -1) if last else x
    width = flat.shape[-1] if last else flat[0, 0].numel() if flat.numel() else 1
    mask = keep_mask(flat.reshape(-1, max(1, width)), dropout).view(flat.shape)
    return mask.movedim(-1, 1) if last else mask


def _channel(v: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector over the dimension `dim` of a tensor, shaped to broadcast over it."""
    return v.view(-1, *(1 for _ in like.shape[dim + 1 :]))


def _times(t: Tensor, gain: Tensor | None, scale: float = 1.0) -> Tensor:
    """Gives scale · g ∘ t for t (out, ...), in a type that is as precise as both."""
    if gain is not None:
        t = t * _channel(gain, t, 0)
    return t if scale == 1 else t * scale


def _scaled(y: Tensor, gain: Tensor, bias: Tensor | None, *, kept: bool) -> Tensor:
    """Gives g ∘ (y − b) + b for y with its bias: y itself, bit for bit, where g is 1. g acts in its own precision.

    In the memory of y unless that is to be kept.
    """
    rest = None if bias is None else _channel(((1 - gain) * bias).to(y.dtype), y, 1)
    if recorded():  # what is recorded is not written to
        scaled = torch.mul(y, _channel(gain, y, 1)).to(y.dtype)
        return scaled if rest is None else scaled + rest
    scaled = torch.mul(y, _channel(gain, y, 1), out=torch.empty_like(y) if kept else y)
    return scaled if rest is None else scaled.add_(rest)


def _gain_gradient(dy: Tensor, before: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """Σ over positions of dy ∘ (y − b), summed in at least float32, for y with its bias but before g."""
    exact = torch.promote_types(dy.dtype, torch.float32)
    linear = before * dy if bias is None else (before - _channel(bias.to(before.dtype), dy, 1)).mul_(dy)
    return linear.sum(dim=[0, *range(2, dy.dim())], dtype=exact).to(kind)


class _Operands(NamedTuple):
    """What the plain twin is made of."""

    x: Tensor | None
    mask: Tensor | None
    a: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None
    weight: Tensor


def _twice(ctx: Any, grad: Tensor, operands: _Operands) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again: those of the plain twin."""
    if operands.x is None:
        raise StateError(
            "second derivatives through a convolution whose A is frozen need its input, which was not kept",
            fix="let A require gradients, or compute second derivatives on a detached model",
        )
    # Views: what is asked for is the gradient by this layer's own use of a tensor, not by that of layers before it.
    x, a, up = (each.view_as(each) for each in (operands.x, operands.a, operands.up))
    gain = None if operands.gain is None else operands.gain.view_as(operands.gain)
    geometry, thin, scale, dropout, _, kind, _ = ctx.fixed
    bias = None if operands.bias is None else operands.bias.to(kind)
    source = x.to(ctx.fixed.source)
    y = geometry.convolve(geometry.padded(source), operands.weight.to(kind), bias)
    dropped = source if operands.mask is None else source * operands.mask
    h = thin.convolve(geometry.padded(dropped), a.to(kind))
    ones = (1,) * (y.dim() - 2)
    point = Geometry(ones, (0,) * len(ones), ones, geometry.groups)
    y = y + point.convolve(h, up.to(kind).view(*up.shape, *ones)) * (scale / (1 - dropout))
    if gain is not None:
        linear = y if bias is None else y - _channel(bias, y, 1)
        y = y + ((_channel(gain, y, 1) - 1) * linear).to(kind)
    needed = [leaf for leaf, need in zip((x, a, up, gain), ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, needed, grad, create_graph=True))  # type: ignore[arg-type]
    return *(next(found) if need else None for need in ctx.needs_input_grad[:4]), None, None, None
