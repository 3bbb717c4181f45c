"""Delta-LoRA: LoRA whose steps also move the weight. Zi et al. 2023, arXiv:2309.02411.

Equations:                h = W x + s B A x
after step t > K:         W ← W + λ s (B⁽ᵗ⁾ A⁽ᵗ⁾ − B⁽ᵗ⁻¹⁾ A⁽ᵗ⁻¹⁾), without gradient or moments for W

The moves of W telescope: W⁽ᵗ⁾ = W₀ + λ s (B A − B_K A_K), B_K A_K being the product after step K. The whole change is
therefore s [(1 + λ) B A − λ B_K A_K], of rank 2 r at most, and W₀ is never written to: nothing is lost where W is in
bf16, detaching gives W₀ back bit for bit, and files hold a plain LoRA of rank 2 r.

| symbol   | code                              | shape                       |
|----------|-----------------------------------|-----------------------------|
| A        | `DeltaLoRAAdapter.A`              | (r, in)                     |
| B        | `DeltaLoRAAdapter.B`              | (out, r / groups)           |
| A_K, B_K | `DeltaLoRAAdapter.A_K`, `.B_K`    | like A and B, buffers       |
| λ        | `DeltaLoRA.lam`                   |                             |
| λ now    | `DeltaLoRAAdapter.lam`            | (), a buffer: 0, then λ     |
| K        | `DeltaLoRA.start`                 | optimizer steps             |
| s        | `DeltaLoRA.scale`                 | α / r                       |

Trained: A and B, with the gradients of s B A alone (dL/dB = s G Aᵀ, dL/dA = s Bᵀ G at the gradient G of the weight W is
now): the moves of W are no function of A and B to autograd, while dL/dx is that of all of W. Count: as LoRA.
Init: as LoRA's; initialisers with B₀ A₀ ≠ 0 are refused.
Schedule: counts optimizer steps (not micro-batches); after step K it copies A and B and sets λ. Resumes exactly.
Cost: until then, and always where K = 0 (so that B_K = 0), that of LoRA of rank r; from then on that of rank 2 r, and
never a pass over a weight. The device is asked for λ once after each change of it, not in each forward pass; compiled
programs, and others that may not ask, multiply by all 2 r rows always.

What it comes to. λ = 0, or K past the end, is LoRA. With K = 0 the change is s (1 + λ) B A, and Adam does not see the
scale of gradients: it is then LoRA with alpha (1 + λ) at the same rates, up to Adam's ε and to clipping. The product of
the differences, (ΔB)(ΔA), is something else than the difference of the products, and wrong.

Deviations. Where W is also another layer's, the paper's move of W would act there too: such layers are refused. Steps
are counted from 1; the paper's listing counts them from 0, so that its K is this one less one. No dropout, as in the
paper. Published code by the authors is not known.
In PEFT's files: plain LoRA of rank 2 r, with B' = [(1 + λ) B, −λ B_K] and A' = [A; A_K] (see `DeltaLoRAAdapter.plain`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.delta import LowRank, Update
from lorafit.errors import TrainingError, some
from lorafit.layers import Shape
from lorafit.memo import Memo, state, unseen
from lorafit.method import Adapter, Evidence, Method, Schedule, Spot
from lorafit.methods import validate
from lorafit.methods.initialisers import INITIALISERS
from lorafit.methods.lora import LoRA, stacked

# K where nothing was said about it: a share of the run, or a number of steps where its length is not known.
SHARE, STEPS = 0.1, 500


class _Moved(NamedTuple):
    """What has moved the weight so far: λ, and −λ B_K unless that is zero (as it is where K = 0)."""

    lam: float
    back: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, lam: Tensor, b: Tensor) -> _Moved:
        value = float(lam)
        return cls(value, -value * b if value and b.any() else None)


class DeltaLoRAAdapter(Adapter):
    """A pair A, B and the pair that it was after step K; ΔW = s [(1 + λ) B A − λ B_K A_K]."""

    A_K: Tensor
    B_K: Tensor
    lam: Tensor

    def __init__(self, a: Tensor, b: Tensor, *, scale: float, groups: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.register_buffer("A_K", a.clone())
        self.register_buffer("B_K", b.clone())
        self.register_buffer("lam", torch.zeros(()))
        self._known: Memo[_Moved] = Memo()
        self.scale = scale
        self.groups = groups

    def update(self, weight: Callable[[], Tensor]) -> Update:
        # Of (1 + λ) B A, only one B A is a function of A and B: λ B stands beside B without a gradient, and A, which
        # meets both, passes on 1 / (1 + λ) of its own. The values are those of A and B exactly.
        a: Tensor = self.A
        b: Tensor = self.B
        moved = self._moved()
        if moved is None:
            up, down = b + self.lam * b.detach(), a.detach() + (a - a.detach()) / (1 + self.lam)
            up, down = stacked((up, down), (-self.lam * self.B_K, self.A_K), self.groups)
        elif moved.lam == 0:
            up, down = b, a
        else:
            up, down = torch.add(b, b.detach(), alpha=moved.lam), torch.lerp(a.detach(), a, 1 / (1 + moved.lam))
            if moved.back is not None:
                up, down = stacked((up, down), (moved.back, self.A_K), self.groups)
        return Update(LowRank(up, down, scale=self.scale, groups=self.groups))

    def _moved(self) -> _Moved | None:
        """λ and −λ B_K as they are, read again only after a change; None where values cannot be read."""
        if torch.compiler.is_compiling():
            return None
        lam, b = self.lam, self.B_K
        known = self._known.held((lam, b))
        if known is not None:
            return known
        # A checkpoint's forward pass may be seen by a mode, and its repetition by none: both must take the same way.
        with unseen(lam, b):
            now = state((lam, b))
            return None if now is None or lam.is_meta else self._known.get(now, lambda: _Moved.of(lam, b))

    def forget(self) -> None:
        """Drops what is remembered of the buffers. Needed only where one was written to through `.data`."""
        self._known.clear()

    def train(self, mode: bool = True) -> DeltaLoRAAdapter:
        # Averages of tensors are often swapped in for evaluation through `.data`, which no version shows.
        if mode != self.training:
            self.forget()
        super().train(mode)
        return self

    def _replicate_for_data_parallel(self) -> DeltaLoRAAdapter:
        # What torch asks of a module that a thread of its own will run, with copies of its tensors.
        replica: DeltaLoRAAdapter = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._known = Memo()
        return replica

    @torch.no_grad()
    def plain(self) -> tuple[Tensor, Tensor]:
        """A' (2 r, in) and B' (out, 2 r / groups) of the plain LoRA with this one's s that computes the same."""
        return stacked((self.B + self.lam * self.B, self.A), (-self.lam * self.B_K, self.A_K), self.groups)[::-1]

    @torch.no_grad()
    def depart(self, lam: float) -> None:
        """Step K is done: W moves from here on. An adapter whose W has moved before is left as it is."""
        if self.lam == 0:
            self.A_K.copy_(self.A)
            self.B_K.copy_(self.B)
            self.lam.fill_(lam)

    @torch.no_grad()
    def take_back(self) -> None:
        """W does not move yet after all. An adapter that has learnt since it departed is left as it is."""
        if torch.equal(self.A_K, self.A) and torch.equal(self.B_K, self.B):
            self.lam.zero_()

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, scale={self.scale:g}"


