"""DoRA beside peft's: the same tensors give the same outputs and gradients, and where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.methods.dora import DoRA
from lorafit.methods.lora import LoRA

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 8), (5, 6)),
    "Linear-nobias": (lambda: nn.Linear(6, 8, bias=False), (5, 6)),
    "Embedding": (lambda: nn.Embedding(11, 8), (4, 3)),
    "HFConv1D": (lambda: Conv1D(8, 6), (5, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2), (2, 4, 7, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 2), (2, 4, 4, 5, 3)),
}
RANK, ALPHA = 3, 4.0


class Gated(nn.Module):
    """A layer in a model, named as both libraries target it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pair(kind: str, *, dropout: float = 0.0, rslora: bool = False, layer: Any = None) -> tuple[Any, Any, lf.Handle]:
    """(peft's model, our model, our handle) of one base layer, with the same adapter in both."""
    make = layer or LAYERS[kind][0]
    torch.manual_seed(0)
    base = make()
    with torch.no_grad():
        base.weight.normal_(std=0.5)
    models = []
    for _ in range(2):
        own = make()
        own.load_state_dict(base.state_dict())
        models.append(Gated(own).double())
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=["layer"],
        use_dora=True,
        fan_in_fan_out=make is LAYERS["HFConv1D"][0],
    )
    theirs = get_peft_model(models[0], config)
    ours = lf.attach(models[1], DoRA(LoRA(r=RANK, alpha=ALPHA, dropout=dropout, rslora=rslora)), ["layer"])
    return theirs, models[1], ours


def tensors(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """peft's A, B and m, under our names."""
    names = {"A": ("lora_A", "lora_embedding_A"), "B": ("lora_B", "lora_embedding_B"), "m": ("lora_magnitude",)}
    trained = {key: each for key, each in theirs.named_parameters() if each.requires_grad}
    assert len(trained) == 3
    return {
        name: next(each for key, each in trained.items() if any(word in key for word in words))
        for name, words in names.items()
    }


def own(handle: lf.Handle) -> dict[str, nn.Parameter]:
    adapter = handle.adapter("layer")
    return {"A": adapter.inner.A, "B": adapter.inner.B, "m": adapter.m}


def same_values(theirs: nn.Module, handle: lf.Handle) -> None:
    """Fills peft's adapter, and ours with what it has."""
    ours, generator = own(handle), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in tensors(theirs).items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = (tensor * (1 + 0.3 * noise) if name == "m" else 0.3 * noise).to(torch.float64)
            ours[name].copy_(tensor.reshape(ours[name].shape))


@pytest.mark.parametrize("kind", list(LAYERS))
def test_the_magnitudes_start_as_peft_has_them(kind):
    theirs, _, handle = pair(kind)
    found = tensors(theirs)["m"].detach().flatten()
    torch.testing.assert_close(own(handle)["m"].detach(), found.to(torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_outputs_gradients_and_merged_weights_are_the_same(kind, rslora):
    theirs, model, handle = pair(kind, rslora=rslora)
    same_values(theirs, handle)
    shape = LAYERS[kind][1]
    x = torch.randint(11, shape) if kind == "Embedding" else torch.randn(shape, dtype=torch.float64)
    results = []
    for each in (theirs, model):
        each.train()
        y = each(x)
        weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        (y * weights).sum().backward()
        results.append(y)
    torch.testing.assert_close(results[1], results[0])
    with handle.disabled():
        assert (results[0] - model(x)).abs().max() > 1e-2
    for name, tensor in tensors(theirs).items():
        ours = own(handle)[name]
        torch.testing.assert_close(ours.grad, tensor.grad.reshape(ours.shape), msg=lambda text, n=name: f"{n}: {text}")
        assert ours.grad.any()
    handle.merge()
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(model.layer.weight, merged.layer.weight)


def test_dropout_reaches_the_base_product_in_peft_and_not_here():
    """peft: W x + (m/C − 1) W drop(x) + (m/C) s B A drop(x). Here the base path sees x, with dropout or without."""
    p = 0.5
    theirs, model, handle = pair("Linear", dropout=p)
    same_values(theirs, handle)
    with torch.no_grad():  # no low-rank part: only what dropout does to the base product is left
        tensors(theirs)["B"].zero_()
        own(handle)["B"].zero_()
    x = torch.randn(5, 6, dtype=torch.float64)
    model.eval()
    expected = model(x)
    model.train()
    assert torch.equal(model(x), expected)

    theirs.eval()
    torch.testing.assert_close(theirs(x), expected)
    theirs.train()
    torch.manual_seed(5)
    found = theirs(x)
    assert not torch.allclose(found, expected, atol=1e-3)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, p)
    layer, m = model.layer, own(handle)["m"]
    gain = m / layer.weight.norm(dim=1)
    torch.testing.assert_close(found, layer.bias + x @ layer.weight.t() + (gain - 1) * (dropped @ layer.weight.t()))


def test_the_norm_of_a_grouped_convolution():
    """peft's is not that of the weight that its own forward pass stands for; merged, its output is another."""
    make = lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False)  # noqa: E731
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["layer"], use_dora=True)
    theirs = get_peft_model(Gated(make()).double(), config)
    with torch.no_grad():
        for tensor in tensors(theirs).values():
            tensor.data = torch.randn_like(tensor, dtype=torch.float64)
    theirs.eval()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    # The whole map, column by column: what the forward pass multiplies each input value with.
    rows = []
    with torch.no_grad():
        for index in range(4 * 3 * 3):
            one = torch.zeros(4 * 3 * 3, dtype=torch.float64)
            one[index] = 1
            rows.append(theirs(one.view(1, 4, 3, 3)).flatten())
        length = torch.stack(rows, dim=1).norm(dim=1)
        m = tensors(theirs)["m"].detach().flatten().abs()
        assert not torch.allclose(length, m, rtol=1e-2)

        handle = lf.attach(Gated(make()).double(), DoRA(LoRA(r=4)), ["layer"], seed=0)
        own(handle)["B"].normal_()
        before = handle.model(x)
        handle.merge()
        torch.testing.assert_close(handle.model(x), before)
        torch.testing.assert_close(handle.model.layer.weight.flatten(1).norm(dim=1), own(handle)["m"].detach())
