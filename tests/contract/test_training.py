"""Optimizers and the first step: training that would go nowhere says so before it does."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafit as lf
from lorafit.errors import CheckpointError
from lorafit.state import load_state, save_state


class Experts(nn.Module):
    """Two experts of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def x():
    return torch.randn(5, 6)


def test_a_plain_loop_trains(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.1, betas=(0.8, 0.9))
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [
        (0.05, 0.1, (0.8, 0.9))
    ]
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in handle.parameters())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_bind_to_an_optimizer_made_elsewhere(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = torch.optim.SGD(handle.param_groups(lr=0.1))
    assert handle.bind(optimizer) is optimizer
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    assert handle.bind(optimizer) is optimizer  # twice is once
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks == (1, 1)


def test_an_optimizer_without_the_adapters_parameters_is_refused():
    model = network()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = lf.attach(model, lf.LoRA(r=2))
    with pytest.raises(lf.TrainingError, match="does not hold this adapter's parameters") as caught:
        handle.bind(early)
    assert "4 missing: 0.A, 0.B" in caught.value.found and "param_groups" in caught.value.fix
    partial = torch.optim.SGD(handle.parameters()[:-1], lr=0.1)
    with pytest.raises(lf.TrainingError, match=r"1 missing: 2\.B") as caught:
        handle.bind(partial)
    assert not early._optimizer_step_pre_hooks and not partial._optimizer_step_pre_hooks


def test_a_first_step_without_any_gradient(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        model(x)
    with pytest.raises(lf.TrainingError, match="adapters got no gradient") as caught:
        optimizer.step()
    assert caught.value.found.startswith("4 tensors: 0.A, 0.B, 2.A and 1 more")
    assert "exclude=" in caught.value.fix and "use_reentrant=False" in caught.value.fix
    model(x).sum().backward()
    optimizer.step()  # the first good step; later ones are not looked at
    optimizer.zero_grad()
    optimizer.step()


def test_reentrant_checkpointing_is_noticed(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    head = nn.Linear(4, 1)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        head(checkpoint(model, x, use_reentrant=True)).sum().backward()
    with pytest.raises(lf.TrainingError, match="no gradient") as caught:
        optimizer.step()
    assert "use_reentrant=False" in caught.value.fix


def test_an_inactive_adapter_is_named(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2), name="first")
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    lf.attach(model, lf.LoRA(r=2), name="second")
    model(x).sum().backward()
    with pytest.raises(lf.TrainingError, match="no gradient") as caught:
        optimizer.step()
    assert caught.value.found == "adapter 'first' is not active" and caught.value.fix == "handle.activate('first')"
    handle.activate("first")
    model(x).sum().backward()
    optimizer.step()


def test_an_adapter_merged_meanwhile_is_named(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    handle.merge()
    model(x.requires_grad_()).sum().backward()
    with pytest.raises(lf.TrainingError, match="no gradient") as caught:
        optimizer.step()
    assert caught.value.found == "adapter 'default' is merged" and caught.value.fix == "handle.unmerge()"


def test_layers_that_see_no_data_need_a_word(x):
    model = Experts()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    model(x).sum().backward()
    with pytest.raises(lf.TrainingError, match="no gradient") as caught:
        optimizer.step()
    assert "2 tensors: experts.1.A, experts.1.B" in caught.value.found and "allow_unused=True" in caught.value.fix
    allowed = handle.bind(torch.optim.SGD(handle.param_groups(lr=0.1)), allow_unused=True)
    allowed.step()
    for parameter in handle.parameters():
        parameter.grad = None
    nothing = handle.bind(torch.optim.SGD(handle.param_groups(lr=0.1)), allow_unused=True)
    with pytest.raises(lf.TrainingError, match="no gradient"):  # some may be unused, not all
        nothing.step()


def test_a_closure_is_looked_at_after_it_ran(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    for kind, style in ((torch.optim.LBFGS, "positional"), (torch.optim.SGD, "keyword"), (torch.optim.SGD, "none")):
        optimizer = handle.optimizer(kind, lr=0.01)

        def closure(optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        if style == "positional":
            optimizer.step(closure)
        elif style == "keyword":
            optimizer.step(closure=closure)
        else:  # what accelerate passes on
            closure()
            optimizer.step(None)
    unused = handle.optimizer(torch.optim.SGD, lr=0.01)
    unused.zero_grad()
    with pytest.raises(lf.TrainingError, match="no gradient"):
        unused.step(lambda: 0.0)


def test_an_adapter_loaded_for_inference_does_not_train(tmp_path):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    handle.save(tmp_path)
    handle.detach()
    frozen = lf.load(model, tmp_path)
    assert frozen.num_trainable == 0
    for call in (
        lambda: frozen.param_groups(lr=0.1),
        lambda: frozen.optimizer(torch.optim.SGD, lr=0.1),
        lambda: frozen.bind(torch.optim.SGD([nn.Parameter(torch.zeros(1))])),
    ):
        with pytest.raises(lf.StateError, match="nothing to train") as caught:
            call()
        assert "trainable=True" in caught.value.fix


def test_the_base_can_be_trained_along(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    model[0].bias.requires_grad_(True)
    optimizer = handle.bind(torch.optim.SGD([*handle.param_groups(lr=0.1), {"params": [model[0].bias], "lr": 0.01}]))
    bias = model[0].bias.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].bias, bias)


def test_a_saved_state_continues_exactly(x, tmp_path):
    """Values and the optimizer's state restored: a run in two parts is the run in one."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    whole = network()
    other = copy.deepcopy(whole)
    one = lf.attach(whole, lf.LoRA(r=2), modules_to_save=["2"], seed=1)
    optimizer = one.optimizer(torch.optim.AdamW, lr=0.05)
    steps(whole, optimizer, 4)
    save_state(one, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 4)
    two = lf.attach(other, lf.LoRA(r=2), modules_to_save=["2"], seed=2)
    again = two.optimizer(torch.optim.AdamW, lr=0.05)
    load_state(two, tmp_path)
    again.load_state_dict(state)
    steps(other, again, 4)
    for mine, expected in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"targets": ["0"]}, ["sits in other layers", "different: 2", "expected: 1 sites"]),
        ({"targets": ["0"], "modules_to_save": ["2"]}, ["sits in other layers", "2"]),
        ({"method": lf.LoRA(r=3)}, ["other settings", "lorafit_state.safetensors: 0", "2, 2.0", "3, 2.0"]),
        ({"method": lf.LoRA(r=2, alpha=9)}, ["other settings", "2.0", "4.5"]),
        ({"method": lf.LoRA(r=2, rslora=True)}, ["other settings", "2.0", "2.828"]),
        ({"method": lf.DoRA(lf.LoRA(r=2))}, ["other settings", "dora"]),
    ],
    ids=["sites", "saved", "rank", "alpha", "rslora", "method"],
)
def test_a_state_of_another_adapter_is_refused_and_changes_nothing(options, parts, tmp_path):
    save_state(lf.attach(network(), lf.LoRA(r=2)), tmp_path)
    options = dict(options)
    handle = lf.attach(network(), options.pop("method", lf.LoRA(r=2)), **options)
    before = [parameter.clone() for parameter in handle.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_state(handle, tmp_path)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.fix
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))


def test_nothing_keeps_a_detached_model_alive(x):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=2))
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    handle.detach()
    seen = weakref.ref(model)
    del model, handle, optimizer
    gc.collect()
    assert seen() is None
