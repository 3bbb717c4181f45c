"""LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou, Ghosh, Yu 2024 (ICML 2024), arXiv:2402.12354.

Equation (Definition of LoRA+):     A ← A − η_A g_A,   B ← B − η_B g_B,   η_B = λ η_A,   λ > 1

Here g is what the optimizer makes of the gradient (Adam's normalised step). The model is LoRA's, h = W₀ x + s B A x,
unchanged: LoRA+ is a parameter group.

| symbol  | code                                 | shape                              |
|---------|--------------------------------------|------------------------------------|
| λ       | `LoRAPlus.ratio`                     |                                    |
| η_A     | the learning rate of the optimizer   |                                    |
| η_B     | ratio × that                         |                                    |
| A, B, s | the inner method's, LoRA by default  | A (r, in), B (out, r / groups)     |

Trained: what the inner method trains. Count: the inner method's. Init: the inner method's. Schedule: the inner
method's.
Under Adam with B₀ = 0, without weight decay, LoRA+ of (α, η, λ η) is LoRA of (λ α, η, η): at one learning rate, a
higher ratio is a higher α.

The ratio. The widely quoted 16 is for a start with A = 0 and B random. With the usual start (A random, B = 0) the
paper's best ratios are 4 to 8 for RoBERTa and 2 to 4 for Llama, so the default here is 4. The claim: up to twice fewer
steps to the same accuracy and 1 to 2 % more of it on hard tasks, nothing on easy ones.

Deviations. Published code, and PEFT's `create_loraplus_optimizer` after it, gives B's rate to every one-dimensional
parameter: DoRA's magnitudes and the biases of modules that are trained in full. Here those keep the plain rate, as do
AdaLoRA's singular values. Published code gives both factors of an adapted Embedding a fixed rate of their own (10⁻⁶);
here they are treated as on every layer, A with the plain rate and B with ratio times that. Published code sets its own
weight decay (0 unless told otherwise, never for biases and norms); here decay is the optimizer's.
In PEFT's files: the inner method's, plain LoRA by default; the ratio is no part of what an adapter computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from lorafit.errors import ConfigError
from lorafit.method import Around, Method
from lorafit.methods import validate
from lorafit.methods.initialisers import INITIALISERS
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_fa import LoRAFA


@dataclass(frozen=True)
class LoRAPlus(Around):
    """Hyperparameters of LoRA+: LoRA's, or a method to put it around, and the ratio of B's learning rate to A's.

    Args:
        r: LoRA's rank, at least 1.
        alpha: LoRA's α, greater than 0; None means 2 r.
        dropout: LoRA's dropout, in [0, 1).
        rslora: scale by α / √r instead of α / r.
        init: name of an initialiser, see `lorafit.methods.initialisers`.
        ratio: λ, the learning rate of B relative to A's, greater than 0. 1 is the plain optimizer.
        inner: another method that trains a matrix B, such as DoRA or AdaLoRA, instead of LoRA; the five fields of LoRA
            are then given to that method, not here.

    Raises:
        ConfigError: for a value out of range, fields of LoRA beside `inner`, or an inner method without a trained pair.

    >>> import torch
    >>> a, b = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(8, 4))
    >>> [group["lr"] for group in LoRAPlus(r=4).param_groups([("layer.A", a), ("layer.B", b)], lr=1e-3)]
    [0.001, 0.004]
    """

    name = "lora-plus"
    paper = "Hayou et al. 2024, arXiv:2402.12354"
    trains = "A, B; B at ratio × the rate"

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"
    ratio: float = 4.0
    inner: Method | None = None

    def __post_init__(self) -> None:
        validate.rank("LoRAPlus.r", self.r)
        validate.alpha("LoRAPlus.alpha", self.alpha)
        validate.dropout("LoRAPlus.dropout", self.dropout)
        validate.flag("LoRAPlus.rslora", self.rslora)
        validate.choice("LoRAPlus.init", self.init, INITIALISERS, "unknown initialiser")
        validate.number("LoRAPlus.ratio", self.ratio, least=0, open_=True, fix="ratio=4.0")
        if self.inner is not None:
            self._check_inner(self.inner)

    def _check_inner(self, inner: Method) -> None:
        reason = objection(inner)
        if reason is not None:
            raise ConfigError(
                f"LoRAPlus cannot be put around {type(inner).__name__}: {reason}",
                where="LoRAPlus.inner",
                found=repr(inner),
                expected="a method that trains matrices A and B, such as LoRA, DoRA or AdaLoRA",
                fix="LoRAPlus(ratio=..., inner=LoRA(...))",
            )
        twice = [field.name for field in fields(LoRA) if getattr(self, field.name) != field.default]
        if twice:
            raise ConfigError(
                "settings of LoRA are given beside an inner method, which has its own",
                where=f"LoRAPlus.{twice[0]}",
                found=", ".join(f"{name}={getattr(self, name)!r}" for name in twice) + f" and inner={inner!r}",
                expected="one of the two",
                fix=f"LoRAPlus(ratio={self.ratio!r}, inner={type(inner).__name__}(...)) with those settings inside",
            )

    @property
    def within(self) -> Method:
        if self.inner is not None:
            return self.inner
        return LoRA(r=self.r, alpha=self.alpha, dropout=self.dropout, rslora=self.rslora, init=self.init)

    def around(self, inner: Method) -> LoRAPlus:
        if self.inner is None and isinstance(inner, LoRA):
            return replace(self, **{field.name: getattr(inner, field.name) for field in fields(LoRA)})
        return LoRAPlus(ratio=self.ratio, inner=inner)

    def adapter_settings(self) -> tuple[object, ...]:
        return self.within.adapter_settings()  # the adapters are the inner method's, and so are their values

    def settings(self) -> dict[str, object]:
        return {"ratio": self.ratio, **(self.within.settings() if self.inner is None else super().settings())}

    def param_groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        groups = self.within.param_groups(named, lr)
        if self.ratio == 1:
            return groups
        ups = {id(parameter) for name, parameter in named if name.rpartition(".")[2] in self.ups()}
        split: list[dict[str, Any]] = []
        for group in groups:
            plain = [parameter for parameter in group["params"] if id(parameter) not in ups]
            faster = [parameter for parameter in group["params"] if id(parameter) in ups]
            rate = group.get("lr", lr)
            split += [{**group, "params": plain, "lr": rate}, {**group, "params": faster, "lr": rate * self.ratio}]
        return [group for group in split if group["params"]]


def objection(method: object) -> str | None:
    """Why LoRA+ has no meaning around a method; None when it has."""
    if not isinstance(method, Method):
        return "it is no method"
    layer: Method = method
    while isinstance(layer, Around):
        if isinstance(layer, LoRAPlus):
            return "B has its own learning rate there already, and two ratios would multiply"
        layer = layer.within
    if isinstance(layer, LoRAFA):
        return "A is frozen there, so the ratio would do no more than rename the learning rate"
    if not method.ups():
        return "it trains no matrix B, so there is nothing to give another learning rate to"
    return None
