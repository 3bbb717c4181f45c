"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023,
arXiv:2312.03732.

Equation (Hu, eq. 3):     h = W₀ x + ΔW x = W₀ x + s B A x
Scale:                    s = α / r          (rsLoRA: s = α / √r)

| symbol | code              | shape             |
|--------|-------------------|-------------------|
| A      | `LoRAAdapter.A`   | (r, in)           |
| B      | `LoRAAdapter.B`   | (out, r / groups) |
| r      | `LoRA.r`          |                   |
| α      | `LoRA.alpha`      | None means 2 r    |
| s      | `LoRA.scale`      |                   |

Trained: A and B. Count: r · in + out · r / groups per site. Init: B A = 0 (see `initialisers`). Schedule: none.

Deviations. Dropout on an Embedding drops a token's one-hot input (the published code has no dropout there). Adapters
compute in the activation's dtype while their own tensors stay in at least float32 (PEFT casts the activations up).
In PEFT's files: `lora_A`, `lora_B`, `lora_embedding_A`, `lora_embedding_B`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafit.delta import LowRank, Update
from lorafit.errors import ConfigError, nearest
from lorafit.layers import Shape
from lorafit.method import Adapter, Method
from lorafit.methods.initialisers import INITIALISERS


class LoRAAdapter(Adapter):
    """One pair A, B at one site."""

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float, groups: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout
        self.groups = groups

    def update(self, weight: Callable[[], Tensor]) -> Update:
        return Update(LowRank(self.B, self.A, scale=self.scale, groups=self.groups))

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class LoRA(Method):
    """Hyperparameters of LoRA and rsLoRA.

    Args:
        r: rank, at least 1.
        alpha: α, greater than 0; None means 2 r.
        dropout: probability of dropping the adapter's own input in training, in [0, 1).
        rslora: scale by α / √r instead of α / r; meant for r ≥ 64.
        init: name of an initialiser: "default" or "gaussian".

    Raises:
        ConfigError: for a value out of range; the message names the field and one fix.

    >>> LoRA(r=8).scale
    2.0
    >>> LoRA(r=16, alpha=32, rslora=True).scale
    8.0
    >>> LoRA(r=4).num_trainable([(12288, 12288)] * 192)  # GPT-3, the paper's "10,000 times fewer"
    18874368
    """

    name = "lora"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    trains = "A, B"

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        _check_rank(self.r)
        if self.alpha is not None and not (_is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise ConfigError(
                "alpha is out of range",
                where="LoRA.alpha",
                found=repr(self.alpha),
                expected="a finite number greater than 0, or None for 2 r",
                fix="alpha=None",
            )
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(
                "dropout is out of range",
                where="LoRA.dropout",
                found=repr(self.dropout),
                expected="a probability of at least 0 and less than 1",
                fix="dropout=0.0",
            )
        if not isinstance(self.rslora, bool):
            raise ConfigError(
                "rslora must be true or false",
                where="LoRA.rslora",
                found=repr(self.rslora),
                fix="rslora=False",
            )
        if not isinstance(self.init, str) or self.init not in INITIALISERS:
            raise ConfigError(
                "unknown initialiser",
                where="LoRA.init",
                found=repr(self.init),
                expected=f"one of {', '.join(INITIALISERS)}",
                near=nearest(str(self.init), INITIALISERS),
                fix='init="default"',
            )

    @property
    def resolved_alpha(self) -> float:
        """α, with None resolved to 2 r."""
        return 2 * self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.resolved_alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def at(self, *, r: int | None = None, alpha: float | None = None) -> LoRA:
        return replace(self, r=self.r if r is None else r, alpha=self.alpha if alpha is None else alpha)

    def adapter(self, shape: Shape, *, generator: torch.Generator | None = None) -> LoRAAdapter:
        a, b = INITIALISERS[self.init](shape, self.r, generator)
        return LoRAAdapter(a, b, scale=self.scale, dropout=self.dropout, groups=shape.groups)

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        full = (Shape(*shape) for shape in shapes)
        return sum(self.r * shape.inn + shape.out * self.r // shape.groups for shape in full)

    def impossible(self, shape: Shape) -> str | None:
        if self.r % shape.groups == 0:
            return None
        above = -(-self.r // shape.groups) * shape.groups
        return f"r = {self.r} does not divide into its {shape.groups} groups; the next rank that does is {above}"

    def wasteful(self, shape: Shape) -> str | None:
        limit = min(shape.out, shape.inn * shape.groups)
        if self.r <= limit:
            return None
        return f"r = {self.r} is larger than the layer: its weight ({shape.out} × {shape.inn}) has rank {limit} at most"

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.r, self.scale)

    def settings(self) -> dict[str, object]:
        return {
            "r": self.r,
            "alpha": self.resolved_alpha,
            "scale": self.scale,
            "rslora": self.rslora,
            "dropout": self.dropout,
            "init": self.init,
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(r: object) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(
            "the rank is out of range",
            where="LoRA.r",
            found=repr(r),
            expected="a whole number of at least 1",
            fix="r=8 is a common small rank",
        )
