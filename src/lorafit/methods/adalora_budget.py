"""The mathematics of AdaLoRA's schedule (see `adalora`), on plain tensors: budget, sensitivities, choice, penalty.

Tensors of n sites of one shape are stacked, and seen by group of a grouped convolution (g = 1 anywhere else), with
c = k / g triplets in each: P (n, g, out / g, c), Λ (n, g, c), Q (n, g, c, in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.errors import TrainingError

ROUNDS = 10
"""In how many rounds the budget falls at least, if the run has twice as many steps to prune in."""
APART = 2
"""The steps between two prunings at least: a λ that was pruned must move, and be seen, before it is judged again."""
PIECE = 2**16
"""About how many numbers are worked on at a time: four times float32 of them stay in a cache of 1 MB."""


@dataclass(frozen=True)
class Plan:
    """When the budget falls, and how far. Steps count from 1; step t is over when the optimizer has stepped t times.

    Args:
        steps: T, the steps of the run.
        warmup: t_i, the steps before the first pruning.
        final: t_f, the steps after the last one.
        interval: ΔT, the steps between two prunings.
        start: b₀, the triplets of all sites together at the start.
        end: b_T, the triplets that are left.

    >>> plan = Plan(steps=100, warmup=10, final=20, interval=10, start=24, end=16)
    >>> [plan.budget(t) for t in (0, 10, 20, 30, 50, 79, 80, 100)]
    [24, 24, 21, 18, 16, 16, 16, 16]
    >>> [t for t in range(101) if plan.prunes(t)]
    [20, 30, 40, 50, 60, 70, 80]
    """

    steps: int
    warmup: int
    final: int
    interval: int
    start: int
    end: int

    @property
    def last(self) -> int:
        """T − t_f: the step with the last pruning."""
        return self.steps - self.final

    def budget(self, t: int) -> int:
        """b(t), eq. 12, rounded down, in whole numbers so that no rounding error can take or add a triplet."""
        if t <= self.warmup:
            return self.start
        if t >= self.last:
            return self.end
        left, length = self.last - t, self.last - self.warmup
        return self.end + (self.start - self.end) * left**3 // length**3

    def prunes(self, t: int) -> bool:
        """Whether triplets are pruned after step t."""
        return self.warmup < t <= self.last and (t % self.interval == 0 or t == self.last)


def lengths(steps: int, warmup: float, final: float) -> tuple[int, int]:
    """(t_i, t_f) of a run: whole numbers are steps, others fractions of the run, rounded down.

    >>> lengths(24, 0.1, 0.2), lengths(100, 29, 0.29)
    ((2, 4), (29, 29))
    """
    first, last = (each if isinstance(each, int) else int(each * steps + 1e-9) for each in (warmup, final))
    return first, last


def planned(steps: int, warmup: float, final: float, interval: int, start: int, end: int) -> Plan:
    """The plan for a run of so many steps.

    Args:
        steps: T.
        warmup: t_i in steps, or as a fraction of the run; `final`, t_f, likewise.
        final: see warmup.
        interval: ΔT, if the pruning phase has ten of them; else a tenth of that phase, so that a short run is pruned
            little by little too; but at least 2 where the phase has 4 steps.
        start: b₀.
        end: b_T.

    Raises:
        TrainingError: no step is left to prune in.

    >>> [planned(steps, 0.1, 0.2, 10, 24, 16).interval for steps in (1000, 100, 24)]
    [10, 7, 2]
    """
    first, last = lengths(steps, warmup, final)
    between = steps - first - last
    if between < 1:
        raise TrainingError(
            "the run is too short for AdaLoRA's warm-up and final phase: no step is left to prune in",
            found=f"{steps} steps, of which {first} + {last}",
            expected=f"at least {first + last + 1} steps",
            where="AdaLoRA.warmup, AdaLoRA.final",
            fix="warmup=0.1, final=0.2: fractions of the run",
        )
    least = APART if between >= 2 * APART else 1
    return Plan(steps, first, last, max(least, min(interval, between // ROUNDS)), start, min(start, end))


class Averages:
    """Ī and Ū (eqs. 9 and 10) of every number in the triplets of some sites of one shape.

    Args:
        means: Ī by name in `TRIPLET`.
        spreads: Ū by name.
    """

    def __init__(self, means: Mapping[str, Tensor], spreads: Mapping[str, Tensor]) -> None:
        self.means = dict(means)
        self.spreads = dict(spreads)

    @classmethod
    def zero(cls, like: Mapping[str, Tensor]) -> Averages:
        """Averages of nothing yet."""
        return cls(*({name: torch.zeros_like(each) for name, each in like.items()} for _ in range(2)))

    def update(
        self,
        weights: Mapping[str, Sequence[Tensor]],
        gradients: Mapping[str, Sequence[Tensor | None]],
        beta1: float,
        beta2: float,
    ) -> None:
        """Takes in one step's sensitivities I = |w · ∂L/∂w| (eq. 8) of the sites' own tensors; no gradient is one of 0.

        Each number is read and written once, in pieces that stay in a processor's cache; the weights are not copied.
        """
        for name, mean in self.means.items():
            sites = list(zip(weights[name], gradients[name], strict=True))
            step = max(1, PIECE // max(1, mean[0].numel()))
            buffer = torch.empty_like(mean[:step])
            for start in range(0, len(sites), step):
                part = sites[start : start + step]
                sensitivity = buffer[: len(part)]
                for place, (weight, gradient) in zip(sensitivity, part, strict=True):
                    if gradient is None:
                        place.zero_()
                    else:
                        torch.mul(weight, gradient, out=place.view(weight.shape))
                average, spread = (each[start : start + step] for each in (mean, self.spreads[name]))
                average.lerp_(sensitivity.abs_(), 1 - beta1)
                spread.lerp_(sensitivity.sub_(average).abs_(), 1 - beta2)

    def scores(self) -> Tensor:
        """S (eq. 7) of each triplet, (n, k): s(λ) + the mean of s over its column of P + that over its row of Q."""
        s = {name: mean * self.spreads[name] for name, mean in self.means.items()}
        return (s["lam"] + s["P"].mean(dim=2) + s["Q"].mean(dim=3)).flatten(1)


def telling(scores: Sequence[Tensor], budget: int) -> bool:
    """Whether the scores can tell which `budget` triplets are best: as many are greater than 0."""
    return sum(int(torch.count_nonzero(each > 0)) for each in scores) >= budget


def best(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which triplets of each site, True, are among the `budget` best of all.

    Of equal ones that with fewer better ones at its own site is better, so that no site loses all of them; then the
    earlier site's. At one site the earlier triplet is better.

    >>> [each.int().tolist() for each in best([torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 0.2, 0.1])], 5)]
    [[1, 1, 0], [1, 0, 0], [0, 1, 1]]
    """
    placed = [each.to(scores[0].device) for each in scores]
    flat = torch.cat(placed)
    ranks = [torch.argsort(torch.argsort(each, descending=True, stable=True)) for each in placed]
    turn = torch.argsort(torch.cat(ranks), stable=True)
    live = torch.zeros_like(flat, dtype=torch.bool)
    live[turn[torch.argsort(flat[turn], descending=True, stable=True)[:budget]]] = True
    parts = torch.split(live, [len(each) for each in scores])
    return [part.to(each.device) for part, each in zip(parts, scores, strict=True)]


def orthogonality(columns: Sequence[Tensor], live: Tensor | None) -> Tensor:
    """E (n, g, c, c), for each of n sites, with X E the gradient of ‖XᵀX − I‖_F by X.

    It is 2 (XᵀX − I) / ‖XᵀX − I‖_F, and 0 where that norm is 0.

    Args:
        columns: n times (g, rows, c), or (rows, c) where g is 1, which is faster. The norm is that of the
            block-diagonal matrix which the g blocks are together.
        live: (n, g, c), the columns that count; None for all.
    """
    first = columns[0]
    g, c = (1, first.shape[1]) if first.dim() == 2 else (first.shape[0], first.shape[2])
    error = first.new_empty(len(columns), g, c, c)
    for place, x in zip((error[:, 0] if first.dim() == 2 else error).unbind(), columns, strict=True):
        torch.matmul(x.mT, x, out=place)
    if live is not None:
        error.mul_(live[..., None]).mul_(live[..., None, :])
    error.diagonal(dim1=-2, dim2=-1).sub_(1 if live is None else live.to(error.dtype))
    norm = torch.linalg.vector_norm(error, dim=(1, 2, 3), keepdim=True)
    return error.mul_(2 / norm.clamp_min(torch.finfo(norm.dtype).tiny))
