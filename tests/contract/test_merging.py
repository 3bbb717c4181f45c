"""Merging where weights are shared: refused, or untied on request and tied again afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafit as lf
from lorafit.delta import Update


class Tied(nn.Module):
    """A language model whose output layer shares the embedding's weight, in one of several ways."""

    def __init__(self, how: str = "parameter") -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        if how == "parameter":
            self.head.weight = self.embed.weight
        elif how == "storage":
            self.head.weight = nn.Parameter(self.embed.weight.detach())
        elif how == "part":  # a head over some of the words only: a view into the embedding's memory
            self.head.weight = nn.Parameter(self.embed.weight.detach()[3:])
        elif how == "buffer":
            self.register_buffer("table", self.embed.weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


IDS = torch.arange(8).view(2, 4)
WAYS = ["parameter", "storage", "part"]


@pytest.mark.parametrize("how", [*WAYS, "buffer"])
@pytest.mark.parametrize("targets", [["embed"], ["embed", "body"]], ids="+".join)
def test_merging_a_shared_weight_is_refused(how, targets, fill):
    model = Tied(how)
    handle = lf.attach(model, lf.LoRA(r=2), targets)
    fill(handle)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (handle.merge, handle.merge_and_detach):
        with pytest.raises(lf.MergeError, match="would change another layer") as caught:
            call()
        assert caught.value.where == "embed.weight"
        assert (".table" if how == "buffer" else "head.weight") in caught.value.found
        assert "untie=True" in caught.value.fix
    assert not handle.merged
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]], ids="+".join)
def test_untied_while_merged_and_tied_again_after(how, targets, fill):
    model = Tied(how).eval()
    base = model(IDS)
    handle = lf.attach(model, lf.LoRA(r=2), targets)
    fill(handle)
    y = model(IDS)
    weights = {name: (id(layer.weight), layer.weight.data_ptr()) for name, layer in model.named_children()}
    keys = list(model.state_dict())
    handle.merge(untie=True)
    torch.testing.assert_close(model(IDS), y)
    assert model.head.weight.untyped_storage().data_ptr() != model.embed.weight.untyped_storage().data_ptr()
    with handle.disabled():
        assert torch.equal(model(IDS), base)
        assert (model.head.weight is model.embed.weight) == (how == "parameter")
    torch.testing.assert_close(model(IDS), y)
    handle.unmerge()
    assert torch.equal(model(IDS), y)
    assert {name: (id(layer.weight), layer.weight.data_ptr()) for name, layer in model.named_children()} == weights
    assert list(model.state_dict()) == keys
    handle.detach()
    assert torch.equal(model(IDS), base)


def test_untied_for_good(fill):
    model = Tied().eval()
    handle = lf.attach(model, lf.LoRA(r=2), ["embed"])
    fill(handle)
    y = model(IDS)
    handle.merge_and_detach(untie=True)
    torch.testing.assert_close(model(IDS), y)
    assert model.head.weight is not model.embed.weight
    assert all(parameter.requires_grad for parameter in model.parameters())  # both halves are trainable again


def test_saved_modules_with_shared_weights(fill):
    model = Tied().eval()
    handle = lf.attach(model, lf.LoRA(r=2), ["body"], modules_to_save=["head"])
    assert handle.copies["head"].weight is not model.embed.weight
    fill(handle)
    y = model(IDS)
    with pytest.raises(lf.MergeError, match="would change another layer") as caught:
        handle.merge()
    assert caught.value.where == "head.weight" and "embed.weight" in caught.value.found
    handle.merge(untie=True)
    torch.testing.assert_close(model(IDS), y)
    handle.unmerge()
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(IDS), y)


def test_layers_that_share_no_weight_merge_beside_tied_ones(fill):
    model = Tied().eval()
    handle = lf.attach(model, lf.LoRA(r=2), ["body"])
    fill(handle)
    y = model(IDS)
    handle.merge()
    torch.testing.assert_close(model(IDS), y)
    assert model.head.weight is model.embed.weight


def test_neighbours_in_one_storage_are_not_shared(fill):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = torch.randn(32)  # as flattened parameters are kept: side by side, without overlap
    model[0].weight = nn.Parameter(flat[:16].view(4, 4))
    model[1].weight = nn.Parameter(flat[16:].view(4, 4))
    handle = lf.attach(model, lf.LoRA(r=2))
    fill(handle)
    x = torch.randn(3, 4)
    y = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), y)
    handle.unmerge()
    assert torch.equal(model(x), y)


def test_many_cycles_do_not_drift(some_layer, fill):
    model = some_layer.model().bfloat16()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    weight = model.layer.weight.clone()
    for _ in range(50):
        handle.merge()
        handle.unmerge()
    assert torch.equal(model.layer.weight, weight)


