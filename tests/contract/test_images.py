"""Networks for images: GroupNorm in channels-last, and the attention of diffusers under each of its processors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf

METHODS = {"lora": lf.LoRA(r=4), "dora": lf.DoRA(lf.LoRA(r=4)), "vera": lf.VeRA(r=8, d_init=0.5)}


def shaken(handle: lf.Handle, std: float = 0.4) -> lf.Handle:
    """Values of usual size, as training would have them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return handle


# GroupNorm in channels-last


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.point(self.deep(self.norm(x)).relu())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(Block(8), nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), Block(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


@pytest.mark.parametrize("method", list(METHODS))
def test_group_norm_in_channels_last_keeps_its_strides_and_its_gradients(method):
    # VeRA's pair is shared by layers of one shape of groups: the depthwise ones are left to the others.
    targets = r".*(stem|point|body\.1)" if method == "vera" else r".*(stem|point|deep|body\.1)"
    pattern = {} if method == "vera" else {"0.deep": 8, "3.deep": 16}
    model = Network().double()
    handle = shaken(lf.attach(model, METHODS[method], targets, rank_pattern=pattern, seed=0))
    other = copy.deepcopy(handle)
    other.model.to(memory_format=torch.channels_last)
    found = []
    for each, layout in ((handle, torch.contiguous_format), (other, torch.channels_last)):
        x = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x.to(memory_format=layout).requires_grad_()
        y = each.model(x)
        assert y.is_contiguous(memory_format=layout)
        with each.disabled():
            assert each.model(x).stride() == y.stride()
        gradients = torch.autograd.grad(y.sin().sum(), [*each.parameters(), x])
        assert gradients[-1].is_contiguous(memory_format=layout)
        found.append([y.detach(), *gradients])
    for plain, last in zip(*found, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-9, atol=1e-9)
    for each in (handle, other):
        each.merge()
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    last = other.model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, handle.model(x), rtol=1e-9, atol=1e-9)


# The attention of diffusers


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Any]:
    yield pytest.importorskip("diffusers", reason="diffusers is not installed")


def unet(diffusers: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model.double().eval()  # then what differs is no rounding


def noise() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64),
        torch.tensor([3, 7]),
        torch.randn(2, 5, 8, generator=generator, dtype=torch.float64),
    )


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(*noise()).sample
    return sample.clone()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def processors(diffusers: Any) -> dict[str, Any]:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    return {"AttnProcessor": AttnProcessor, "AttnProcessor2_0": AttnProcessor2_0}


PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = r".*(to_[qkv]|to_out\.0|conv1|conv2|conv_shortcut|proj_in|proj_out|conv_in|conv_out|conv)"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
@pytest.mark.parametrize("targets", [PROJECTIONS, EVERYTHING], ids=["attention", "convolutions-too"])
@pytest.mark.parametrize("method", list(METHODS))
def test_adapted_is_merged_under_every_processor(diffusers, method, targets, processor):
    model = unet(diffusers)
    base = run(model)
    model.set_attn_processor(processors(diffusers)[processor]())
    same(run(model), base)
    handle = shaken(lf.attach(model, METHODS[method], targets, seed=0))
    adapted = run(model)
    assert (adapted - base).abs().max() > 1e-4
    for other in processors(diffusers).values():  # after attach, too
        model.set_attn_processor(other())
        same(run(model), adapted)
    handle.merge()
    for other in processors(diffusers).values():
        model.set_attn_processor(other())
        same(run(model), adapted)
    handle.unmerge()
    handle.detach()
    same(run(model), base)


@pytest.mark.filterwarnings("ignore")
def test_every_projection_gets_a_gradient_under_every_processor(diffusers):
    model = unet(diffusers)
    handle = shaken(lf.attach(model, lf.LoRA(r=4), PROJECTIONS, seed=0))
    results = []
    for kind in processors(diffusers).values():
        model.set_attn_processor(kind())
        results.append(torch.autograd.grad(model(*noise()).sample.square().mean(), list(handle.parameters())))
    for plain, fast in zip(*results, strict=True):
        assert plain.abs().max() > 0
        same(fast, plain)


