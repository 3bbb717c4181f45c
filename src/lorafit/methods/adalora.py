"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023, arXiv:2303.10512.

Equation (eq. 3):     W = W₀ + Δ = W₀ + s P Λ Q
Penalty (eq. 4):      R = ‖PᵀP − I‖_F + ‖QQᵀ − I‖_F;  the loss is C + γ · mean of R over the sites
Score (eq. 7):        Sᵢ = s(λᵢ) + mean of s over column i of P + mean of s over row i of Q, of triplet i
Sensitivity (8–11):   I = |w ∂C/∂w|;  Ī ← β₁ Ī + (1 − β₁) I;  Ū ← β₂ Ū + (1 − β₂) |I − Ī|;  s(w) = Ī Ū
Budget (eq. 12):      b(t) = b_T + (b₀ − b_T) (1 − (t − t_i) / (T − t_i − t_f))³;  b₀ up to t_i, b_T from T − t_f on

| symbol   | code                                          | shape             |
|----------|-----------------------------------------------|-------------------|
| P        | `AdaLoRAAdapter.P`                            | (out, k / groups) |
| Λ        | `AdaLoRAAdapter.lam`                          | (k,)              |
| Q        | `AdaLoRAAdapter.Q`                            | (k, in)           |
| b₀, b_T  | `AdaLoRA.init_r`, `.target_r` times the sites |                   |
| t_i, t_f | `AdaLoRA.warmup`, `.final`                    |                   |
| ΔT       | `AdaLoRA.interval`                            |                   |
| γ        | `AdaLoRA.orthogonality`                       |                   |
| s        | `AdaLoRA.scale` = α / (init_r + 1e-5)         |                   |

Trained: P, Λ, Q. Count: r (in + out / groups + 1) per site with r = init_r, and fewer from the final phase on.
Init: Λ = 0, so Δ = 0; P and Q ~ N(0, 0.02²).
Schedule: after every ΔT-th step between t_i and T − t_f, the b(t) best triplets of all sites together keep their λ.
The others get 0, and may come back. After step T − t_f the choice is final, and what it leaves out is removed: P, Λ,
Q and what the optimizer holds for them become smaller, and the last t_f steps cheaper. As long as every λ is 0 (in the
first step, or while the learning rate is 0) every score is 0 and says nothing: with fewer scores above 0 than b(t)
nothing is pruned, but for the last time, step T − t_f. Equal scores are shared out evenly: the best triplet of each
site comes before the second ones, then the earlier site's; there are always exactly b(t). ΔT is at most a tenth of the
pruning phase, so that a short run is pruned little by little too, and at least 2 if that phase has 4 steps: what is
pruned at every step never moves, and cannot come back. If the run is distributed, or the optimizer holds something
whose parts cannot be told apart, the tensors keep their size and λ is held at 0, with the same result.

Deviations. From paper and published code: I takes the gradient of the task's loss C as the optimizer would get it
(theirs includes the penalty, which says nothing of what a triplet does for the task). The penalty is added to the
gradients in closed form, so that every training loop has it, and after clipping, so that it takes nothing from the
task's share. From the paper: R has norms that are not squared, as the published code has them, and is averaged over
the sites. The published code averages over P and Q too: its γ = 1 is γ = 0.5 here. From the published code: I takes w
before the step, as the paper's Algorithm 1 does (there: after it); equal scores never leave too few triplets; in the
final phase only triplets that are kept have a penalty. As published: s is α / (init_r + 1e-5) at every rank, never
the current one. Beyond both: embeddings and grouped convolutions. There a triplet belongs to one group; a site keeps
as many in each group as the group that needs most, with λ = 0 for the rest.
In PEFT's files: `lora_A` = Q, `lora_E` = Λ, `lora_B` = P. As plain LoRA, exactly: A = diag(Λ) Q, B = P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.delta import LowRank, Update
from lorafit.errors import ConfigError
from lorafit.layers import Shape
from lorafit.method import Adapter, Method, Schedule, Spot
from lorafit.methods import validate
from lorafit.methods.adalora_budget import lengths
from lorafit.methods.adalora_schedule import AdaLoRASchedule, Course
from lorafit.methods.adalora_triplets import Triplets
from lorafit.methods.lora import indivisible, matrices, too_large


