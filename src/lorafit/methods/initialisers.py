"""First values of A and B, as plain functions named in a method's `init` field.

Each takes the site's shape and the rank and returns ``(A, B)``: A (r, in), B (out, r / groups), float32, on the CPU,
with B A = 0, so that an adapted model starts as the model it was. Embeddings swap the roles (A zero, B random), as the
published code of LoRA and PEFT do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lorafit.layers import Shape

Initialiser = Callable[[Shape, int, torch.Generator | None], tuple[Tensor, Tensor]]


def _zeros(shape: Shape, r: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(r, shape.inn), torch.zeros(shape.out, r // shape.groups)


def default(shape: Shape, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ U(±1/√in) (kaiming uniform with a = √5), B = 0; embeddings: A = 0, B ~ N(0, 1). Hu et al. 2021, code."""
    a, b = _zeros(shape, r)
    if shape.lookup:
        b.normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(shape.inn)
        a.uniform_(-bound, bound, generator=generator)
    return a, b


def gaussian(shape: Shape, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r²), B = 0; embeddings: A = 0, B ~ N(0, 1/r²). The paper's "random Gaussian" as PEFT scales it."""
    a, b = _zeros(shape, r)
    (b if shape.lookup else a).normal_(std=1 / r, generator=generator)
    return a, b


INITIALISERS: Mapping[str, Initialiser] = MappingProxyType({"default": default, "gaussian": gaussian})
