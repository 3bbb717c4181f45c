"""DoRA, Liu et al. 2024, arXiv:2402.09353: every invariant of the method, against the plain formula."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import lorafit as lf
from lorafit.layers import Shape, Stored
from lorafit.method import Spot
from lorafit.methods import dora
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.dora import DoRA, DoRAAdapter
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_fa import LoRAFA
from lorafit.methods.vera import VeRA
from lorafit.rownorm import WORST, row_norm, row_squares

INNER = {
    "lora": lambda layer: LoRA(r=layer.rank(2), alpha=3.0),
    "rslora": lambda layer: LoRA(r=layer.rank(2), alpha=3.0, rslora=True),
    "lora-fa": lambda layer: LoRAFA(r=layer.rank(2), alpha=3.0),
    "vera": lambda layer: VeRA(r=layer.rank(6), d_init=0.5),
    "adalora": lambda layer: AdaLoRA(init_r=layer.rank(3), target_r=layer.rank(2), alpha=3.0, total_steps=12),
}


@pytest.fixture(params=list(INNER))
def inner(request: pytest.FixtureRequest) -> Any:
    """layer → a method that DoRA can be put around."""
    return INNER[request.param]


def attached(layer: Any, inner: Any = INNER["lora"], *, double: bool = True, filled: bool = True) -> Any:
    """(model, handle, DoRA's adapter), away from where it starts unless told otherwise."""
    model = layer.model().double() if double else layer.model()
    handle = lf.attach(model, DoRA(inner(layer)), targets=["layer"], seed=0)
    adapter = handle.adapter("layer")
    assert isinstance(adapter, DoRAAdapter)
    if filled:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(parameter * (1 + 0.2 * noise) if name == "m" else 0.4 * noise)
    return model, handle, adapter


def base_matrix(handle: lf.Handle) -> Tensor:
    return handle.sites["layer"].weight().detach()


def delta_of(handle: lf.Handle) -> Tensor:
    """ΔV as a matrix, with the inner adapter's gradients."""
    adapter = handle.adapter("layer")
    return adapter.inner.update(handle.sites["layer"].weight).delta.dense()


def formula(handle: lf.Handle, *, detached: bool = True) -> Tensor:
    """W' = m V / ‖V‖_c by the paper's equation 5, formed, with autograd through everything or all but the norm."""
    v = base_matrix(handle) + delta_of(handle)
    c = v.square().sum(dim=1).sqrt()
    return (handle.adapter("layer").m / (c.detach() if detached else c))[:, None] * v


def with_weight(layer: Any, handle: lf.Handle, matrix: Tensor, x: Tensor) -> Tensor:
    """The plain layer's output for x with `matrix` for its weight."""
    site = handle.sites["layer"]
    plain = layer.model().layer.to(matrix.dtype)
    tensors = {"weight": site.unfold(matrix)} | ({} if site.bias() is None else {"bias": site.bias()})
    return torch.func.functional_call(plain, tensors, (x,))


def inputs(layer: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    x = layer.input()
    return x.to(dtype) if x.is_floating_point() else x


def norms(adapter: DoRAAdapter) -> list[Tensor | None]:
    """What is remembered: the norm, and ‖W‖²."""
    lengths, squares = (
        None if memo._entry is None else memo._entry[1] for memo in (adapter._lengths, adapter._squares)
    )
    return [None if lengths is None else lengths.norm, squares]


# W' = W at the start


@pytest.mark.parametrize("double", [False, True])
def test_a_new_adapter_changes_nothing_bit_for_bit(layer, inner, double):
    model = layer.model().double() if double else layer.model()
    x = inputs(layer, torch.float64 if double else torch.float32)
    expected = model(x)
    handle = lf.attach(model, DoRA(inner(layer)), targets=["layer"], seed=0)
    assert torch.equal(model(x), expected)
    assert torch.equal(handle.adapter("layer").update(handle.sites["layer"].weight).gain, torch.ones(8).to(x.dtype))
    assert not handle.delta("layer").any()
    handle.merge()
    assert torch.equal(model(x), expected)


def test_a_new_adapter_changes_nothing_in_bf16(some_layer):
    model = some_layer.model().bfloat16()
    x = inputs(some_layer, torch.bfloat16)
    expected = model(x)
    handle = lf.attach(model, DoRA(LoRA(r=some_layer.rank(2))), targets=["layer"], seed=0)
    assert handle.adapter("layer").m.dtype == torch.float32
    assert torch.equal(model(x), expected)


def test_the_magnitudes_start_as_the_norms_of_the_rows(layer):
    _, handle, adapter = attached(layer, filled=False)
    torch.testing.assert_close(adapter.m, base_matrix(handle).norm(dim=1))
    if layer.kind is nn.Embedding:
        assert adapter.m.shape == (layer.args[1],)


# The function


def test_the_output_is_that_of_the_formed_weight(layer, inner):
    model, handle, _ = attached(layer, inner)
    x = inputs(layer)
    expected = model.gate(with_weight(layer, handle, formula(handle), x))
    torch.testing.assert_close(model(x), expected)


def test_row_norms_are_the_magnitudes_always(some_layer, inner):
    model, handle, adapter = attached(some_layer, inner)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.3)
    x = inputs(some_layer)
    for _ in range(3):
        handle.merge()
        torch.testing.assert_close(base_matrix(handle).norm(dim=1), adapter.m.detach().abs())
        handle.unmerge()
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_merged_is_unmerged(layer, inner):
    model, handle, _ = attached(layer, inner)
    model.eval()
    x, before = inputs(layer), handle.sites["layer"].raw_weight.detach().clone()
    unmerged = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), unmerged)
    handle.unmerge()
    assert torch.equal(handle.sites["layer"].raw_weight, before)
    assert torch.equal(model(x), unmerged)


