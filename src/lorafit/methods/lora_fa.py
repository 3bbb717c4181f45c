"""LoRA-FA: LoRA with a frozen A. Zhang et al. 2023, arXiv:2308.03303; the correction is of its version 2 (2026).

Equation:                 h = W₀ x + s B A x, with A random and frozen
Correction (version 2):   ĝ_B = (1 / s²) g_B (A Aᵀ)⁻¹, the gradient of B that changes W as much like full fine-tuning as
                          it can: g_B = s G Aᵀ, so s ĝ_B A = G Aᵀ (A Aᵀ)⁻¹ A = G P_A, the gradient G of the whole
                          weight projected on the rows of A

| symbol | code                 | shape                      |
|--------|----------------------|----------------------------|
| A      | `LoRAFAAdapter.A`    | (r, in), a buffer          |
| B      | `LoRAFAAdapter.B`    | (out, r / groups)          |
| s      | `LoRAFA.scale`       | α / r (rsLoRA: α / √r)     |
| g_B    | `LoRAFAAdapter.B.grad` | like B                   |
| (A Aᵀ)⁻¹ / s² | `Correction._inverses` | (groups, r / groups, r / groups) |

Trained: B alone. Count: out · r / groups per site. Every change s B A has its rows in the row space of A.
Init: as LoRA's, so B A = 0. On an Embedding LoRA starts from A = 0, which would stay 0 here: A ~ N(0, 1 / r) instead,
so that a token's column of A has length 1 on average, and B = 0. That of padding_idx is one of them: its vector changes
with B as all others do. Initialisers with B₀ A₀ ≠ 0 are refused: they put main directions of W into A and B, to train
both.
Schedule: before each optimizer step the gradients of B, already clipped, unscaled and accumulated, are replaced by
ĝ_B. It has nothing to save, since A never changes. In a grouped convolution each group has its own A Aᵀ.

Memory: autograd keeps A x for B, r numbers a token, and no x: at linear layers (Linear, HF Conv1D) alone, since a
convolution of torch keeps its input in any case. Dropout is refused: its mask would have to be kept for every x.

Deviations. The published code (PEFT's) adds 1e-8 to the diagonal of A Aᵀ, takes a pseudo-inverse in every step and
multiplies in bf16 where there is bf16; here there is one inverse per site, computed once in float64, and a singular
A Aᵀ is an error. That code is an optimizer of its own, AdamW; here the correction comes before any optimizer.
In PEFT's files: plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.delta import LowRank, Update
from lorafit.errors import ConfigError, TrainingError
from lorafit.layers import Shape
from lorafit.method import Adapter, Evidence, Method, Schedule, Spot
from lorafit.methods import validate
from lorafit.methods.initialisers import INITIALISERS
from lorafit.methods.lora import LoRA


class LoRAFAAdapter(Adapter):
    """One pair of a frozen A and a trained B at one site."""

    A: Tensor

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, groups: int) -> None:
        super().__init__()
        self.register_buffer("A", a)
        self.B = nn.Parameter(b)
        self.scale = scale
        self.groups = groups

    def update(self, weight: Callable[[], Tensor]) -> Update:
        return Update(LowRank(self.B, self.A, scale=self.scale, groups=self.groups))

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, scale={self.scale:g}, A frozen"


class _Inverse(NamedTuple):
    """(A Aᵀ)⁻¹ / s², and the s and state of A that it was made from."""

    source: Tensor
    address: int
    version: int
    scale: float
    matrix: Tensor

    def fits(self, a: Tensor, scale: float) -> bool:
        """Whether A is still what it was: the same tensor, not written to and not given other memory since."""
        same = self.source is a and self.address == a.data_ptr() and self.version == a._version
        return same and self.scale == scale


class Correction(Schedule):
    """Replaces the gradient of every B by g_B (A Aᵀ)⁻¹ / s² before each step.

    Args:
        adapters: module path → adapter.
    """

    needs_gradients = True

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = {path: each for path, each in adapters.items() if isinstance(each, LoRAFAAdapter)}
        self._inverses: dict[str, _Inverse] = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for path, adapter in self._adapters.items():
            grad = adapter.B.grad
            if grad is None:  # experts that no token has reached
                continue
            inverse = self._inverse(path, adapter).to(torch.promote_types(grad.dtype, torch.float32))
            if adapter.groups == 1:
                grad.copy_(grad.to(inverse.dtype) @ inverse[0])
            else:
                blocks = grad.to(inverse.dtype).view(adapter.groups, -1, grad.shape[1])
                grad.copy_((blocks @ inverse).flatten(0, 1))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return

    def _inverse(self, path: str, adapter: LoRAFAAdapter) -> Tensor:
        """(A Aᵀ)⁻¹ / s², made once and again only after A was loaded or moved."""
        known = self._inverses.get(path)
        if known is None or not known.fits(adapter.A, adapter.scale):
            a = adapter.A
            exact = torch.float32 if a.device.type == "mps" else torch.float64
            single = torch.promote_types(a.dtype, torch.float32)
            lower = _triangle(a.to(exact), adapter.groups, path, torch.finfo(single).eps)
            matrix = torch.cholesky_inverse(lower).div_(adapter.scale**2).to(single)
            known = self._inverses[path] = _Inverse(a, a.data_ptr(), a._version, adapter.scale, matrix)
        return known.matrix


def _triangle(a: Tensor, groups: int, path: str, eps: float) -> Tensor:
    """L (groups, r / groups, r / groups), lower triangular, with L Lᵀ = A Aᵀ in each group, for numbers exact to `eps`.

    Aᵀ = Q R gives L = Rᵀ. Squaring A first would cost half of its digits, which counts where r is close to `in`.
    """
    blocks = a.view(groups, -1, a.shape[1])
    lower: Tensor = torch.linalg.qr(blocks.mT, mode="r").R.mT
    rank = torch.linalg.matrix_rank(lower, rtol=eps * blocks.shape[1])
    if (rank < blocks.shape[1]).any():
        raise TrainingError(
            "the gradient of B cannot be corrected: A Aᵀ is singular",
            where=path,
            found=f"an A with {blocks.shape[1]} rows of rank {int(rank.min())}",
            expected="independent rows",
            fix="a rank that the layer can have, or LoRAFA(correction=False)",
        )
    signs: Tensor = lower.diagonal(dim1=-2, dim2=-1).sign()  # which Q R leaves open
    return lower * signs.unsqueeze(-2)


@dataclass(frozen=True)
class LoRAFA(Method):
    """Hyperparameters of LoRA-FA.

    Args:
        r: rank, at least 1.
        alpha: α, greater than 0; None means 2 r.
        dropout: must be 0: with dropout the input would be kept for the backward pass, and nothing be saved.
        rslora: scale by α / √r instead of α / r.
        init: name of an initialiser with B A = 0, see `lorafit.methods.initialisers`.
        correction: replace the gradient of B by g_B (A Aᵀ)⁻¹ / s², as version 2 of the paper does.

    Raises:
        ConfigError: for a value out of range; the message names the field and one fix.

    >>> LoRAFA(r=4).num_trainable([(8, 6)])  # LoRA trains 56
    32
    """

    name = "lora-fa"
    paper = "Zhang et al. 2023, arXiv:2308.03303"
    trains = "B"

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"
    correction: bool = True

    def __post_init__(self) -> None:
        validate.rank("LoRAFA.r", self.r)
        validate.alpha("LoRAFA.alpha", self.alpha)
        validate.dropout("LoRAFA.dropout", self.dropout)
        validate.flag("LoRAFA.rslora", self.rslora)
        validate.choice("LoRAFA.init", self.init, INITIALISERS, "unknown initialiser")
        validate.flag("LoRAFA.correction", self.correction)
        if self.dropout > 0:
            raise ConfigError(
                "LoRA-FA has no dropout: its mask would be kept for every input, and LoRA-FA is there to keep none",
                where="LoRAFA.dropout",
                found=repr(self.dropout),
                expected="0",
                fix=f"dropout=0.0, or LoRA(dropout={self.dropout})",
            )
        zero = [name for name, each in INITIALISERS.items() if not each.anchored]
        reason = "this initialiser puts main directions of the weight into A and B, and LoRA-FA trains B alone"
        validate.choice("LoRAFA.init", self.init, zero, reason)

    @property
    def _lora(self) -> LoRA:
        return LoRA(self.r, self.alpha, self.dropout, self.rslora, self.init)

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self._lora.scale

    def at(self, *, r: int | None = None, alpha: float | None = None) -> LoRAFA:
        return replace(self, r=self.r if r is None else r, alpha=self.alpha if alpha is None else alpha)

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> LoRAFAAdapter:
        a, b = INITIALISERS[self.init].draw(spot, self.r, self.scale, generator)
        if spot.shape.lookup and not a.any():
            a, b = a.normal_(generator=generator).div_(self.r**0.5), torch.zeros_like(b)
        return LoRAFAAdapter(a, b, scale=self.scale, groups=spot.shape.groups)

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        return sum(shape.out * self.r // shape.groups for shape in (Shape(*each) for each in shapes))

    def impossible(self, spot: Spot) -> str | None:
        return self._lora.impossible(spot)

    def wasteful(self, spot: Spot) -> str | None:
        return self._lora.wasteful(spot)

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, self.r, self.scale)

    def ups(self) -> tuple[str, ...]:
        return ("B",)

    def evidence(self) -> Evidence | None:
        return self._lora.evidence()

    def settings(self) -> dict[str, object]:
        return {**self._lora.settings(), "correction": self.correction}

    def schedule(self, adapters: Mapping[str, Adapter]) -> Schedule | None:
        return Correction(adapters) if self.correction else None
