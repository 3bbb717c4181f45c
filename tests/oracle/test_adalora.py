"""AdaLoRA files: trained and pruned by peft and read here, written here and read by peft, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
PICTURE = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(4))


class Layers(nn.Module):
    """A few layers in a row, with a loss as models of transformers have it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def linear() -> nn.Module:
    return Layers(nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 4, bias=False))


def gpt() -> nn.Module:
    return Layers(Conv1D(10, 6), Conv1D(5, 10))


def conv() -> nn.Module:
    return Layers(nn.Conv2d(6, 4, (3, 2), padding=1, stride=(2, 1)), nn.Conv2d(4, 5, 1))


KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (linear, X),
    "HF Conv1D": (gpt, X),
    "Conv2d": (conv, PICTURE),
}


@pytest.fixture(params=KINDS)
def kind(request, tiny) -> tuple[Callable[[], nn.Module], Tensor]:
    make, x = KINDS[request.param]
    return (lambda: tiny.seeded(make)), x


def settings(**changes: object) -> AdaLoraConfig:
    known = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "lora_alpha": 6}
    return AdaLoraConfig(target_modules=r"layers\.\d", **{**known, **changes})


def trained(model: nn.Module, x: Tensor, config: AdaLoraConfig, steps: int) -> PeftModel:
    """An adapter that peft trained, and pruned when its schedule said so."""
    torch.manual_seed(3)
    theirs = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, steps + 1):
        theirs(x).square().sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with torch.no_grad():  # a few steps change little; what was pruned stays at 0
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(10)
    return theirs.eval()


@pytest.mark.parametrize("steps", [1, 4, 8], ids=["before pruning", "while pruning", "after it"])
def test_what_peft_trained_is_read(oracle, kind, steps) -> None:
    build, x = kind
    base = oracle.run(build(), x)
    theirs = trained(build(), x, settings(), steps)
    expected = oracle.run(theirs, x)
    oracle.differ(expected, base)
    theirs.save_pretrained(oracle.folder / "peft")
    tensors, config = oracle.read(oracle.folder / "peft")
    ranks = {key: len(value) for key, value in tensors.items() if key.endswith("lora_E")}
    pruned = sum(ranks.values()) < 4 * len(ranks)
    assert pruned == (steps > 1) and (steps < 8 or sum(ranks.values()) == 2 * len(ranks))
    assert (config["rank_pattern"] is None) == (steps == 1)

    handle = lf.load(build(), oracle.folder / "peft", trainable=True)
    assert isinstance(handle.method, lf.AdaLoRA) and handle.method.init_r == 4 and handle.method.total_steps == 8
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)
    for path in handle.sites:
        assert handle.adapter(path).lam.shape == (ranks[f"base_model.model.{path}.lora_E"],)
    oracle.same_tensors(handle.save(oracle.folder / "again"), oracle.folder / "peft")
    oracle.same_merged(handle, theirs)


@pytest.mark.parametrize("k", [4, 3, 1, 0])
def test_what_is_written_here_is_read_by_peft(oracle, kind, k) -> None:
    build, x = kind
    method = lf.AdaLoRA(init_r=4, target_r=2, alpha=5, total_steps=100, warmup=0.1, final=20, orthogonality=0.3)
    handle = lf.attach(build(), method, r"layers\.\d", seed=0)
    first = handle.adapter("layers.0")
    shapes = {"P": (first.P.shape[0], k), "lam": (k,), "Q": (k, first.Q.shape[1])}
    first.resize({name: torch.Size(shape) for name, shape in shapes.items()})
    oracle.randomise(dict(handle.named_parameters()))
    expected = oracle.run(handle.model, x)
    folder = handle.save(oracle.folder / "ours")
    tensors, config = oracle.read(folder)
    assert config["peft_type"] == "ADALORA" and (config["tinit"], config["tfinal"]) == (10, 20)
    assert config["rank_pattern"] == (None if k == 4 else {"layers.0.lora_E": [True] * k + [False] * (4 - k)})
    assert tensors["base_model.model.layers.0.lora_A"].shape[0] == k
    theirs = PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(oracle.run(theirs, x), expected, atol=1e-5, rtol=1e-5)
    again = lf.load(build(), folder, trainable=True)
    assert again.method == method
    assert torch.equal(oracle.run(again.model, x), expected)
    assert again.adapter("layers.0").lam.shape == (k,)


