"""Layers of a class with a forward of its own: the adapter sits right in it, or is refused with what is wrong.

The contract of every method (`test_household.py`, `test_rows.py`) runs here over layers that pad their input inside of
their forward, as those of EfficientNet-Lite do, and over others like them.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafit as lf
from lorafit.layers import OwnSite, following, site_class, site_of, unfollowed
from tests.conftest import Layer
from tests.contract import test_household as household
from tests.contract import test_rows as of_rows


class Padded(nn.Conv2d):
    """Pads by a layer of its own, made for one size of image, and keeps its stride as a list."""

    def __init__(self, inn: int, out: int, kernel_size: int, stride: int = 1, *, image: int, **options: Any) -> None:
        super().__init__(inn, out, kernel_size, stride, **options)
        self.stride = list(self.stride)  # type: ignore[assignment]
        around = max((math.ceil(image / stride) - 1) * stride + kernel_size - image, 0)
        low, high = around // 2, around - around // 2
        self.static_padding = nn.ZeroPad2d((low, high, low, high)) if around else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """Pads as much as the size of its input asks for."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            around = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [around // 2, around - around // 2, *pads]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


class Causal(nn.Conv1d):
    """Sees the past alone: zeros before its input, or what came before it."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        around = self.dilation[0] * (self.kernel_size[0] - 1)
        x = F.pad(x, (around, 0)) if before is None else torch.cat([before[..., -around:], x], dim=-1)
        return super().forward(x)


class WrittenOut(nn.Linear):
    """A linear layer with its product written out."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


CASES = [
    Layer("padded", Padded, (4, 8), (2, 4, 7, 6), {"kernel_size": 3, "stride": 2, "image": 7}),
    Layer("padded-depthwise", Padded, (4, 8), (2, 4, 7, 6), {"kernel_size": 5, "image": 7, "groups": 4, "bias": False}),
    Layer("same-dilated", Same, (4, 8), (2, 4, 7, 6), {"kernel_size": 3, "stride": 2, "dilation": 2, "groups": 2}),
    Layer("causal", Causal, (4, 8), (2, 4, 9), {"kernel_size": 3, "dilation": 2}),
    Layer("written-out", WrittenOut, (6, 8), (3, 5, 6)),
]
FEW = [CASES[0], CASES[1]]


@pytest.fixture(params=CASES, ids=lambda layer: layer.id)
def layer(request: pytest.FixtureRequest) -> Layer:
    case: Layer = request.param
    return case


@pytest.fixture(params=FEW, ids=lambda layer: layer.id)
def some_layer(request: pytest.FixtureRequest) -> Layer:
    case: Layer = request.param
    return case


# The contract of every method

fill = household.fill
three = of_rows.three
test_a_new_adapter_changes_nothing = household.test_a_new_adapter_changes_nothing
test_gradients_reach_what_is_declared = household.test_gradients_reach_what_is_declared_and_nothing_else
test_outputs_and_gradients = household.test_outputs_and_gradients_are_those_of_the_changed_weight
test_merged_and_unmerged_agree = household.test_merged_and_unmerged_agree_and_unmerge_is_exact
test_detach_restores_the_model = household.test_detach_restores_the_model
test_training_moves_all_of_it = household.test_training_moves_all_of_it_and_nothing_of_the_base
test_the_count_is_the_formula = household.test_the_count_is_the_formula
test_save_and_load_give_the_same_outputs = household.test_save_and_load_give_the_same_outputs
test_methods_add_up_on_one_layer = household.test_methods_add_up_on_one_layer
test_copies_are_apart_and_the_same = household.test_copies_are_apart_and_the_same
test_the_state_dict_goes_round = household.test_the_state_dict_goes_round
test_gradient_checkpointing = household.test_gradient_checkpointing_gives_the_same_gradients
test_accumulated_batches = household.test_accumulated_batches_are_one_large_one
test_autocast_agrees_with_full_precision = household.test_autocast_agrees_with_full_precision
test_a_resumed_run_ends_the_same = household.test_a_resumed_run_ends_bit_for_bit_the_same
test_each_row_is_what_its_adapter_gives_alone = of_rows.test_each_row_is_what_its_adapter_gives_alone
test_gradients_of_rows = of_rows.test_gradients_of_rows_are_those_of_each_adapter_alone


