"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): its invariants, its figures, and its traps."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorafit as lf
from lorafit.errors import ConfigError, LorafitWarning, TrainingError
from lorafit.layers import SITES, Conv1DSite, Shape
from lorafit.method import Spot
from lorafit.methods.adalora import AdaLoRA, AdaLoRAAdapter
from lorafit.methods.adalora_budget import Averages, Plan, best, lengths, orthogonality, planned, telling
from lorafit.methods.adalora_triplets import survivors
from lorafit.methods.dora import DoRA
from lorafit.methods.lora_plus import LoRAPlus
from lorafit.state import load_state, save_state

GOLDEN = json.loads((Path(__file__).parent / "golden" / "adalora.json").read_text(encoding="utf-8"))
SIZES = (6, 10, 10, 5)
SHORT = {"warmup": 4, "final": 6, "interval": 3}


def spot(method: AdaLoRA, shape: Shape, path: str = "site") -> Spot:
    return Spot(path, shape, lambda: torch.zeros(shape.out, shape.inn), method)


class Net(nn.Module):
    """Frozen linear layers with an adapter on each, in double precision."""

    def __init__(self, method: AdaLoRA, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(b, a, generator=generator).double() / a**0.5 for a, b in itertools.pairwise(sizes)]
        shapes = [Shape(*weight.shape) for weight in self.weights]
        made = (method.adapter(spot(method, shape), generator=generator) for shape in shapes)
        self.adapters = nn.ModuleDict({str(i): adapter.double() for i, adapter in enumerate(made)})

    def forward(self, x: Tensor) -> Tensor:
        for weight, adapter in zip(self.weights, self.adapters.values(), strict=True):
            delta = adapter.update(lambda weight=weight: weight).delta
            x = torch.tanh(x @ weight.T + delta.scale * (x @ delta.down.T * delta.mid) @ delta.up.T)
        return x


class Run:
    """A bare training loop around one net."""

    def __init__(self, method: AdaLoRA, steps: int | None, kind: Callable[..., torch.optim.Optimizer] | None = None):
        self.net = Net(method)
        self.adapters: dict[str, AdaLoRAAdapter] = dict(self.net.adapters.items())
        kind = kind or (lambda parameters: torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.01))
        self.optimizer = kind(self.net.parameters())
        self.schedule = method.schedule(self.adapters)
        self.schedule.begin(steps)
        self.t = 0

    @staticmethod
    def data(t: int, rows: int = 16) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + t)
        x = torch.randn(rows, SIZES[0], generator=generator, dtype=torch.float64)
        return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2], -x[:, 3], x.sum(1), x[:, 4] * 0], dim=1).tanh()

    def gradients(self) -> None:
        x, y = self.data(self.t)
        self.loss = (self.net(x) - y).square().mean()  # kept: its graph is alive while the next one is made
        self.loss.backward()

    def step(self) -> None:
        self.schedule.before_step(self.optimizer)
        self.optimizer.step()
        self.schedule.after_step(self.optimizer)
        self.optimizer.zero_grad()
        self.t += 1

    def go(self, steps: int = 1) -> Run:
        for _ in range(steps):
            self.gradients()
            self.step()
        return self

    def masks(self) -> dict[str, list[bool]]:
        return {path: (adapter.lam != 0).tolist() for path, adapter in self.adapters.items()}

    def saved(self) -> dict:
        """All that a checkpoint has, through a file that no pickle can hide in."""
        file = io.BytesIO()
        state = {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "t": self.t,
        }
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state: dict) -> Run:
        for path, adapter in self.adapters.items():
            values = {name: state["model"][f"adapters.{path}.{name}"] for name in ("P", "lam", "Q")}
            adapter.resize({name: value.shape for name, value in values.items()})
            adapter.load_state_dict(values)
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.t = state["t"]
        return self


def assert_equal(one: Run, other: Run) -> None:
    ours, theirs = one.net.state_dict(), other.net.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "part"),
    [
        ({"init_r": 0}, "AdaLoRA.init_r", "at least 1"),
        ({"target_r": 0}, "AdaLoRA.target_r", "at least 1"),
        ({"target_r": 2.0}, "AdaLoRA.target_r", "2.0"),
        ({"init_r": 4, "target_r": 5}, "AdaLoRA.target_r", "at most init_r = 4"),
        ({"alpha": 0}, "AdaLoRA.alpha", "greater than 0"),
        ({"dropout": 1.0}, "AdaLoRA.dropout", "1.0"),
        ({"total_steps": 0}, "AdaLoRA.total_steps", "at least 1"),
        ({"total_steps": 10.0}, "AdaLoRA.total_steps", "10.0"),
        ({"warmup": 1.0}, "AdaLoRA.warmup", "less than 1"),
        ({"warmup": -1}, "AdaLoRA.warmup", "at least 0"),
        ({"warmup": True}, "AdaLoRA.warmup", "True"),
        ({"warmup": "0.1"}, "AdaLoRA.warmup", "'0.1'"),
        ({"final": float("nan")}, "AdaLoRA.final", "nan"),
        ({"warmup": 0.5, "final": 0.5}, "AdaLoRA.warmup, AdaLoRA.final", "no step to prune in"),
        ({"warmup": 60, "final": 0.4, "total_steps": 100}, "AdaLoRA.warmup, AdaLoRA.final", "no step to prune in"),
        ({"interval": 0}, "AdaLoRA.interval", "at least 1"),
        ({"beta1": 0.0}, "AdaLoRA.beta1", "greater than 0"),
        ({"beta2": 1.0}, "AdaLoRA.beta2", "less than 1"),
        ({"orthogonality": -0.1}, "AdaLoRA.orthogonality", "at least 0"),
    ],
    ids=str,
)
def test_values_out_of_range(options, where, part):
    with pytest.raises(ConfigError) as caught:
        AdaLoRA(**options)
    assert caught.value.where == where and caught.value.fix and part in str(caught.value)


