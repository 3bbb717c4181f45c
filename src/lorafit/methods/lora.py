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

Trained: A and B. Count: r · in + out · r / groups per site. Schedule: none.
Init: B A = 0, or ΔW = s (B A − B₀ A₀) for initialisers that start elsewhere (see `initialisers`).

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
from lorafit.layers import Shape
from lorafit.method import Adapter, Evidence, Method, Spot
from lorafit.methods import validate
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


class AnchoredAdapter(Adapter):
    """A pair A, B that starts from A₀, B₀ with B₀ A₀ ≠ 0: ΔW = s (B A − B₀ A₀), a change of rank 2 r.

    PiSSA and its kind move s B₀ A₀ out of W instead. Left in place, W is still everybody's W.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, dropout: float, groups: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.register_buffer("A0", a.clone())
        self.register_buffer("B0", b.clone())
        self.scale = scale
        self.dropout = dropout
        self.groups = groups

    def update(self, weight: Callable[[], Tensor]) -> Update:
        up, down = stacked((self.B, self.A), (-self.B0, self.A0), self.groups)
        return Update(LowRank(up, down, scale=self.scale, groups=self.groups))

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}, anchored"


def stacked(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """(up, down) of the sum of two products up₁ down₁ + up₂ down₂, group by group."""
    (up1, down1), (up2, down2) = first, second
    up = torch.cat([up1, up2], dim=1)
    if groups == 1:
        return up, torch.cat([down1, down2])
    blocks = [down.view(groups, -1, down.shape[1]) for down in (down1, down2)]
    return up, torch.cat(blocks, dim=1).flatten(0, 1)


@dataclass(frozen=True)
class LoRA(Method):
    """Hyperparameters of LoRA and rsLoRA.

    Args:
        r: rank, at least 1.
        alpha: α, greater than 0; None means 2 r.
        dropout: probability of dropping the adapter's own input in training, in [0, 1).
        rslora: scale by α / √r instead of α / r; meant for r ≥ 64.
        init: name of an initialiser, see `lorafit.methods.initialisers`.

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
        validate.rank("LoRA.r", self.r)
        validate.alpha("LoRA.alpha", self.alpha)
        validate.dropout("LoRA.dropout", self.dropout)
        validate.flag("LoRA.rslora", self.rslora)
        validate.choice("LoRA.init", self.init, INITIALISERS, "unknown initialiser")

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

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        start = INITIALISERS[self.init]
        a, b = start.draw(spot, self.r, self.scale, generator)
        kind = AnchoredAdapter if start.anchored else LoRAAdapter
        return kind(a, b, scale=self.scale, dropout=self.dropout, groups=spot.shape.groups)

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        return matrices(self.r, shapes)

    def impossible(self, spot: Spot) -> str | None:
        return indivisible(self.r, spot.shape)

    def wasteful(self, spot: Spot) -> str | None:
        return too_large(self.r, spot.shape) or INITIALISERS[self.init].objection(spot, self.r)

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, self.r, self.scale)

    def ups(self) -> tuple[str, ...]:
        return ("B",)

    def evidence(self) -> Evidence | None:
        needed = INITIALISERS[self.init].evidence
        return None if needed is None else needed()

    def settings(self) -> dict[str, object]:
        return {
            "r": self.r,
            "alpha": self.resolved_alpha,
            "scale": self.scale,
            "rslora": self.rslora,
            "dropout": self.dropout,
            "init": self.init,
        }


def matrices(r: int, shapes: Iterable[Shape | tuple[int, int]]) -> int:
    """How many numbers A (r, in) and B (out, r / groups) have together, over sites of these shapes."""
    return sum(r * shape.inn + shape.out * r // shape.groups for shape in (Shape(*each) for each in shapes))


def indivisible(r: int, shape: Shape) -> str | None:
    """Why a rank cannot be shared out over the groups of a site; None when it can."""
    if r % shape.groups == 0:
        return None
    above = -(-r // shape.groups) * shape.groups
    return f"r = {r} does not divide into its {shape.groups} groups; the next rank that does is {above}"


def too_large(r: int, shape: Shape) -> str | None:
    """Why a rank is more than a site's weight can have; None when it is not."""
    limit = min(shape.out, shape.inn * shape.groups)
    if r <= limit:
        return None
    return f"r = {r} is larger than the layer: its weight ({shape.out} × {shape.inn}) has rank {limit} at most"