# The two ways to compute it, and the two ways to put another weight into a forward


@pytest.mark.parametrize("method", [lf.LoRA, lambda r: lf.DoRA(lf.LoRA(r=r))], ids=["lora", "dora"])
def test_one_pass_and_two_agree(layer, method, fill, monkeypatch):
    model = layer.model().double().eval()
    handle = lf.attach(model, method(r=layer.rank(2)), ["layer"])
    fill(handle)
    x = layer.input().double().requires_grad_()
    inputs = [*handle.parameters(), x]
    results = []
    for one in (False, True):
        monkeypatch.setattr(following.FollowingSite, "_one_pass", lambda *_, one=one: one)
        y = model(x)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)])
    for apart, together in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


def test_a_stand_in_and_a_swap_agree_and_leave_the_layer_alone(layer):
    module = layer.model().layer
    keys, own = list(vars(module)), dict(module._parameters)
    tensors = {"weight": torch.randn_like(module.weight), "bias": None}
    x, forward = layer.input(), type(module).forward
    stood = forward(following.stand_in(module, tensors), x)
    assert torch.equal(following._swapped(module, forward, x, tensors), stood)
    assert list(vars(module)) == keys
    assert module._parameters.keys() == own.keys() and all(module._parameters[key] is own[key] for key in own)
    with pytest.raises(RuntimeError):
        following._swapped(module, forward, x, {"weight": torch.randn(3, 2), "bias": None})
    assert all(module._parameters[key] is own[key] for key in own)


def test_dropout_drops_the_adapters_input_alone(layer, fill):
    model = layer.model()
    handle = lf.attach(model, lf.LoRA(r=layer.rank(2), dropout=0.5), ["layer"])
    fill(handle)
    x = layer.input()
    torch.manual_seed(3)
    found = model.layer(x)
    torch.manual_seed(3)
    site, update = site_of(model.layer), handle.adapter("layer").update(None)
    assert isinstance(site, OwnSite)
    low = site.expand(site.project(F.dropout(x, 0.5), update.delta.down), update.delta.up) * update.delta.scale
    with handle.disabled():
        torch.testing.assert_close(found, model.layer(x) + low)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("method", [lf.LoRA(r=1), lf.DoRA(lf.LoRA(r=6))], ids=["lora-r1", "dora-r6"])
def test_a_whole_graph_with_the_same_numbers(layer, method, fill):
    model = layer.model()
    handle = lf.attach(model, method.at(r=layer.rank(6 if isinstance(method, lf.DoRA) else 1)), ["layer"])
    fill(handle)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        model.zero_grad()
        y = function(layer.input())
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in handle.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)
    assert isinstance(model.layer.weight, nn.Parameter)


# What else it is called with


def test_a_cache_beside_the_input_reaches_the_adapter_too(fill):
    model = nn.Sequential(Causal(4, 8, 3, dilation=2)).eval()
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    fill(handle)
    x = torch.randn(2, 4, 12)
    whole = model(x)
    torch.testing.assert_close(model[0](x[..., 7:], x[..., :7]), whole[..., 7:])
    torch.testing.assert_close(model[0](x[..., 7:], before=x[..., :7]), whole[..., 7:])
    with handle.disabled():
        base = model[0](x[..., 7:], before=x[..., :7])
        torch.testing.assert_close(base, model(x)[..., 7:])
    with handle.rows(["default", None]), pytest.raises(lf.StateError, match="more than its input") as caught:
        model[0](x[..., 7:], before=x[..., :7])
    assert caught.value.where == "0" and "before" in str(caught.value) and caught.value.fix


