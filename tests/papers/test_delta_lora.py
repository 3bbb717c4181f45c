"""Delta-LoRA, Zi et al. 2023, arXiv:2309.02411: the telescoped form against the paper's loop, and its limits."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.layers import Acting
from lorafit.methods import delta_lora
from lorafit.methods.delta_lora import DeltaLoRA, DeltaLoRAAdapter
from lorafit.methods.initialisers import INITIALISERS
from lorafit.methods.lora import LoRAAdapter
from lorafit.state import load_state, save_state

SGD = {"lr": 0.2}
ADAM = {"lr": 0.02, "eps": 1e-30}


def small() -> nn.Sequential:
    """Three sites in a row, so that gradients pass through weights that move."""
    torch.manual_seed(0)
    layers = OrderedDict(one=nn.Embedding(11, 6), two=nn.Linear(6, 8), act=nn.Tanh(), three=nn.Linear(8, 5))
    return nn.Sequential(layers).double()


SITES = ["one", "two", "three"]


def batch(step: int) -> Tensor:
    return torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(step))


def loss(y: Tensor) -> Tensor:
    return (y - torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().mean()


def train(handle: lf.Handle, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """The outputs before each step."""
    outputs = []
    for step in steps:
        optimizer.zero_grad()
        y = handle.model(batch(step))
        loss(y).backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def run(method: lf.Method, steps: int, kind: Any = torch.optim.SGD, options: Any = SGD) -> tuple[lf.Handle, Tensor]:
    """A trained handle on `small`, and what its model then computes."""
    handle = lf.attach(small(), method, targets=SITES, seed=0)
    train(handle, handle.optimizer(kind, **options), range(steps))
    with torch.no_grad():
        return handle, handle.model(batch(1000))


def values(handle: lf.Handle) -> list[Tensor]:
    return [parameter.detach() for parameter in handle.parameters()]


def close(one: Any, other: Any, tolerance: float = 1e-9) -> bool:
    pairs = [(one, other)] if isinstance(one, Tensor) else list(zip(one, other, strict=True))
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


# The paper's loop -------------------------------------------------------------


def product(a: Tensor, b: Tensor, groups: int) -> Tensor:
    pairs = zip(b.chunk(groups), a.chunk(groups), strict=True)
    return torch.cat([up @ down for up, down in pairs])


class Literal:
    """The paper's listing: plain weights that are really written to, and s B A beside them.

    Its steps are counted from 1 here: after step t > K, W ← W + λ s (B⁽ᵗ⁾ A⁽ᵗ⁾ − B⁽ᵗ⁻¹⁾ A⁽ᵗ⁻¹⁾).
    """

    def __init__(self, model: nn.Module, handle: lf.Handle, lam: float, k: int) -> None:
        self.model = model
        self.lam, self.k, self.t = lam, k, 0
        self.scale = handle.method.scale
        self.groups = {path: site.shape.groups for path, site in handle.sites.items()}
        self.turned = {path for path, site in handle.sites.items() if isinstance(site.module, nn.Embedding | Conv1D)}
        self.W = {path: site.raw_weight.detach().clone() for path, site in handle.sites.items()}
        self.A = {path: nn.Parameter(handle.adapter(path).A.detach().clone()) for path in handle.sites}
        self.B = {path: nn.Parameter(handle.adapter(path).B.detach().clone()) for path in handle.sites}
        self.optimizer: torch.optim.Optimizer

    def pairs(self) -> list[nn.Parameter]:
        return [tensor for path in self.W for tensor in (self.A[path], self.B[path])]

    def low_rank(self, path: str) -> Tensor:
        matrix = self.scale * product(self.A[path], self.B[path], self.groups[path])
        return (matrix.t() if path in self.turned else matrix).reshape(self.W[path].shape)

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.model, {f"{path}.weight": self.W[path] + self.low_rank(path) for path in self.W}, x)

    @torch.no_grad()
    def step(self) -> None:
        before = {path: self.low_rank(path) for path in self.W}
        self.optimizer.step()
        self.t += 1
        if self.t > self.k:
            for path, w in self.W.items():
                w += self.lam * (self.low_rank(path) - before[path])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("k", [0, 1, 7, 100])
def test_the_telescoped_form_is_the_papers_loop(kind: Any, k: int):
    """Outputs, and the gradients of A and B, at each of 30 steps; weight decay moves W through A and B, too."""
    handle = lf.attach(small(), DeltaLoRA(r=2, alpha=3.0, lam=1.7, start=k), targets=SITES, seed=0)
    literal = Literal(small(), handle, 1.7, k)
    options = {"lr": 0.05, "weight_decay": 0.1}
    optimizer = handle.optimizer(kind, **options)
    literal.optimizer = kind(literal.pairs(), **options)
    for step in range(30):
        optimizer.zero_grad()
        literal.optimizer.zero_grad()
        y, expected = handle.model(batch(step)), literal(batch(step))
        assert close(y, expected)
        loss(y).backward()
        loss(expected).backward()
        ours = [tensor.grad for path in SITES for tensor in handle.adapter(path).parameters()]
        assert close(ours, [tensor.grad for tensor in literal.pairs()])
        optimizer.step()
        literal.step()
    for path in SITES:
        moved = literal.W[path] + literal.low_rank(path) - handle.sites[path].raw_weight
        assert close(handle.delta(path), moved)


def test_the_telescoped_form_is_the_papers_loop_on_every_layer(layer):
    if layer.kind is nn.Embedding:
        layer = replace(layer, options={})  # the plain twin would treat the gradient of the padding in another way
    model = layer.model().double()
    plain = copy.deepcopy(model)
    method = DeltaLoRA(r=layer.rank(2), alpha=3.0, lam=0.8, start=2)
    handle = lf.attach(model, method, targets=["layer"], seed=0)
    literal = Literal(plain, handle, 0.8, 2)
    optimizer = handle.optimizer(torch.optim.Adam, lr=0.05)
    literal.optimizer = torch.optim.Adam(literal.pairs(), lr=0.05)
    x = layer.input() if layer.kind is nn.Embedding else layer.input().double()
    for _ in range(6):
        optimizer.zero_grad()
        literal.optimizer.zero_grad()
        y, expected = model(x), literal(x)
        assert close(y, expected)
        loss(y).backward()
        loss(expected).backward()
        assert close([p.grad for p in handle.parameters()], [p.grad for p in literal.pairs()])
        optimizer.step()
        literal.step()
    assert handle.adapter("layer").lam == 0.8


def test_the_product_of_differences_is_something_else():
    """The trap: Σ (ΔB)(ΔA) is not B A − B_K A_K."""
    handle = lf.attach(small(), DeltaLoRA(r=2, start=3), targets=SITES, seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, **SGD)
    train(handle, optimizer, range(3))
    adapter = handle.adapter("two")
    start = adapter.B.detach() @ adapter.A.detach()
    wrong = torch.zeros_like(start)
    for step in range(3, 20):
        a, b = adapter.A.detach().clone(), adapter.B.detach().clone()
        train(handle, optimizer, range(step, step + 1))
        wrong += (adapter.B.detach() - b) @ (adapter.A.detach() - a)
    right = adapter.B.detach() @ adapter.A.detach() - start
    assert close(handle.delta("two"), adapter.scale * (start + 3 * right))  # s P_K + s (1 + λ) (P − P_K)
    assert not close(wrong, right, 1e-3)


def test_the_gradient_of_the_input_is_that_of_the_moved_weight():
    handle = lf.attach(nn.Sequential(nn.Linear(6, 8)).double(), DeltaLoRA(r=2, start=0))
    handle.optimizer(torch.optim.SGD, lr=0.1)
    adapter = handle.adapter("0")
    with torch.no_grad():
        adapter.B.normal_()
        adapter.B_K.normal_()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(handle.model(x).sum(), x)
    whole = handle.sites["0"].raw_weight + handle.delta("0")
    assert adapter.lam == 2
    assert close(gradient, whole.sum(0).expand(3, 6))


# What it comes to -------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_lambda_0_is_lora(kind: Any, start: int):
    delta, y = run(DeltaLoRA(r=2, alpha=3.0, lam=0.0, start=start), 15, kind, {"lr": 0.05})
    lora, expected = run(lf.LoRA(r=2, alpha=3.0), 15, kind, {"lr": 0.05})
    assert close(y, expected) and close(values(delta), values(lora))


@pytest.mark.parametrize("start", [15, 100, None])
def test_a_start_past_the_end_is_lora(start: int | None):
    delta, y = run(DeltaLoRA(r=2, alpha=3.0, start=start), 15)
    lora, expected = run(lf.LoRA(r=2, alpha=3.0), 15)
    assert close(y, expected) and close(values(delta), values(lora))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_from_the_start_and_with_adam_it_is_lora_with_alpha_times_1_plus_lambda(decay: float):
    """The same first values and rates give the same A and B at each step, and so the same change."""
    options = {**ADAM, "weight_decay": decay}
    delta, y = run(DeltaLoRA(r=2, alpha=3.0, lam=1.5, start=0), 20, torch.optim.AdamW, options)
    lora, expected = run(lf.LoRA(r=2, alpha=3.0 * 2.5), 20, torch.optim.AdamW, options)
    assert close(values(delta), values(lora), 1e-7)
    assert close(y, expected, 1e-7)
    assert not close(y, run(lf.LoRA(r=2, alpha=3.0), 20, torch.optim.AdamW, options)[1], 1e-3)


def test_from_the_start_and_with_sgd_it_is_that_lora_at_a_rate_divided_by_1_plus_lambda():
    delta, y = run(DeltaLoRA(r=2, alpha=3.0, lam=1.5, start=0), 20, options={"lr": 0.25})
    lora, expected = run(lf.LoRA(r=2, alpha=3.0 * 2.5), 20, options={"lr": 0.1})
    assert close(values(delta), values(lora)) and close(y, expected)


# The start and the count ------------------------------------------------------


def lambdas(handle: lf.Handle) -> set[float]:
    return {handle.adapter(path).lam.item() for path in handle.sites}


@pytest.mark.parametrize(
    ("start", "total", "expected"),
    [
        (7, None, 7),
        (7, 40, 7),
        (0, None, 0),
        (None, 40, 4),
        (None, None, 500),
        (0.25, 40, 10),
        (0.0, 40, 0),
        (0.0, None, 0),
        (None, 5, 1),
        (None, 1, 1),
        (0.01, 40, 1),
        (0, 5, 0),
    ],
)
def test_where_it_starts(start: Any, total: int | None, expected: int):
    handle = lf.attach(small(), DeltaLoRA(start=start, r=2), targets=SITES)
    optimizer = handle.optimizer(torch.optim.SGD, total_steps=total, **SGD)
    assert handle.schedule.facts() == {"start": expected, "started": expected == 0}
    for step in range(min(expected, 12)):
        assert lambdas(handle) == {0}
        train(handle, optimizer, range(step, step + 1))
    assert lambdas(handle) == ({2} if expected <= 12 else {0})


def test_a_departure_before_the_first_step_can_be_taken_back():
    early = lf.attach(small(), DeltaLoRA(r=2, start=0), targets=SITES, seed=0)
    later = lf.attach(small(), DeltaLoRA(r=2, start=3), targets=SITES, seed=0)
    saved = later.optimizer(torch.optim.SGD, **SGD).state_dict()
    optimizer = early.optimizer(torch.optim.SGD, **SGD)
    assert lambdas(early) == {2}
    optimizer.load_state_dict(saved)  # whose K is 3
    assert lambdas(early) == {0} and early.schedule.facts() == {"start": 3, "started": False}
    train(early, optimizer, range(3))
    assert lambdas(early) == {2}


def test_a_departure_that_was_loaded_is_not_taken_back(tmp_path):
    trained, _ = run(DeltaLoRA(r=2, start=1), 4)
    loaded = lf.load(small(), trained.save(tmp_path), trainable=True)
    before = [loaded.delta(path) for path in SITES]
    for total in (40, 20):
        loaded.optimizer(torch.optim.SGD, total_steps=total, **SGD)
    assert lambdas(loaded) == {2} and close([loaded.delta(path) for path in SITES], before)


def test_a_second_optimizer_may_say_another_length():
    handle = lf.attach(small(), DeltaLoRA(r=2), targets=SITES, seed=0)
    for total, k in ((5, 1), (40, 4), (None, 500), (1, 1)):
        optimizer = handle.optimizer(torch.optim.SGD, total_steps=total, **SGD)
        assert handle.schedule.facts()["start"] == k and lambdas(handle) == {0}
    train(handle, optimizer, range(1))
    assert lambdas(handle) == {2}


def test_another_lambda_cannot_take_over_a_state(tmp_path):
    handle, _ = run(DeltaLoRA(r=2, start=1), 3)
    save_state(handle, tmp_path)
    load_state(lf.attach(small(), DeltaLoRA(r=2, start=1), targets=SITES), tmp_path)
    with pytest.raises(lf.CheckpointError, match="other settings"):
        load_state(lf.attach(small(), DeltaLoRA(r=2, start=1, lam=0.5), targets=SITES), tmp_path)
    assert DeltaLoRA(r=2, init="orthogonal").settings()["init"] == "orthogonal"


def test_a_share_of_an_unknown_length_is_an_error_that_says_what_to_do():
    handle = lf.attach(small(), DeltaLoRA(start=0.25, r=2), targets=SITES)
    optimizer = handle.optimizer(torch.optim.SGD, **SGD)
    with pytest.raises(lf.TrainingError, match="total_steps="):
        train(handle, optimizer, range(1))


def test_steps_are_optimizer_steps_under_gradient_accumulation():
    def run(parts: int) -> tuple[lf.Handle, set[float]]:
        handle = lf.attach(small(), DeltaLoRA(r=2, start=3), targets=SITES, seed=0)
        optimizer = handle.optimizer(torch.optim.SGD, **SGD)
        for step in range(3):
            optimizer.zero_grad()
            for part in batch(step).chunk(parts):
                (loss(handle.model(part)) / parts).backward()
            assert lambdas(handle) == {0}
            optimizer.step()
        after = lambdas(handle)
        train(handle, optimizer, range(3, 6))
        return handle, after

    whole, split = run(1), run(4)
    assert whole[1] == split[1] == {2}
    assert close(values(whole[0]), values(split[0]))


def test_steps_that_a_gradient_scaler_skips_are_not_counted():
    model = nn.Sequential(nn.Linear(6, 8))
    handle = lf.attach(model, DeltaLoRA(r=2, start=2))
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    started = []
    for factor in (1.0, float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss(model(torch.ones(2, 6))) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        started.append(handle.adapter("0").lam.item() == 2)
    assert started == [False, False, False, True]


@pytest.mark.parametrize("stop", [3, 6, 9], ids=["before", "at", "after"])
@pytest.mark.parametrize("bound_first", [False, True])
def test_a_resumed_run_continues_exactly(stop: int, bound_first: bool):
    method = DeltaLoRA(r=2, start=0.5)
    handle = lf.attach(small(), method, targets=SITES, seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, total_steps=12)
    train(handle, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": handle.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(handle, optimizer, range(stop, 12))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = lf.attach(small(), method, targets=SITES, seed=1)
    if bound_first:
        optimizer = again.optimizer(torch.optim.AdamW, lr=0.05, total_steps=12)
    again.model.load_state_dict(saved["model"])
    if not bound_first:
        optimizer = again.optimizer(torch.optim.AdamW, lr=0.05, total_steps=12)
    optimizer.load_state_dict(saved["optimizer"])
    for one, other in zip(train(again, optimizer, range(stop, 12)), expected, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(values(again), values(handle), strict=True))


def test_an_optimizers_state_without_its_adapters_is_noticed():
    handle = lf.attach(small(), DeltaLoRA(r=2, start=2), targets=SITES)
    optimizer = handle.optimizer(torch.optim.SGD, **SGD)
    train(handle, optimizer, range(4))
    fresh = lf.attach(small(), DeltaLoRA(r=2, start=2), targets=SITES)
    second = fresh.optimizer(torch.optim.SGD, **SGD)
    second.load_state_dict(optimizer.state_dict())
    with pytest.raises(lf.TrainingError, match="from the same checkpoint"):
        train(fresh, second, range(1))


def test_adapters_that_have_started_never_start_again():
    """A new optimizer over weights that have moved must not take a second copy: the model would jump."""
    handle, y = run(DeltaLoRA(r=2, start=2), 5)
    again = lf.attach(small(), DeltaLoRA(r=2, start=0), targets=SITES)
    again.model.load_state_dict(handle.model.state_dict())
    again.optimizer(torch.optim.SGD, **SGD)
    assert torch.equal(again.model(batch(1000)), y)
    later = lf.attach(small(), DeltaLoRA(r=2, start=3), targets=SITES)
    later.model.load_state_dict(handle.model.state_dict())
    train(later, later.optimizer(torch.optim.SGD, lr=0.0), range(5))
    assert torch.equal(later.model(batch(1000)), y)


def test_a_second_optimizer_goes_on_with_the_count_and_the_start():
    handle = lf.attach(small(), DeltaLoRA(r=2, start=0.5), targets=SITES)
    train(handle, handle.optimizer(torch.optim.SGD, total_steps=12, **SGD), range(4))
    second = handle.optimizer(torch.optim.SGD, total_steps=200, **SGD)
    train(handle, second, range(1))
    assert lambdas(handle) == {0}
    train(handle, second, range(1))
    assert lambdas(handle) == {2} and handle.schedule.facts() == {"start": 6, "started": True}


def test_a_resumed_run_keeps_its_start_whatever_length_it_is_told():
    handle = lf.attach(small(), DeltaLoRA(r=2), targets=SITES)
    optimizer = handle.optimizer(torch.optim.SGD, total_steps=30, **SGD)
    train(handle, optimizer, range(1))
    again = lf.attach(small(), DeltaLoRA(r=2), targets=SITES)
    second = again.optimizer(torch.optim.SGD, total_steps=1000, **SGD)
    second.load_state_dict(optimizer.state_dict())
    assert again.schedule.facts() == {"start": 3, "started": False}
    train(again, second, range(2))
    assert lambdas(again) == {2}


# The base weight --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_weight_is_never_written_to_and_detach_leaves_the_model_as_it_was(some_layer, dtype: torch.dtype):
    model = some_layer.model().to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = some_layer.input() if some_layer.kind is nn.Embedding else some_layer.input().to(dtype)
    handle = lf.attach(model, DeltaLoRA(r=some_layer.rank(2), start=1), targets=["layer"])
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss(model(x).float()).backward()
        optimizer.step()
    assert handle.adapter("layer").lam == 2 and handle.delta("layer").any()
    handle.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shared_weight_is_refused_and_named():
    model = nn.ModuleDict({"tokens": nn.Embedding(11, 6), "head": nn.Linear(6, 11, bias=False)})
    model["head"].weight = model["tokens"].weight
    with pytest.raises(lf.ConfigError, match=r"its weight is also tokens\S*, and Delta-LoRA moves the weight"):
        lf.attach(model, DeltaLoRA(r=2), targets=["head"])
    lf.attach(model, lf.LoRA(r=2), targets=["head"])


# As a plain LoRA --------------------------------------------------------------


def started(layer: Any) -> tuple[nn.Module, lf.Handle, DeltaLoRAAdapter]:
    model = layer.model().double()
    handle = lf.attach(model, DeltaLoRA(r=layer.rank(2), alpha=3.0, lam=1.5), targets=["layer"])
    adapter = handle.adapter("layer")
    assert isinstance(adapter, DeltaLoRAAdapter)
    with torch.no_grad():
        for tensor in (adapter.A, adapter.B, adapter.A_K, adapter.B_K):
            tensor.normal_(std=0.4)
        adapter.lam.fill_(1.5)
    return model, handle, adapter


def test_as_a_plain_lora_of_rank_2r_it_is_the_same_function(layer):
    model, handle, adapter = started(layer)
    x = layer.input() if layer.kind is nn.Embedding else layer.input().double()
    expected, delta = model(x), handle.delta("layer")
    down, up = adapter.plain()
    handle.detach()
    lora = LoRAAdapter(down, up, scale=adapter.scale, dropout=0.0, groups=layer.groups)
    site = handle.sites["layer"]
    assert down.shape == (2 * layer.rank(2), site.shape.inn)
    change = lora.update(site.weight).change(site.weight())
    assert close(site.unfold(change), delta, 1e-13)
    acting = [Acting(lora.update(site.weight), 0.0)]
    assert close(model.gate(site.forward(x, type(site.module).forward, acting)), expected, 1e-12)


def test_saved_and_loaded_it_is_the_same_function(layer, tmp_path):
    model, handle, _ = started(layer)
    x = layer.input() if layer.kind is nn.Embedding else layer.input().double()
    expected = model(x)
    handle.save(tmp_path)
    handle.detach()
    loaded = lf.load(model, tmp_path)
    assert close(model(x), expected, 1e-6)
    loaded.detach()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2 * layer.rank(2))
    assert config["lora_alpha"] / config["r"] == pytest.approx(handle.method.scale)


# Settings and copies ----------------------------------------------------------


def test_a_new_adapter_changes_nothing(layer):
    model = layer.model()
    x = layer.input()
    y = model(x)
    handle = lf.attach(model, DeltaLoRA(r=layer.rank(2), start=0), targets=["layer"])
    assert torch.equal(model(x), y)
    handle.optimizer(torch.optim.SGD, lr=0.1)
    assert handle.adapter("layer").lam == 2 and torch.equal(model(x), y)


def test_counts_are_loras(layer):
    handle = lf.attach(layer.model(), DeltaLoRA(r=layer.rank(2)), targets=["layer"])
    assert handle.num_trainable == handle.method.num_trainable(handle.shapes())
    assert handle.num_trainable == lf.LoRA(r=layer.rank(2)).num_trainable(handle.shapes())
    assert DeltaLoRA(r=8).num_trainable([(768, 768)] * 24) == 294_912


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"alpha": 0},
        {"lam": -1},
        {"lam": float("nan")},
        {"start": -1},
        {"start": 1.0},
        {"start": -0.1},
        {"start": True},
        {"start": "soon"},
        {"init": "nothing"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(lf.ConfigError, match=f"DeltaLoRA.{next(iter(options))}"):
        DeltaLoRA(**options)


@pytest.mark.parametrize("init", [name for name, each in INITIALISERS.items() if each.anchored])
def test_initialisers_that_are_not_zero_at_the_start_are_refused(init: str):
    with pytest.raises(lf.ConfigError, match="does not start from B A = 0"):
        DeltaLoRA(init=init)


def test_settings():
    method = DeltaLoRA(r=8, alpha=4.0, start=20)
    assert method.scale == 0.5
    assert method.settings() == {"r": 8, "alpha": 4.0, "scale": 0.5, "init": "default", "lam": 2.0, "start": 20}
    assert method.at(r=4) == DeltaLoRA(r=4, alpha=4.0, start=20)
    assert DeltaLoRA().settings()["start"] == "0.1 of the run"


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_compute_the_same(some_layer, twin: Callable[[nn.Module], nn.Module]):
    model, _, _ = started(some_layer)
    x = some_layer.input() if some_layer.kind is nn.Embedding else some_layer.input().double()
    assert torch.equal(twin(model)(x), model(x))


# What a forward pass costs ----------------------------------------------------


def rank(handle: lf.Handle, path: str = "two") -> int:
    delta = handle.adapter(path).update(handle.sites[path].weight).delta
    return delta.down.shape[0]


@pytest.mark.parametrize(("start", "ranks"), [(0, [2, 2, 2, 2]), (2, [2, 2, 4, 4]), (9, [2, 2, 2, 2])])
def test_the_rank_is_doubled_only_after_the_start(start: int, ranks: list[int]):
    handle = lf.attach(small(), DeltaLoRA(r=2, start=start), targets=SITES, seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, **SGD)
    found = []
    for step in range(4):
        found.append(rank(handle))
        train(handle, optimizer, range(step, step + 1))
    assert found == ranks


def test_before_the_start_its_matrices_are_those_that_are_trained():
    handle = lf.attach(small(), DeltaLoRA(r=2, start=5), targets=SITES, seed=0)
    adapter = handle.adapter("two")
    delta = adapter.update(handle.sites["two"].weight).delta
    assert delta.up is adapter.B and delta.down is adapter.A


def test_values_are_read_from_the_device_once_after_each_change(monkeypatch: pytest.MonkeyPatch):
    reads = []
    plain = delta_lora._Moved.of
    monkeypatch.setattr(delta_lora._Moved, "of", lambda *tensors: (reads.append(1), plain(*tensors))[1])
    handle = lf.attach(small(), DeltaLoRA(r=2, start=2), targets=SITES, seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, **SGD)
    counts = []
    for step in range(5):
        train(handle, optimizer, range(step, step + 1))
        handle.model(batch(step)).sum().backward()
        counts.append(len(reads))
    assert counts == [3, 6, 6, 6, 6]  # three sites: at first, and when they departed


def _loads(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    model.load_state_dict({k: torch.zeros_like(v) if k.endswith("lam") else v for k, v in model.state_dict().items()})
    return adapter


def _loads_others(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    state = {k: torch.zeros_like(v) if k.endswith("lam") else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return adapter


def _written(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    adapter.lam.zero_()
    return adapter


def _moved(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    adapter.lam.zero_()
    model.float().double()
    return adapter


def _copied(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    twin = copy.deepcopy(adapter)
    twin.lam.zero_()
    while twin.lam._version < adapter.lam._version:  # a version is no name: the original has had it too
        twin.lam.zero_()
    return twin


def _pickled(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    twin = pickle.loads(pickle.dumps(adapter))
    twin.lam.zero_()
    return twin


def _averaged(model: nn.Module, adapter: DeltaLoRAAdapter) -> DeltaLoRAAdapter:
    model.eval()
    adapter.lam.data.zero_()
    return adapter


@pytest.mark.parametrize("change", [_loads, _loads_others, _written, _moved, _copied, _pickled, _averaged])
def test_another_lambda_is_noticed_however_it_came(change: Callable[..., DeltaLoRAAdapter]):
    handle = lf.attach(small(), DeltaLoRA(r=2, start=1), targets=SITES, seed=0)
    train(handle, handle.optimizer(torch.optim.SGD, **SGD), range(3))
    assert rank(handle) == 4
    adapter = change(handle.model, handle.adapter("two"))
    assert adapter.lam == 0
    delta = adapter.update(handle.sites["two"].weight).delta
    assert delta.down.shape[0] == 2 and torch.equal(delta.dense(), LoRAAdapter.update(adapter, None).delta.dense())


def test_where_values_cannot_be_read_all_rows_are_multiplied():
    handle, expected = run(DeltaLoRA(r=2, start=1), 4)
    site, adapter = handle.sites["two"], handle.adapter("two")
    with FlopCounterMode(display=False):
        seen = adapter.update(site.weight).delta
        result = handle.model(batch(1000))
    assert seen.down.shape[0] == 4 and close(result, expected)
    assert close(seen.dense(), adapter.update(site.weight).delta.dense())
    with torch.device("meta"):
        meta = copy.deepcopy(adapter).to("meta")
    assert meta.update(lambda: torch.empty(8, 6)).delta.down.shape == (4, 6)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_one_compiled_graph_serves_before_and_after_the_start():
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    handle = lf.attach(nn.Sequential(nn.Linear(6, 8).double()), DeltaLoRA(r=2, start=2), seed=0)
    compiled, x = torch.compile(handle.model, backend=backend, fullgraph=True), torch.randn(3, 6).double()
    optimizer = handle.optimizer(torch.optim.SGD, **SGD)
    for _ in range(4):
        optimizer.zero_grad()
        y = compiled(x)
        assert close(y, handle.model(x))
        y.square().sum().backward()
        optimizer.step()
    assert len(graphs) == 1
    torch.compiler.reset()


def test_an_adapter_whose_weight_has_not_moved_yet_comes_back_as_what_it_is(some_layer, tmp_path, fill):
    handle = lf.attach(some_layer.model(), lf.DeltaLoRA(r=some_layer.rank(2), start=5), ["layer"])
    fill(handle)
    handle.save(tmp_path)
    again = lf.load(some_layer.model(), tmp_path, trainable=True)  # a warning would be an error
    assert again.method == handle.method
    for key, value in handle.adapter("layer").state_dict().items():
        expected = handle.adapter("layer").A if key == "A_K" else handle.adapter("layer").B if key == "B_K" else value
        assert torch.equal(again.adapter("layer").state_dict()[key], expected), key
