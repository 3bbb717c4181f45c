"""Intrinsic dimension: training in a random subspace. Li et al. 2018, arXiv:1804.08838 (DID); with a factor for each
layer: Aghajanyan et al. 2020, arXiv:2012.13255 (SAID). The random matrix: Le et al. 2013, Fastfood.

Equation (Li, eq. 2; Aghajanyan, eq. 1):   θ = θ₀ + P θ_d
P by Fastfood (Aghajanyan, eq. 2):         P = M / √(D Σ G²),  M = H G Π H B, cut to D rows and d columns
SAID (Aghajanyan, eq. 3):                  θᵢ = θ₀ᵢ + λᵢ P(θ_{d−m})ᵢ  for layer i of m

| symbol   | code                      | shape                                                                       |
|----------|---------------------------|-----------------------------------------------------------------------------|
| θ        | weights of all sites      | (D,), site after site in model order, each as its matrix (out, in) row by row |
| θ_d      | `Subspace.theta` (DID)    | (d,)                                                                        |
| θ_{d−m}  | `Subspace.theta` (SAID)   | (d − m,)                                                                    |
| λ        | `Subspace.lam` (SAID)     | (m,), one for each layer                                                    |
| d        | `IntrinsicDimension.d`    |                                                                             |
| P        | `lorafit.fastfood`        | (D, d), never formed: tables of 2^⌈log₂ D⌉ numbers                          |

Trained: θ_d, and λ where it is layer by layer. Count: d for the whole model, λ included. Init: θ_d = 0 and λ = 1, so
that the model starts as it is. Schedule: none.

A layer is what has the same path up to its first number: "model.layers.3.self_attn.q_proj" is of "model.layers.3".
One λ for each tensor it cannot be: the paper's d = 207 for RoBERTa-Large's 24 layers is less than its tensors.

P θ_d is computed once for all sites and kept until θ_d or λ changes; under torch.compile it is part of the graph.

Deviations. Both papers count every parameter of the model in θ; here θ is what is adapted. Published code scales the
backward of H by 1 / L: then the gradient is not the adjoint's, and parts that were padded differently get gradients of
wrong relative size. It also projects tensor by tensor and crops θ_d to tensors smaller than d, so that these see a part
of it; here one P covers all. Li's networks are reached by dense or sparse P too; here it is always Fastfood.
No type of PEFT's: its files have this library's own keys, θ_d, λ and the key from which P is drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.delta import Dense, Update
from lorafit.errors import ConfigError, some
from lorafit.fastfood import Part
from lorafit.layers import Shape
from lorafit.method import Adapter, Method, Sharing, Spot
from lorafit.methods import validate
from lorafit.methods.subspace import Subspace


class IntrinsicAdapter(Sharing):
    """One site's part of P θ_d, times its layer's λ."""

    def __init__(self, subspace: Subspace, number: int) -> None:
        super().__init__(subspace, owner=number == 0)
        self.number = number

    def update(self, weight: Callable[[], Tensor]) -> Update:
        subspace = self.common
        assert isinstance(subspace, Subspace)
        return Update(Dense(subspace.matrices()[self.number]))

    def extra_repr(self) -> str:
        return f"number={self.number}"


def layer_of(path: str) -> str:
    """A path up to and including its first number; the path itself without one.

    >>> layer_of("model.layers.3.self_attn.q_proj")
    'model.layers.3'
    """
    names = path.split(".")
    first = next((i for i, name in enumerate(names) if name.isdecimal()), len(names))
    return ".".join(names[: first + 1])


@dataclass(frozen=True)
class IntrinsicDimension(Method):
    """Hyperparameters of training in a random subspace of all adapted weights together.

    Args:
        d: how many numbers are trained in the whole model, at least 1 and at most as many as the layers have.
        layerwise: give each layer a trained factor λ of its part, counted in d (SAID); false: one projection (DID).

    Raises:
        ConfigError: for a value out of range; the message names the field and one fix.

    >>> IntrinsicDimension(d=200).num_trainable([(768, 768)] * 24)
    200
    """

    name = "intrinsic"
    paper = "Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255"
    trains = "θ_d, λ"
    in_peft = "merge, or convert"
    in_vllm = "merge, or export --r"
    in_rows = False

    d: int = 1000
    layerwise: bool = True

    def __post_init__(self) -> None:
        validate.whole("IntrinsicDimension.d", self.d, fix="d=1000")
        validate.flag("IntrinsicDimension.layerwise", self.layerwise)

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        return self.adapters([spot], generator=generator)[spot.path]

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, Adapter]:
        """One subspace over all spots. Raises `ConfigError` for a d that does not fit them, or several devices."""
        layers = list(dict.fromkeys(layer_of(spot.path) for spot in spots)) if self.layerwise else []
        parts, size = [], 0
        for spot in spots:
            number = layers.index(layer_of(spot.path)) if self.layerwise else 0
            parts.append(Part(size, spot.shape.out, spot.shape.inn, number))
            size += spot.shape.out * spot.shape.inn
        self._check(spots, size, len(layers))
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        subspace = Subspace(parts, self.d, len(layers), seed)
        return {spot.path: IntrinsicAdapter(subspace, number) for number, spot in enumerate(spots)}

    def _check(self, spots: Sequence[Spot], size: int, m: int) -> None:
        where = "IntrinsicDimension.d"
        if self.d > size:
            raise ConfigError(
                "the subspace has more dimensions than there are numbers in the adapted layers",
                where=where, found=f"d = {self.d}", expected=f"at most D = {size}", fix=f"d={min(1000, size)}",
            )  # fmt: skip
        if self.d <= m:
            raise ConfigError(
                "d counts one factor λ for each layer, and none is left for the subspace",
                where=where, found=f"d = {self.d} for {m} layers", expected=f"more than {m}",
                fix=f"d={10 * m}, or layerwise=False",
            )  # fmt: skip
        devices = list(dict.fromkeys(str(spot.device) for spot in spots))
        if len(devices) > 1:
            raise ConfigError(
                "one subspace spans all adapted layers, and has to be on one device with them",
                found=f"layers on {some(devices)}",
                expected="one device",
                fix="put the model on one device, adapt the layers of one device only (targets=), or take LoRA",
            )

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        return self.d

    def at(self, *, r: int | None = None, alpha: float | None = None) -> Method:
        if r is None and alpha is None:
            return self
        raise ConfigError(
            "a subspace of all layers together has no rank or alpha of its own for one of them",
            where="IntrinsicDimension",
            found=f"r = {r}" if r is not None else f"alpha = {alpha}",
            expected="neither",
            fix="d=... sets the size for all layers; leave rank_pattern and alpha_pattern out",
        )

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, self.d, self.layerwise)

    def rate(self, shapes: Iterable[Shape | tuple[int, int]]) -> float:
        """√(D / d): columns of P have the norm 1, so θ_d has to go as far as all weights together.

        Measured: docs/results/household.md.
        """
        size = sum(shape.out * shape.inn for shape in (Shape(*each) for each in shapes))
        return max(1.0, math.sqrt(size / self.d))

    def settings(self) -> dict[str, object]:
        return {"d": self.d, "layerwise": self.layerwise}