class AdaLoRAAdapter(Triplets):
    """P, Λ and Q at one site."""

    def __init__(self, p: Tensor, lam: Tensor, q: Tensor, *, scale: float, dropout: float, groups: int) -> None:
        super().__init__(p, lam, q, groups)
        self.scale = scale
        self.dropout = dropout

    def update(self, weight: Callable[[], Tensor]) -> Update:
        p: Tensor = self.P
        lam: Tensor = self.lam
        q: Tensor = self.Q
        if lam.shape[0] == 0:  # torch has no convolution to 0 channels: one triplet of zeros stands for none
            p, lam, q = F.pad(p, (0, 1)), F.pad(lam, (0, self.groups)), F.pad(q, (0, 0, 0, self.groups))
        return Update(LowRank(p, q, mid=lam, scale=self.scale, groups=self.groups))

    def extra_repr(self) -> str:
        return f"k={self.lam.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Hyperparameters of AdaLoRA.

    Args:
        init_r: the triplets of each site at the start, at least 1. 1.5 times `target_r` is the paper's choice.
        target_r: the triplets of a site at the end, on average over the sites, from 1 to `init_r`.
        alpha: α, greater than 0; None means 2 init_r.
        dropout: probability of dropping the adapter's own input in training, in [0, 1).
        total_steps: T, the optimizer steps of the run; None leaves it to `handle.optimizer(total_steps=)`. It may be
            less than the run has, and not more: the budget would not be reached.
        warmup: t_i, before the first pruning: a whole number of steps, or a fraction of the run in [0, 1).
        final: t_f, after the last pruning: likewise. At least one step must be left between the two.
        interval: ΔT, the steps between two prunings; a tenth of the pruning phase where that is less, and at least 2
            where that phase has 4 steps.
        beta1: β₁, the weight of the past in the average sensitivity, in (0, 1).
        beta2: β₂, the same for its spread.
        orthogonality: γ, the weight of the penalty, at least 0.

    Raises:
        ConfigError: for a value out of range; the message names the field and one fix.

    >>> AdaLoRA(init_r=12, target_r=8).num_trainable([(768, 768)] * 72)  # before pruning: r (in + out + 1) per site
    1327968
    >>> AdaLoRA(init_r=4, target_r=8)
    Traceback (most recent call last):
    ...
    lorafit.errors.ConfigError: the budget can only fall: target_r is greater than init_r
      where:    AdaLoRA.target_r
      found:    8
      expected: at most init_r = 4
      fix:      init_r=12
    """

    name = "adalora"
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    trains = "P, Λ, Q"
    in_peft = "AdaLoRA, linear layers"
    in_vllm = "export"

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    total_steps: int | None = None
    warmup: int | float = 0.1
    final: int | float = 0.2
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        validate.rank("AdaLoRA.init_r", self.init_r)
        validate.rank("AdaLoRA.target_r", self.target_r)
        validate.alpha("AdaLoRA.alpha", self.alpha)
        validate.dropout("AdaLoRA.dropout", self.dropout)
        if self.total_steps is not None:
            validate.whole("AdaLoRA.total_steps", self.total_steps, fix="total_steps=None: the run's")
        self._part("AdaLoRA.warmup", self.warmup, "warmup=0.1")
        self._part("AdaLoRA.final", self.final, "final=0.2")
        validate.whole("AdaLoRA.interval", self.interval, fix="interval=10")
        validate.number("AdaLoRA.beta1", self.beta1, least=0, below=1, open_=True, fix="beta1=0.85")
        validate.number("AdaLoRA.beta2", self.beta2, least=0, below=1, open_=True, fix="beta2=0.85")
        validate.number("AdaLoRA.orthogonality", self.orthogonality, least=0, fix="orthogonality=0.5")
        if self.target_r > self.init_r:
            raise ConfigError(
                "the budget can only fall: target_r is greater than init_r",
                where="AdaLoRA.target_r",
                found=self.target_r,
                expected=f"at most init_r = {self.init_r}",
                fix=f"init_r={-(-3 * self.target_r // 2)}",
            )
        self._leave_room()

    @staticmethod
    def _part(where: str, value: object, fix: str) -> None:
        if isinstance(value, int):
            validate.whole(where, value, least=0, fix=fix)
        else:
            validate.number(
                where, value, least=0, below=1, fix=f"{fix}, a fraction of the run, or a whole number of steps"
            )

    def _leave_room(self) -> None:
        """Raises where it is clear already that no step is left to prune in."""
        fractions = [part for part in (self.warmup, self.final) if not isinstance(part, int)]
        full = sum(fractions) >= 1
        if self.total_steps is not None:
            full = full or sum(lengths(self.total_steps, self.warmup, self.final)) >= self.total_steps
        if full:
            raise ConfigError(
                "warm-up and final phase leave no step to prune in",
                where="AdaLoRA.warmup, AdaLoRA.final",
                found=f"warmup={self.warmup}, final={self.final}, total_steps={self.total_steps}",
                expected="less than the whole run together",
                fix="warmup=0.1, final=0.2: fractions of the run",
            )

    @property
    def resolved_alpha(self) -> float:
        """α, with None resolved to 2 init_r."""
        return 2 * self.init_r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """s, the factor of P Λ Q."""
        return self.resolved_alpha / (self.init_r + 1e-5)

    def at(self, *, r: int | None = None, alpha: float | None = None) -> AdaLoRA:
        if r is None and alpha is None:
            return self
        given = "rank_pattern" if alpha is None else "alpha_pattern"
        raise ConfigError(
            "AdaLoRA has one initial rank and one scale: the budget decides over ranks, and compares the sites",
            where=given,
            found=f"r={r}" if alpha is None else f"alpha={alpha}",
            expected="no pattern",
            fix=f"{given}=None",
        )

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        shape, r = spot.shape, self.init_r
        p = torch.empty(shape.out, r // shape.groups).normal_(std=0.02, generator=generator)
        q = torch.empty(r, shape.inn).normal_(std=0.02, generator=generator)
        return AdaLoRAAdapter(p, torch.zeros(r), q, scale=self.scale, dropout=self.dropout, groups=shape.groups)

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        listed = list(shapes)
        return matrices(self.init_r, listed) + self.init_r * len(listed)

    def impossible(self, spot: Spot) -> str | None:
        reason = indivisible(self.init_r, spot.shape)
        return None if reason is None else f"init_{reason}"

    def wasteful(self, spot: Spot) -> str | None:
        reason = too_large(self.init_r, spot.shape)
        return None if reason is None else f"init_{reason}"

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, self.init_r, self.scale)

    def ups(self) -> tuple[str, ...]:
        return ("P",)

    def rate(self, shapes: Iterable[Shape | tuple[int, int]]) -> float:
        """P and Q are small and Λ is zero at the start. Measured: docs/results/household.md."""
        return 10.0

    def schedule(self, adapters: Mapping[str, Adapter]) -> Schedule:
        course = Course(**{field.name: vars(self)[field.name] for field in fields(Course)})
        # What is not made of triplets is another method's, which was put around this one.
        return AdaLoRASchedule(course, {path: each for path, each in adapters.items() if isinstance(each, Triplets)})

    def settings(self) -> dict[str, object]:
        return {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "alpha": self.resolved_alpha,
            "scale": self.scale,
            "dropout": self.dropout,
            "total_steps": self.total_steps,
            "warmup": self.warmup,
            "final": self.final,
            "interval": self.interval,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orthogonality": self.orthogonality,
        }