def test_defaults_and_scale():
    method = AdaLoRA()
    assert method.resolved_alpha == 24 and method.scale == 24 / (12 + 1e-5)
    assert AdaLoRA(init_r=4, target_r=4).target_r == 4  # a budget that stays is a budget
    assert method.ups() == ("P",) and json.loads(json.dumps(method.settings()))["interval"] == 10
    assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.parametrize(("pattern", "where"), [({"r": 4}, "rank_pattern"), ({"alpha": 4.0}, "alpha_pattern")])
def test_patterns_are_refused_with_the_reason(pattern, where):
    with pytest.raises(ConfigError, match="the budget decides over ranks") as caught:
        AdaLoRA().at(**pattern)
    assert caught.value.where == where
    assert AdaLoRA().at() == AdaLoRA()


def test_layers_that_cannot_have_so_many_triplets():
    method = AdaLoRA(init_r=6, target_r=2)
    assert method.impossible(spot(method, Shape(8, 9, 4))) == (
        "init_r = 6 does not divide into its 4 groups; the next rank that does is 8"
    )
    assert "init_r = 6 is larger than the layer" in str(method.wasteful(spot(method, Shape(8, 5))))
    assert method.impossible(spot(method, Shape(8, 9, 2))) is None
    assert method.wasteful(spot(method, Shape(8, 6))) is None


