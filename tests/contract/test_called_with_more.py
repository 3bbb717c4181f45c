"""What looks at the inputs of layers that are called with more than one: with a cache, or an output size."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.importance import importance
from tests.contract.test_own_forward import Causal


class Cached(nn.Module):
    """Two layers that are given what came before, one of them by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Causal(4, 8, 3, dilation=2)
        self.other = Causal(4, 8, 3, dilation=2)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return torch.cat([self.one(x, before), self.other(x, before=before)], dim=1)


@pytest.mark.parametrize("method", [lf.LoRA(r=2), lf.DoRA(lf.LoRA(r=2))], ids=["lora", "dora"])
def test_importance_is_that_of_calls_with_a_cache(method, fill):
    model = Cached().eval()
    x, before = torch.randn(2, 4, 5), torch.randn(2, 4, 7)
    base = model(x, before)
    handle = lf.attach(model, method, ["one", "other"])
    fill(handle)
    squares = (model(x, before) - base).square().detach()
    share = float(squares[:, :8].sum() / squares.sum())
    found = importance(handle, [(x, before)])
    assert found["one"] == pytest.approx(share, rel=1e-4) and sum(found.values()) == pytest.approx(1)


def test_input_directions_are_those_of_calls_with_a_cache():
    model = Cached().eval()
    x, before = torch.randn(4, 4, 5), torch.randn(4, 4, 7)
    handle = lf.attach(model, lf.LoRA(r=2, init="eva"), ["one", "other"], sample=lf.Sample([(x, before)]))
    plain = nn.Sequential(OrderedDict(one=nn.Conv1d(4, 8, 3, dilation=2)))
    seen = torch.cat([before[..., -4:], x], dim=-1)
    other = lf.attach(plain, lf.LoRA(r=2, init="eva"), ["one"], sample=lf.Sample([seen]))
    torch.testing.assert_close(handle.adapter("one").A[0], other.adapter("one").A[0], rtol=1e-3, atol=1e-4)


class Sized(nn.Module):
    """A layer that is asked for one of two sizes of output."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[10, 12])


@pytest.mark.parametrize("method", [lf.LoRA(r=2, init="eva"), lf.DoRA(lf.LoRA(r=2))], ids=["eva", "dora"])
def test_an_output_size_reaches_them_too(method, fill):
    model, x = Sized().eval(), torch.randn(2, 4, 5, 6)
    sample = lf.Sample([x]) if isinstance(method, lf.LoRA) else None
    handle = lf.attach(model, method, ["up"], sample=sample)
    fill(handle)
    assert importance(handle, [x]) == {"up": pytest.approx(1)}


class Streamed(nn.Module):
    """A layer that is given what it could write to."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Causal(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x, before=Seen())


class Seen:
    """What a layer may write to, and what came before its input."""

    def __getitem__(self, index: object) -> Tensor:
        return torch.zeros(2, 4, 2)


def test_what_may_be_written_to_is_given_to_no_pass_beside_the_layers_own(fill):
    x = torch.randn(2, 4, 5)
    handle = lf.attach(Streamed(), lf.LoRA(r=2), ["one"])
    fill(handle)
    with pytest.raises(lf.StateError, match="while its inputs are looked at") as caught:
        importance(handle, [x])
    assert "Seen" in str(caught.value) and "exclude=" in caught.value.fix
    with pytest.raises(lf.StateError, match="while its inputs are looked at"):
        lf.attach(Streamed(), lf.LoRA(r=2, init="eva"), ["one"], sample=lf.Sample([x]))
