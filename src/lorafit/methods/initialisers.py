"""First values of A and B, as plain functions named in a method's `init` field.

Each takes the spot, the rank, the scale s and a generator, and returns ``(A, B)``: A (r, in), B (out, r / groups). Most
have B A = 0, so that an adapted model starts as the model it was. Those that are `anchored` have not: the adapter then
computes s (B A − B₀ A₀), which is the same function as a residual W − s B₀ A₀ under B A, while W stays what it is.
Embeddings swap the roles (A zero, B random), as the published code of LoRA and PEFT do.

| name         | A                  | B               | from                                            |
|--------------|--------------------|-----------------|-------------------------------------------------|
| `default`    | U(±1/√in)          | 0               | Hu et al. 2021, arXiv:2106.09685, their code    |
| `gaussian`   | N(0, 1/r²)         | 0               | the same, as PEFT scales it                     |
| `orthogonal` | (X Q_odd)ᵀ / 10    | Y Q_even / 10   | PEFT: Q random orthogonal, so that B A = 0      |
| `pissa`      | √(S_r / s) V_rᵀ    | U_r √(S_r / s)  | Meng et al. 2024, arXiv:2404.02948: W = U S Vᵀ  |
| `olora`      | R_r                | Q_r             | Büyükakyüz 2024, arXiv:2406.01775: W = Q R      |
| `lora_ga`    | c V_[1 … r]ᵀ       | c U_[r+1 … 2r]  | Wang et al. 2024, arXiv:2407.05000: G = U S Vᵀ  |
| `eva`        | V_rᵀ of the inputs | 0               | Paischer et al. 2024, arXiv:2410.07170          |

`pissa`, `olora` and `lora_ga` are anchored; `lora_ga` and `eva` learn from data first (see `evidence`). A grouped
convolution is as many layers as it has groups, with rank r / groups each. Signs of singular vectors are fixed: the
largest entry of each right one is positive (`olora`: the diagonal of R is not negative).

`lora_ga`: c = ∜out / √γ with γ = 64, `out` being one group's. The first step of plain gradient descent then changes W
by (s c)² times the gradient's best approximation of rank 2 r.

Deviations. Published code of the anchored ones moves s B₀ A₀ out of W. Where W has a rank below r, PiSSA's A and B
would both be zero and never learn: there A keeps its direction, as long as `default` would draw it, and B is zero.
OLoRA's A is computed as Q_rᵀ W, which is R_r. PEFT's `lora_ga` differs from the authors' code, which is followed here:
it has γ = 16, in B alone, and multiplies B by the gradient's singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.layers import Shape
from lorafit.method import Evidence, Spot
from lorafit.methods.directions import first_signs
from lorafit.methods.evidence import FirstGradients, InputDirections

ORTHOGONAL_SIZE = 0.1
"""PEFT's factor in both matrices of `orthogonal`."""
GAMMA = 64.0
"""γ of LoRA-GA's "stable" scaling, as in the authors' experiments."""

Draw = Callable[[Spot, int, float, torch.Generator | None], tuple[Tensor, Tensor]]


def _nothing_against(spot: Spot, r: int) -> str | None:
    return None


@dataclass(frozen=True)
class Initialiser:
    """First values by one scheme.

    Attributes:
        draw: (spot, r, s, generator) → (A, B).
        anchored: whether B A ≠ 0 at the start, so that it has to be taken off.
        objection: (spot, r) → why such a spot cannot start like this, or None.
        evidence: what has to be learnt from data first, or None.
    """

    draw: Draw
    anchored: bool = False
    objection: Callable[[Spot, int], str | None] = _nothing_against
    evidence: Callable[[], Evidence] | None = None