def test_merging_keeps_what_hangs_on_the_parameter(some_layer, fill):
    model = some_layer.model()
    handle = lf.attach(model, lf.LoRA(r=some_layer.rank(2)), ["layer"])
    fill(handle)
    weight, strides = model.layer.weight, model.layer.weight.stride()
    handle.merge()
    assert model.layer.weight is weight and weight.stride() == strides and not weight.requires_grad
    handle.unmerge()
    assert model.layer.weight is weight


def test_merging_in_inference_mode_leaves_a_model_that_trains(fill):
    model = Tied()
    handle = lf.attach(model, lf.LoRA(r=2), ["embed"])
    fill(handle)
    with torch.inference_mode():
        handle.merge(untie=True)
        handle.unmerge()
        handle.merge(untie=True)
        with handle.disabled():
            pass
    handle.merge_and_detach(untie=True)
    model(IDS).sum().backward()
    assert model.embed.weight.grad is not None


def test_a_failure_in_the_middle_of_a_merge_undoes_what_was_done(fill):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = nn.Parameter(torch.randn(1, 4).expand(6, 4))  # rows in one place: torch refuses to write to them
    handle = lf.attach(model, lf.LoRA(r=2))
    fill(handle)
    x = torch.randn(3, 4)
    y, weight = model(x), model[0].weight.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        handle.merge()
    assert torch.equal(model[0].weight, weight) and not handle.merged
    assert torch.equal(model(x), y)


# Adapters that rescale W + Δ beside a merged one -------------------------------


