"""Fastfood: a large random matrix of a subspace that is never formed. Le, Sarlós & Smola 2013, "Fastfood: approximating
kernel expansions in loglinear time", eq. 7, as Li et al. 2018 (arXiv:1804.08838, supplement) use it.

M = H G Π H B, with H the unnormalised Walsh-Hadamard matrix of size L = 2^⌈log₂ D⌉ in Sylvester's order (H² = L I), B a
diagonal of ±1, Π a permutation, G a diagonal of N(0, 1). P is the first D rows and d columns of M over √(D Σ G²): every
entry of H Π H B has size 1 before G acts, so that columns have the norm 1, exactly when D = L.

Two facts make it cheap. v fills the first d of L places, and row i of H reads there what row i mod d' reads, with
d' = 2^⌈log₂ d⌉: so the first H is one of size d', and of Π only where it points to mod d' is kept. And H of size a b is
H_a ⊗ H_b: so the second H is a few products with matrices of size 16 or so, on pieces that stay in a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

PIECE = {"cpu": 2**16}
"""Numbers that are worked on at a time, by device type, as measured: float32 and a copy fit into 1 MB of cache."""
GONE = 1e-20
"""A λ of less than this takes digits from what it multiplies."""
WITNESSES = 8
Passed: TypeAlias = Callable[[], None] | None


def power_of_two(n: int) -> int:
    """The least power of two that is not less than `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


def sylvester(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Walsh-Hadamard matrix of size `n`, a power of two: H₁ = 1, H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]]."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def factors(n: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Small matrices H_a, H_b, … with H_n = H_a ⊗ H_b ⊗ …; sizes near 16 are the fastest, by measurement."""
    bits = n.bit_length() - 1
    count = max(1, round(bits / 4))
    return [sylvester(1 << (bits + i) // count, dtype, device) for i in range(count)]


def rotated(x: Tensor, small: Sequence[Tensor]) -> Tensor:
    """(H x)ᵀ for H = ⊗ `small` of size n and x of n · c numbers, seen as (n, c); the result is (c, n), contiguous.

    One product for each factor takes the first axis off the front and puts it, transformed, at the end.
    """
    n = 1
    for h in small:
        x = x.reshape(h.shape[0], -1).t() @ h  # H is symmetric
        n *= h.shape[0]
    return x.view(-1, n)


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x for x (n, ...), n a power of two: the plain twin of what is done piece by piece below. H H x = n x."""
    return rotated(x, factors(x.shape[0], x.dtype, x.device)).t().reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Fastfood:
    """One draw of P (D, d): its tables, and what it does to vectors.

    Attributes:
        size: D.
        seed: from which it was drawn; the same seed, D and d give the same P.
        signs: the part of B that meets something, ±1, over √(D Σ G²): (d,), in the best precision of the device.
        index: Π mod d', (L,), int16 or int32.
        gain: G, (L,), float32 whatever the precision of the vectors.
    """

    size: int
    seed: int
    signs: Tensor
    index: Tensor
    gain: Tensor

    @classmethod
    def draw(cls, size: int, dim: int, seed: int) -> Fastfood:
        """P (size, dim) on the CPU; B, Π and G are drawn in this order from a generator of this seed."""
        generator = torch.Generator().manual_seed(seed)
        length, short = power_of_two(size), power_of_two(dim)
        signs = torch.randint(0, 2, (dim,), generator=generator).mul_(2).sub_(1).double()
        kind = torch.int32 if length <= 2**31 else torch.int64
        index = torch.randperm(length, generator=generator, dtype=kind).bitwise_and_(short - 1)
        index = index.to(torch.int16 if short <= 2**15 else torch.int32)
        gain = torch.empty(length).normal_(generator=generator)
        total = math.fsum(float(part.double().square().sum()) for part in torch.split(gain, 2**20))
        return cls(size, seed, signs.div_(math.sqrt(size * total)), index, gain)

    def to(self, device: torch.device) -> Fastfood:
        """The same P on another device."""
        if self.index.device == device:
            return self
        best = torch.float32 if device.type == "mps" else torch.float64
        return replace(self, signs=self.signs.to(device, best), index=self.index.to(device), gain=self.gain.to(device))

    @property
    def length(self) -> int:
        """L."""
        return self.index.shape[0]

    @property
    def witness(self) -> list[int]:
        """A few drawn numbers as integers, by which another drawing of the same seed can be told to be another one."""
        few = torch.arange(WITNESSES, device=self.index.device) % self.length
        return [*self.index[few].tolist(), *self.gain[few].mul(2**16).round().long().tolist()]

    def _pieces(self) -> tuple[int, int]:
        """(rows, columns) of L: a piece is one row, or as many columns as make one of the same size."""
        device = self.index.device.type
        # A compiled graph would have every piece as operations of its own: then there is one.
        piece = self.length if torch.compiler.is_compiling() else PIECE.get(device, 2**24)
        columns = min(self.length, piece)
        return self.length // columns, columns

    def _across(self, x: Tensor) -> None:
        """H along the first axis of x (rows, columns), in place."""
        rows, columns = x.shape
        if rows == 1:
            return
        small = factors(rows, x.dtype, x.device)
        width = min(columns, max(32, columns // rows))
        for part in torch.split(x, width, dim=1):
            part.copy_(rotated(part, small).t())

    def project(self, v: Tensor) -> Tensor:
        """P v for v (d,), float32 or float64: (D,), the front part of a buffer of L numbers."""
        rows, columns = self._pieces()
        short = self.signs.new_zeros(power_of_two(v.shape[0]))
        short[: v.shape[0]] = v * self.signs
        short = walsh_hadamard(short).to(v.dtype)
        x = v.new_empty(rows, columns)
        small = factors(columns, v.dtype, v.device)
        for row, index, gain in zip(x, self.index.view(rows, -1), self.gain.view(rows, -1), strict=True):
            row.copy_(rotated(short.index_select(0, index.int()).mul_(gain), small).view(-1))
        self._across(x)
        return x.view(-1)[: self.size]

    def adjoint(self, u: Tensor) -> Tensor:
        """Pᵀ u for u (D,): (d,)."""
        padded = u.new_zeros(self.length)
        padded[: self.size] = u
        return self.adjoint_(padded)

    def adjoint_(self, padded: Tensor) -> Tensor:
        """Pᵀ u for u (D,) in front of zeros up to L, a buffer that is used up."""
        rows, columns = self._pieces()
        x = padded.view(rows, columns)
        self._across(x)
        small = factors(columns, x.dtype, x.device)
        # A number of the short vector is a sum over L / d' others.
        dim = self.signs.shape[0]
        total = self.signs.new_zeros(power_of_two(dim))
        for row, index, gain in zip(x, self.index.view(rows, -1), self.gain.view(rows, -1), strict=True):
            total.index_add_(0, index.int(), rotated(row, small).view(-1).mul_(gain).to(total.dtype))
        return (walsh_hadamard(total)[:dim] * self.signs).to(x.dtype)


class Part(NamedTuple):
    """The part of P v that is one matrix (out, inn): where it starts, and which λ multiplies it."""

    start: int
    out: int
    inn: int
    layer: int


class _Parts(torch.autograd.Function):
    """All matrices λ_layer · (P v)[start : start + out · inn] at once; backward gathers their gradients for one Pᵀ.

    It saves no tensor for backward, only tables and buffers that nobody else writes to: its outputs serve as many
    forward and backward passes as there are between two changes of v and λ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        lam: Tensor | None,
        operator: Fastfood,
        parts: tuple[Part, ...],
        passed: Callable[[], None] | None,
    ) -> tuple[Tensor, ...]:
        with _no_autocast(v):
            flat = operator.project(v)
            ctx.set_materialize_grads(False)
            ctx.operator, ctx.parts, ctx.passed = operator, parts, passed
            ctx.dtype, ctx.device = v.dtype, v.device
            ctx.lam = None if lam is None else lam.clone()
            ctx.v = v.clone() if lam is not None and ctx.needs_input_grad[1] else None
            # As large as the weights: λ is multiplied into it, and divided out again for λ's own gradient.
            ctx.inside = lam is not None and not torch.compiler.is_compiling()
            ctx.flat = None if ctx.v is None else flat
            if lam is None or not ctx.inside:
                return matrices(flat, lam, parts)
            for part in parts:
                _view(flat, part).mul_(lam[part.layer])
            return matrices(flat, None, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.passed is not None:
            ctx.passed()
        for_v = for_lam = None
        if ctx.needs_input_grad[1]:
            for_lam = _for_factors(ctx, grads)
        if ctx.needs_input_grad[0]:
            u = torch.zeros(ctx.operator.length, dtype=ctx.dtype, device=ctx.device)
            for grad, part in zip(grads, ctx.parts, strict=True):
                if grad is not None:
                    place = _view(u, part).copy_(grad)
                    if ctx.lam is not None:
                        place.mul_(ctx.lam[part.layer])
            with _no_autocast(u):
                for_v = ctx.operator.adjoint_(u)
        return for_v, for_lam, None, None, None


def _for_factors(ctx: Any, grads: Sequence[Tensor | None]) -> Tensor:
    """∂/∂λ: for each layer the sum of ∂/∂(λ P v) ∘ P v over its parts."""
    flat, divisor = ctx.flat, ctx.lam
    if not ctx.inside:
        divisor = None
    elif (ctx.lam.abs() < GONE).any():  # nothing is left of P v there: it is made anew
        with _no_autocast(ctx.v):
            flat, divisor = ctx.operator.project(ctx.v), None
    found = torch.zeros_like(ctx.lam)
    for grad, part in zip(grads, ctx.parts, strict=True):
        if grad is not None:
            found[part.layer] += (grad * _view(flat, part)).sum()
    return found if divisor is None else found.div_(divisor)


def _view(flat: Tensor, part: Part) -> Tensor:
    return flat[part.start : part.start + part.out * part.inn].view(part.out, part.inn)


def matrices(flat: Tensor, lam: Tensor | None, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The parts of P v as matrices, each times its layer's λ where there are λ."""
    views = [_view(flat, part) for part in parts]
    if lam is None:
        return tuple(views)
    return tuple(lam[part.layer] * view for view, part in zip(views, parts, strict=True))


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def parts_of(
    v: Tensor, lam: Tensor | None, operator: Fastfood, parts: tuple[Part, ...], passed: Passed
) -> tuple[Tensor, ...]:
    """The matrices of `parts` as functions of v (d,) and λ (m,); `passed`, if any, is called in each backward pass.

    The plain twin is ``matrices(operator.project(v), lam, parts)``.
    """
    result: tuple[Tensor, ...] = _Parts.apply(v, lam, operator, parts, passed)  # type: ignore[no-untyped-call]
    return result