def test_it_is_the_inner_method_when_m_is_the_norm(layer, inner):
    model, handle, adapter = attached(layer, inner)
    site = handle.sites["layer"]
    with torch.no_grad():
        v = base_matrix(handle) + delta_of(handle)
        adapter.m.copy_(v.norm(dim=1))
    plain, x = delta_of(handle).detach(), inputs(layer)
    expected = model.gate(with_weight(layer, handle, base_matrix(handle) + plain, x))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(handle.delta("layer"), site.unfold(plain))


def test_the_bias_is_never_scaled():
    model = nn.Sequential(nn.Linear(4, 3))
    handle = lf.attach(model, DoRA(LoRA(r=2)), seed=0)
    with torch.no_grad():
        handle.adapter("0").m.mul_(5)
    torch.testing.assert_close(model(torch.zeros(2, 4)), model[0].bias.expand(2, 3))


# Gradients


def gradients(output: Tensor, handle: lf.Handle) -> dict[str, Tensor]:
    named = dict(handle.named_parameters())
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad((output * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def test_the_gradient_is_the_detached_formulas_and_not_the_full_ones(some_layer, inner):
    if some_layer.kind is nn.Embedding:  # what padding and frequency do to a weight's gradient they do to A's alone
        some_layer = replace(some_layer, options={})
    model, handle, _ = attached(some_layer, inner)
    x = inputs(some_layer)
    ours = gradients(model(x), handle)
    detached, full = (
        gradients(model.gate(with_weight(some_layer, handle, formula(handle, detached=d), x)), handle)
        for d in (True, False)
    )
    differ = 0
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, detached[name])
        if name.endswith(".m"):
            torch.testing.assert_close(gradient, full[name])
        else:
            differ += not torch.allclose(gradient, full[name], rtol=1e-3)
    assert differ == len(ours) - 1


def test_the_gradients_written_out_for_a_linear_layer():
    """∂L/∂V = (m / C) G and ∂L/∂m = Σ G ∘ V / C."""
    layer = nn.Linear(5, 4, bias=False).double()
    handle = lf.attach(nn.Sequential(layer), DoRA(LoRA(r=2, alpha=6.0)), seed=0)
    adapter = handle.adapter("0")
    with torch.no_grad():
        adapter.inner.B.normal_()
        adapter.m.mul_(1.5)
    x, g = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    layer(x).backward(g)
    whole = g.t() @ x
    v = layer.weight + 3 * adapter.inner.B @ adapter.inner.A
    c = v.norm(dim=1, keepdim=True)
    toward = adapter.m[:, None] / c * whole
    torch.testing.assert_close(adapter.inner.B.grad, 3 * toward @ adapter.inner.A.t())
    torch.testing.assert_close(adapter.inner.A.grad, 3 * adapter.inner.B.t() @ toward)
    torch.testing.assert_close(adapter.m.grad, (whole * v / c).sum(dim=1))


def test_dropout_is_on_the_low_rank_path_alone():
    """The expectation over masks is W' x, and the base path has no noise: with B = 0 every pass is the same."""
    model = nn.Sequential(nn.Linear(6, 5).double())
    handle = lf.attach(model, DoRA(LoRA(r=2, dropout=0.5)), seed=0)
    adapter, x = handle.adapter("0"), torch.randn(1, 6, dtype=torch.float64)
    assert adapter.dropout == 0.5
    with torch.no_grad():
        adapter.m.mul_(2)
    model.train()
    assert torch.equal(model(x), model(x))
    with torch.no_grad():
        adapter.inner.B.normal_()
        assert not torch.equal(model(x), model(x))
        mean = model(x.expand(20000, 6)).mean(dim=0)
        model.eval()
        torch.testing.assert_close(mean, model(x)[0], atol=0.15, rtol=0)


# Rows without a direction


def zero_row(double: bool = True) -> tuple[nn.Sequential, lf.Handle, DoRAAdapter]:
    model = nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[2] = 0
    model = model.double() if double else model
    handle = lf.attach(model, DoRA(LoRA(r=2)), seed=0)
    return model, handle, handle.adapter("0")


def test_a_row_of_zeros_gives_no_nan_and_can_learn():
    model, handle, adapter = zero_row()
    x = torch.randn(8, 5, dtype=torch.float64)
    base = model[0].weight.detach().clone()
    y = model(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, base, model[0].bias))
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.0)
    target = torch.randn(8, 4, dtype=torch.float64)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean(dim=0)
        loss.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in handle.parameters())
        if step == 0:
            assert adapter.m.grad[2] == 0 and adapter.inner.B.grad[2].any()
        optimizer.step()
        losses.append(loss[2].item())
    assert losses[-1] < 0.9 * losses[0] and adapter.m[2] != 0
    assert handle.delta("0").isfinite().all()
    expected = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), expected)


