"""Files written by hand with json and safetensors alone, against a formula written out here; peft agrees with both."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _config(**settings: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["layer"], **settings}


class One(nn.Module):
    """A model around one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


P = "base_model.model.layer."


def _check(oracle, make, folder: Path, x: Tensor, expected: Tensor, delta: Tensor) -> None:
    handle = lf.load(make(), folder)
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(handle.delta("layer"), delta, atol=1e-5, rtol=1e-5)
    handle.merge()
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)
    theirs = PeftModel.from_pretrained(make(), folder)
    torch.testing.assert_close(oracle.run(theirs, x), expected, atol=1e-5, rtol=1e-5)


SCALES = {"plain": ({}, 6 / 3), "rslora": ({"use_rslora": True}, 6 / math.sqrt(3))}
SCALES["pattern"] = ({"alpha_pattern": {"layer": 5}}, 5 / 3)


@pytest.mark.parametrize("which", SCALES)
def test_linear(oracle, tiny, which) -> None:
    settings, s = SCALES[which]
    a, b, x = _random(3, 5, seed=1), _random(4, 3, seed=2), _random(2, 5, seed=3)
    folder = oracle.write(_config(**settings), {f"{P}lora_A.weight": a, f"{P}lora_B.weight": b})

    def make() -> nn.Module:
        return tiny.seeded(lambda: One(nn.Linear(5, 4)))

    layer = make().layer
    w, bias = layer.weight.tolist(), layer.bias.tolist()
    delta = torch.zeros(4, 5)
    expected = torch.zeros(2, 4)
    for o, i in itertools.product(range(4), range(5)):
        delta[o, i] = s * sum(float(b[o, k] * a[k, i]) for k in range(3))
    for n, o in itertools.product(range(2), range(4)):
        expected[n, o] = bias[o] + sum((w[o][i] + float(delta[o, i])) * float(x[n, i]) for i in range(5))
    _check(oracle, make, folder, x, expected, delta)


def test_hf_conv1d(oracle, tiny) -> None:
    # The weight is (in, out); A and B stand as for a Linear, and only the change is transposed.
    a, b, x = _random(3, 5, seed=1), _random(4, 3, seed=2), _random(2, 5, seed=3)
    folder = oracle.write(_config(fan_in_fan_out=True), {f"{P}lora_A.weight": a, f"{P}lora_B.weight": b})

    def make() -> nn.Module:
        return tiny.seeded(lambda: One(Conv1D(4, 5)))

    w, bias = make().layer.weight.tolist(), make().layer.bias.tolist()
    delta = torch.zeros(5, 4)
    expected = torch.zeros(2, 4)
    for i, o in itertools.product(range(5), range(4)):
        delta[i, o] = 2.0 * sum(float(b[o, k] * a[k, i]) for k in range(3))
    for n, o in itertools.product(range(2), range(4)):
        expected[n, o] = bias[o] + sum(float(x[n, i]) * (w[i][o] + float(delta[i, o])) for i in range(5))
    _check(oracle, make, folder, x, expected, delta)


def test_embedding(oracle, tiny) -> None:
    # No ".weight" in the keys; the change of row t is s · B A[:, t].
    a, b = _random(3, 7, seed=1), _random(4, 3, seed=2)
    x = torch.tensor([[0, 6, 2], [2, 2, 5]])
    folder = oracle.write(_config(), {f"{P}lora_embedding_A": a, f"{P}lora_embedding_B": b})

    def make() -> nn.Module:
        return tiny.seeded(lambda: One(nn.Embedding(7, 4)))

    w = make().layer.weight.tolist()
    delta = torch.zeros(7, 4)
    expected = torch.zeros(2, 3, 4)
    for t, d in itertools.product(range(7), range(4)):
        delta[t, d] = 2.0 * sum(float(b[d, k] * a[k, t]) for k in range(3))
    for n, p, d in itertools.product(range(2), range(3), range(4)):
        token = int(x[n, p])
        expected[n, p, d] = w[token][d] + float(delta[token, d])
    _check(oracle, make, folder, x, expected, delta)