# The schedule -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "table"),
    [
        # b_T + (b₀ − b_T)(1 − (t − t_i) / L)³ by hand: L = 10, b from 1010 to 10, so cubes of tenths
        (
            Plan(steps=15, warmup=2, final=3, interval=1, start=1010, end=10),
            [1010, 1010, 1010, 739, 522, 353, 226, 135, 74, 37, 18, 11, 10, 10, 10, 10],
        ),
        (Plan(steps=4, warmup=0, final=0, interval=1, start=12, end=4), [12, 7, 5, 4, 4]),
        (Plan(steps=3, warmup=0, final=2, interval=1, start=12, end=4), [12, 4, 4, 4]),
        (Plan(steps=5, warmup=1, final=1, interval=1, start=6, end=6), [6] * 6),
    ],
)
def test_the_budget_is_the_cubic_of_equation_12(plan, table):
    assert [plan.budget(t) for t in range(plan.steps + 1)] == table


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 24, 99, 1000])
@pytest.mark.parametrize(("start", "end"), [(24, 16), (7, 1), (5, 5), (864, 576)])
def test_the_schedule_is_monotone_and_its_ends_are_exact(steps, start, end):
    plan = planned(steps, 0.1, 0.2, 10, start, end)
    budgets = [plan.budget(t) for t in range(steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert set(budgets[: plan.warmup + 1]) == {start} and set(budgets[plan.last :]) == {end}
    assert plan.prunes(plan.last) and not any(plan.prunes(t) for t in range(plan.last + 1, steps + 1))


def test_fractions_and_steps():
    assert lengths(1000, 0.1, 0.2) == (100, 200)
    assert lengths(1000, 7, 0.29) == (7, 290)  # 0.29 · 1000 is 289.99999999999994
    assert lengths(3, 0.45, 0.5) == (1, 1)  # rounded down: two fractions below 1 always leave a step
    assert all(sum(lengths(steps, 0.49, 0.5)) < steps for steps in range(1, 300))


@pytest.mark.parametrize(
    ("steps", "interval", "times"), [(24, 2, 9), (100, 7, 11), (1000, 10, 70), (5, 2, 2), (4, 2, 2), (3, 1, 3)]
)
def test_a_short_run_is_pruned_little_by_little_too(steps, interval, times):
    plan = planned(steps, 0.1, 0.2, 10, 24, 16)
    assert plan.interval == interval and sum(plan.prunes(t) for t in range(steps + 1)) == times
    assert planned(steps, 0.1, 0.2, 1, 24, 16).interval == min(interval, 2)  # what never moves cannot come back


@pytest.mark.parametrize("steps", [20, 33, 100, 257])
def test_the_budget_is_that_of_peft(steps):
    config = SimpleNamespace(tinit=5, tfinal=steps // 5, total_step=steps, deltaT=3, beta1=0.85, beta2=0.85, target_r=8)
    theirs = RankAllocator(nn.Linear(1, 1), config, "default")
    theirs.init_bgt, theirs.target_bgt = 72, 48
    plan = Plan(steps, 5, steps // 5, 3, 72, 48)
    for t in range(1, steps + 1):
        budget, prunes = theirs.budget_schedule(t)
        assert plan.budget(t) == budget, t
        if t < plan.last:  # then they prune at every step what stays pruned, and here it is gone
            assert plan.prunes(t) == prunes, t


def test_the_run_must_be_told_its_length():
    run = Run(AdaLoRA(init_r=4, target_r=2), None)
    run.gradients()
    with pytest.raises(TrainingError, match="nobody said how long the run is") as caught:
        run.step()
    assert "total_steps=1000" in str(caught.value.fix)
    assert Run(AdaLoRA(init_r=4, target_r=2, total_steps=9), 100).schedule.plan.steps == 9
    assert Run(AdaLoRA(init_r=4, target_r=2, total_steps=9), None).go().schedule.plan.steps == 9


def test_a_length_of_its_own_is_at_most_the_run_s():
    method = AdaLoRA(init_r=4, target_r=2, total_steps=9)
    assert Run(method, 9).schedule.plan.steps == 9
    with pytest.raises(TrainingError, match="greater than the run's") as caught:
        Run(method, 8)
    assert caught.value.found == 9 and "at most 8" in str(caught.value) and "leave total_steps out" in caught.value.fix


def test_a_run_without_a_step_to_prune_in_does_not_begin():
    with pytest.raises(TrainingError, match="too short") as caught:
        Run(AdaLoRA(init_r=4, target_r=2, warmup=8, final=4), 12)
    assert "12 steps, of which 8 + 4" in str(caught.value) and "at least 13 steps" in str(caught.value)


def test_a_step_that_computes_its_own_gradients_is_refused():
    run = Run(AdaLoRA(init_r=4, target_r=2), 20)
    with pytest.raises(TrainingError, match="without a closure"):
        run.step()


# Algorithm 1, by hand ---------------------------------------------------------


class Naive:
    """Algorithm 1 one triplet at a time: every vector a tensor of its own, the penalty by autograd."""

    def __init__(self, run: Run, steps: int) -> None:
        self.method = run.schedule._course
        self.weights, self.scale = run.net.weights, run.adapters["0"].scale
        self.steps, self.step_count = steps, 0
        self.sites = [
            [
                {n: nn.Parameter(v.detach().clone()) for n, v in (("p", a.P[:, i]), ("l", a.lam[i]), ("q", a.Q[i]))}
                for i in range(len(a.lam))
            ]
            for a in run.adapters.values()
        ]
        self.mean = {id(v): torch.zeros_like(v) for site in self.sites for tri in site for v in tri.values()}
        self.spread = copy.deepcopy(self.mean)
        parameters = [v for site in self.sites for tri in site for v in tri.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for weight, site in zip(self.weights, self.sites, strict=True):
            y = x @ weight.T
            for tri in site:
                y = y + self.scale * tri["l"] * torch.outer(x @ tri["q"], tri["p"])
            x = torch.tanh(y)
        return x

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for site in self.sites:
            for part in ("p", "q"):
                if site:
                    squares = 0
                    for i, one in enumerate(site):
                        for j, two in enumerate(site):
                            squares = squares + (one[part] @ two[part] - (1.0 if i == j else 0.0)) ** 2
                    total = total + squares**0.5
        return self.method.orthogonality / len(self.sites) * total

    def step(self, x: Tensor, y: Tensor, clip: float | None = None) -> None:
        b1, b2 = self.method.beta1, self.method.beta2
        self.optimizer.zero_grad()
        (self.forward(x) - y).square().mean().backward()
        triplets = [tri for site in self.sites for tri in site]
        if clip is not None:
            nn.utils.clip_grad_norm_([v for tri in triplets for v in tri.values()], clip)
        scores = []
        for tri in triplets:
            score = 0.0
            for v in tri.values():
                now = (v * v.grad).abs().detach()
                self.mean[id(v)] = b1 * self.mean[id(v)] + (1 - b1) * now
                self.spread[id(v)] = b2 * self.spread[id(v)] + (1 - b2) * (now - self.mean[id(v)]).abs()
                score += float((self.mean[id(v)] * self.spread[id(v)]).mean())
            scores.append(score)
        self.penalty().backward()
        self.optimizer.step()
        self.step_count += 1
        self.prune(triplets, scores)

    def prune(self, triplets: list, scores: list[float]) -> None:
        t, first, last = self.step_count, self.method.warmup, self.steps - self.method.final
        if not (first < t < last and t % self.method.interval == 0) and t != last:
            return
        start, end = sum(map(len, self.sites)), self.method.target_r * len(self.sites)
        budget = int(end + (start - end) * (1 - (t - first) / (last - first)) ** 3 + 1e-9)
        if t != last and sum(score > 0 for score in scores) < budget:
            return  # too few scores say anything
        places, start = [], 0
        for site in self.sites:
            own = sorted(range(start, start + len(site)), key=lambda i: (-scores[i], i))
            places += [own.index(i) for i in range(start, start + len(site))]
            start += len(site)
        order = sorted(range(len(triplets)), key=lambda i: (-scores[i], places[i], i))
        for i in order[budget:]:
            triplets[i]["l"].data.zero_()
        if t == last:
            kept = {id(triplets[i]) for i in order[:budget]}
            self.sites = [[tri for tri in site if id(tri) in kept] for site in self.sites]


@pytest.mark.parametrize("still", [0, 1, 4, 9])
def test_a_short_run_is_that_of_algorithm_1_though_its_rate_begins_at_zero(still):
    method = AdaLoRA(init_r=4, target_r=2, warmup=0, final=2, interval=2, orthogonality=0.3)
    run = Run(method, 12, lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01))
    naive = Naive(run, 12)
    for t in range(1, 13):
        for optimizer in (run.optimizer, naive.optimizer):
            optimizer.param_groups[0]["lr"] = 0.0 if t <= still else 2e-3
        naive.step(*run.data(run.t))
        run.go()
        for site, adapter in zip(naive.sites, run.adapters.values(), strict=True):
            assert len(site) == len(adapter.lam), t
            for i, tri in enumerate(site):
                torch.testing.assert_close(adapter.lam[i], tri["l"].data, rtol=1e-6, atol=1e-9)
        left = sum(sum(mask) for mask in run.masks().values())
        if t <= still:
            assert left == 0
        elif t == still + 1 and t < 10:
            assert left == 12, "a position is no reason to be pruned"
        elif t % 2 == 0 or t >= 10:
            assert left == run.schedule.plan.budget(t)
    if still == 9:  # no score said anything: as many at each site
        assert [len(adapter.lam) for adapter in run.adapters.values()] == [2, 2, 2]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_200_steps_are_those_of_algorithm_1(clip):
    method = AdaLoRA(init_r=4, target_r=2, warmup=20, final=60, interval=7)
    # A small rate: where the factors are orthogonal the norm has a kink, and rounding errors double every few steps.
    run = Run(method, 200, lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01))
    naive = Naive(run, 200)
    masks = set()
    for t in range(1, 201):
        naive.step(*run.data(run.t), clip)
        run.gradients()
        if clip is not None:
            nn.utils.clip_grad_norm_(run.net.parameters(), clip)
        run.step()
        for site, adapter in zip(naive.sites, run.adapters.values(), strict=True):
            assert len(site) == len(adapter.lam), t
            for i, tri in enumerate(site):
                assert bool(tri["l"] == 0) == bool(adapter.lam[i] == 0), t
                for ours, theirs in ((adapter.P[:, i], "p"), (adapter.lam[i], "l"), (adapter.Q[i], "q")):
                    torch.testing.assert_close(ours, tri[theirs].data, rtol=1e-9, atol=1e-11)
        masks.add(str(run.masks()))
    assert sum(len(site) for site in naive.sites) == 6 and len(masks) > 5


def test_gradient_accumulation_is_the_larger_batch():
    one, two = (Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30) for _ in range(2))
    for t in range(30):
        x, y = Run.data(t, 32)
        (one.net(x) - y).square().mean().backward()
        for part in range(4):
            rows = slice(8 * part, 8 * part + 8)
            ((two.net(x[rows]) - y[rows]).square().mean() / 4).backward()
        one.step()
        two.step()
    assert one.schedule.step == two.schedule.step == 30 and one.masks() == two.masks()
    torch.testing.assert_close(one.net.state_dict(), two.net.state_dict(), rtol=1e-9, atol=1e-10)


# Invariants -------------------------------------------------------------------


def test_zero_at_init():
    net = Net(AdaLoRA(init_r=4, target_r=2))
    for adapter in net.adapters.values():
        delta = adapter.update(lambda: torch.zeros(1)).delta
        assert not delta.dense().any() and adapter.P.std() > 0.01 and adapter.Q.std() > 0.01
    net(Run.data(0)[0]).sum().backward()
    for adapter in net.adapters.values():
        assert adapter.lam.grad.any() and not adapter.P.grad.any() and not adapter.Q.grad.any()


def test_first_values_are_normal_with_deviation_002_and_repeatable():
    method = AdaLoRA(init_r=8, target_r=8)
    drawn = [
        method.adapter(spot(method, Shape(400, 300)), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    for name in ("P", "Q"):
        one, two = (adapter.get_parameter(name) for adapter in drawn)
        assert torch.equal(one, two) and abs(one.std().item() - 0.02) < 0.001 and abs(one.mean().item()) < 0.002


def test_count_of_nonzero_values_is_the_budget_after_each_pruning():
    run = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30)
    seen = []
    for t in range(1, 31):
        run.go()
        left = sum(sum(mask) for mask in run.masks().values())
        if run.schedule.plan.prunes(t) or t > 24:
            assert left == run.schedule.plan.budget(t), t
            seen.append(left)
        assert run.schedule.facts()["budget"] == run.schedule.plan.budget(t)
        assert run.schedule.facts()["ranks"] == {path: sum(mask) for path, mask in run.masks().items()}
    assert seen[0] < 12 and seen[-1] == 6 and len(set(seen)) > 3
    assert json.loads(json.dumps(run.schedule.facts()))["step"] == 30


def test_pruned_triplets_may_come_back_until_the_final_phase():
    run = Run(AdaLoRA(init_r=4, target_r=1, warmup=2, final=10, interval=4, orthogonality=0.0), 60)
    kept = {}
    for t in range(1, 50):
        for adapter in run.adapters.values():
            for parameter in adapter.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            # Task gradients that change sides in mid-run: the first triplet of each site matters, then the last one.
            adapter.P.grad[:, 0 if t <= 24 else 3] = 1.0 + t % 2
        run.step()
        if t in (24, 44):
            kept[t] = run.masks()
        elif t == 46:
            assert all(all(mask) for mask in run.masks().values())  # an optimizer moves what is pruned, too
    assert [mask[0] for mask in kept[24].values()] == [True] * 3 and not any(mask[3] for mask in kept[24].values())
    assert [mask[3] for mask in kept[44].values()] == [True] * 3 and not any(mask[0] for mask in kept[44].values())


def test_permuted_triplets_are_pruned_as_their_originals():
    runs = [Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30) for _ in range(2)]
    orders = {"0": [2, 0, 3, 1], "1": [3, 2, 1, 0], "2": [1, 0, 2, 3]}
    with torch.no_grad():
        for path, order in orders.items():
            adapter = runs[1].adapters[path]
            adapter.P.copy_(adapter.P[:, order])
            adapter.Q.copy_(adapter.Q[order])
    for t in range(1, 31):
        for run in runs:
            run.go()
        for path, order in orders.items():
            one, two = (run.adapters[path] for run in runs)
            if t >= 24:  # what was removed has no place any more: compare what is left, in any order
                one, two = one.lam.sort().values, two.lam.sort().values
                torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
            else:
                torch.testing.assert_close(one.lam[order], two.lam, rtol=1e-6, atol=1e-9)
                assert torch.equal(one.lam[order] == 0, two.lam == 0)
    x = Run.data(99)[0]
    torch.testing.assert_close(runs[0].net(x), runs[1].net(x), rtol=1e-6, atol=1e-8)


def test_the_removal_leaves_outputs_unchanged_and_shrinks_everything():
    run = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30).go(23)
    identities = [id(parameter) for parameter in run.net.parameters()]
    held = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30).load(run.saved())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.methods.adalora_schedule.alone", lambda: False)
        held.go()
    run.go()
    assert held.schedule.finished and all(len(adapter.lam) == 4 for adapter in held.adapters.values())
    assert sum(len(adapter.lam) for adapter in run.adapters.values()) == 6
    x = Run.data(99)[0]
    torch.testing.assert_close(run.net(x), held.net(x), rtol=1e-12, atol=1e-14)
    assert identities == [id(parameter) for parameter in run.net.parameters()]
    for parameter in run.net.parameters():
        for value in run.optimizer.state[parameter].values():
            assert value.shape in (parameter.shape, ())
    for _ in range(6):  # training goes on as if nothing had been taken out
        run.go()
        held.go()
        torch.testing.assert_close(run.net(x), held.net(x), rtol=1e-10, atol=1e-12)
        assert sum(sum(mask) for mask in held.masks().values()) == 6