def test_a_row_that_the_change_takes_away_gives_no_nan():
    model = nn.Sequential(nn.Linear(4, 3, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3, 4))
    handle = lf.attach(model, DoRA(LoRA(r=2, alpha=2.0)), seed=0)
    adapter = handle.adapter("0")
    with torch.no_grad():
        adapter.inner.A.copy_(torch.eye(2, 4))
        adapter.inner.B.zero_()[1, 1] = -1.0  # W + s B A is 0 in row 1
    x = torch.randn(6, 4, dtype=torch.float64)
    y = model(x)
    assert not y[:, 1].any()
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in handle.parameters())
    assert handle.delta("0")[1, 1] == -1
    handle.merge()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_nearly_cancels_keeps_its_length(dtype):
    model = nn.Sequential(nn.Linear(64, 5, bias=False).to(dtype))
    handle = lf.attach(model, DoRA(LoRA(r=5, alpha=5.0)), seed=0)
    adapter, w = handle.adapter("0"), model[0].weight
    with torch.no_grad():
        adapter.inner.A.copy_(w)
        adapter.inner.B.zero_()
        adapter.inner.B[3, 3] = -1 + 2**-12
    v = w.detach().double() + (adapter.inner.B.double() @ adapter.inner.A.double())
    merged = w + handle.delta("0")
    torch.testing.assert_close(merged.norm(dim=1), adapter.m.detach(), rtol=1e-4, atol=0)
    norm = adapter.norm(w, adapter.inner.update(lambda: w).delta)
    torch.testing.assert_close(norm, v.norm(dim=1).to(dtype), rtol=1e-5, atol=0)


# Once per optimizer step