class Kept:
    """What a stream has shown of itself, as streaming models of transformers keep it."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def update(self, x: Tensor, around: int) -> Tensor:
        before = x.new_zeros(*x.shape[:-1], around) if self.last is None else self.last
        seen = torch.cat([before, x], dim=-1)
        self.last = seen[..., -around:].detach()
        return seen


class Streaming(nn.Conv1d):
    """Sees what came before its input, and writes down what it has seen."""

    def forward(self, x: Tensor, kept: Kept | None = None, *, buffer: Tensor | None = None) -> Tensor:
        around = self.kernel_size[0] - 1
        if kept is not None:
            return super().forward(kept.update(x, around))
        if buffer is None:
            return super().forward(F.pad(x, (around, 0)))
        seen = torch.cat([buffer, x], dim=-1)
        buffer.copy_(seen[..., -around:])
        return super().forward(seen)


def streams(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The model's output for x in three parts: with a cache by place, by name, and with a tensor that it writes to."""
    found, parts = {}, x.split(32, dim=-1)
    kept, named, buffer = Kept(), Kept(), x.new_zeros(*x.shape[:-1], 2)
    found["place"] = torch.cat([model[0](part, kept) for part in parts], dim=-1)
    found["name"] = torch.cat([model[0](part, kept=named) for part in parts], dim=-1)
    found["tensor"] = torch.cat([model[0](part, buffer=buffer) for part in parts], dim=-1)
    return found


@pytest.mark.parametrize("method", [lf.LoRA(r=1), lf.LoRA(r=8), lf.DoRA(lf.LoRA(r=1))], ids=["thin", "wide", "dora"])
def test_a_cache_that_the_layer_writes_to_is_written_once(method, fill):
    model = nn.Sequential(Streaming(16, 16, 3)).eval()
    x = torch.randn(2, 16, 96)
    base = model(x)
    fill(lf.attach(model, method, ["0"]))
    whole = model(x).detach()
    assert (whole - base).abs().max() > 1e-2
    for found in streams(model, x).values():
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    both = lf.attach(model, method, ["0"], name="second")
    fill(both)
    both.activate(["default", "second"])
    whole = model(x).detach()
    for found in streams(model, x).values():
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_where_one_pass_is_not_enough_a_cache_is_refused(fill):
    model = nn.Sequential(Streaming(16, 16, 3))
    handle = lf.attach(model, lf.LoRA(r=1, dropout=0.5), ["0"])
    fill(handle)
    x, kept = torch.randn(2, 16, 96), Kept()
    with pytest.raises(lf.StateError, match="while its adapter drops inputs") as caught:
        model[0](x, kept)
    assert kept.last is None and "Kept" in str(caught.value) and "dropout=0" in caught.value.fix
    model.eval()
    torch.testing.assert_close(model[0](x, kept), model(x), rtol=1e-4, atol=1e-4)


# Layers around it: memory formats, a whole model, files


@pytest.mark.parametrize("r", [1, 8], ids=["two-passes", "one-pass"])
def test_channels_last_is_kept(r, fill):
    model = nn.Sequential(Padded(4, 8, 3, 2, image=7), nn.GroupNorm(2, 8), Padded(8, 8, 3, image=4, groups=8)).eval()
    handle = lf.attach(model, lf.LoRA(r=8), ["0", "2"], rank_pattern={"0": r})
    fill(handle)
    x = torch.randn(2, 4, 7, 6)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    found = model(x)
    torch.testing.assert_close(found, expected)
    with handle.disabled():
        assert found.stride() == model(x).stride()


def test_a_pickled_and_a_copied_layer_stay_what_they_are(fill):
    model = nn.Sequential(Padded(4, 8, 3, 2, image=7)).eval()
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    fill(handle)
    x = torch.randn(2, 4, 7, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0], Padded) and torch.equal(other(x), model(x))


def test_what_peft_makes_of_it_is_said(fill, tmp_path):
    model = nn.Sequential(Padded(4, 8, 3, 2, image=7)).eval()
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    fill(handle)
    with pytest.warns(lf.LorafitWarning, match="PEFT has no adapter that goes through a forward of a layer's own"):
        handle.save(tmp_path)
    delta = handle.delta("0")
    handle.detach()
    assert torch.equal(lf.load(model, tmp_path).delta("0"), delta)