def test_exact_export_to_plain_lora():
    run = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30).go(30)
    for adapter in run.adapters.values():
        exported = adapter.scale * adapter.P @ (adapter.lam[:, None] * adapter.Q)
        delta = adapter.update(lambda: torch.zeros(1)).delta
        torch.testing.assert_close(delta.dense(), exported, rtol=1e-12, atol=1e-15)
        assert torch.linalg.matrix_rank(delta.dense()) <= len(adapter.lam)


def test_the_penalty_makes_the_factors_orthogonal():
    method = AdaLoRA(init_r=4, target_r=4, orthogonality=0.5)
    run = Run(method, 200, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)).go(200)
    for adapter in run.adapters.values():
        torch.testing.assert_close(adapter.P.T @ adapter.P, torch.eye(4).double(), rtol=0, atol=0.05)
        torch.testing.assert_close(adapter.Q @ adapter.Q.T, torch.eye(4).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_penalty_s_gradient_is_that_of_autograd(groups):
    x = torch.randn(3, groups, 5, 4, dtype=torch.float64, requires_grad=True)
    full = [torch.block_diag(*site) for site in x]
    sum(torch.linalg.matrix_norm(site.T @ site - torch.eye(4 * groups)) for site in full).backward()
    torch.testing.assert_close(x.detach() @ orthogonality(x.detach(), None), x.grad)
    live = torch.tensor([True, False, True, True]).expand(3, groups, 4)
    x.grad = None
    full = [torch.block_diag(*site[:, :, live[0, 0]]) for site in x]
    sum(torch.linalg.matrix_norm(site.T @ site - torch.eye(3 * groups)) for site in full).backward()
    torch.testing.assert_close(x.detach() @ orthogonality(x.detach(), live), x.grad)


def test_the_penalty_has_no_nan_where_its_norm_is_zero():
    exact = torch.eye(5, 3)[None, None]
    assert torch.equal(orthogonality(exact, None), torch.zeros(1, 1, 3, 3))
    assert orthogonality(torch.zeros(2, 1, 5, 0), None).shape == (2, 1, 0, 0)
    assert not orthogonality(torch.randn(2, 1, 5, 3), torch.zeros(2, 1, 3, dtype=torch.bool)).any()


# The published code -----------------------------------------------------------


def test_the_penalty_is_that_of_the_published_code():
    p, q = (torch.tensor(GOLDEN["penalty"][name], dtype=torch.float64) for name in ("P", "Q"))
    weight = GOLDEN["penalty"]["weight"]
    mine = {
        "P": (p[:, None] @ orthogonality(p[:, None], None))[:, 0],
        "Q": (orthogonality(q.mT[:, None], None) @ q[:, None])[:, 0],
    }
    for name, gradient in mine.items():
        theirs = torch.tensor(GOLDEN["penalty"][f"gradient_{name}"], dtype=torch.float64)
        # Its γ is divided by the number of matrices, here by that of the sites.
        torch.testing.assert_close(gradient * weight / (2 * len(p)), theirs, rtol=1e-9, atol=1e-12)


def test_the_choice_is_that_of_the_published_code():
    golden = GOLDEN["allocation"]
    plan = Plan(**golden["plan"])
    averages: Averages | None = None
    for t, step in enumerate(golden["steps"], start=1):
        weights, gradients = (
            {name: torch.tensor(values, dtype=torch.float64)[:, None] for name, values in step[key].items()}
            for key in ("weights", "gradients")
        )
        averages = averages or Averages.zero(weights)
        averages.update(weights, gradients, 0.85, 0.85)
        if plan.prunes(t):
            assert plan.budget(t) == step["budget"]
            kept = best(list(averages.scores()), plan.budget(t))
            assert [each.tolist() for each in kept] == step["kept"], t


# Traps ------------------------------------------------------------------------


def test_a_budget_that_is_the_total_prunes_nothing():
    run = Run(AdaLoRA(init_r=4, target_r=4, **SHORT), 30).go(30)
    assert run.masks() == {path: [True] * 4 for path in "012"} and run.schedule.finished
    assert [each.tolist() for each in best([torch.ones(2), torch.zeros(2)], 4)] == [[True, True], [True, True]]


def test_equal_scores_neither_undershoot_nor_overshoot():
    equal = [torch.ones(4), torch.ones(3), torch.ones(4)]
    for budget in range(12):
        kept = [each.tolist() for each in best(equal, budget)]
        counts = [sum(each) for each in kept]
        assert sum(counts) == budget and kept[1] == [True] * counts[1] + [False] * (3 - counts[1])
        assert max(counts) - min(counts) <= 1 and counts[0] >= counts[1]
    assert [sum(each.tolist()) for each in best([torch.tensor([3.0, 2, 0, 0]), torch.zeros(4)], 4)] == [2, 2]
    assert telling(equal, 11) and not telling([torch.ones(2), torch.zeros(3)], 3)
    run = Run(AdaLoRA(init_r=4, target_r=2, orthogonality=0.0, **SHORT), 30)
    for _ in range(30):  # no data: every gradient, and so every score, is 0
        for parameter in run.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.step()
    assert [len(adapter.lam) for adapter in run.adapters.values()] == [2, 2, 2]


def test_a_site_without_gradients_has_the_lowest_scores():
    run = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30)
    for _ in range(30):
        run.gradients()
        for parameter in run.adapters["1"].parameters():
            parameter.grad = None
        run.step()
    assert {path: len(adapter.lam) for path, adapter in run.adapters.items()}["1"] == 0
    assert sum(len(adapter.lam) for adapter in run.adapters.values()) == 6


