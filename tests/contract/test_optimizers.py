"""The kind of step that `handle.optimizer` chooses, and what it must not change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lorafit as lf
from lorafit.hooks import Binding, StepHooks, quick

QUICK = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(handle: lf.Handle, optimizer: torch.optim.Optimizer, steps: int, scaler: Any = None) -> list[torch.Tensor]:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (handle.model(x) - 1).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return [parameter.detach().clone() for parameter in handle.parameters()]


def fused(optimizer: torch.optim.Optimizer) -> set[object]:
    return {group.get("fused") for group in optimizer.param_groups}


@pytest.mark.parametrize("kind", QUICK)
def test_a_step_is_one_fused_kernel_unless_told_otherwise(kind):
    handle = lf.attach(network(), lf.LoRA(r=2), seed=0)
    assert fused(handle.optimizer(kind, lr=0.1)) == {True}
    assert fused(handle.optimizer(kind, lr=0.1, fused=False)) == {False}
    for option in ({"foreach": False}, {"foreach": True}, {"differentiable": False}, {"fused": None}):
        assert fused(handle.optimizer(kind, lr=0.1, **option)) == {None}


def test_others_are_left_as_they_are():
    class Own(torch.optim.AdamW):
        """Somebody's own, which may do anything with its settings."""

    handle = lf.attach(network(), lf.LoRA(r=2), seed=0)
    for kind in (torch.optim.Adagrad, torch.optim.RMSprop, Own):
        assert True not in fused(handle.optimizer(kind, lr=0.1))
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64)):
        assert not quick(torch.optim.AdamW, [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(tensor))], [])


def test_a_sparse_gradient_is_not_asked_of_a_fused_kernel():
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4))
    handle = lf.attach(model, lf.LoRA(r=2), targets=["1"], modules_to_save=["0"], seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert True not in fused(optimizer)


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("method", [lf.LoRA(r=2), lf.DoRA(lf.LoRA(r=2)), lf.LoRAPlus(r=2), lf.LoRAFA(r=2)])
def test_the_result_is_the_same_but_for_rounding(kind, method):
    values = []
    for options in ({}, {"foreach": False}):
        handle = lf.attach(network(), method, seed=0)
        values.append(train(handle, handle.optimizer(kind, lr=0.01, **options), 20))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("before", [{}, {"foreach": False}])
@pytest.mark.parametrize("after", [{}, {"foreach": False}])
def test_a_run_goes_on_from_the_state_of_either_kind(before, after):
    handle = lf.attach(network(), lf.LoRA(r=2), seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.01, **before)
    train(handle, optimizer, 3)
    state, model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(handle.model.state_dict())
    expected = train(handle, optimizer, 3)
    again = lf.attach(network(), lf.LoRA(r=2), seed=1)
    again.model.load_state_dict(model)
    resumed = again.optimizer(torch.optim.AdamW, lr=0.01, **after)
    resumed.load_state_dict(state)
    for one, other in zip(expected, train(again, resumed, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [lf.LoRA(r=2), lf.LoRAFA(r=2), lf.DeltaLoRA(r=2, start=2), lf.AdaLoRA(init_r=3, target_r=2, total_steps=12)],
)
def test_a_gradient_scaler_and_a_fused_step(method):
    values = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        handle = lf.attach(network(), method, seed=0)
        values.append(train(handle, handle.optimizer(torch.optim.AdamW, lr=0.01), 12, scaler))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_adalora_shrinks_under_a_fused_step():
    values = []
    for options in ({}, {"foreach": False}):
        handle = lf.attach(network(), lf.AdaLoRA(init_r=4, target_r=1, total_steps=20), seed=0)
        values.append(train(handle, handle.optimizer(torch.optim.AdamW, lr=0.02, **options), 20))
    assert sum(handle.adapter(path).lam.numel() for path in handle.sites) == 2
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_step_looks_no_further_than_the_first_gradient():
    """What a schedule adds to a step does not grow with the number of sites."""
    handle = lf.attach(network(), lf.DeltaLoRA(r=2, start=5), seed=0)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    looked = []

    def named() -> Iterator[tuple[str, nn.Parameter]]:
        for each in handle.named_parameters():
            looked.append(each[0])
            yield each

    handle.schedule.begin(None)
    StepHooks.of(optimizer).add(Binding("default", "delta-lora", lambda: None, named, handle.schedule))
    train(handle, optimizer, 3)
    assert looked == ["0.A"] * 3
    assert handle.schedule.state_dict()["count"] == 3
