"""Every layer type that peft has LoRA for: its files here, ours there, the same numbers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 3))


def _padded_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(13, 8, padding_idx=2), nn.Linear(8, 3))


def _conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv1d(6, 5, 1))


def _conv2d() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Tanh(), nn.Conv2d(6, 5, 1))


def _conv2d_same() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), nn.Tanh(), nn.Conv2d(6, 5, 3, padding="valid"))


def _conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), nn.Tanh(), nn.Conv3d(6, 5, 2))


def _hf_conv1d() -> nn.Module:
    return nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(5, 10))


def _mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Conv1D(5, 10))


IDS = torch.arange(13).view(1, 13)
LAYERS = {
    "Linear": (_linear, torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
    "Linear, one row": (_linear, torch.randn(6, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
    "Embedding": (_embedding, IDS, ["0"]),
    "Embedding with padding_idx": (_padded_embedding, IDS, ["0", "1"]),
    "Conv1d": (_conv1d, torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
    "Conv2d": (_conv2d, torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
    "Conv2d, padding by name": (_conv2d_same, torch.randn(2, 4, 9, 8), ["0", "2"]),
    "Conv3d": (_conv3d, torch.randn(2, 4, 5, 6, 7, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
    "HF Conv1D": (_hf_conv1d, torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
    "Linear beside HF Conv1D": (_mixed, torch.randn(3, 6, generator=torch.Generator().manual_seed(2)), ["0", "2"]),
}


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "_"))
def layer(request, tiny):
    make, x, targets = LAYERS[request.param]
    return (lambda: tiny.seeded(make)), x, targets


@pytest.mark.parametrize("rslora", [False, True])
def test_layer_of_peft_is_read(oracle, layer, rslora) -> None:
    build, x, targets = layer
    oracle.check_read(build, LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora), x)


@pytest.mark.parametrize("rslora", [False, True])
def test_layer_of_ours_is_read_by_peft(oracle, layer, rslora) -> None:
    build, x, targets = layer
    oracle.check_written(build, lf.LoRA(r=3, alpha=5, rslora=rslora), x, targets=targets)


GROUPED = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, padding=1)), torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, stride=2)), torch.randn(2, 6, 9, 8)),
    "depthwise Conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), torch.randn(2, 4, 6, 6)),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 2, groups=2)), torch.randn(2, 4, 4, 5, 6)),
}


@pytest.fixture(params=GROUPED, ids=lambda name: name.replace(" ", "_"))
def grouped(request, tiny):
    make, x = GROUPED[request.param]
    return (lambda: tiny.seeded(make)), x, 2 * make()[0].groups


def test_grouped_convolution_of_peft_that_mixes_groups_is_computed_and_not_merged(oracle, grouped) -> None:
    # peft's A sees all channels, so its update is no change of a grouped weight at all.
    build, x, r = grouped
    handle = oracle.check_read(build, LoraConfig(r=r, lora_alpha=6, target_modules=["0"]), x, merge=False)
    before = {key: value.clone() for key, value in handle.model.state_dict().items()}
    with pytest.raises(lf.MergeError, match="mixes the groups"):
        handle.merge()
    with pytest.raises(lf.MergeError, match="mixes the groups"):
        handle.delta("0")
    assert not handle.merged
    assert all(torch.equal(value, before[key]) for key, value in handle.model.state_dict().items())


def test_grouped_convolution_of_ours_is_written_zero_embedded(oracle, grouped) -> None:
    build, x, r = grouped
    theirs = oracle.check_written(build, lf.LoRA(r=r, alpha=6), x, targets=["0"])
    stored = theirs.base_model.model[0].lora_A["default"].weight
    conv = build()[0]
    assert stored.shape == (r, conv.in_channels, *conv.kernel_size)
    own = stored.view(conv.groups, r // conv.groups, conv.groups, -1)
    for row in range(conv.groups):
        for column in range(conv.groups):
            assert bool(own[row, :, column].any()) == (row == column)


def test_grouped_convolution_of_ours_comes_back_block_structured(oracle, grouped) -> None:
    build, x, r = grouped
    handle = lf.attach(build(), lf.LoRA(r=r, alpha=6), targets=["0"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    again = lf.load(build(), handle.save(oracle.folder / "ours"))
    assert torch.equal(again.adapter("0").A, handle.adapter("0").A)
    expected = oracle.run(handle.model, x)
    assert torch.equal(oracle.run(again.model, x), expected)
    again.merge()
    torch.testing.assert_close(oracle.run(again.model, x), expected, atol=1e-5, rtol=1e-5)


def test_multi_head_attention_of_peft_is_refused_by_name(oracle, tiny) -> None:
    # peft adapts nn.MultiheadAttention as a whole, by merging at each call; no layer type here does that.
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    _, folder = oracle.written_by_peft(
        lambda: tiny.seeded(Attention), LoraConfig(r=2, target_modules=["attn"], init_lora_weights=True)
    )
    model = tiny.seeded(Attention)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lf.LorafitError, match=r"attn"):
        lf.load(model, folder)
    assert model.state_dict().keys() == before.keys()
    assert type(model.attn) is nn.MultiheadAttention