@pytest.fixture
def beside(fill):
    """A model with a LoRA "a" on both layers and a DoRA "m" on the second."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).eval()
    handles = []
    for name, method, targets in (("a", lf.LoRA(r=2), ["0", "1"]), ("m", lf.DoRA(lf.LoRA(r=2)), ["1"])):
        handle = lf.attach(model, method, targets, name=name, seed=1)
        fill(handle, std=0.2)
        handles.append(handle)
    return model, *handles


def test_merging_below_an_active_dora_is_refused(beside):
    model, a, m = beside
    a.activate(["a", "m"])
    x = torch.randn(3, 6)
    y, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    for call in (a.merge, a.merge_and_detach):
        with pytest.raises(lf.MergeError, match="rescales the rows") as caught:
            call()
        assert caught.value.where == "1" and caught.value.found == "'m', active" and caught.value.fix
    assert not a.merged and torch.equal(model(x), y)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    m.merge()  # the one with magnitudes itself: what acts beside it does not depend on W
    torch.testing.assert_close(model(x), y)
    m.unmerge()
    m.merge_and_detach()
    torch.testing.assert_close(model(x), y)


def test_an_inactive_dora_bars_merging_for_good_alone(beside):
    model, a, m = beside
    a.activate("a")
    x = torch.randn(3, 6)
    y, delta = model(x), m.delta("1")
    for _ in range(2):  # not merged, then merged
        with pytest.raises(lf.MergeError, match="rescales the rows") as caught:
            a.merge_and_detach()
        assert caught.value.found == "'m', attached" and "detach 'm' first" in caught.value.fix
        if not a.merged:
            a.merge()
    torch.testing.assert_close(model(x), y)
    with pytest.raises(lf.StateError, match="merged into W now") as caught:
        a.activate(["a", "m"])
    assert caught.value.where == "1" and caught.value.fix == "unmerge 'a' first"
    assert a.active == ("a",)
    with pytest.raises(lf.StateError, match="merged into W now") as caught:
        m.delta("1")
    assert caught.value.where == "1"
    assert a.delta("1").any()
    a.unmerge()
    assert torch.equal(m.delta("1"), delta)
    m.detach()
    a.merge_and_detach()
    torch.testing.assert_close(model(x), y)


def test_a_dora_elsewhere_is_no_hindrance(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).eval()
    a = lf.attach(model, lf.LoRA(r=2), ["0"], name="a")
    m = lf.attach(model, lf.DoRA(lf.LoRA(r=2)), ["1"], name="m")
    fill(a)
    fill(m, std=0.2)
    a.activate(["a", "m"])
    x = torch.randn(3, 6)
    y = model(x)
    a.merge()
    torch.testing.assert_close(model(x), y)
    a.activate(["m", "a"])
    m.delta("1")
    a.merge_and_detach()
    torch.testing.assert_close(model(x), y)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...], int]:
    """Any convolution that torch takes, an input for it and a rank that its groups can share."""
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, dilation = draw(each), draw(st.tuples(*[st.integers(1, 2)] * dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    stride = (1,) * dims if same else draw(each)
    padding = "same" if same else draw(st.tuples(*[st.integers(0, 2)] * dims))
    layer = CONVOLUTIONS[dims](
        channels,
        out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    size = tuple(draw(st.integers(5, 7)) for _ in range(dims))
    batch = draw(st.sampled_from([(), (1,), (3,)])) if mode == "zeros" else (draw(st.integers(1, 3)),)
    limit = min(out, layer.weight[0].numel() * groups)
    ranks = list(range(groups, limit + 1, groups)) or [0]
    return layer, (*batch, channels, *size), draw(st.sampled_from(ranks))


# torch says that it pads a copy of the input for some of these settings, which is no concern of the numbers.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions(), st.integers(0, 1000))
def test_merged_is_unmerged_for_any_convolution(case, seed):
    layer, shape, r = case
    if r == 0:
        return
    torch.manual_seed(seed)
    model = nn.Sequential(layer).double()
    handle = lf.attach(model, lf.LoRA(r=r), ["0"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    handle.unmerge()
    assert torch.equal(model(x), y)
    site = handle.sites["0"]
    a, b = handle.adapter("0").A.detach(), handle.adapter("0").B.detach()
    assert torch.equal(site.down_from_file(site.down_to_file(a), r), a)
    assert torch.equal(site.up_from_file(site.up_to_file(b), r), b)


def test_unmerging_after_the_model_was_moved_or_converted():
    # `.to` gives parameters other memory and puts other tensors in the places of buffers.
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    handle = lf.attach(model, lf.LoRA(r=2), targets=["0"], modules_to_save=["1"])
    with torch.no_grad():
        handle.copies["1"].running_mean += 5
        handle.adapter("0").B.normal_()
    x = torch.randn(2, 8)
    with handle.disabled():
        base = model(x)
    own = model(x)
    handle.merge()
    model.double()
    with handle.disabled():
        torch.testing.assert_close(model(x.double()).float(), base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x.double()).float(), own, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    torch.testing.assert_close(model(x.double()).float(), own, rtol=1e-5, atol=1e-5)
    with handle.disabled():
        torch.testing.assert_close(model(x.double()).float(), base, rtol=1e-5, atol=1e-5)


# How often a change is computed -----------------------------------------------


@pytest.fixture
def changes(monkeypatch):
    """One entry for each change of a weight that is computed."""
    computed: list[int] = []
    plain = Update.change
    monkeypatch.setattr(Update, "change", lambda self, weight: computed.append(1) or plain(self, weight))
    return computed


def test_a_change_is_computed_once(some_layer, member, fill, changes):
    model = some_layer.model()
    try:
        handle = lf.attach(model, member.make(some_layer), targets=["layer"], seed=0)
    except lf.ConfigError:
        return  # this method has no such layer
    fill(handle)
    handle.merge()
    assert len(changes) == 1
    kept = model.layer.weight.detach().clone()
    handle.unmerge()
    changes.clear()
    handle.merge_and_detach()
    # A dense change has no bounds short of itself: it is computed for the check, and again.
    assert len(changes) == (2 if member.id in ("did", "said") else 1)
    assert torch.equal(model.layer.weight, kept)


@pytest.mark.parametrize("keep", [True, False], ids=["merge", "merge_and_detach"])
def test_of_a_quantised_weight_it_is_computed_no_more_than_the_check_takes(keep, fill, changes):
    model = nn.Sequential(nn.Linear(6, 8))
    lf.quantise(model, targets=["0"])
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    fill(handle)
    with pytest.warns(lf.LorafitWarning, match="rounded again"):
        handle.merge() if keep else handle.merge_and_detach()
    assert len(changes) == (1 if keep else 2)


@pytest.mark.parametrize("what", ["weight", "adapter", "overflow", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_finite_is_found_before_anything_changes(what, dtype, fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).to(dtype)
    dora = what == "magnitude"
    handle = lf.attach(model, lf.DoRA(lf.LoRA(r=2)) if dora else lf.LoRA(r=2), ["0", "1"])
    fill(handle)
    adapter = handle.adapter("1")
    with torch.no_grad():
        if what == "weight":
            model[1].weight[2, 3] = torch.nan
        elif what == "adapter":
            adapter.B[2, 1] = torch.inf
        elif what == "overflow":
            adapter.B.mul_(torch.finfo(dtype).max / 2)
            adapter.A.mul_(10)
        else:
            adapter.m[3] = torch.nan
    before = [parameter.detach().clone() for parameter in (model[0].weight, model[1].weight)]
    with pytest.raises(lf.MergeError, match="not finite") as caught:
        handle.merge_and_detach()
    assert caught.value.where == "1.weight"
    for parameter, original in zip((model[0].weight, model[1].weight), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), original.nan_to_num())


def test_a_large_weight_that_stays_finite_is_merged(fill):
    # Its bounds leave it in doubt: it is looked at number by number.
    model = nn.Sequential(nn.Linear(6, 8)).half()
    with torch.no_grad():
        model[0].weight.fill_(60000.0)
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    fill(handle)
    expected = (model[0].weight.float() + handle.delta("0")).half()
    handle.merge_and_detach()
    assert torch.equal(model[0].weight, expected) and expected.isfinite().all()