@pytest.mark.filterwarnings("ignore")
def test_projections_that_are_fused_after_attach_are_noticed(diffusers):
    model = unet(diffusers)
    base = run(model)
    handle = shaken(lf.attach(model, lf.LoRA(r=4), ["to_q", "to_k", "to_v"], seed=0))
    adapted = run(model)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-3)
    model.fuse_qkv_projections()
    now = run(model)
    # What is called now holds copies of the base's weights; only the queries that meet a text are not fused.
    with torch.no_grad():
        for path in handle.sites:
            if not path.endswith("attn2.to_q"):
                model.get_submodule(path).adapters["default"].B.zero_()
    model.unfuse_qkv_projections()
    same(now, run(model))
    assert (now - base).abs().max() > 1e-4 and (now - adapted).abs().max() > 1e-4
    model.fuse_qkv_projections()
    # No forward pass can tell that from what was wanted, but training and merging say it.
    model(*noise()).sample.square().mean().backward()
    with pytest.raises(lf.TrainingError, match="no gradient"):
        optimizer.step()
    with pytest.raises(lf.StateError, match="fused after the adapter was attached; cannot merge") as caught:
        handle.merge()
    assert "to_k" in caught.value.where or "to_q" in caught.value.where or "to_v" in caught.value.where
    assert "unfuse_qkv_projections" in caught.value.fix and not handle.merged
    with pytest.raises(lf.TargetError, match="fused it with others"):
        lf.attach(model, lf.LoRA(r=4), ["to_k"], name="late")
    model.unfuse_qkv_projections()
    handle.merge()
    same(run(model), now)


@pytest.mark.filterwarnings("ignore")
def test_merged_projections_are_fused_right(diffusers):
    model = unet(diffusers)
    handle = shaken(lf.attach(model, lf.LoRA(r=4), ["to_q", "to_k", "to_v"], seed=0))
    adapted = run(model)
    handle.merge()
    model.fuse_qkv_projections()
    same(run(model), adapted)
    with pytest.raises(lf.StateError, match="cannot unmerge"):
        handle.unmerge()
    with pytest.raises(lf.StateError, match="cannot unmerge"), handle.disabled():
        pass
    assert handle.merged
    model.unfuse_qkv_projections()
    handle.unmerge()
    same(run(model), adapted)


@pytest.mark.filterwarnings("ignore")
def test_the_fused_layer_itself_can_be_adapted(diffusers):
    model = unet(diffusers)
    model.fuse_qkv_projections()
    base = run(model)
    handle = shaken(lf.attach(model, lf.LoRA(r=4), ["to_qkv", "to_kv", "to_out.0"], seed=0))
    adapted = run(model)
    assert (adapted - base).abs().max() > 1e-4
    handle.merge()
    same(run(model), adapted)


@pytest.mark.filterwarnings("ignore")
def test_attention_that_fuses_by_itself_is_noticed_too(diffusers):
    from diffusers.models.transformers.transformer_flux import FluxAttention

    model = nn.ModuleDict({"attn": FluxAttention(8, heads=2, dim_head=4, bias=True, added_kv_proj_dim=8)})
    model["attn"].fuse_projections()
    for name in ("to_q", "to_v", "add_q_proj"):
        with pytest.raises(lf.TargetError, match="fused it with others"):
            lf.attach(model, lf.LoRA(r=2), [name])
    lf.attach(model, lf.LoRA(r=2), ["to_qkv", "to_add_out"]).detach()
    model["attn"].unfuse_projections()
    handle = lf.attach(model, lf.LoRA(r=2), ["to_q", "add_q_proj"])
    model["attn"].fuse_projections()
    with pytest.raises(lf.StateError, match="cannot merge"):
        handle.merge()


@pytest.mark.filterwarnings("ignore")
def test_keys_and_values_that_are_added_are_noticed_too(diffusers):
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    sizes = {"heads": 2, "dim_head": 4, "added_kv_proj_dim": 8, "cross_attention_dim_head": 4}
    model = nn.ModuleDict({"attn": WanAttention(8, processor=WanAttnProcessor(), **sizes)})
    model["attn"].fuse_projections()
    for name in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
        with pytest.raises(lf.TargetError, match="fused it with others"):
            lf.attach(model, lf.LoRA(r=2), [name])
    assert list(lf.attach(model, lf.LoRA(r=2), ["to_q", "to_added_kv"]).sites) == ["attn.to_q", "attn.to_added_kv"]
