"""LoRA-FA, Zhang et al. 2023, arXiv:2308.03303: the frozen A, the corrected step, and what autograd keeps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.layers import Shape
from lorafit.methods.initialisers import INITIALISERS
from lorafit.methods.lora_fa import LoRAFA, LoRAFAAdapter

RATE = 0.25


def attached(layer: Any, **options: Any) -> tuple[nn.Sequential, lf.Handle, LoRAFAAdapter]:
    """A double-precision model with LoRA-FA on its layer, B away from zero."""
    model = layer.model().double()
    handle = lf.attach(model, LoRAFA(r=layer.rank(2), alpha=3.0, **options), targets=["layer"], seed=0)
    adapter = handle.adapter("layer")
    assert isinstance(adapter, LoRAFAAdapter)
    with torch.no_grad():
        adapter.B.normal_(std=0.3)
    return model, handle, adapter


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def matrix(weight: Tensor, layer: Any) -> Tensor:
    """A weight as (out, in)."""
    return weight.t() if layer.kind in (nn.Embedding, Conv1D) else weight.flatten(1)


def whole_gradient(layer: Any, model: nn.Sequential, handle: lf.Handle, x: Tensor) -> Tensor:
    """G (out, in): the gradient of the whole weight, from a plain model in which the adapter is folded in."""
    options = {} if layer.kind is nn.Embedding else layer.options  # what those have there changes gradients alone
    plain = nn.Sequential(layer.kind(*layer.args, **options), nn.PReLU()).double()
    with torch.no_grad():
        plain[0].weight.copy_(model.layer.weight + handle.delta("layer"))
        if model.layer.__dict__.get("_parameters", {}).get("bias") is not None:
            plain[0].bias.copy_(model.layer.bias)
        plain[1].weight.copy_(model.gate.weight)
    loss(plain, x).backward()
    return matrix(plain[0].weight.grad, layer)


def projected(gradient: Tensor, a: Tensor, groups: int) -> Tensor:
    """G P_A with P_A = Aᵀ (A Aᵀ)⁻¹ A, group by group."""
    blocks = []
    for rows, own in zip(gradient.chunk(groups), a.chunk(groups), strict=True):
        blocks.append(rows @ own.T @ torch.linalg.inv(own @ own.T) @ own)
    return torch.cat(blocks)


# A and the row space ----------------------------------------------------------


def test_a_is_a_buffer_and_b_alone_is_trained(layer):
    _, handle, adapter = attached(layer)
    assert [name for name, _ in adapter.named_parameters()] == ["B"]
    assert [name for name, _ in adapter.named_buffers()] == ["A"]
    assert handle.num_trainable == adapter.B.numel()
    assert not adapter.A.requires_grad


def test_a_is_untouched_by_training_and_every_change_stays_in_its_row_space(layer):
    model, handle, adapter = attached(layer)
    before = adapter.A.clone()
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss(model, layer.input() if layer.kind is nn.Embedding else layer.input().double()).backward()
        optimizer.step()
        delta = matrix(handle.delta("layer"), layer)
        outside = delta - projected(delta, adapter.A, layer.groups)
        assert outside.abs().max() < 1e-12 < delta.abs().max()
    assert torch.equal(adapter.A, before)


def test_a_new_adapter_changes_nothing_and_can_learn(layer):
    model = layer.model()
    x = layer.input()
    y = model(x)
    handle = lf.attach(model, LoRAFA(r=layer.rank(2)), targets=["layer"])
    assert torch.equal(model(x), y)
    loss(model, x).backward()
    assert handle.adapter("layer").B.grad.abs().max() > 0


@pytest.mark.parametrize("r", [4, 64])
def test_tokens_of_an_embedding_start_with_columns_of_length_one(r):
    model = nn.Sequential(nn.Embedding(2000, 64))
    handle = lf.attach(model, LoRAFA(r=r), targets=["0"], seed=1)
    adapter = handle.adapter("0")
    assert adapter.A.square().sum(0).mean().item() == pytest.approx(1, abs=0.1)
    assert not adapter.B.any()


def test_the_seed_decides_a(some_layer):
    def a(seed: int) -> Tensor:
        model = some_layer.model()
        method = LoRAFA(r=some_layer.rank(2))
        return lf.attach(model, method, targets=["layer"], seed=seed).adapter("layer").A

    assert torch.equal(a(3), a(3))
    assert not torch.equal(a(3), a(4))


# The correction ---------------------------------------------------------------


def test_the_corrected_step_is_the_projection_of_the_whole_gradient(layer):
    """One SGD step with rate η changes s B A by −η G P_A, whatever A and s are."""
    model, handle, adapter = attached(layer)
    x = layer.input() if layer.kind is nn.Embedding else layer.input().double()
    gradient = whole_gradient(layer, model, handle, x)
    before = matrix(handle.delta("layer"), layer)
    optimizer = handle.optimizer(torch.optim.SGD, lr=RATE)
    loss(model, x).backward()
    optimizer.step()
    step = matrix(handle.delta("layer"), layer) - before
    expected = -RATE * projected(gradient, adapter.A, layer.groups)
    assert torch.allclose(step, expected, rtol=1e-9, atol=1e-13)
    assert expected.abs().max() > 1e-6


def test_without_correction_the_step_is_that_of_the_plain_gradient(layer):
    model, handle, adapter = attached(layer, correction=False)
    x = layer.input() if layer.kind is nn.Embedding else layer.input().double()
    gradient = whole_gradient(layer, model, handle, x)
    before = adapter.B.detach().clone()
    optimizer = handle.optimizer(torch.optim.SGD, lr=RATE)
    loss(model, x).backward()
    optimizer.step()
    scale = 3.0 / layer.rank(2)
    pairs = zip(gradient.chunk(layer.groups), adapter.A.chunk(layer.groups), strict=True)
    plain = torch.cat([scale * rows @ own.T for rows, own in pairs])
    assert handle.schedule is None
    assert torch.allclose(adapter.B - before, -RATE * plain, rtol=1e-9, atol=1e-13)


def test_float32_is_as_close_as_float32_can_be_where_the_rank_is_the_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 30))
    handle = lf.attach(model, LoRAFA(r=24))
    adapter = handle.adapter("0")
    x = torch.randn(100, 24)
    loss(model, x).backward()
    a, g = adapter.A.double(), adapter.B.grad.double()
    exact = g @ torch.linalg.inv(a @ a.T) / 4
    handle.optimizer(torch.optim.SGD, lr=0.0).step()
    error = (adapter.B.grad - exact).norm() / exact.norm()
    assert error < 1e-7 * torch.linalg.cond(a @ a.T) ** 0.5 * 24


def corrected(adapter: LoRAFAAdapter, g: Tensor) -> Tensor:
    return g @ torch.linalg.inv(adapter.A @ adapter.A.T) / adapter.scale**2


def linear() -> tuple[nn.Sequential, lf.Handle, LoRAFAAdapter, Tensor]:
    model = nn.Sequential(nn.Linear(7, 5)).double()
    handle = lf.attach(model, LoRAFA(r=3, alpha=2.0), seed=0)
    return model, handle, handle.adapter("0"), torch.randn(11, 7).double()


def test_the_correction_comes_after_clipping():
    model, handle, adapter, x = linear()
    optimizer = handle.optimizer(torch.optim.SGD, lr=RATE)
    (loss(model, x) * 1e3).backward()
    norm = nn.utils.clip_grad_norm_(handle.parameters(), 0.01)
    clipped = adapter.B.grad.clone()
    assert norm > 1 and clipped.norm().item() == pytest.approx(0.01, rel=1e-4)
    optimizer.step()
    assert torch.allclose(adapter.B, -RATE * corrected(adapter, clipped), rtol=1e-9)


def test_the_correction_comes_once_after_accumulation():
    model, handle, adapter, x = linear()
    optimizer = handle.optimizer(torch.optim.SGD, lr=RATE)
    total = torch.zeros_like(adapter.B)
    for part in x.split(4):
        value = loss(model, part)
        total += torch.autograd.grad(value, adapter.B, retain_graph=True)[0]
        value.backward()
    optimizer.step()
    assert torch.allclose(adapter.B, -RATE * corrected(adapter, total), rtol=1e-9)


def test_a_gradient_scaler_gives_the_same_corrected_step_and_its_skipped_steps_change_nothing():
    def run(scaler: Any) -> tuple[Tensor, lf.Handle, nn.Module, Any, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5))
        handle = lf.attach(model, LoRAFA(r=3), seed=0)
        optimizer = handle.optimizer(torch.optim.SGD, lr=RATE)
        x = torch.randn(11, 7)
        with torch.autocast("cpu", torch.float16):
            value = loss(model, x)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        return handle.adapter("0").B.detach().clone(), handle, model, optimizer, x

    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaled, handle, model, optimizer, x = run(scaler)
    plain = run(torch.amp.GradScaler("cpu", enabled=False))[0]
    assert plain.abs().max() > 1e-3
    assert torch.allclose(scaled, plain, rtol=5e-3, atol=1e-5)

    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        value = loss(model, x) * 1e30
    scaler.scale(value).backward()
    scaler.step(optimizer)
    assert torch.equal(handle.adapter("0").B, scaled)


def test_a_loaded_or_moved_a_is_corrected_with_its_own_inverse():
    model, handle, adapter, x = linear()
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.0)

    def check() -> None:
        optimizer.zero_grad()
        loss(model, x).backward()
        g = adapter.B.grad.clone()
        optimizer.step()
        assert torch.allclose(adapter.B.grad, corrected(adapter, g), rtol=1e-9)

    check()
    first = handle.schedule._inverse("0", adapter)
    assert handle.schedule._inverse("0", adapter) is first
    other = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(other)
    check()
    model.load_state_dict({key: torch.randn_like(value) for key, value in other.items()}, assign=True)
    check()
    adapter.A.data = torch.randn_like(adapter.A)
    check()


def test_parameters_without_a_gradient_are_left_alone():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    handle = lf.attach(model, LoRAFA(r=2))
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    handle.bind(optimizer, allow_unused=True)
    loss(model["used"], torch.randn(3, 4)).backward()
    optimizer.step()
    assert handle.adapter("idle").B.grad is None
    assert handle.adapter("used").B.any() and not handle.adapter("idle").B.any()


def test_a_singular_a_is_an_error_that_names_the_layer():
    model, handle, adapter, x = linear()
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        adapter.A[2] = adapter.A[0] - adapter.A[1]
    loss(model, x).backward()
    with pytest.raises(lf.TrainingError, match=r"singular[\s\S]*where: +0[\s\S]*3 rows of rank 2"):
        optimizer.step()


def test_a_rank_above_the_layers_is_refused():
    with pytest.raises(lf.ConfigError, match="rank 4 at most"):
        lf.attach(nn.Sequential(nn.Linear(4, 9)), LoRAFA(r=5))


def test_the_optimizers_state_comes_and_goes():
    model, handle, _, x = linear()
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    loss(model, x).backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin_model, twin, _, _ = linear()
    twin_model.load_state_dict(model.state_dict())
    second = twin.optimizer(torch.optim.AdamW, lr=0.1)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for each, step in ((model, optimizer), (twin_model, second)):
        step.zero_grad()
        loss(each, x).backward()
        step.step()
    assert torch.equal(handle.adapter("0").B, twin.adapter("0").B)


# Around it --------------------------------------------------------------------


def test_with_dora_around_the_induced_step_is_scaled_by_m_over_c():
    """The step of V = W + Δ is −η (m / C) G P_A, with G the gradient of the whole weight W'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5)).double()
    handle = lf.attach(model, lf.DoRA(LoRAFA(r=3)), seed=0)
    outer = handle.adapter("0")
    inner, m = outer.inner, outer.m
    with torch.no_grad():
        inner.B.normal_(std=0.2)
        m.mul_(torch.linspace(0.5, 2, 5))
    x = torch.randn(11, 7).double()
    plain = nn.Linear(7, 5).double()
    with torch.no_grad():
        plain.weight.copy_(model[0].weight + handle.delta("0"))
        plain.bias.copy_(model[0].bias)
    loss(plain, x).backward()
    before = inner.scale * inner.B.detach() @ inner.A
    c = (model[0].weight + before).norm(dim=1, keepdim=True)
    factor = m.detach()[:, None] / c
    optimizer = handle.optimizer(torch.optim.SGD, lr=RATE)
    loss(model, x).backward()
    optimizer.step()
    step = inner.scale * inner.B.detach() @ inner.A - before
    assert torch.allclose(step, -RATE * factor * projected(plain.weight.grad, inner.A, 1), rtol=1e-9, atol=1e-13)