def test_an_adapter_that_mixes_groups_is_refused(tmp_path):
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    handle = lf.attach(plain, lf.LoRA(r=2), ["0"])
    folder = handle.save(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: torch.randn_like(tensors[key])}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(lf.CheckpointError, match="channels of other groups"):
        lf.load(nn.Sequential(Padded(4, 8, 3, image=7, groups=2)), folder)


def test_all_linear_takes_a_linear_layer_that_is_written_out():
    model = nn.Sequential(WrittenOut(6, 8), nn.Linear(8, 3))
    assert list(lf.attach(model, lf.LoRA(r=1)).sites) == ["0", "1"]
    assert site_class(WrittenOut).kind == "Linear" and unfollowed(WrittenOut) is None


def test_a_trial_leaves_no_trace():
    model = nn.Sequential(Padded(4, 8, 3, 2, image=7))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].static_padding.register_buffer("count", torch.zeros(()))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    handle = lf.attach(model, lf.LoRA(r=1), ["0"], seed=0)
    assert torch.equal(torch.get_rng_state(), random) and calls == [] and model[0].training
    handle.detach()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# What an adapter could not follow


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class Skipping(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3), keepdim=True)


class Rescaled(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.conv2d(x, self.weight, None)


class Shuffled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


class Rectified(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None).relu()


class Elsewhere(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.held = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.held[0].to(x.dtype), None)


class Counting(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class Centred(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Both(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y.mean()


class Sequence(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).mT


class Asking(nn.Conv2d):
    def forward(self, x: Tensor, size: int) -> Tensor:
        return super().forward(x)[..., :size]


class Single(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 8 * super().forward(ids)


REFUSED = {
    Noisy: "another output each time",
    Skipping: "neither its weight's nor its bias",
    Rescaled: "raises RuntimeError",
    Shuffled: "its bias is not added",
    Rectified: "not linear in its weight",
    Elsewhere: "not read as self.weight",
    Counting: "changes its own buffers",
    Centred: "depends on the others",
    Both: "gives a tuple",
    Sequence: "without the 5 channels",
    Asking: "raises TypeError",
    Single: "torch.float32 for an input of torch.float64",
}


@pytest.mark.parametrize("kind", list(REFUSED), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_cannot_be_followed_is_refused_with_the_reason(kind, mode):
    bias = kind not in (Rescaled, Rectified, Elsewhere)
    model = nn.Sequential(kind(4, 5, 3, bias=bias)).train(mode == "train")
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(lf.TargetError, match=REFUSED[kind]) as caught:
        lf.attach(model, lf.LoRA(r=1), ["0"])
    assert f"{kind.__name__} has a forward of its own" in str(caught.value)
    assert caught.value.where == "0" and "exclude=['0']" in caught.value.fix
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == kinds


class Marked(nn.Parameter):
    """What another library may have in the place of a weight."""


def test_a_weight_of_another_librarys_kind_is_refused():
    module = Padded(4, 5, 3, image=7)
    module.weight = Marked(module.weight.detach())
    with pytest.raises(lf.TargetError, match="its weight is a Marked") as caught:
        lf.attach(nn.Sequential(module), lf.LoRA(r=1), ["0"])
    assert caught.value.where == "0"


def test_shuffled_channels_are_refused_without_a_bias_too():
    with pytest.raises(lf.TargetError, match="mixes its channels"):
        lf.attach(nn.Sequential(Shuffled(4, 5, 3, bias=False)), lf.LoRA(r=1), ["0"])


def test_other_types_with_a_forward_of_their_own_are_refused_as_ever():
    assert unfollowed(Scaled) == "Scaled"
    with pytest.raises(lf.TargetError, match="Scaled has a forward of its own"):
        lf.attach(nn.Sequential(Scaled(5, 4)), lf.LoRA(r=1), ["0"])


def test_a_large_layer_is_tried_on_some_of_its_rows(monkeypatch):
    monkeypatch.setattr(following, "MOST", 100)
    module = Padded(4, 9, 3, image=7)
    spare = following._spare(site_of(module))
    assert spare.weight.shape == (2, 4, 3, 3) and spare.bias.shape == (2,) and spare.weight.dtype == torch.float64
    lf.attach(nn.Sequential(module), lf.LoRA(r=2), ["0"])
