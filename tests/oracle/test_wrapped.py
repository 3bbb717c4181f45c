"""Files of methods that PEFT has no type for: written here, peft computes the same; written by peft, read here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf

VECTORS = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
IDS = torch.arange(13).view(1, 13)
WAVES = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))
PICTURES = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(2))
VOLUMES = torch.randn(2, 4, 5, 6, 7, generator=torch.Generator().manual_seed(2))


def row(first: nn.Module, *rest: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), *rest)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (
        lambda: row(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)),
        VECTORS,
    ),
    "HF Conv1D": (lambda: nn.Sequential(Conv1D(6, 6), nn.Tanh(), Conv1D(6, 6), Conv1D(5, 6)), VECTORS),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(13, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6)), IDS),
    "Conv1d": (
        lambda: row(nn.Conv1d(4, 6, 3, stride=2), nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 1)),
        WAVES,
    ),
    "Conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Tanh(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        ),
        PICTURES,
    ),
    "Conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(4, 6, (1, 2, 3), bias=False), nn.Tanh(), nn.Conv3d(6, 6, 1), nn.Conv3d(6, 6, 1)
        ),
        VOLUMES,
    ),
}
TARGETS = ["0", "2", "3"]


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "_"))
def layer(request, tiny) -> tuple[Callable[[], nn.Module], Tensor]:
    make, x = LAYERS[request.param]
    return (lambda: tiny.seeded(make)), x


METHODS: dict[str, lf.Method] = {
    "lora-plus": lf.LoRAPlus(r=2, ratio=3.0),
    "lora-fa": lf.LoRAFA(r=2, alpha=3, rslora=True),
    "delta-lora": lf.DeltaLoRA(r=2, lam=1.5),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=2), keep=("2",)),
    "lora-drop, frozen": lf.LoRADrop(lf.LoRA(r=2), keep=("0", "2"), rest="freeze"),
    "dora": lf.DoRA(lf.LoRA(r=2, alpha=3)),
    "dora, rslora": lf.DoRA(lf.LoRA(r=3, alpha=2, rslora=True)),
    "dora, lora-fa": lf.DoRA(lf.LoRAFA(r=2)),
    "lora-drop, dora": lf.LoRADrop(lf.DoRA(lf.LoRA(r=2)), keep=("2",)),
    "lora-plus, dora": lf.LoRAPlus(inner=lf.DoRA(lf.LoRA(r=2))),
}


def moved(handle: lf.Handle, oracle) -> None:
    """Random values in every tensor of an adapter, as after some training."""
    for number, path in enumerate(handle.sites):
        adapter = handle.adapter(path)
        tensors = {key: value for key, value in adapter.state_dict(keep_vars=True).items() if key != "lam"}
        oracle.randomise(tensors, seed=number + 1)
        if "lam" in adapter.state_dict():
            adapter.lam.fill_(handle.method.lam)


@pytest.mark.parametrize("which", METHODS)
def test_what_is_written_here_is_read_by_peft(oracle, layer, which) -> None:
    build, x = layer
    handle = lf.attach(build(), METHODS[which], TARGETS, seed=0)
    moved(handle, oracle)
    expected = oracle.run(handle.model, x)
    oracle.differ(expected, oracle.run(build(), x))
    folder = handle.save(oracle.folder / "ours")
    _, config = oracle.read(folder)
    assert config["peft_type"] == "LORA" and config["use_dora"] == ("dora" in which)
    theirs = PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(oracle.run(theirs, x), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(oracle.folder / "again", save_embedding_layers=False)
    oracle.same_tensors(folder, oracle.folder / "again")

    # And what peft wrote of it, without our own key, is a plain LoRA or DoRA of the same function.
    again = lf.load(build(), oracle.folder / "again")
    assert type(again.method) is (lf.DoRA if "dora" in which else lf.LoRA)
    torch.testing.assert_close(oracle.run(again.model, x), expected, atol=1e-5, rtol=1e-5)


ANCHORED = ["pissa", "olora"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ANCHORED)
def test_adapters_that_start_elsewhere_are_read_by_peft(oracle, tiny, init, rslora) -> None:
    build = lambda: tiny.seeded(LAYERS["Linear"][0])  # noqa: E731
    handle = lf.attach(build(), lf.LoRA(r=2, alpha=3, init=init, rslora=rslora), TARGETS, seed=0)
    torch.testing.assert_close(oracle.run(handle.model, VECTORS), oracle.run(build(), VECTORS))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    expected = oracle.run(handle.model, VECTORS)
    folder = handle.save(oracle.folder / "ours")
    _, config = oracle.read(folder)
    assert config["r"] == 4 and config["init_lora_weights"] is True
    theirs = PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(oracle.run(theirs, VECTORS), expected, atol=1e-5, rtol=1e-5)
    again = lf.load(build(), folder, trainable=True)
    assert again.method == handle.method and torch.equal(oracle.run(again.model, VECTORS), expected)
    assert torch.equal(again.adapter("0").A0, handle.adapter("0").A0)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_of_peft_is_read(oracle, layer, rslora) -> None:
    build, x = layer
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True, use_rslora=rslora)
    # PEFT cannot merge DoRA on an Embedding or HF Conv1D and keep its own output; here all can be merged.
    handle = oracle.check_read(build, config, x, merge=False)
    assert handle.method == lf.DoRA(lf.LoRA(r=3, alpha=5, rslora=rslora))
    expected = oracle.run(handle.model, x)
    handle.merge()
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)


def test_dora_with_patterns_both_ways(oracle, tiny) -> None:
    settings = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7}}
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, use_dora=True, **settings)
    oracle.check_read(tiny.llama, config, tiny.tokens())
    method = lf.DoRA(lf.LoRA(r=2, alpha=5))
    oracle.check_written(tiny.llama, method, tiny.tokens(), targets=targets, **settings)


def test_magnitudes_in_the_other_spelling(oracle, tiny, edit_tensors) -> None:
    build = lambda: tiny.seeded(LAYERS["Linear"][0])  # noqa: E731
    theirs, folder = oracle.written_by_peft(build, LoraConfig(r=2, target_modules=TARGETS, use_dora=True))

    def respell(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("magnitude_vector")]:
            tensors[f"{key}.weight"] = tensors.pop(key)

    handle = lf.load(build(), edit_tensors(folder, respell))
    torch.testing.assert_close(oracle.run(handle.model, VECTORS), oracle.run(theirs, VECTORS), atol=1e-5, rtol=1e-5)

    def twice(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("magnitude_vector.weight"))
        tensors[key.removesuffix(".weight")] = tensors[key].clone()

    with pytest.raises(lf.CheckpointError, match="two keys hold the same tensor"):
        lf.load(build(), edit_tensors(folder, twice))


def test_dora_on_a_grouped_convolution_is_said_and_comes_back(oracle, tiny) -> None:
    build = lambda: tiny.seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)))  # noqa: E731
    handle = lf.attach(build(), lf.DoRA(lf.LoRA(r=2)), ["0"], seed=0)
    moved(handle, oracle)
    with pytest.warns(lf.LorafitWarning, match="PEFT cannot compute DoRA on grouped convolutions"):
        folder = handle.save(oracle.folder / "ours")
    assert torch.equal(lf.load(build(), folder).delta("0"), handle.delta("0"))
