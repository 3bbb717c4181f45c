"""How far rows have moved, against the formulas on formed weights."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.anatomy import Anatomy, anatomy, correlation, of_update
from lorafit.delta import Dense, LowRank, Update
from lorafit.layers import LinearSite
from lorafit.methods.dora import DoRA
from lorafit.methods.lora import LoRA

METHODS = {
    "lora": lambda layer: LoRA(r=layer.rank(2)),
    "pissa": lambda layer: LoRA(r=layer.rank(2), init="pissa"),
    "vera": lambda layer: lf.VeRA(r=layer.rank(6)),
    "dora": lambda layer: DoRA(LoRA(r=layer.rank(2))),
    "intrinsic": lambda layer: lf.IntrinsicDimension(d=40),
}


def plainly(before: Tensor, after: Tensor) -> Anatomy:
    magnitude = (after.norm(dim=1) - before.norm(dim=1)).abs().mean()
    return Anatomy(magnitude.item(), (1 - torch.cosine_similarity(after, before)).mean().item())


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_on_every_layer_type(some_layer, name, fill):
    model = some_layer.model().double()
    handle = lf.attach(model, METHODS[name](some_layer), targets=["layer"], seed=0)
    fill(handle)
    site = handle.sites["layer"]
    before = site.weight().detach().clone()
    found = anatomy({"layer": (site, handle.adapter("layer"))})["layer"]
    handle.merge()
    expected = plainly(before, site.weight().detach())
    assert found.magnitude == pytest.approx(expected.magnitude, rel=1e-9)
    assert found.direction == pytest.approx(expected.direction, rel=1e-9)
    assert found.magnitude > 0 and found.direction > 0


def test_a_new_adapter_has_moved_nothing(some_layer):
    handle = lf.attach(some_layer.model(), DoRA(LoRA(r=some_layer.rank(2))), targets=["layer"], seed=0)
    found = anatomy({"layer": (handle.sites["layer"], handle.adapter("layer"))})["layer"]
    assert found.magnitude < 1e-6 and found.direction == 0


def test_a_small_turn_keeps_its_digits():
    """1 − cos of a turn by 1e-6 is 5e-13, of which cos itself in double precision keeps three digits."""
    weight = torch.tensor([[3.0, 0.0]])
    turned = of_update(weight, Update(Dense(torch.tensor([[0.0, 3e-6]], dtype=torch.float64))))
    assert turned.direction == pytest.approx(2 * math.sin(math.atan(1e-6) / 2) ** 2, rel=1e-9, abs=0)


def test_lengths_and_turns_known_by_hand():
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    delta = Dense(torch.tensor([[0.0, 0.0], [-1.0, 1.0], [-6.0, 0.0]]))  # as it was; a right angle; about-turn, doubled
    assert of_update(weight, Update(delta)) == Anatomy(pytest.approx(2 / 3), pytest.approx((0 + 1 + 2) / 3))
    turned = Update(Dense(torch.zeros(3, 2)), gain=torch.tensor([2.0, 1.0, -1.0]))
    assert of_update(weight, turned) == Anatomy(pytest.approx(5 / 3), pytest.approx(2 / 3))


def test_rows_without_a_direction_have_no_turn():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    delta = Dense(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 1.0]]))
    assert of_update(weight, Update(delta)) == Anatomy(pytest.approx(1.0), pytest.approx(1.0))
    assert of_update(torch.zeros(2, 2), Update(Dense(torch.zeros(2, 2)))) == Anatomy(0.0, 0.0)


def test_it_is_computed_in_double_precision():
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False).bfloat16()
    site, up, down = LinearSite(layer), torch.randn(30, 2) * 1e-3, torch.randn(2, 40)
    found = of_update(site.weight(), Update(LowRank(up, down)))
    before = layer.weight.detach().double()
    expected = plainly(before, before + up.double() @ down.double())
    assert found.magnitude == pytest.approx(expected.magnitude, rel=1e-9)
    assert found.direction == pytest.approx(expected.direction, rel=1e-7)


def test_correlation():
    torch.manual_seed(0)
    found = [Anatomy(*pair) for pair in torch.rand(9, 2).tolist()]
    expected = statistics.correlation([one.magnitude for one in found], [one.direction for one in found])
    assert correlation(found) == pytest.approx(expected)
    assert correlation([Anatomy(each, 2 - 3 * each) for each in (0.1, 0.2, 0.5)]) == pytest.approx(-1)
    for poor in ([], [Anatomy(1, 2)], [Anatomy(1, 2), Anatomy(1, 3)]):
        with pytest.raises(lf.ConfigError, match="does not vary"):
            correlation(poor)