# What autograd keeps ----------------------------------------------------------


@contextmanager
def kept() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all tensors that autograd keeps for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes


@pytest.mark.parametrize("kind", [nn.Linear, lambda inn, out: Conv1D(out, inn)], ids=["Linear", "HFConv1D"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_autograd_keeps_r_numbers_a_token_and_never_x(kind: Callable[[int, int], nn.Module], autocast: bool):
    r, inn, out, tokens = 3, 34, 26, (5, 7)

    def run(method: lf.Method) -> list[tuple[int, ...]]:
        model = nn.Sequential(kind(inn, out))
        lf.attach(model, method)
        x = torch.randn(*tokens, inn, requires_grad=True)
        with kept() as shapes, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().sum().backward()
        assert x.grad is not None and x.grad.any()
        return shapes

    weights = {(out, inn), (inn, out), (r, inn), (out, r)}
    rows = tokens[0] * tokens[1]
    assert set(run(LoRAFA(r=r))) - weights == {(rows, r)}
    assert set(run(lf.LoRA(r=r))) - weights == {(rows, r), (*tokens, inn)}


def test_gradients_are_those_of_a_lora_with_the_same_values(layer):
    model, _, adapter = attached(layer)
    x = layer.input() if layer.kind is nn.Embedding else layer.input().double()
    twin = copy.deepcopy(model)
    lora = lf.attach(layer.model().double(), lf.LoRA(r=layer.rank(2), alpha=3.0), targets=["layer"])
    twin.load_state_dict({**model.state_dict()})
    other = lora.model
    other.load_state_dict(model.state_dict())
    loss(model, x).backward()
    loss(other, x).backward()
    assert torch.allclose(adapter.B.grad, lora.adapter("layer").B.grad, rtol=1e-12, atol=1e-15)


# Settings and copies ----------------------------------------------------------


def test_counts():
    assert LoRAFA(r=8).num_trainable([(768, 768)] * 24) == 8 * 768 * 24  # half of LoRA's 294,912
    assert LoRAFA(r=4).num_trainable([Shape(8, 18, groups=2)]) == 16
    assert LoRAFA(r=2).num_trainable([Shape(8, 11, lookup=True)]) == 16


def test_counts_are_those_of_the_handle(layer):
    _, handle, _ = attached(layer)
    assert handle.num_trainable == handle.method.num_trainable(handle.shapes())


def test_dropout_is_refused_with_the_reason():
    with pytest.raises(lf.ConfigError, match=r"mask[\s\S]*LoRAFA.dropout[\s\S]*fix: +dropout=0.0"):
        LoRAFA(dropout=0.1)


@pytest.mark.parametrize("init", [name for name, each in INITIALISERS.items() if each.anchored])
def test_initialisers_that_are_not_zero_at_the_start_are_refused(init):
    with pytest.raises(lf.ConfigError, match="LoRA-FA trains B alone"):
        LoRAFA(init=init)


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"alpha": -1}, {"dropout": 2}, {"rslora": 1}, {"init": "nothing"}, {"correction": "yes"}],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(lf.ConfigError, match=f"LoRAFA.{next(iter(options))}"):
        LoRAFA(**options)