class Departure(Schedule):
    """Counts optimizer steps, and lets the weights move after the K-th.

    Args:
        adapters: module path → adapter.
        lam: λ.
        start: K, as `DeltaLoRA` has it.
    """

    def __init__(self, adapters: Mapping[str, Adapter], lam: float, start: int | float | None) -> None:
        self._adapters = {path: each for path, each in adapters.items() if isinstance(each, DeltaLoRAAdapter)}
        self._lam = lam
        self._start = start
        self._count = 0
        self._k: int | None = None
        self._checked = False
        self._early: list[DeltaLoRAAdapter] = []  # those that departed before the first step

    def begin(self, total_steps: int | None) -> None:
        if self._count == 0:  # a run that is under way keeps its K
            self._k = self._resolve(total_steps)
            self._begin()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._k is None:
            raise TrainingError(
                "Delta-LoRA starts after a share of the run, and nobody said how long the run is",
                where="DeltaLoRA.start",
                found=f"start={self._start!r}, total_steps=None",
                fix="handle.optimizer(..., total_steps=...), or DeltaLoRA(start=100)",
            )
        if not self._checked:
            self._check(self._k)
            self._checked = True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._count += 1
        self._depart()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "K": self._k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, self._k = state["count"], state["K"]
        self._checked = False
        self._begin()

    def facts(self) -> dict[str, Any]:
        return {"start": self._k, "started": self._k is not None and self._count >= self._k}

    def told(self) -> str | None:
        if self._k is None or not self._lam:
            return None
        return f"Delta-LoRA: the weights move from step {self._k + 1:,} on"

    def _resolve(self, total_steps: int | None) -> int | None:
        if isinstance(self._start, int) or self._start == 0:
            return int(self._start)
        if total_steps is not None:
            # With K = 0 it would be another method, LoRA at α (1 + λ): that is for who asks for it by start=0.
            return max(1, round(total_steps * (SHARE if self._start is None else self._start)))
        return STEPS if self._start is None else None

    def _begin(self) -> None:
        """Departs where K is 0. What another K made depart before is taken back: adapters that came so are not."""
        if self._k is None or self._count < self._k:
            for adapter in self._early:
                adapter.take_back()
            self._early = []
        elif self._count == 0:
            self._early += [adapter for adapter in self._adapters.values() if adapter.lam == 0]
            self._depart()

    def _depart(self) -> None:
        if self._count == self._k:
            for adapter in self._adapters.values():
                adapter.depart(self._lam)

    def _check(self, k: int) -> None:
        """Raises `TrainingError` where the count was resumed without the adapters that belong to it."""
        behind = [path for path, each in self._adapters.items() if self._lam and self._count >= k and each.lam == 0]
        if behind:
            raise TrainingError(
                "the optimizer's state is past the step after which Delta-LoRA moves weights, and adapters are not",
                where=some(behind, 3),
                found=f"{self._count} steps, λ = 0",
                expected=f"λ = {self._lam:g} after {k} steps",
                fix="restore the adapter (its buffers too) and the optimizer from the same checkpoint",
            )