def small(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Sequential, lf.Handle, DoRAAdapter, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    handle = lf.attach(model, DoRA(LoRA(r=2, **options)), seed=0)
    with torch.no_grad():
        for path in handle.sites:
            handle.adapter(path).inner.B.normal_()
    return model, handle, handle.adapter("0"), torch.randn(3, 6, dtype=dtype)


def current(model: nn.Sequential, adapter: DoRAAdapter) -> Tensor:
    """What the norm should be."""
    v = model[0].weight + adapter.inner.scale * adapter.inner.B @ adapter.inner.A
    return v.detach().norm(dim=1)


def test_the_norm_is_computed_once_per_optimizer_step():
    model, handle, adapter, x = small()
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    squares = None
    for _ in range(3):
        optimizer.zero_grad()
        seen = []
        for _ in range(4):  # accumulation
            model(x).square().mean().backward()
            seen.append(norms(adapter)[0])
        assert all(each is seen[0] for each in seen)
        torch.testing.assert_close(seen[0], current(model, adapter))
        assert squares is None or norms(adapter)[1] is squares
        squares = norms(adapter)[1]
        optimizer.step()
        model(x)
        assert norms(adapter)[0] is not seen[0]
        assert norms(adapter)[1] is squares  # W has not changed: neither has ‖W‖²


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_how_often_norms_are_computed(monkeypatch, reentrant):
    """Once per site for the micro-batches of a step, checkpointed or not, and once for all batches of an evaluation."""
    model, handle, _, x = small()
    x.requires_grad_()
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    computed = []
    plain = dora.row_norm
    monkeypatch.setattr(dora, "row_norm", lambda *args, **kwargs: (computed.append(1), plain(*args, **kwargs))[1])

    def count() -> int:
        found = len(computed)
        computed.clear()
        return found

    for _ in range(2):
        for _ in range(3):
            y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            y.square().mean().backward()
        assert count() == len(handle.sites)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert count() == len(handle.sites)


def test_a_gain_is_one_operation():
    model, _, adapter, x = small()
    model(x)
    gain = adapter.update(lambda: model[0].weight).gain
    leaves = [function for function, _ in gain.grad_fn.next_functions if function is not None]
    assert len(leaves) == 1 and leaves[0].variable is adapter.m


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(
    "how", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"fused": True, "amsgrad": True}]
)
def test_every_kind_of_step_renews_the_norm(how, bound):
    """A fused AdamW counts up no version of the parameters it changes."""
    model, handle, adapter, x = small()
    optimizer = torch.optim.AdamW(handle.param_groups(lr=0.1), **how)
    if bound:
        handle.bind(optimizer)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        model(x)
        torch.testing.assert_close(norms(adapter)[0], current(model, adapter))


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")  # torch, of its own
@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_step_renews_the_norm_and_is_compiled_once(fused):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, handle, adapter, x = small()
    optimizer = torch.optim.AdamW(handle.param_groups(lr=0.1), fused=fused)
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(4):
        model(x).square().mean().backward()
        step()
        model(x)
        torch.testing.assert_close(norms(adapter)[0], current(model, adapter))
    assert len(graphs) == (0 if fused else 1)  # torch leaves its fused optimizers out
    torch.compiler.reset()


def _load(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})


def _assign(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()}, assign=True)


