"""The schedule of AdaLoRA (see `adalora`): what happens around every optimizer step, and what is kept of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import LorafitWarning, TrainingError
from lorafit.method import Schedule
from lorafit.methods.adalora_budget import Averages, Plan, best, orthogonality, planned, telling
from lorafit.methods.adalora_triplets import (
    TRIPLET,
    Triplets,
    alone,
    blocks,
    parameter_of,
    separable,
    shrink,
    stand_ins,
    survivors,
)


@dataclass(frozen=True)
class Course:
    """The settings of the schedule; names and meanings as in `AdaLoRA`."""

    target_r: int
    total_steps: int | None
    warmup: float
    final: float
    interval: int
    beta1: float
    beta2: float
    orthogonality: float


class AdaLoRASchedule(Schedule):
    """Scores the triplets, prunes them, and adds the penalty's gradient; see `adalora` for what they are.

    Every decision follows from gradients and weights alone, which are the same in all processes of a distributed run.

    Args:
        course: the settings.
        adapters: by path.
    """

    needs_gradients = True

    def __init__(self, course: Course, adapters: Mapping[str, Triplets]) -> None:
        self._course = course
        self._adapters = dict(adapters)
        self._steps = course.total_steps
        self._averages: dict[tuple[str, ...], Averages] = {}
        self._live: dict[str, Tensor] = {}
        self._ranks: dict[str, int] | None = None
        self._seen = False
        self._sorted: tuple[dict[str, int], list[tuple[str, ...]]] | None = None
        self.step = 0
        self.plan: Plan | None = None
        self.finished = False

    def begin(self, total_steps: int | None) -> None:
        if self.step == 0:  # one that was resumed goes on as it began
            own = self._course.total_steps
            if own is not None and total_steps is not None and own > total_steps:
                raise TrainingError(
                    "AdaLoRA's own total_steps is greater than the run's: the budget would not be reached",
                    found=own,
                    expected=f"at most {total_steps}, the steps of this run",
                    where="AdaLoRA.total_steps",
                    fix="leave total_steps out: the run's own is taken",
                )
            self._steps = total_steps if own is None else own
            self._plan()

    def _plan(self) -> None:
        self.plan, m, start = None, self._course, sum(self._now().values())
        if self._steps is not None:
            end = m.target_r * len(self._adapters)
            self.plan = planned(self._steps, m.warmup, m.final, m.interval, start, end)

    def _now(self) -> dict[str, int]:
        return {path: adapter.lam.shape[0] for path, adapter in self._adapters.items()}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.step == 0 and self._ranks is None:
            self._plan()  # again: values of another rank may have been loaded since
        self._check()
        for paths in self._kinds():
            sites = [self._adapters[path] for path in paths]
            weights = {name: [parameter_of(site, name) for site in sites] for name in TRIPLET}
            if not self.finished:
                gradients = {name: [each.grad for each in same] for name, same in weights.items()}
                if paths not in self._averages:
                    self._averages[paths] = Averages.zero(
                        {
                            name: torch.stack([blocks(each, sites[0].groups) for each in weights[name]])
                            for name in TRIPLET
                        }
                    )
                self._averages[paths].update(weights, gradients, self._course.beta1, self._course.beta2)
            if self._course.orthogonality:
                self._penalise(paths, weights, sites[0].groups)

    def _check(self) -> None:
        if self.plan is None:
            raise TrainingError(
                "AdaLoRA's budget falls over the run, and nobody said how long the run is",
                expected="the number of optimizer steps",
                where="AdaLoRA.total_steps",
                fix="handle.optimizer(..., total_steps=1000) or AdaLoRA(total_steps=1000)",
            )
        now = self._now()
        if self._ranks not in (None, now):
            assert self._ranks is not None
            raise TrainingError(
                "the adapters' ranks are not those of AdaLoRA's schedule",
                found=f"{sum(now.values())} triplets at {len(now)} sites",
                expected=f"{sum(self._ranks.values())} at {len(self._ranks)}",
                fix="load the adapter and the optimizer from the same checkpoint",
            )
        self._ranks = now
        if not self._seen:
            parameters = [p for adapter in self._adapters.values() for p in adapter.parameters() if p.numel()]
            self._seen = not parameters or any(p.grad is not None for p in parameters)
        if not self._seen:
            raise TrainingError(
                "AdaLoRA needs the gradients before the optimizer steps, and there are none",
                found="a step that computes them itself (a closure), or a loss that reaches no adapter",
                expected="loss.backward(), then optimizer.step()",
                fix="call optimizer.step() without a closure; in Lightning: automatic_optimization = False",
            )

    def _alike(self, sizes: Mapping[str, object]) -> list[tuple[str, ...]]:
        """The paths of the sites by shape: sites of one shape are worked on together."""
        kinds: dict[tuple[object, ...], list[str]] = {}
        for path, adapter in self._adapters.items():
            if path in sizes:
                key = (sizes[path], adapter.groups, adapter.lam.device, adapter.lam.dtype)
                kinds.setdefault(key, []).append(path)
        return [tuple(paths) for paths in kinds.values()]

    def _kinds(self) -> list[tuple[str, ...]]:
        """The paths of the sites by shape as they are now; looked up again only after ranks have changed."""
        assert self._ranks is not None
        if self._sorted is None or self._sorted[0] != self._ranks:
            sizes = {p: _sizes(a.parameters()) for p, a in self._adapters.items()}
            self._sorted = (dict(self._ranks), self._alike(sizes))
        return self._sorted[1]

    def _penalise(self, paths: tuple[str, ...], weights: Mapping[str, list[nn.Parameter]], groups: int) -> None:
        live = None
        if self._live:
            live = torch.stack([self._live[path].view(groups, -1) for path in paths])
        weight = self._course.orthogonality / len(self._adapters)
        for name in ("P", "Q"):
            same = weights[name]
            tensors: list[Tensor] = [*same] if groups == 1 else [blocks(each, groups) for each in same]
            columns = tensors if name == "P" else [each.mT for each in tensors]
            factors = orthogonality(columns, live).mul_(weight)
            for parameter, x, factor in zip(same, tensors, (factors[:, 0] if groups == 1 else factors), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                left, right = (x, factor) if name == "P" else (factor, x)
                if groups == 1:
                    parameter.grad.addmm_(left, right)
                else:
                    parameter.grad.add_((left @ right).view(parameter.shape))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.plan is not None
        self.step += 1
        if not self.finished and self.plan.prunes(self.step):
            by_path = {
                p: s for paths, each in self._averages.items() for p, s in zip(paths, each.scores(), strict=True)
            }
            scores, budget = [by_path[path] for path in self._adapters], self.plan.budget(self.step)
            last = self.step == self.plan.last
            if last or telling(scores, budget):
                live = dict(zip(self._adapters, best(scores, budget), strict=True))
                self._hold(live)
                if last:
                    self.finished, self._averages, self._live = True, {}, live
                    self._remove(optimizer)
        self._hold(self._live)

    def _hold(self, live: Mapping[str, Tensor]) -> None:
        for path, each in live.items():
            self._adapters[path].lam.masked_fill_(~each, 0)

    def _remove(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for adapter in self._adapters.values() for p in adapter.parameters()]
        if not alone() or stand_ins(optimizer, parameters):
            return
        if not all(separable(optimizer, parameter) for parameter in parameters):
            warnings.warn(
                f"{type(optimizer).__name__} holds values for whole blocks of a parameter: AdaLoRA keeps the pruned "
                "triplets, with λ = 0; the result is the same, but the last steps are not faster",
                LorafitWarning,
                stacklevel=2,
            )
            return
        for path, adapter in self._adapters.items():
            index, self._live[path] = survivors(self._live[path], adapter.groups)
            for name, parameter in adapter.named_parameters():
                shrink(parameter, name, index, optimizer)
        if all(bool(each.all()) for each in self._live.values()):
            self._live = {}
        self._ranks = self._now()

    def state_dict(self) -> dict[str, Any]:
        averages: dict[str, Any] = {}
        for paths, each in self._averages.items():
            for i, path in enumerate(paths):
                averages[path] = {n: [each.means[n][i].clone(), each.spreads[n][i].clone()] for n in TRIPLET}
        return {
            "step": self.step,
            "finished": self.finished,
            "plan": {} if self.plan is None else asdict(self.plan),
            "ranks": self._now() if self._ranks is None else dict(self._ranks),
            "averages": averages,
            "live": {path: each.clone() for path, each in self._live.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.finished, self._ranks = state["step"], state["finished"], dict(state["ranks"])
        if state["plan"]:
            self.plan = Plan(**state["plan"])
        saved, self._averages = state["averages"], {}
        for paths in self._alike({path: _sizes(saved[path][name][0] for name in TRIPLET) for path in saved}):
            like = self._adapters[paths[0]].lam
            means, spreads = (
                {n: torch.stack([saved[path][n][i].to(like) for path in paths]) for n in TRIPLET} for i in range(2)
            )
            self._averages[paths] = Averages(means, spreads)
        self._live = {
            p: each.to(self._adapters[p].lam.device) for p, each in state["live"].items() if p in self._adapters
        }

    def facts(self) -> dict[str, Any]:
        """The step, the budget at it, the steps between two prunings, and how many λ are not 0 at each site."""
        counts = [torch.count_nonzero(adapter.lam.detach()).cpu() for adapter in self._adapters.values()]
        plan = {} if self.plan is None else {"budget": self.plan.budget(self.step), "interval": self.plan.interval}
        ranks = dict(zip(self._adapters, torch.stack(counts).tolist() if counts else (), strict=True))
        return {"step": self.step, **plan, "ranks": ranks}

    def told(self) -> str | None:
        if self.plan is None:
            return None
        plan = self.plan
        first = next(step for step in range(plan.warmup + 1, plan.last + 1) if plan.prunes(step))
        every = "every step" if plan.interval == 1 else f"every {plan.interval:,} steps"
        when = f"{every} from {first:,} to {plan.last:,}" if first < plan.last else f"once, after step {first:,}"
        return f"AdaLoRA: {plan.start:,} → {plan.end:,} triplets, pruned {when} of {plan.steps:,}"


def _sizes(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(size for each in tensors for size in each.shape)