@dataclass(frozen=True)
class DeltaLoRA(Method):
    """Hyperparameters of Delta-LoRA.

    Args:
        r: rank, at least 1.
        alpha: α, greater than 0; None means 2 r.
        lam: λ, at least 0: how far the weight moves with each step of s B A.
        start: K: the weight moves after this many optimizer steps (a whole number), or after this share of the run (a
            fraction of less than 1; never before the first step, unless it is 0). None: a tenth of the run, or 500
            steps where its length is not known.
        init: name of an initialiser with B A = 0, see `lorafit.methods.initialisers`.

    Raises:
        ConfigError: for a value out of range; the message names the field and one fix.

    >>> DeltaLoRA(r=4).num_trainable([(8, 6)])
    56
    """

    name = "delta-lora"
    paper = "Zi et al. 2023, arXiv:2309.02411"
    trains = "A, B"
    in_peft = "LoRA of rank 2 r"
    in_vllm = "yes"

    r: int = 16
    alpha: float | None = None
    lam: float = 2.0
    start: int | float | None = None
    init: str = "default"

    def __post_init__(self) -> None:
        validate.rank("DeltaLoRA.r", self.r)
        validate.alpha("DeltaLoRA.alpha", self.alpha)
        validate.number("DeltaLoRA.lam", self.lam, least=0, fix="lam=2.0")
        if isinstance(self.start, float):
            validate.number(
                "DeltaLoRA.start", self.start, least=0, below=1, fix="start=0.1, or a whole number of steps"
            )
        elif self.start is not None:
            validate.whole("DeltaLoRA.start", self.start, least=0, fix="start=None")
        validate.choice("DeltaLoRA.init", self.init, INITIALISERS, "unknown initialiser")
        zero = [name for name, each in INITIALISERS.items() if not each.anchored]
        reason = "this initialiser does not start from B A = 0, and Delta-LoRA moves the weight by what B A becomes"
        validate.choice("DeltaLoRA.init", self.init, zero, reason)

    @property
    def _lora(self) -> LoRA:
        return LoRA(self.r, self.alpha, init=self.init)

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self._lora.scale

    def at(self, *, r: int | None = None, alpha: float | None = None) -> DeltaLoRA:
        return replace(self, r=self.r if r is None else r, alpha=self.alpha if alpha is None else alpha)

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> DeltaLoRAAdapter:
        a, b = INITIALISERS[self.init].draw(spot, self.r, self.scale, generator)
        return DeltaLoRAAdapter(a, b, scale=self.scale, groups=spot.shape.groups)

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        return self._lora.num_trainable(shapes)

    def impossible(self, spot: Spot) -> str | None:
        if spot.shared:
            return f"its weight is also {some(spot.shared)}, and Delta-LoRA moves the weight: it would act there too"
        return self._lora.impossible(spot)

    def wasteful(self, spot: Spot) -> str | None:
        return self._lora.wasteful(spot)

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, self.r, self.scale, self.lam)

    def ups(self) -> tuple[str, ...]:
        return ("B",)

    def evidence(self) -> Evidence | None:
        return self._lora.evidence()

    def settings(self) -> dict[str, object]:
        start = f"{SHARE:g} of the run" if self.start is None else self.start
        return {
            "r": self.r,
            "alpha": self._lora.resolved_alpha,
            "scale": self.scale,
            "init": self.init,
            "lam": self.lam,
            "start": start,
        }

    def schedule(self, adapters: Mapping[str, Adapter]) -> Schedule | None:
        return Departure(adapters, self.lam, self.start)
