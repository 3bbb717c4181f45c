"""Lengths of the rows of W + Δ, and their angles to those of W, without forming Δ: the plain functions.

With Δ = up down, and ∘ the elementwise product, row by row:

    ‖W + Δ‖² = ‖W‖² + 2 ⟨W, Δ⟩ + ‖Δ‖²,   ⟨W, Δ⟩ = Σ (W downᵀ) ∘ up,   ‖Δ‖² = Σ (up (down downᵀ)) ∘ up

which needs numbers of the size of `up` where Δ would need those of W, and one product with W. A row in which Δ cancels
nearly all of W would keep no correct digit that way: such rows are formed after all. Nothing here records gradients.

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

CANCELS = 2e-2
"""A row is formed where ‖W + Δ‖² is a smaller part than this of ‖W‖²: at most two digits are lost elsewhere.

‖Δ‖ is at most ‖W‖ + ‖W + Δ‖: where this part is not small, neither is that of ‖W‖² + ‖Δ‖², in which digits are lost.
"""
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
    return _squares(weight, dtype or at_least_single(weight))


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
    projected, up, gram = _factored(weight, delta, dtype)
    cross, own = torch.linalg.vecdot(projected, up), torch.linalg.vecdot(up @ gram, up)
    return cross.flatten() * delta.scale, (own.flatten() * delta.scale**2).clamp(min=0)


@_exactly
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
        MergeError: Δ is no change of this matrix, since it mixes the groups of a grouped convolution.
    """
    dtype = at_least_single(weight)
    if isinstance(delta, Dense):
        parts = zip(_slices(weight, dtype), _slices(delta.matrix, dtype), strict=True)
        return torch.cat([(w + d).square().sum(dim=1) for w, d in parts]).sqrt()
    squares = _squares(weight, dtype) if squares is None else squares
    if delta is None:
        return squares.sqrt()
    assert isinstance(delta, LowRank)
    projected, up, gram = _factored(weight, delta.to(dtype), dtype)
    add = torch.addmm if delta.groups == 1 else torch.baddbmm
    change = torch.linalg.vecdot(add(projected, up, gram, beta=2, alpha=delta.scale), up)  # (2 ⟨W, Δ⟩ + ‖Δ‖²) / scale
    total = torch.add(squares, change.flatten(), alpha=delta.scale).clamp(min=0)
    return (_mended if branch else _mended_blindly)(weight, delta, squares, total).sqrt()


def _squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype and weight.numel() <= SLICE:
        return weight.square().sum(dim=1)
    return torch.cat([part.square().sum(dim=1) for part in _slices(weight, dtype)])


def _factored(weight: Tensor, delta: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(W downᵀ, up, down downᵀ), Δ's vectors in `up`; by group, as (groups, ...), where there are groups."""
    up, down = _alike(weight, delta)
    if delta.groups > 1:
        up, down, grouped = (_grouped(each, delta.groups) for each in (up, down, weight.to(dtype)))
        return grouped @ down.mT, up, down @ down.mT
    whole = weight.dtype == dtype  # then there is nothing to convert, a slice at a time
    projected = weight @ down.t() if whole else torch.cat([part @ down.t() for part in _slices(weight, dtype)])
    return projected, up, down @ down.t()


def _mended(weight: Tensor, delta: LowRank, squares: Tensor, total: Tensor) -> Tensor:
    """‖W + Δ‖² with all rows formed that cancel; `total` is used up."""
    found = (total < CANCELS * squares).nonzero().flatten()
    if len(found):
        for part in torch.split(found, max(1, SLICE // max(1, weight.shape[1]))):
            total[part] = _formed(weight, delta, part)
    return total


def _mended_blindly(weight: Tensor, delta: LowRank, squares: Tensor, total: Tensor) -> Tensor:
    """The same for the `WORST` rows that cancel most, whether they do or not."""
    share = total / squares  # not a number in a row of zeros, which nothing is less than
    worst = share.nan_to_num(nan=1.0).topk(min(WORST, len(total)), largest=False).indices
    exact = torch.where(share[worst] < CANCELS, _formed(weight, delta, worst), total[worst])
    return total.index_copy(0, worst, exact)


def _formed(weight: Tensor, delta: LowRank, rows: Tensor) -> Tensor:
    """‖W + Δ‖² of some rows, by forming them."""
    dtype = at_least_single(weight)
    up, down = _alike(weight, delta.to(dtype))
    if delta.groups == 1:
        change = up[rows] @ down * delta.scale
    else:
        down = _grouped(down, delta.groups)
        change = torch.bmm(up[rows][:, None], down[rows // (up.shape[0] // delta.groups)])[:, 0] * delta.scale
    return (weight[rows].to(dtype) + change).square().sum(dim=1)


def _alike(weight: Tensor, delta: LowRank) -> tuple[Tensor, Tensor]:
    """(up, down) with Δ's vectors in `up`, and rows as long as those of the weight."""
    up, down = delta.upward(), delta.down
    if down.shape[1] != weight.shape[1]:
        raise MergeError(
            "this adapter mixes the groups of a grouped convolution, which no change of its weight can do: "
            "its rows have no length",
            found=f"a change with {down.shape[1]} columns",
            expected=f"{weight.shape[1]} columns: the channels of one group times the kernel",
            fix="train it again here: then each group has its own part of A",
        )
    return up, down


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    return matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1])