def test_a_site_of_rank_zero_works():
    run = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30)
    adapter = run.adapters["1"]
    adapter.resize({"P": torch.Size((10, 0)), "lam": torch.Size((0,)), "Q": torch.Size((0, 10))})
    run.go(30)
    assert len(adapter.lam) == 0 and adapter.P.grad is None
    assert run.schedule.plan.start == 8 and run.schedule.plan.end == 6
    fresh = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30).load(run.saved())
    assert_equal(fresh, run)
    assert not adapter.update(lambda: torch.zeros(1)).delta.dense().any()


@pytest.mark.parametrize("at", [0, 3, 4, 10, 23, 24, 27])
def test_a_resumed_run_continues_bit_for_bit(at):
    method = AdaLoRA(init_r=4, target_r=2, **SHORT)
    run = Run(method, 30).go(at)
    state = run.saved()
    resumed = Run(method, 30).load(state)
    assert resumed.schedule.plan == run.schedule.plan and resumed.schedule.step == at
    again = Run(method, 30).load(resumed.saved())  # saved before its first step
    for _ in range(at, 30):
        for each in (run, resumed, again):
            each.go()
        assert_equal(run, resumed)
        assert_equal(run, again)
    assert sum(len(adapter.lam) for adapter in resumed.adapters.values()) == 6


