"""Schedules and the optimizers that carry them: closures, several adapters, states of others, odd orders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorafit as lf


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def step(handle: lf.Handle, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    for _ in range(count):
        optimizer.zero_grad()
        handle.model(x).square().mean().backward()
        optimizer.step()


ADALORA = lf.AdaLoRA(init_r=3, target_r=2, total_steps=40)


@pytest.mark.parametrize("method", [lf.LoRAFA(r=2), ADALORA, lf.DoRA(ADALORA)], ids=["lora-fa", "adalora", "dora"])
def test_a_closure_is_refused_where_gradients_come_too_late(method):
    handle = lf.attach(network(), method, seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    x = torch.randn(5, 6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = handle.model(x).square().mean()
        loss.backward()
        return loss

    closure()  # gradients of before do not help: they are not those of the step
    before = [parameter.clone() for parameter in handle.parameters()]
    with pytest.raises(lf.TrainingError, match="needs the gradients before") as caught:
        optimizer.step(closure)
    assert "automatic_optimization" in caught.value.fix
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))


def test_delta_lora_takes_a_closure():
    handle = lf.attach(network(), lf.DeltaLoRA(r=2, start=1), seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    x = torch.randn(5, 6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = handle.model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert handle.schedule.facts() == {"start": 1, "started": True}


def test_two_handles_of_one_name_keep_their_schedules_apart():
    def both() -> tuple[list[lf.Handle], torch.optim.Optimizer]:
        handles = [
            lf.attach(network(seed), lf.DeltaLoRA(r=2, start=start), seed=seed) for seed, start in ((0, 3), (1, 9))
        ]
        optimizer = torch.optim.AdamW([*handles[0].param_groups(1e-2), *handles[1].param_groups(1e-2)])
        for handle in handles:
            handle.bind(optimizer)
        return handles, optimizer

    _, optimizer = both()
    state = optimizer.state_dict()
    assert set(state["lorafit"]) == {"default", "default#2"}
    again, other = both()
    other.load_state_dict(state)
    assert [handle.schedule.facts()["start"] for handle in again] == [3, 9]


def test_a_state_that_was_loaded_before_bind_is_noticed():
    handle = lf.attach(network(), ADALORA, seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    step(handle, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    other = lf.attach(network(), ADALORA, seed=0)
    late = torch.optim.AdamW(other.param_groups(0.1))
    late.load_state_dict(state)
    with pytest.raises(lf.TrainingError, match="would begin anew") as caught:
        other.bind(late)
    assert "bind(optimizer) first" in caught.value.fix


@pytest.mark.parametrize("method", [ADALORA, lf.DeltaLoRA(r=2, start=4)], ids=["adalora", "delta-lora"])
def test_a_schedule_rests_while_its_adapter_does(method):
    model = network()
    handle = lf.attach(model, method, name="a", seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    step(handle, optimizer, 2)
    state = handle.schedule.state_dict()
    values = [parameter.clone() for parameter in handle.parameters()]
    lf.attach(model, lf.LoRA(r=1), name="b", seed=1)  # active instead
    step(handle, optimizer, 10)
    assert str(handle.schedule.state_dict()) == str(state)
    assert all(torch.equal(a, b) for a, b in zip(values, handle.parameters(), strict=True))
    handle.activate("a")
    step(handle, optimizer)
    assert str(handle.schedule.state_dict()) != str(state)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (ADALORA, lf.DeltaLoRA(r=3)),
        (lf.DeltaLoRA(r=2), lf.LoRA(r=2)),
        (lf.DeltaLoRA(r=2), lf.LoRAFA(r=2)),
        (lf.LoRA(r=2), lf.DeltaLoRA(r=2)),
        (lf.LoRAFA(r=2), lf.DeltaLoRA(r=2)),
    ],
)
def test_a_state_of_another_method_is_refused_and_changes_nothing(saved, loaded):
    first = lf.attach(network(), saved, seed=0)
    optimizer = first.optimizer(torch.optim.SGD, lr=0.1, total_steps=40)
    other = lf.attach(network(), loaded, seed=0)
    mine = other.optimizer(torch.optim.SGD, lr=0.1, total_steps=40)
    before = str(mine.state_dict())
    with pytest.raises(lf.CheckpointError, match="not one of the adapter"):
        mine.load_state_dict(optimizer.state_dict())
    assert str(mine.state_dict()) == before


def test_a_state_that_torch_refuses_leaves_the_schedule_as_it_was():
    first = lf.attach(network(), ADALORA, seed=0)
    optimizer = first.optimizer(torch.optim.AdamW, lr=0.1)
    step(first, optimizer, 3)
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"] * 2
    other = lf.attach(network(), ADALORA, seed=0)
    mine = other.optimizer(torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match="parameter groups"):
        mine.load_state_dict(state)
    assert other.schedule.facts()["step"] == 0


def test_a_damaged_schedule_is_named():
    handle = lf.attach(network(), ADALORA, seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    state = optimizer.state_dict()
    del state["lorafit"]["default"]["schedule"]["ranks"]
    with pytest.raises(lf.CheckpointError, match="is damaged") as caught:
        optimizer.load_state_dict(state)
    assert "ranks" in caught.value.found


def test_checks_come_before_any_gradient_is_changed():
    model = network()
    corrected = lf.attach(model, lf.LoRAFA(r=2), name="a", seed=0)
    idle = lf.attach(model, lf.LoRA(r=2), name="b", seed=1)
    idle.activate("a")
    optimizer = torch.optim.SGD([*corrected.param_groups(0.1), *idle.param_groups(0.1)])
    corrected.bind(optimizer)
    idle.bind(optimizer)
    model(torch.randn(5, 6)).square().mean().backward()
    before = [parameter.grad.clone() for parameter in corrected.parameters()]
    with pytest.raises(lf.TrainingError, match="not active"):
        optimizer.step()
    assert all(torch.equal(a, b.grad) for a, b in zip(before, corrected.parameters(), strict=True))


@pytest.mark.parametrize("steps", [0, -5, 2.5, True, "x"])
def test_a_length_that_is_none_is_refused(steps: Any):
    handle = lf.attach(network(), ADALORA, seed=0)
    with pytest.raises(lf.ConfigError, match="total_steps is out of range"):
        handle.optimizer(torch.optim.SGD, lr=0.1, total_steps=steps)
