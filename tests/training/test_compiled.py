"""`compile`: each layer by itself, in whole graphs that serve all lengths; nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import lorafit as lf
from lorafit.errors import ConfigError
from lorafit.training import compiled
from lorafit.training.compiled import compile_layers
from lorafit.training.config import resolve
from lorafit.training.run import train

# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated, and looks for gradients
# at tensors that have none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

CPU = torch.device("cpu")
QUICK = {"lora": lf.LoRA(r=4), "dora": lf.DoRA(lf.LoRA(r=4))}
OTHERS = {
    "lora-plus": lf.LoRAPlus(r=4),
    "lora-fa": lf.LoRAFA(r=4),
    "vera": lf.VeRA(r=16),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=4)),
    "adalora": lf.AdaLoRA(init_r=4, target_r=2),
    "delta-lora": lf.DeltaLoRA(r=4),
    "intrinsic": lf.IntrinsicDimension(d=50),
}
CASES = [
    *(pytest.param(method, id=name) for name, method in QUICK.items()),
    *(pytest.param(method, id=name, marks=pytest.mark.slow) for name, method in OTHERS.items()),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def adapted(method: Any) -> tuple[Any, lf.Handle]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    handle = lf.attach(model, method, exclude=["lm_head"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train(), handle


def results(model: Any, handle: lf.Handle, width: int) -> list[torch.Tensor]:
    ids = torch.arange(2 * width).reshape(2, width) % 64
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, handle.parameters())]


@pytest.mark.parametrize("method", CASES)
def test_a_layer_is_one_graph_and_computes_the_same(method: Any) -> None:
    model, handle = adapted(method)
    expected = {width: results(model, handle, width) for width in (5, 9, 7)}
    keys, counter = list(model.state_dict()), Counter()
    # fullgraph: a break inside of a layer would be an error.
    compile_layers(model, CPU, fullgraph=True, backend=counter)
    checked = counter.graphs
    for width, plain in expected.items():
        for ours, theirs in zip(results(model, handle, width), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert counter.graphs - checked > 0
    assert list(model.state_dict()) == keys


def test_lengths_that_differ_do_not_compile_anew() -> None:
    model, handle = adapted(lf.LoRA(r=4))
    counter = Counter()
    compile_layers(model, CPU, fullgraph=True, backend=counter)
    for width in (8, 9, 60, 64):  # short and long batches take their products in another order
        results(model, handle, width)
    known = counter.graphs
    for width in (7, 10, 12, 61, 66, 70):
        results(model, handle, width)
    assert counter.graphs == known


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("g++")

    model, _ = adapted(lf.LoRA(r=4))
    with pytest.raises(ConfigError, match="torch cannot compile here") as caught:
        compile_layers(model, CPU, backend=broken)
    assert "install one" in str(caught.value) and "g++" in str(caught.value)


def test_without_layers() -> None:
    with pytest.raises(ConfigError, match="no list of layers"):
        compile_layers(nn.Sequential(nn.Linear(2, 2)), CPU)


def test_the_name_in_transformers_and_what_is_not_taken() -> None:
    said: list[str] = []
    assert resolve([("test", {"torch_compile": True})], said.append).compile
    assert said == ["torch_compile is called compile here"]
    with pytest.raises(ConfigError, match="not yours to set"):
        resolve([("test", {"torch_compile_mode": "max-autotune"})])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_that_goes_on(
    model_dir: Path, write: Callable[[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write("sums.jsonl", [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}"} for n in range(16)])
    settings = {"model": str(model_dir), "data": data, "eval_split": 0, "max_steps": 2, "save_steps": 1, "r": 4}
    settings |= {"samples": 0, "use_cpu": True, "learning_rate": 1e-2}

    def run(folder: str, **changes: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
        resolved = resolve([("test", {**settings, "output_dir": str(tmp_path / folder), **changes})])
        outcome = train(resolved, command="test", notify=lambda _: None, console=Console(quiet=True))
        assert outcome.status == "done"
        lines = map(json.loads, outcome.folder.records.read_text().splitlines())
        losses = [record["loss"] for record in lines if record["event"] == "step"]
        return load_file(outcome.adapter / "adapter_model.safetensors"), losses

    (plain, expected), (layers, losses) = run("plain"), run("compiled", compile=True)
    assert plain.keys() == layers.keys()
    # Losses and not weights: Adam's first steps are of the rate's size wherever a gradient is anything but zero.
    assert len(losses) == 2 and losses == pytest.approx(expected, rel=1e-4)
    (tmp_path / "compiled" / "result.json").unlink()
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-2")
    again, losses = run("compiled", compile=True)
    assert len(losses) == 3 and losses[2] == pytest.approx(losses[1], rel=1e-4) and again.keys() == layers.keys()


def test_the_limit_is_well_above_torchs_own() -> None:
    assert torch._dynamo.config.recompile_limit < compiled.GRAPHS