def test_the_state_is_no_part_of_the_run():
    run = Run(AdaLoRA(init_r=4, target_r=2, **SHORT), 30).go(12)
    state = run.schedule.state_dict()
    before = copy.deepcopy(state["averages"])
    run.go(3)
    for path, parts in before.items():
        for name, pair in parts.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, state["averages"][path][name], strict=True))


def test_the_state_of_other_ranks_is_refused():
    method = AdaLoRA(init_r=4, target_r=2, **SHORT)
    run = Run(method, 30).go(26)
    other = Run(method, 30)
    other.schedule.load_state_dict(run.schedule.state_dict())
    other.gradients()
    with pytest.raises(TrainingError, match="ranks are not those of AdaLoRA's schedule") as caught:
        other.step()
    assert "12 triplets at 3 sites" in str(caught.value) and "6 at 3" in str(caught.value)


class Blocked(torch.optim.SGD):
    """An optimizer with a state that has not its parameter's shape, as those of 8 bits have."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["absmax"] = torch.ones(7)
        return super().step(closure)


def test_a_state_that_cannot_be_cut_holds_the_pruned_values_at_zero():
    method = AdaLoRA(init_r=4, target_r=2, **SHORT)
    plain = Run(method, 30, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    held = Run(method, 30, lambda parameters: Blocked(parameters, lr=0.05, momentum=0.9))
    for t in range(1, 31):
        plain.go()
        if t == 24:
            with pytest.warns(LorafitWarning, match="Blocked holds values for whole blocks"):
                held.go()
        else:
            held.go()
        if t >= 24:
            assert sum(sum(mask) for mask in held.masks().values()) == 6
            assert all(len(adapter.lam) == 4 for adapter in held.adapters.values())
    x = Run.data(99)[0]
    torch.testing.assert_close(plain.net(x), held.net(x), rtol=1e-10, atol=1e-12)
    resumed = Run(method, 30, lambda parameters: Blocked(parameters, lr=0.05, momentum=0.9)).load(held.saved())
    assert_equal(resumed.go(2), held.go(2))
    assert sum(sum(mask) for mask in resumed.masks().values()) == 6


def test_groups_keep_as_many_triplets_as_the_one_that_needs_most():
    live = torch.tensor([False, True, False, True, True, False, False, False, True])
    index, rest = survivors(live, 3)
    assert index.tolist() == [[0, 1], [0, 1], [0, 2]] and rest.tolist() == [False, True, True, True, False, True]
    index, rest = survivors(torch.zeros(6, dtype=torch.bool), 2)
    assert index.shape == (2, 0) and rest.shape == (0,)
    assert survivors(torch.zeros(0, dtype=torch.bool), 2)[0].shape == (2, 0)


@pytest.mark.parametrize("target", [1, 2])
def test_every_layer_type_through_the_whole_schedule(layer, target):
    model = layer.model()
    kind = SITES.get(type(model.layer), Conv1DSite)
    site = kind(model.layer)
    r = layer.rank(4)
    method = AdaLoRA(init_r=r, target_r=target, total_steps=20, warmup=2, final=6, interval=2)
    adapters = {
        path: method.adapter(spot(method, site.shape, path), generator=torch.Generator().manual_seed(i))
        for i, path in enumerate(("one", "two"))
    }
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    optimizer, schedule = torch.optim.AdamW(parameters, lr=1e-2), method.schedule(adapters)
    schedule.begin(None)
    x = layer.input()
    wanted = torch.randn_like(model.layer(x))
    for t in range(1, 21):
        y = model.layer(x)
        for adapter in adapters.values():
            delta = adapter.update(site.weight).delta
            y = y + delta.scale * site.expand(site.project(x, delta.down) * site.channel(delta.mid), delta.up)
        loss = (y - wanted).square().mean()
        loss.backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
        left = sum(schedule.facts()["ranks"].values())
        assert t < 14 or left == 2 * target
    for adapter in adapters.values():
        groups, k = layer.groups, len(adapter.lam)
        assert k % groups == 0 and adapter.P.shape == (site.shape.out, k // groups)
        assert adapter.Q.shape == (k, site.shape.inn)
        blocks = (adapter.lam.view(groups, -1) != 0).sum(1) if k else torch.zeros(1)
        assert k == groups * int(blocks.max())  # no column is left that no group needs


@pytest.mark.parametrize("k", [0, 2])
def test_resize_and_what_it_refuses(k):
    method = AdaLoRA(init_r=4, target_r=2)
    adapter = method.adapter(spot(method, Shape(8, 9, 2)))
    parameters = list(adapter.parameters())
    adapter.resize({"P": torch.Size((8, k // 2)), "lam": torch.Size((k,)), "Q": torch.Size((k, 9))})
    assert [tuple(p.shape) for p in adapter.parameters()] == [(8, k // 2), (k,), (k, 9)]
    assert all(a is b for a, b in zip(parameters, adapter.parameters(), strict=True))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())
    for shapes in (
        {"lam": torch.Size((3,))},
        {"P": torch.Size((8, 1)), "lam": torch.Size((3,)), "Q": torch.Size((3, 9))},
        {"P": torch.Size((7, 2)), "lam": torch.Size((4,)), "Q": torch.Size((4, 9))},
        {"P": torch.Size((8, 2)), "lam": torch.Size((4, 1)), "Q": torch.Size((4, 9))},
    ):
        with pytest.raises(ValueError, match="triplets in 2 groups would be"):
            adapter.resize(shapes)


# Figures ----------------------------------------------------------------------

DEBERTA_V3_BASE = [*[(768, 768)] * 4, (3072, 768), (768, 3072)] * 12
"""Query, key, value and output projections and both feed-forward layers of each of the twelve layers."""


def test_counts_are_r_in_out_1():
    assert AdaLoRA(init_r=2, target_r=2).num_trainable(DEBERTA_V3_BASE) == 331_776 + 2 * 72  # LoRA's 0.33 M, and Λ
    assert AdaLoRA(init_r=8, target_r=8).num_trainable(DEBERTA_V3_BASE) == 1_327_104 + 8 * 72  # LoRA's 1.33 M, and Λ
    method = AdaLoRA(init_r=4, target_r=2)
    assert sum(p.numel() for p in Net(method).parameters()) == method.num_trainable(
        [Shape(b, a) for a, b in itertools.pairwise(SIZES)]
    )
    grouped = method.adapter(spot(method, Shape(8, 9, 2)))
    assert sum(p.numel() for p in grouped.parameters()) == method.num_trainable([Shape(8, 9, 2)]) == 4 * 9 + 8 * 2 + 4


@pytest.mark.parametrize(("target", "paper"), [(2, 0.32e6), (8, 1.27e6)])
def test_the_paper_s_counts_lie_where_its_budget_can_lead(target, paper):
    # Where the triplets end up follows from data: the least is all in attention, the most all in the feed-forward.
    budget = target * len(DEBERTA_V3_BASE)
    assert budget in (144, 576)
    sizes = sorted(sum(shape) + 1 for shape in DEBERTA_V3_BASE)
    assert budget * sizes[0] < paper < budget * sizes[-1]
    assert abs(paper / (budget * (sum(sizes) / len(sizes))) - 1) < 0.05  # and theirs is near an even spread


# In a model -------------------------------------------------------------------

METHOD = AdaLoRA(init_r=4, target_r=1, warmup=2, final=4, interval=3)
AROUND = {"adalora": METHOD, "lora-plus": LoRAPlus(ratio=2.0, inner=METHOD), "dora": DoRA(METHOD)}


def trained(model: nn.Module, handle: lf.Handle, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        tokens = torch.randint(9, (8, 5), generator=generator)
        loss = (model(tokens) - tokens.float().mean(1, keepdim=True)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(method: lf.Method) -> tuple[nn.Module, lf.Handle, torch.optim.Optimizer]:
    """A model with an Embedding, a grouped convolution and two Linear layers."""
    torch.manual_seed(5)
    layers = [nn.Embedding(9, 8), nn.Conv1d(5, 5, 3), nn.Conv1d(5, 4, 1), nn.Conv1d(4, 8, 3, groups=2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    handle = lf.attach(model, method, ["0", "3", "5", "7"], seed=1)
    return model, handle, handle.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=20)


@pytest.mark.parametrize("method", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("at", [9, 18])
def test_a_run_in_a_model_and_its_continuation(method, at, tmp_path):
    model, handle, optimizer = adapted(method)
    start = handle.num_trainable
    trained(model, handle, optimizer, range(at))
    save_state(handle, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    rest = trained(model, handle, optimizer, range(at, 20))
    again, resumed, other = adapted(method)
    load_state(resumed, tmp_path)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert trained(again, resumed, other, range(at, 20)) == rest
    for one, two in zip(handle.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    facts = handle.schedule.facts()
    assert sum(facts["ranks"].values()) == facts["budget"] == 4 and 0 in facts["ranks"].values()
    assert handle.num_trainable < start
    tokens = torch.arange(5)[None]
    expected = model(tokens)
    handle.merge()
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    handle.detach()
    assert not any(isinstance(module, AdaLoRAAdapter) for module in model.modules())


def test_a_handle_passes_the_length_on_and_misses_it():
    model, handle, _ = adapted(METHOD)
    assert handle.schedule.plan.steps == 20
    handle.detach()
    handle = lf.attach(model, METHOD, ["5"])
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    with pytest.raises(TrainingError, match="nobody said how long"):
        trained(model, handle, optimizer, range(1))


class Operations(TorchDispatchMode):
    """Counts what is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("orthogonality", [0.0, 0.5])
def test_a_step_makes_few_calls_and_copies_no_weight(orthogonality):
    """A site more of the same shape costs three products for the scores, and two and two for the penalty."""
    counts = []
    for sites in (2, 12):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(sites)))
        handle = lf.attach(model, AdaLoRA(init_r=4, target_r=2, total_steps=100, orthogonality=orthogonality))
        optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):  # the first time there are no averages yet
            optimizer.zero_grad()
            model(torch.randn(3, 6)).square().sum().backward()
            with Operations() as seen:
                handle.schedule.before_step(optimizer)
        counts.append(seen.calls)
    assert not set(counts[1]) & {"stack", "cat", "clone", "copy_"}
    work = {name: counts[1][name] - counts[0][name] for name in counts[1]}
    views = {"view", "detach", "unbind", "slice", "t", "transpose", "select", "_unsafe_view", "alias"}
    more = {name: count for name, count in work.items() if count and name not in views}
    assert more == {"mul": 30} | ({"mm": 20, "addmm_": 20} if orthogonality else {})