def _zeros(shape: Shape, r: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(r, shape.inn), torch.zeros(shape.out, r // shape.groups)


def default(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ U(±1/√in) (kaiming uniform with a = √5), B = 0; embeddings: A = 0, B ~ N(0, 1). Hu et al. 2021, code."""
    a, b = _zeros(spot.shape, r)
    if spot.shape.lookup:
        b.normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(spot.shape.inn)
        a.uniform_(-bound, bound, generator=generator)
    return a, b


def gaussian(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r²), B = 0; embeddings: A = 0, B ~ N(0, 1/r²). The paper's "random Gaussian" as PEFT scales it."""
    a, b = _zeros(spot.shape, r)
    (b if spot.shape.lookup else a).normal_(std=1 / r, generator=generator)
    return a, b


def orthogonal(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A and B both random, with B A = 0 up to rounding: their inner sides lie in orthogonal halves of ℝʳ."""
    out, inn, groups, _ = spot.shape
    k, ups, downs = r // groups, [], []

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(spot.dtype)

    for _ in range(groups):
        q = torch.linalg.qr(normal(k, k)).Q
        downs.append((normal(inn, k // 2) @ q[0::2]).t() * ORTHOGONAL_SIZE)
        ups.append(normal(k // 2, out // groups).t() @ q[1::2] * ORTHOGONAL_SIZE)
    return torch.cat(downs), torch.cat(ups)


def pissa(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """S B A is the best approximation of W that has rank r, its square root in A and B each."""
    k, ups, downs = r // spot.shape.groups, [], []
    for block in _blocks(_weight(spot), spot.shape.groups):
        u, sigma, v = _svd(block)
        u, sigma, v = u[:, :k], sigma[:k], v[:k]
        root = (sigma / scale).sqrt()
        dead = sigma <= sigma[0] * torch.finfo(sigma.dtype).eps * max(block.shape)
        downs.append(torch.where(dead, 1 / math.sqrt(3), root)[:, None] * v)
        ups.append(torch.where(dead, 0.0, root) * u)
    return torch.cat(downs), torch.cat(ups)


def olora(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """B A are the first r terms of W = Q R."""
    k, ups, downs = r // spot.shape.groups, [], []
    for block in _blocks(_weight(spot), spot.shape.groups):
        # The first r columns of Q come from those of W alone.
        q, triangle = torch.linalg.qr(block[:, :k])
        q = q * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        downs.append(q.t() @ block)
        ups.append(q)
    return torch.cat(downs), torch.cat(ups)


def lora_ga(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A and B from the gradient's first 2 r singular directions, of a size that keeps outputs stable over widths."""
    k, ups, downs = r // spot.shape.groups, [], []
    for block in _blocks(_evidence(spot).to(spot.device), spot.shape.groups):
        u, _, v = _svd(block)
        size = len(block) ** 0.25 / math.sqrt(GAMMA)
        downs.append(v[:k] * size)
        ups.append(u[:, k : 2 * k] * size)
    return torch.cat(downs), torch.cat(ups)


def eva(spot: Spot, r: int, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A: the r directions in which the layer's inputs vary most; B = 0."""
    directions = _evidence(spot)
    return directions.clone(), directions.new_zeros(spot.shape.out, r)


def _weight(spot: Spot) -> Tensor:
    weight = spot.weight().detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not weight.isfinite().all():
        raise ConfigError(
            "an initialiser that takes the weight apart cannot start from one that is not finite",
            where=spot.path,
            found="inf or nan in the weight",
            fix='init="default", or leave the layer out with exclude=',
        )
    return weight


def _evidence(spot: Spot) -> Tensor:
    if spot.evidence is None:
        raise ConfigError(
            "this initialiser learns from data first, and was given none",
            where=spot.path,
            found="no sample",
            expected="a few dozen batches",
            fix="attach(model, method, sample=Sample(batches))",
        )
    return spot.evidence


def _blocks(matrix: Tensor, groups: int) -> Tensor:
    return matrix.reshape(groups, -1, matrix.shape[1])


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD (U, S, Vᵀ) with fixed signs; the long side of a matrix goes through QR first, which is faster."""
    if len(matrix) < matrix.shape[1]:
        q, triangle = torch.linalg.qr(matrix.t())
        u, sigma, v = torch.linalg.svd(triangle.t(), full_matrices=False)
        v = v @ q.t()
    elif len(matrix) > matrix.shape[1]:
        q, triangle = torch.linalg.qr(matrix)
        u, sigma, v = torch.linalg.svd(triangle, full_matrices=False)
        u = q @ u
    else:
        u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    signs = first_signs(v)
    return u * signs, sigma, v * signs[:, None]


def _odd(spot: Spot, r: int) -> str | None:
    k = r // spot.shape.groups
    each = f" in each of the {spot.shape.groups} groups" if spot.shape.groups > 1 else ""
    return f'init="orthogonal" halves the rank: {k}{each} is odd, an even one is needed' if k % 2 else None


def _too_few_directions(spot: Spot, r: int) -> str | None:
    groups = spot.shape.groups
    limit = min(spot.shape.out // groups, spot.shape.inn) * groups
    if 2 * r <= limit:
        return None
    return f'init="lora_ga" needs 2 r = {2 * r} directions of the gradient: this layer has {limit}'


def _no_directions(spot: Spot, r: int) -> str | None:
    if spot.shape.lookup:
        return 'init="eva" has nothing to find in an embedding: its inputs are tokens, whose directions are themselves'
    if spot.shape.groups > 1:
        return 'init="eva" has one set of input directions for a layer: a grouped convolution has one for each group'
    return None


INITIALISERS: Mapping[str, Initialiser] = MappingProxyType(
    {
        "default": Initialiser(default),
        "gaussian": Initialiser(gaussian),
        "orthogonal": Initialiser(orthogonal, objection=_odd),
        "pissa": Initialiser(pissa, anchored=True),
        "olora": Initialiser(olora, anchored=True),
        "lora_ga": Initialiser(lora_ga, anchored=True, objection=_too_few_directions, evidence=FirstGradients),
        "eva": Initialiser(eva, objection=_no_directions, evidence=InputDirections),
    }
)
"""Name in a config → scheme."""