def test_the_scale_is_that_of_peft(oracle, tiny) -> None:
    handle = lf.attach(tiny.seeded(linear), lf.AdaLoRA(init_r=4, target_r=2, alpha=6))
    folder = handle.save(oracle.folder / "ours")
    theirs = PeftModel.from_pretrained(tiny.seeded(linear), folder)
    layer = theirs.base_model.model.layers[0]
    assert pytest.approx(float(layer.scaling["default"] / (layer.ranknum["default"] + 1e-5))) == 6 / (4 + 1e-5)
    assert lf.load(tiny.seeded(linear), folder).adapter("layers.0").scale == 6 / (4 + 1e-5)


def test_layers_that_peft_does_not_know_are_said(oracle, tiny) -> None:
    build = lambda: tiny.seeded(lambda: nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 3)))  # noqa: E731
    handle = lf.attach(build(), lf.AdaLoRA(init_r=2, target_r=1), ["0", "1"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    with pytest.warns(lf.LorafitWarning, match="PEFT has no AdaLoRA for layers of this type: 0"):
        folder = handle.save(oracle.folder / "ours")
    ids = torch.arange(13)
    assert torch.equal(oracle.run(lf.load(build(), folder).model, ids), oracle.run(handle.model, ids))


def test_grouped_convolutions_come_back(oracle, tiny) -> None:
    build = lambda: tiny.seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)))  # noqa: E731
    handle = lf.attach(build(), lf.AdaLoRA(init_r=4, target_r=2), ["0"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    with pytest.warns(lf.LorafitWarning, match="PEFT has no AdaLoRA"):
        folder = handle.save(oracle.folder / "ours")
    stored = load_file(folder / "adapter_model.safetensors")["base_model.model.0.lora_B"]
    assert stored.shape == (6, 4) and stored[:3, 2:].eq(0).all() and stored[3:, :2].eq(0).all()
    again = lf.load(build(), folder)
    assert torch.equal(again.delta("0"), handle.delta("0"))


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no lora_E": (lambda t: t.pop("base_model.model.layers.0.lora_E"), r"missing key[\s\S]*layers\.0\.lora_E"),
    "another rank": (
        lambda t: t.update({key: value[:1] for key, value in t.items() if "layers.0.lora_A" in key}),
        r"rank in the file[\s\S]*r = 1",
    ),
    "lora_E flat": (
        lambda t: t.update({key: value[:, 0].contiguous() for key, value in t.items() if key.endswith("0.lora_E")}),
        r"wrong shape[\s\S]*\(4, 1\)",
    ),
    "a key of LoRA": (
        lambda t: t.update({"base_model.model.layers.0.lora_A.weight": torch.zeros(4, 6)}),
        r"tensor of LoRA[\s\S]*ADALORA",
    ),
}


@pytest.mark.parametrize("which", BROKEN)
def test_broken_files(oracle, tiny, edit_tensors, which) -> None:
    how, match = BROKEN[which]
    trained(tiny.seeded(linear), X, settings(), 1).save_pretrained(oracle.folder / "peft")
    edit_tensors(oracle.folder / "peft", how)
    with pytest.raises(lf.CheckpointError, match=match):
        lf.load(tiny.seeded(linear), oracle.folder / "peft")


CONFIGS = {
    "init_r": [0, "4", None],
    "target_r": [5, 0],
    "lora_alpha": [None, -1, 0],
    "total_step": [0],
    "beta1": [1.5],
    "rank_pattern": [["a"], {"layers.0.lora_E": 3}, {"layers.0": [True, True]}],
    "use_dora": [True],
    "alpha_pattern": [{"layers.0": 3}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in CONFIGS.items() for value in values], ids=str
)
def test_configs_that_cannot_be(oracle, tiny, edit, key, value) -> None:
    trained(tiny.seeded(linear), X, settings(), 1).save_pretrained(oracle.folder / "peft")
    edit(oracle.folder / "peft", **{key: value})
    with pytest.raises(lf.CheckpointError) as caught:
        lf.load(tiny.seeded(linear), oracle.folder / "peft")
    assert key in str(caught.value.where) and caught.value.expected and caught.value.fix
