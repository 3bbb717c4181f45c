"""`torch.compile`: one whole graph for each set of acting adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lorafit as lf

# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["fused", "dropout"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_graph_with_the_same_numbers(some_layer, backend, dropout, fill, monkeypatch):
    # A compiled graph draws its masks in one way, eager programs on a CPU in a faster one: here both in the first.
    monkeypatch.setattr("lorafit.kernels.masks.by_bytes", lambda _: False)
    model = some_layer.model()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2), dropout=dropout), ["layer"])
    fill(handle)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for function in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        y = function(some_layer.input())
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in handle.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)


def test_several_adapters_in_a_whole_graph(some_layer, fill):
    model = some_layer.model()
    for seed, name in enumerate(("a", "b")):
        handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"], name=name)
        fill(handle, seed)
    handle.activate(["a", "b"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(some_layer.input()), model(some_layer.input()), rtol=1e-5, atol=1e-5)


def test_only_a_change_of_the_acting_set_makes_a_new_graph(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    one = lf.attach(model, lf.LoRA(r=2), name="one")
    two = lf.attach(model, lf.LoRA(r=2), name="two")
    fill(one, 1)
    fill(two, 2)
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    x = torch.randn(3, 6)

    def graphs() -> int:
        before = counter.graphs
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        return counter.graphs - before

    assert graphs() == 1  # the first: "two"
    optimizer = two.optimizer(torch.optim.AdamW, lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    assert graphs() == 0  # new values, same graph
    one.activate("one")
    assert graphs() == 1
    one.activate(["one", "two"])
    assert graphs() == 1
    one.activate(None)
    assert graphs() == 1
    for names in ("two", "one", ["one", "two"], None):
        one.activate(names)
        assert graphs() == 0  # each set has its graph by now
    one.activate("one")
    one.merge()
    assert graphs() == 0  # merged: the graph of the base model
    one.unmerge()
    with one.disabled():
        assert graphs() == 0
    assert graphs() == 0


def test_a_saved_module_compiles(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    handle = lf.attach(model, lf.LoRA(r=2), ["0"], modules_to_save=["1", "2"])
    fill(handle)
    x = torch.randn(5, 6)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_model_trains(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    handle = lf.attach(model, lf.LoRA(r=1), ["0", "2"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05)
    x = torch.randn(16, 6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (compiled(x) - x[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_autocast_compiles(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    fill(lf.attach(model, lf.LoRA(r=2)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")  # inductor's own imports
def test_inductor(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    handle = lf.attach(model, lf.LoRA(r=2))
    fill(handle)
    x = torch.randn(3, 6)
    expected = model(x)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in handle.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(handle.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