def _weight(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def _new_memory(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    model[0].weight.data = model[0].weight.data * 1.5


def _factor(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    with torch.no_grad():
        adapter.inner.A[0, 0] += 1


def _scale(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    adapter.inner.scale *= 2


def _there_and_back(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    model.bfloat16()
    model.float()


def _averages(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    model.eval()
    adapter.inner.A.data.mul_(2)


def _merge(model: nn.Sequential, handle: lf.Handle, adapter: DoRAAdapter) -> None:
    handle.merge()
    handle.unmerge()
    with torch.no_grad():
        adapter.inner.B.mul_(2)


@pytest.mark.parametrize(
    "change", [_load, _assign, _weight, _new_memory, _factor, _scale, _there_and_back, _averages, _merge]
)
def test_the_norm_is_renewed_by(change):
    model, handle, adapter, x = small()
    model(x)
    before = norms(adapter)[0]
    change(model, handle, adapter)
    model(x)
    torch.testing.assert_close(norms(adapter)[0], current(model, adapter))
    assert not torch.equal(norms(adapter)[0], before)


def test_a_change_of_dtype_renews_the_norm():
    model, _, adapter, x = small()
    model(x)
    model.double()
    model(x.double())
    assert norms(adapter)[0].dtype == norms(adapter)[1].dtype == torch.float64
    torch.testing.assert_close(norms(adapter)[0], current(model, adapter))


def test_what_is_remembered_is_in_no_copy_and_no_file():
    model, _, adapter, x = small()
    expected = model(x)
    assert None not in norms(adapter)
    assert {key.rpartition("default.")[2] for key in model[0].state_dict() if "adapters" in key} == {
        "m",
        "inner.A",
        "inner.B",
    }
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(whole, weights_only=False)]
    for each in copies:
        own = each[0].adapters["default"]
        assert norms(own) == [None, None]
        assert torch.equal(each(x), expected)
        with torch.no_grad():
            own.inner.B.mul_(2)
        assert not torch.equal(each(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_accumulation_change_no_gradient(reentrant):
    model, handle, adapter, x = small(torch.float64)
    x.requires_grad_()
    for _ in range(2):
        model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in handle.parameters()]
    handle_norm = norms(adapter)[0]
    for parameter in handle.parameters():
        parameter.grad = None
    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert norms(adapter)[0] is handle_norm
    for parameter, gradient in zip(handle.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_selective_checkpointing_sees_the_same_operations_twice():
    def keep_products(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    model, handle, _, x = small(torch.float64)
    x.requires_grad_()
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in handle.parameters()]
    for parameter in handle.parameters():
        parameter.grad = None
    for path in handle.sites:
        handle.adapter(path).forget()
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    for parameter, gradient in zip(handle.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda kind: kind.__name__)
def test_the_norm_of_a_convolution_is_kept_in_every_order_of_memory(kind: Any, monkeypatch: pytest.MonkeyPatch):
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    model = nn.Sequential(kind(4, 8, 3, padding=1))
    if dims > 1:
        model = model.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    handle = lf.attach(model, DoRA(LoRA(r=2)), ["0"], seed=0)
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    computed: list[int] = []
    monkeypatch.setattr(dora, "row_norm", lambda *args, **options: computed.append(1) or row_norm(*args, **options))
    monkeypatch.setattr(dora, "row_squares", lambda weight: computed.append(2) or row_squares(weight))
    x = torch.randn(2, 4, *(5,) * dims)
    for step in range(3):
        for _ in range(3):
            model(x).square().mean().backward()
        assert computed == [2, 1, *[1] * step]  # ‖W‖² once, the norm once a step
        optimizer.step()
    with torch.no_grad():
        model[0].weight[0] += 1
    model(x)
    assert computed == [2, 1, 1, 1, 2, 1]  # and both anew once W is another


@pytest.mark.parametrize("inner", [LoRA(r=2), LoRA(r=2, init="pissa"), LoRAFA(r=2)], ids=["lora", "pissa", "lora-fa"])
def test_an_adapter_that_is_loaded_computes_no_norm(some_layer, inner, tmp_path, fill, monkeypatch):
    model = some_layer.model()
    method = DoRA(replace(inner, r=some_layer.rank(2)))
    handle = lf.attach(model, method, ["layer"], seed=0)
    fill(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lf.LorafitWarning)  # of grouped convolutions, which PEFT cannot compute
        handle.save(tmp_path)
    x = some_layer.input()
    expected, read = model(x), []
    handle.detach()
    monkeypatch.setattr(
        dora, "row_norm", lambda weight, *rest, **more: read.append(weight) or row_norm(weight, *rest, **more)
    )
    loaded = lf.load(model, tmp_path, trainable=True)
    assert isinstance(loaded.method, DoRA) and sum(weight.numel() for weight in read) == 0
    torch.testing.assert_close(model(x), expected)


def test_an_adapter_that_is_loaded_does_not_read_a_quantised_weight(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8))
    lf.quantise(model, targets=["0"])
    handle = lf.attach(model, DoRA(LoRA(r=2)), ["0"], seed=0)
    handle.save(tmp_path)
    handle.detach()
    formed: list[int] = []
    plain = Stored.__call__
    monkeypatch.setattr(Stored, "__call__", lambda self: formed.append(1) or plain(self))
    lf.load(model, tmp_path)
    assert not formed


def test_inference_mode_before_training():
    model, handle, adapter, x = small()
    with torch.inference_mode():
        model(x)
    assert not norms(adapter)[0].is_inference()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, _, adapter, x = small()
        y = model(x)
        adapter.inner.B.mul_(2)
        assert norms(adapter) == [None, None]
        assert not torch.equal(model(x), y)


def test_autocast_leaves_the_norm_in_full_precision():
    model, _, adapter, x = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and norms(adapter)[0].dtype == torch.float32
    torch.testing.assert_close(norms(adapter)[0], current(model, adapter))


def test_a_magnitude_that_moves_a_little_is_felt_in_bf16():
    model = nn.Sequential(nn.Linear(1, 4, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1)
    handle = lf.attach(model, DoRA(LoRA(r=1)), seed=0)
    with torch.no_grad():
        handle.adapter("0").m.fill_(1.005)  # 1 in bf16
    torch.testing.assert_close(model(torch.full((1, 1), 400.0).bfloat16()).float(), torch.full((1, 4), 402.0))


def test_no_dense_change_is_formed_in_training():
    """The flops of a step's first forward pass: base, low-rank path, and 2 r · out · in for the norm.

    Under a mode that counts operations the rows that cancel most are formed unasked, as in a compiled program.
    """
    out, inn, r, rows = 80, 64, 4, 5
    model = nn.Sequential(nn.Linear(inn, out, bias=False))
    lf.attach(model, DoRA(LoRA(r=r)), seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.randn(rows, inn))
    path = 2 * rows * (inn * out + r * (inn + out))
    norm = 2 * out * inn * r + 2 * r * r * (inn + out) + 2 * WORST * inn * r
    assert counter.get_total_flops() == path + norm


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_it_compiles_to_one_graph():
    model, handle, adapter, x = small()
    adapter.forget()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        y = compiled(x)
        y.square().mean().backward()
        ours = [parameter.grad.clone() for parameter in handle.parameters()]
        optimizer.zero_grad()
        plain = model(x)
        torch.testing.assert_close(y, plain)
        plain.square().mean().backward()
        for gradient, parameter in zip(ours, handle.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        optimizer.step()


# Around other methods


def test_training_around_every_method(some_layer, inner):
    model, handle, adapter = attached(some_layer, inner)
    x = inputs(some_layer)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.02, total_steps=12)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = model.gate(with_weight(some_layer, handle, formula(handle), x))
    torch.testing.assert_close(model(x), expected)
    assert adapter.dropout == adapter.inner.dropout


def test_adalora_shrinks_inside(tmp_path):
    model, handle, adapter = attached_linear(AdaLoRA(init_r=4, target_r=1, total_steps=10, warmup=2, final=2))
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05)
    x = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - x[:, :5].roll(1, 1)).square().mean().backward()
        optimizer.step()
    assert adapter.inner.lam.numel() == 1
    v = model[0].weight + adapter.inner.update(handle.sites["0"].weight).delta.dense()
    torch.testing.assert_close((model[0].weight + handle.delta("0")).norm(dim=1), adapter.m.detach().abs())
    model(x)
    torch.testing.assert_close(norms(adapter)[0], v.detach().norm(dim=1))
    # What was pruned is loaded into a new, unpruned model.
    other, again, fresh = attached_linear(AdaLoRA(init_r=4, target_r=1, total_steps=10, warmup=2, final=2))
    other.load_state_dict(model.state_dict())
    assert fresh.inner.lam.numel() == 1
    torch.testing.assert_close(other(x), model(x))
    assert again.num_trainable == handle.num_trainable


def attached_linear(inner: lf.Method) -> tuple[nn.Sequential, lf.Handle, DoRAAdapter]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5).double())
    handle = lf.attach(model, DoRA(inner), seed=0)
    return model, handle, handle.adapter("0")


def test_resize_refuses_what_is_not_the_inner_adapters():
    adapter = attached_linear(LoRA(r=2))[2]
    for shapes in ({"m": torch.Size([9])}, {"other": torch.Size([1])}, {"inner.A": torch.Size([9, 9])}):
        with pytest.raises(ValueError):
            adapter.resize(shapes)
    adapter.resize({"m": adapter.m.shape})


def test_the_norm_follows_a_shared_projection():
    """VeRA's pair belongs to another site's adapter: a change of it must reach all."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    handle = lf.attach(model, DoRA(VeRA(r=3)), seed=0)
    with torch.no_grad():
        for path in handle.sites:
            handle.adapter(path).inner.b.normal_()
    x = torch.randn(2, 6, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        handle.adapter("0").inner.common.A.mul_(3)
    for index in (0, 1):
        site, adapter = handle.sites[str(index)], handle.adapter(str(index))
        delta = adapter.inner.update(site.weight).delta
        norm = adapter.norm(site.weight(), delta)
        torch.testing.assert_close(norm, (site.weight() + delta.dense()).detach().norm(dim=1))


def test_two_sites_can_share_an_inner_adapter_and_have_magnitudes_of_their_own():
    method, weights = DoRA(LoRA(r=2)), [torch.randn(4, 3), torch.randn(4, 3)]
    spots = [Spot(str(i), Shape(4, 3), lambda i=i: weights[i], method) for i in range(2)]
    inner = method.inner.adapter(spots[0])
    first, second = (method.wrap(spot, inner) for spot in spots)
    assert first.inner is second.inner and not torch.equal(first.m, second.m)
    for adapter, weight in zip((first, second), weights, strict=True):
        assert torch.equal(adapter.update(lambda weight=weight: weight).gain, torch.ones(4))


# Settings


def test_counts():
    llama_7b = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]
    count = DoRA(LoRA(r=32)).num_trainable(llama_7b * 32)
    assert count == 56_975_360  # q, k, v, up, down; the paper says 0.84 % of 6.74 billion, LoRA 0.83 %
    assert int(count / 6_738_415_616 * 1e4) == 84
    assert DoRA(VeRA(r=8)).num_trainable([(5, 3)]) == 5 + 8 + 5
    assert DoRA(LoRAFA(r=2)).num_trainable([(5, 3)]) == 5 * 2 + 5


def test_the_count_is_what_is_trained(layer, inner):
    _, handle, _ = attached(layer, inner, double=False)
    method = handle.method
    assert handle.num_trainable == method.num_trainable(handle.shapes())
    assert method.num_trainable(handle.shapes()) == method.inner.num_trainable(handle.shapes()) + layer_rows(handle)


def layer_rows(handle: lf.Handle) -> int:
    return sum(shape.out for shape in handle.shapes())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DoRA(), "magnitudes already"),
        (lambda: lf.DeltaLoRA(), "moves the base weight"),
        (lambda: lf.LoRADrop(), "put it around DoRA"),
        (lambda: lf.LoRAPlus(), "put LoRA\\+ around DoRA"),
        (lambda: lf.IntrinsicDimension(), "dense"),
        (lambda: "lora", "around str"),
    ],
)
def test_refusals(make, reason):
    with pytest.raises(lf.ConfigError, match=reason) as error:
        DoRA(make())
    assert "DoRA(inner=LoRA(...))" in str(error.value)


def test_what_is_passed_on_to_the_inner_method():
    method = DoRA(LoRA(r=8, alpha=4, dropout=0.1))
    assert method == DoRA(inner=LoRA(r=8, alpha=4, dropout=0.1)) and DoRA() == DoRA(LoRA())
    assert method.at(r=2) == DoRA(LoRA(r=2, alpha=4, dropout=0.1))
    assert method.settings() == {"inner": "lora", **method.inner.settings()}
    assert method.adapter_settings() == ("dora", *method.inner.adapter_settings())
    assert method.ups() == ("B",) and method.rate([]) == 1.0 and method.schedule({}) is None
    too_large = Spot("x", Shape(4, 3), lambda: torch.zeros(4, 3), method)
    assert "larger than the layer" in method.wasteful(too_large)
    uneven = Spot("x", Shape(9, 3, groups=3), lambda: torch.zeros(9, 3), method)
    assert "does not divide" in method.impossible(uneven)


def test_rank_patterns_reach_the_inner_method():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    handle = lf.attach(model, DoRA(LoRA(r=2)), rank_pattern={"1": 3}, seed=0)
    assert [handle.adapter(path).inner.A.shape[0] for path in ("0", "1")] == [2, 3]
    assert [name for name, _ in handle.named_parameters()][:3] == ["0.m", "0.inner.A", "0.inner.B"]