def test_settings_are_loras_and_its_own():
    method = LoRAFA(r=64, alpha=32, rslora=True, correction=False)
    assert method.scale == 4
    assert method.settings()["correction"] is False and method.settings()["alpha"] == 32
    assert method.at(r=4) == LoRAFA(r=4, alpha=32, rslora=True, correction=False)
    assert method.at(alpha=8.0).scale == 1
    assert method.ups() == ("B",)


def test_rslora_scales_the_correction_too():
    model = nn.Sequential(nn.Linear(7, 5)).double()
    handle = lf.attach(model, LoRAFA(r=4, alpha=6.0, rslora=True))
    adapter = handle.adapter("0")
    loss(model, torch.randn(3, 7).double()).backward()
    g = adapter.B.grad.clone()
    handle.optimizer(torch.optim.SGD, lr=0.0).step()
    assert torch.allclose(adapter.B.grad, g @ torch.linalg.inv(adapter.A @ adapter.A.T) / 9, rtol=1e-9)


def test_copies_and_pickles_compute_the_same(some_layer):
    model, _, _ = attached(some_layer)
    x = some_layer.input() if some_layer.kind is nn.Embedding else some_layer.input().double()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_the_inverse_is_exact_though_a_is_nearly_singular():
    """r = in: squaring A costs half of the digits, and float32 would have none left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9))
    handle = lf.attach(model, LoRAFA(r=8, alpha=8.0), seed=0)
    adapter = handle.adapter("0")
    with torch.no_grad():
        left, _, right = torch.linalg.svd(torch.randn(8, 8).double())
        adapter.A.copy_(left @ torch.diag(torch.logspace(0, -3, 8).double()) @ right)
    a = adapter.A.double()
    exact = torch.linalg.inv(a @ a.T)
    found = handle.schedule._inverse("0", adapter)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_what_is_singular_in_the_precision_of_a_is_an_error():
    model = nn.Sequential(nn.Linear(8, 5))
    handle = lf.attach(model, LoRAFA(r=2), seed=0)
    with torch.no_grad():
        adapter = handle.adapter("0")
        adapter.A[1] = adapter.A[0]
        adapter.A[1, 0] *= 1 + 2e-7  # the last digit
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    loss(model, torch.randn(3, 8)).backward()
    with pytest.raises(lf.TrainingError, match="singular"):
        optimizer.step()


def test_an_embedding_that_is_loaded_draws_nothing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Embedding(50, 8))
    handle = lf.attach(model, lf.LoRAFA(r=2), ["0"], seed=0)
    expected = handle.adapter("0").A.clone()
    handle.save(tmp_path)
    handle.detach()
    drawn: list[torch.Size] = []
    functions = {name: vars(torch)[name] for name in ("rand", "randn")}
    for name, function in functions.items():
        monkeypatch.setattr(torch, name, lambda *a, f=function, **o: drawn.append(f(*a, **o).shape) or f(*a, **o))
    loaded = lf.load(model, tmp_path)
    assert not drawn and torch.equal(loaded.adapter("0").A, expected)
