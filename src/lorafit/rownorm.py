"""Lengths of the rows of W + Δ, and their angles to those of W, without forming Δ: the plain functions.

With Δ = up down, and ∘ the elementwise product, row by row:

    ‖W + Δ‖² = ‖W‖² + 2 ⟨W, Δ⟩ + ‖Δ‖²,   ⟨W, Δ⟩ = Σ (W downᵀ) ∘ up,   ‖Δ‖² = Σ (up (down downᵀ)) ∘ up

which needs numbers of the size of `up` where Δ would need those of W. A row in which Δ cancels nearly all of W would
keep no correct digit that way: such rows are formed after all. Nothing here records gradients.

Everything is computed in at least single precision, whatever autocast says; a weight of lower precision is converted a
slice at a time. (Where torch was told to multiply float32 as TF32, these products are TF32's too.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lorafit.delta import Delta, Dense, LowRank
from lorafit.errors import MergeError

CANCELS = 1e-2
"""A row is formed where ‖W + Δ‖² is a smaller part than this of ‖W‖² + ‖Δ‖²: at most two digits are lost elsewhere."""
WORST = 32
"""How many rows are looked at where a program may not branch on values."""
SLICE = 2**22
"""About how many numbers of a weight are converted or formed at a time."""

P = ParamSpec("P")
T = TypeVar("T")


def _exactly(function: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """Without gradients, and without the low precision of an autocast around it."""

    @wraps(function)
    def plain(weight: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), _no_autocast(weight):
            return function(weight, *args, **kwargs)

    return plain


def _no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    rows = max(1, SLICE // max(1, weight.shape[1]))
    return (part.to(dtype) for part in torch.split(weight, rows))


def at_least_single(weight: Tensor) -> torch.dtype:
    """The precision in which lengths of this weight's rows are computed unless another is asked for."""
    return torch.promote_types(weight.dtype, torch.float32)


@_exactly
def row_squares(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """‖W‖² of each row of a matrix (out, in), as (out,)."""
    dtype = dtype or at_least_single(weight)
    return torch.cat([part.square().sum(dim=1) for part in _slices(weight, dtype)])


@_exactly
def row_products(weight: Tensor, delta: Delta, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(⟨W, Δ⟩, ‖Δ‖²) of each row, two times (out,).

    Raises:
        MergeError: Δ is no change of this matrix, since it mixes the groups of a convolution.
    """
    dtype = dtype or at_least_single(weight)
    delta = delta.to(dtype)
    if isinstance(delta, Dense):
        parts = zip(_slices(weight, dtype), _slices(delta.matrix, dtype), strict=True)
        both = [(torch.sum(w * d, dim=1), d.square().sum(dim=1)) for w, d in parts]
        return torch.cat([cross for cross, _ in both]), torch.cat([own for _, own in both])
    assert isinstance(delta, LowRank)
    up, down = _blocks(weight, delta)
    if delta.groups == 1:
        projected = torch.cat([part @ down[0].t() for part in _slices(weight, dtype)])[None]
    else:
        projected = torch.bmm(_grouped(weight.to(dtype), delta.groups), down.mT)
    cross = (projected * up).sum(dim=-1)
    own = (torch.bmm(up, torch.bmm(down, down.mT)) * up).sum(dim=-1)
    return cross.flatten(), own.flatten().clamp(min=0)


def row_norm(
    weight: Tensor, delta: Delta | None = None, *, squares: Tensor | None = None, branch: bool = True
) -> Tensor:
    """‖W + Δ‖ of each row.

    Args:
        weight: W, (out, in).
        delta: Δ, or None for ‖W‖.
        squares: ‖W‖² if it is known.
        branch: look whether any row cancels, and form all those that do: one synchronisation with the device. Without
            it (in compiled programs) the `WORST` rows that cancel most are formed always, and no others.

    Returns:
        (out,), never negative, without a gradient; exactly ‖W‖ where Δ is zero.

    Raises:
        MergeError: Δ is no change of this matrix, since it mixes the groups of a convolution.
    """
    squares = row_squares(weight) if squares is None else squares
    if delta is None:
        return squares.sqrt()
    cross, own = row_products(weight, delta)
    return _sum(weight, delta, squares, cross, own, branch=branch).sqrt()


@_exactly
def _sum(weight: Tensor, delta: Delta, squares: Tensor, cross: Tensor, own: Tensor, *, branch: bool) -> Tensor:
    total = (squares + 2 * cross + own).clamp(min=0)
    share = total / (squares + own)  # not a number in a row of zeros, which nothing is less than
    if branch:
        found = (share < CANCELS).nonzero().flatten()
        rows = max(1, SLICE // max(1, weight.shape[1]))
        for part in torch.split(found, rows) if len(found) else ():
            total[part] = _formed(weight, delta, part)
        return total
    worst = share.nan_to_num(nan=1.0).topk(min(WORST, len(total)), largest=False).indices
    exact = torch.where(share[worst] < CANCELS, _formed(weight, delta, worst), total[worst])
    return total.index_copy(0, worst, exact)


def _formed(weight: Tensor, delta: Delta, rows: Tensor) -> Tensor:
    """‖W + Δ‖² of some rows, by forming them."""
    dtype = at_least_single(weight)
    if isinstance(delta, Dense):
        change = delta.matrix[rows].to(dtype)
    else:
        assert isinstance(delta, LowRank)
        up, down = _blocks(weight, delta.to(dtype))
        own = up.flatten(0, 1)[rows]
        change = own @ down[0] if delta.groups == 1 else torch.bmm(own[:, None], down[rows // up.shape[1]])[:, 0]
    return (weight[rows].to(dtype) + change).square().sum(dim=1)


def _blocks(weight: Tensor, delta: LowRank) -> tuple[Tensor, Tensor]:
    """(up, down) as (groups, out / groups, r / groups) and (groups, r / groups, in), all factors in them."""
    up, down = delta.fold()
    if down.shape[1] != weight.shape[1]:
        raise MergeError(
            "this adapter mixes the groups of a grouped convolution, which no change of its weight can do: "
            "its rows have no length",
            found=f"a change with {down.shape[1]} columns",
            expected=f"{weight.shape[1]} columns: the channels of one group times the kernel",
            fix="train it again here: then each group has its own part of A",
        )
    return _grouped(up, delta.groups), _grouped(down, delta.groups)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    return matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1])