def test_conv2d(oracle, tiny) -> None:
    # A is a convolution with the layer's kernel, stride and padding down to r channels, B one of 1 × 1 up.
    a, b = _random(3, 2, 3, 2, seed=1), _random(4, 3, 1, 1, seed=2)
    x = _random(1, 2, 5, 6, seed=3)
    folder = oracle.write(_config(), {f"{P}lora_A.weight": a, f"{P}lora_B.weight": b})

    def make() -> nn.Module:
        return tiny.seeded(lambda: One(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0))))

    layer = make().requires_grad_(False).layer
    padded = torch.zeros(2, 7, 6)
    padded[:, 1:6] = x[0]
    delta = torch.zeros(4, 2, 3, 2)
    for o, c, u, v in itertools.product(range(4), range(2), range(3), range(2)):
        delta[o, c, u, v] = 2.0 * sum(float(b[o, k, 0, 0] * a[k, c, u, v]) for k in range(3))
    weight = layer.weight.detach() + delta
    expected = torch.zeros(1, 4, 3, 5)
    for o, row, column in itertools.product(range(4), range(3), range(5)):
        patch = padded[:, 2 * row : 2 * row + 3, column : column + 2]
        expected[0, o, row, column] = float(layer.bias[o]) + float((weight[o] * patch).sum())
    _check(oracle, make, folder, x, expected, delta)


def test_the_smallest_config(oracle, tiny) -> None:
    # Only the type is needed: r and alpha are then 8, and the layers those of the file.
    a, b, x = _random(8, 5, seed=1), _random(4, 8, seed=2), _random(2, 5, seed=3)
    folder = oracle.write({"peft_type": "LORA"}, {f"{P}lora_A.weight": a, f"{P}lora_B.weight": b})
    model = tiny.seeded(lambda: One(nn.Linear(5, 4)))
    expected = oracle.run(model, x) + x @ a.T @ b.T
    handle = lf.load(model, folder)
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_in_the_file(oracle, tiny) -> None:
    a, b, x = _random(3, 5, seed=1).half(), _random(4, 3, seed=2).half(), _random(2, 5, seed=3)
    folder = oracle.write(_config(), {f"{P}lora_A.weight": a, f"{P}lora_B.weight": b})
    model = tiny.seeded(lambda: One(nn.Linear(5, 4)))
    expected = oracle.run(model, x) + 2.0 * x @ a.float().T @ b.float().T
    handle = lf.load(model, folder)
    assert handle.adapter("layer").A.dtype == torch.float32
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)


def test_our_files_hold_the_table(oracle, tiny) -> None:
    # What `save` writes, key by key and shape by shape.
    def make() -> nn.Module:
        layers = {"linear": nn.Linear(5, 4), "conv1d": Conv1D(4, 5), "embedding": nn.Embedding(7, 4)}
        layers |= {"conv": nn.Conv2d(2, 4, (3, 2)), "grouped": nn.Conv1d(4, 6, 3, groups=2), "head": nn.Linear(4, 2)}
        return nn.ModuleDict(layers)

    handle = lf.attach(
        tiny.seeded(make), lf.LoRA(r=2), ["linear", "conv1d", "embedding", "conv", "grouped"], modules_to_save=["head"]
    )
    folder = handle.save(oracle.folder / "ours", base_model="a/b", task_type="FEATURE_EXTRACTION")
    tensors, config = oracle.read(folder)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "base_model.model.linear.lora_A.weight": (2, 5),
        "base_model.model.linear.lora_B.weight": (4, 2),
        "base_model.model.conv1d.lora_A.weight": (2, 5),
        "base_model.model.conv1d.lora_B.weight": (4, 2),
        "base_model.model.embedding.lora_embedding_A": (2, 7),
        "base_model.model.embedding.lora_embedding_B": (4, 2),
        "base_model.model.conv.lora_A.weight": (2, 2, 3, 2),
        "base_model.model.conv.lora_B.weight": (4, 2, 1, 1),
        "base_model.model.grouped.lora_A.weight": (2, 4, 3),
        "base_model.model.grouped.lora_B.weight": (6, 1, 1),
        "base_model.model.head.weight": (2, 4),
        "base_model.model.head.bias": (2,),
    }
    text = (folder / "adapter_config.json").read_text()
    assert list(config) == sorted(config)
    assert text.startswith('{\n  "alpha_pattern"')
    wanted = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": True,
        "modules_to_save": ["head"],
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": "a/b",
        "inference_mode": True,
        "target_modules": ["conv", "conv1d", "embedding", "grouped", "linear"],
    }
    assert {key: config[key] for key in wanted} == wanted
    assert (folder / "README.md").is_file()
