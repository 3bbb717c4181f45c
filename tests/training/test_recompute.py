"""What is computed again in the backward pass: the same numbers, less memory, no matrix product twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorafit as lf
from lorafit.errors import ConfigError
from lorafit.training.config import resolve
from lorafit.training.outcome import Outcome
from lorafit.training.recompute import checkpointing
from lorafit.training.recompute_cheap import CheapAgain, KeepsAll, make_cheap
from lorafit.training.run import train

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
METHODS = {
    "lora": lf.LoRA(r=4),
    "dropout": lf.LoRA(r=4, dropout=0.3),
    "lora-plus": lf.LoRAPlus(r=4),
    "lora-fa": lf.LoRAFA(r=4),
    "vera": lf.VeRA(r=16),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=4)),
    "adalora": lf.AdaLoRA(init_r=4, target_r=2),
    "dora": lf.DoRA(lf.LoRA(r=4)),
    "dora with dropout": lf.DoRA(lf.LoRA(r=4, dropout=0.3)),
    "delta-lora": lf.DeltaLoRA(r=4),
    "intrinsic": lf.IntrinsicDimension(d=50),
}
CPU = torch.device("cpu")
BATCH = {"input_ids": torch.arange(24).reshape(2, 12) % 64, "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
BATCH["labels"] = BATCH["input_ids"]


def adapted(method: Any, config: Any = None) -> tuple[Any, lf.Handle]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config or transformers.LlamaConfig(**SIZES))
    handle = lf.attach(model, method, exclude=["lm_head"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train(), handle


def loss_of(model: Any) -> Callable[[Any], torch.Tensor]:
    return lambda batch: model(**batch, use_cache=False).loss


def gradients(model: Any, handle: lf.Handle, keeping: Any = None) -> list[torch.Tensor]:
    torch.manual_seed(3)
    with (keeping or KeepsAll()).over():
        loss = loss_of(model)(BATCH)
    loss.backward()
    made = [loss.detach(), *(parameter.grad for parameter in handle.parameters())]
    for parameter in handle.parameters():
        parameter.grad = None
    return made


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_cheap_changes_no_bit(name: str) -> None:
    model, handle = adapted(METHODS[name])
    expected = gradients(model, handle)
    keeping, told = make_cheap(model, loss_of(model), BATCH, CPU)
    assert isinstance(keeping, CheapAgain) and "13 outputs" in told  # 7 norms, 3 activations, 3 products
    assert equal(gradients(model, handle, keeping), expected)
    assert equal(gradients(model, handle), expected)  # the hooks sleep


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_no_bit(name: str) -> None:
    model, handle = adapted(METHODS[name])
    expected = gradients(model, handle)
    for module in model.modules():
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
            assert not module.gradient_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    assert equal(gradients(model, handle), expected)


class Work(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += operation.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        return operation(*args, **(kwargs or {}))


def kept(run: Callable[[], Any]) -> int:
    """The bytes that a forward pass holds for the backward pass: of the memory that appears and stays."""

    class Live(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operation(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else (result,):
                if isinstance(one, torch.Tensor):
                    references.append(torch.multiprocessing.reductions.StorageWeakRef(one.untyped_storage()))
                    sizes.append(one.untyped_storage().nbytes())
            return result

    references: list[Any] = []
    sizes: list[int] = []
    with Live():
        loss = run()
    assert loss.requires_grad
    return sum({one: size for one, size in zip(references, sizes, strict=True) if not one.expired()}.values())


def test_cheap_keeps_much_less_and_multiplies_no_matrix_twice() -> None:
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 192})
    model, _ = adapted(lf.LoRA(r=4), config)
    batch = {name: value.repeat(2, 4) for name, value in BATCH.items()}
    keeping, _ = make_cheap(model, loss_of(model), BATCH, CPU)
    assert isinstance(keeping, CheapAgain)

    def run(keeping: Any) -> Callable[[], Any]:
        def forward() -> Any:
            with keeping.over():
                return loss_of(model)(batch)

        return forward

    def products(keeping: Any) -> int:
        with Work() as work:
            run(keeping)().backward()
        return work.products

    assert kept(run(keeping)) < 0.70 * kept(run(KeepsAll()))
    assert products(keeping) == products(KeepsAll())


def test_layers_below_the_lowest_adapter_keep_nothing() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    lf.attach(model, lf.LoRA(r=4), r".*layers\.2\..*_proj")
    keeping, _ = make_cheap(model, loss_of(model), BATCH, CPU)

    def size(keeping: Any) -> int:
        def run() -> Any:
            with keeping.over():
                return loss_of(model)(BATCH)

        return kept(run)

    layer = 24 * 32 * 4  # bytes of one hidden state: recipes of lower layers would hold several
    assert isinstance(keeping, CheapAgain) and size(keeping) < size(KeepsAll()) - 4 * layer


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (transformers.Qwen3Config(**SIZES, head_dim=8), 13 + 6),  # norms of query and key
        (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4), 7 + 3),  # no gate: no product
        (transformers.Phi3Config(**SIZES, pad_token_id=0), 7 + 3),  # gate and up in one matrix: no product
    ],
    ids=["qwen3", "gpt2", "phi3"],
)
def test_other_models(config: Any, count: int) -> None:
    model, handle = adapted(lf.LoRA(r=4), config)
    expected = gradients(model, handle)
    keeping, told = make_cheap(model, loss_of(model), BATCH, CPU)
    assert f"{count} outputs" in told
    assert equal(gradients(model, handle, keeping), expected)


def test_under_autocast() -> None:
    model, handle = adapted(lf.LoRA(r=4))

    def loss(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)(batch)

    keeping, told = make_cheap(model, loss, BATCH, CPU)
    assert isinstance(keeping, CheapAgain), told
    results = []
    for way in (KeepsAll(), keeping):
        with way.over():
            value = loss(BATCH)
        results.append(torch.autograd.grad(value, handle.parameters()))
    assert equal(*map(list, results))


class Forgetful(nn.Module):
    """Looks like a norm, and returns something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + 1 / self.calls)


def test_what_does_not_follow_from_its_input_is_kept() -> None:
    model, _ = adapted(lf.LoRA(r=4))
    for layer in model.model.layers:
        layer.input_layernorm = Forgetful()
        layer.post_attention_layernorm = Forgetful()
        layer.mlp.act_fn = Forgetful()
    model.model.norm = Forgetful()
    keeping, told = make_cheap(model, loss_of(model), BATCH, CPU)
    assert isinstance(keeping, KeepsAll) and "no effect" in told


# Runs and settings ------------------------------------------------------------


@pytest.fixture
def run(model_dir: Path, write: Callable[[str, Any], str], tmp_path: Path) -> Callable[..., Outcome]:
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}"} for n in range(24)]
    data = write("sums.jsonl", rows)

    def run(**changes: Any) -> Outcome:
        settings = {
            "model": str(model_dir),
            "data": data,
            "eval_split": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "r": 4,
            "samples": 0,
            "use_cpu": True,
            "output_dir": str(tmp_path / str(len(list(tmp_path.iterdir())))),
        }
        resolved = resolve([("test", {**settings, **changes})])
        return train(resolved, command="test", notify=lambda _: None, console=Console(quiet=True))

    return run


def test_runs_with_and_without_are_the_same(run: Callable[..., Outcome]) -> None:
    none, cheap, blocks = (run(recompute=name, dropout=0.1) for name in ("none", "cheap", "blocks"))
    files = [(one.adapter / "adapter_model.safetensors").read_bytes() for one in (none, cheap, blocks)]
    assert files[0] == files[1] == files[2]


def test_settings_that_contradict_one_another() -> None:
    for recompute, given in (("cheap", True), ("blocks", False)):
        with pytest.raises(ConfigError, match="contradict"):
            checkpointing(recompute, {"gradient_checkpointing": given})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="by themselves"):
        checkpointing("cheap", {}, compiles=True)
    no = {"use_reentrant": False}
    assert checkpointing("none", {"gradient_checkpointing": False}) == {"gradient_checkpointing": False}
    blocks = checkpointing("blocks", {"activation_checkpointing": True})
    assert blocks == {"activation_checkpointing": True, "activation_checkpointing_kwargs": no}
    assert checkpointing("blocks", {})["gradient_checkpointing_kwargs"] == no
    text = json.dumps({"preserve_rng_state": False})
    mixed = checkpointing("none", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": text})
    assert mixed["gradient_checkpointing_kwargs"] == {"preserve_rng_state": False, **no}
