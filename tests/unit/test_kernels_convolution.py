"""The fused convolution against its plain twin, in each of its orders, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import lorafit as lf
from lorafit.delta import LowRank, Update
from lorafit.errors import StateError
from lorafit.kernels import convolution as kernel
from lorafit.kernels.convolution import Order
from lorafit.layers import Acting, Conv1dSite, Conv2dSite, Conv3dSite, ConvSite, apply

# Said by torch's own layer of what it does with an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
SCALE = 1.7
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ORDERS = {"low-rank": Order(), "merged": Order(merged=True), "whole": Order(merged=True, whole=True)}
KINDS: dict[int, tuple[type[nn.Module], type[ConvSite]]] = {
    1: (nn.Conv1d, Conv1dSite),
    2: (nn.Conv2d, Conv2dSite),
    3: (nn.Conv3d, Conv3dSite),
}
SIZES = {1: (3, 4, 9), 2: (3, 4, 7, 6), 3: (2, 4, 5, 4, 6)}
OPTIONS: dict[str, dict[str, Any]] = {
    "stride": {"kernel_size": 3, "stride": 2, "bias": False},
    "pointwise": {"kernel_size": 1},
    "padding": {"kernel_size": 3, "padding": 2, "stride": 2},
    "valid": {"kernel_size": 2, "padding": "valid", "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same-even": {"kernel_size": 4, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "circular-same-even": {"kernel_size": 4, "padding": "same", "padding_mode": "circular", "bias": False},
    "reflect-same-even": {"kernel_size": 2, "padding": "same", "padding_mode": "reflect", "groups": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
}
CASES = [pytest.param(dims, options, id=f"{dims}d-{name}") for dims in KINDS for name, options in OPTIONS.items()]
FEW = [
    pytest.param(1, OPTIONS["circular-same-even"], id="1d-circular-same-even"),
    pytest.param(2, OPTIONS["padding"], id="2d-padding"),
    pytest.param(2, OPTIONS["same-even"], id="2d-same-even"),
    pytest.param(2, OPTIONS["groups"], id="2d-groups"),
    pytest.param(3, OPTIONS["reflect-same-even"], id="3d-reflect-same-even"),
]


class Case:
    """A layer, its input, and an update of it with values of usual size, all in float64."""

    def __init__(self, dims: int, options: dict[str, Any], *, gain: bool = False, mixing: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        kind, self.site_kind = KINDS[dims]
        self.layer = kind(4, 8, **options).double().requires_grad_(False)
        for parameter in self.layer.parameters():
            parameter.copy_(make(*parameter.shape))
        groups = self.layer.groups
        inn = self.layer.weight[0].numel() * (groups if mixing else 1)
        self.groups, r = groups, 4
        self.x = make(*SIZES[dims])
        self.leaves = [make(r, inn), make(8, r // groups), *([1 + 0.3 * make(8)] if gain else [])]

    def to(self, dtype: torch.dtype) -> Case:
        self.layer, self.x = self.layer.to(dtype), self.x.to(dtype)
        self.leaves = [leaf.to(dtype) for leaf in self.leaves]
        return self

    def update(self, leaves: list[Tensor]) -> Update:
        down, up, *gain = leaves
        return Update(LowRank(up, down, scale=SCALE, groups=self.groups), gain[0] if gain else None)

    def fused(self, x: Tensor, *leaves: Tensor, dropout: float = 0.0) -> Tensor:
        acting = [Acting(self.update(list(leaves)), dropout)]
        return self.site_kind(self.layer).forward(x, type(self.layer).forward, acting)

    def plain(self, x: Tensor, *leaves: Tensor) -> Tensor:
        return apply(self.site_kind(self.layer), x, self.layer(x), [Acting(self.update(list(leaves)), 0.0)])


def outputs_and_gradients(function: Callable[..., Tensor], case: Case) -> list[Tensor]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.x, *case.leaves)]
    y = function(*inputs)
    weights = torch.linspace(-1, 1, max(y.numel(), 1)).to(y.dtype)[: y.numel()].view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def assert_near(found: list[Tensor], exact: list[Tensor], bound: float) -> None:
    for name, one, truth in zip(("y", "dx", "dA", "dE", "dg"), found, exact, strict=False):
        assert one.shape == truth.shape, name
        assert (one.double() - truth.double()).norm() <= bound * truth.double().norm(), name


@pytest.fixture(params=ORDERS.values(), ids=list(ORDERS))
def each_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Every order in turn, whatever it costs."""
    order: Order = request.param
    monkeypatch.setattr(kernel, "order", lambda *_: order)
    return order


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize(("dims", "options"), CASES)
def test_every_order_agrees_with_the_plain_twin(dims, options, gain, each_order):
    case = Case(dims, options, gain=gain)
    exact = outputs_and_gradients(case.plain, case)
    assert_near(outputs_and_gradients(case.fused, case), exact, 1e-13)
    case.to(torch.float32)
    found = outputs_and_gradients(case.fused, case)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert_near(found[:4], exact, 1e-6)
    assert_near(found, exact, 2e-6)  # dg is a sum of more terms


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize(("dims", "options"), [case for case in CASES if case.values[0] < 3])
def test_low_precision_is_as_near_as_the_plain_twin(dims, options, low, gain):
    case, dtype = Case(dims, options, gain=gain).to(DTYPES[low]), DTYPES[low]
    found, twin = outputs_and_gradients(case.fused, case), outputs_and_gradients(case.plain, case)
    assert [tensor.dtype for tensor in found] == [dtype] * len(found)
    case.to(torch.float64)
    exact = outputs_and_gradients(case.plain, case)
    bound = 4 * torch.finfo(dtype).eps
    assert_near(found, exact, bound)
    assert_near(twin, exact, 2 * bound)


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize(("dims", "options"), FEW)
def test_gradients_are_those_of_differences(dims, options, gain, each_order):
    case = Case(dims, options, gain=gain)
    inputs = [case.x[:1].clone().requires_grad_(), *(leaf.requires_grad_() for leaf in case.leaves)]
    assert gradcheck(case.fused, inputs, fast_mode=True)
    assert gradgradcheck(case.fused, inputs, fast_mode=True)


@pytest.mark.parametrize("trained", ["x", "A", "E", "g", "x A", "x E", "x g", "A E", "A E g"])
def test_only_what_is_asked_for(trained, each_order):
    case = Case(2, OPTIONS["padding"], gain=True)
    inputs = [case.x, *case.leaves]
    for tensor, name in zip(inputs, "xAEg", strict=True):
        tensor.requires_grad_(name in trained)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad(case.fused(*inputs).sin().sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(case.plain(*inputs).sin().sum(), wanted))


def test_second_derivatives_through_a_frozen_a_are_refused_not_wrong():
    case = Case(2, OPTIONS["padding"])
    case.leaves[1].requires_grad_()
    y = case.fused(case.x.requires_grad_(), *case.leaves)
    with pytest.raises(StateError, match="second derivatives") as caught:
        torch.autograd.grad(y.square().sum(), case.leaves[1], create_graph=True)
    assert "A" in str(caught.value.fix)


@pytest.mark.parametrize("low", ["float64", "bfloat16"])
def test_an_a_that_mixes_the_groups(low):
    case = Case(2, OPTIONS["groups"], mixing=True).to(DTYPES[low])
    found = outputs_and_gradients(case.fused, case)
    case.to(torch.float64)
    exact = outputs_and_gradients(case.plain, case)
    assert_near(found, exact, 1e-13 if low == "float64" else 4 * torch.finfo(DTYPES[low]).eps)


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("name", ["padding", "groups", "same-even", "circular", "pointwise"])
def test_channels_last_is_kept_in_both_directions(name, gain, each_order):
    case = Case(2, OPTIONS[name], gain=gain)
    exact = outputs_and_gradients(case.plain, case)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    case.layer.to(memory_format=torch.channels_last)
    found = outputs_and_gradients(case.fused, case)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in found[:2])
    assert_near(found, exact, 1e-13)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: x[0],
    "none": lambda x: x[:0],
    "strided": lambda x: x.repeat(2, 1, 2, 1)[::2, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "one-place": lambda x: x[:, :, :3, :3],
}


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("name", list(INPUTS))
def test_inputs_of_every_form(name, gain, each_order):
    case = Case(2, {"kernel_size": 3}, gain=gain)
    case.x = INPUTS[name](case.x)
    assert_near(outputs_and_gradients(case.fused, case), outputs_and_gradients(case.plain, case), 1e-13)


def test_a_wrong_input_is_torchs_own_error():
    case = Case(2, OPTIONS["padding"])
    for x in (
        torch.randn(4, 4),
        torch.randn(2, 3, 7, 6),
        torch.randn(2, 4, 7, 6),
        torch.randn(1, 1, 4, 7, 6),
        torch.randn(4),
    ):
        with pytest.raises(RuntimeError) as expected:
            case.layer(x)
        with pytest.raises(RuntimeError) as caught:
            case.fused(x, *case.leaves)
        assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", ["padding", "groups", "circular"])
def test_dropout_is_the_same_in_both_passes(name, last):
    case = Case(2, OPTIONS[name], gain=True)
    x = case.x.contiguous(memory_format=torch.channels_last) if last else case.x
    inputs = [x.requires_grad_(), *(leaf.requires_grad_() for leaf in case.leaves)]

    def function(*leaves: Tensor) -> Tensor:
        torch.manual_seed(3)
        return case.fused(*leaves, dropout=0.3)

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
def test_dropout_drops_each_number_of_the_thin_path_alone(dropout, last):
    layer = nn.Conv2d(16, 16, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(3 * torch.eye(16).view_as(layer.weight))
    update = Update(LowRank(torch.eye(16), torch.eye(16), scale=SCALE))
    x = torch.ones(8, 16, 30, 20)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = Conv2dSite(layer).forward(x, nn.Conv2d.forward, [Acting(update, dropout)])
    kept = (y > 3.001).double()
    torch.testing.assert_close(y, 3 + SCALE / (1 - dropout) * kept.float())
    deviation = (dropout * (1 - dropout) / x.numel()) ** 0.5
    assert abs(kept.mean() - (1 - dropout)) < 6 * deviation
    for dims in ((0, 2, 3), (1, 2, 3), (0, 1)):
        parts = kept.mean(dim=dims)
        allowed = 8 * deviation * parts.numel() ** 0.5 + 2 / 256  # a sample's bound is rounded up or down
        assert (parts - (1 - dropout)).abs().max() < allowed


def saved(function: Callable[[], object]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


X, Y, H = (3, 4, 7, 6), (3, 8, 5, 4), (3, 4, 5, 4)


@pytest.mark.parametrize(
    ("trained", "how", "dropout", "expected"),
    [
        ("x A E", "low-rank", 0.0, [X, H]),
        ("x A E", "low-rank", 0.3, [X, X, H]),
        ("x A E g", "low-rank", 0.0, [X, Y, H]),
        ("x E", "low-rank", 0.0, [H]),
        ("x A E", "merged", 0.0, [X]),
        ("x A E g", "merged", 0.0, [X, Y]),
        ("x E", "merged", 0.0, [H]),
        ("x", "merged", 0.0, []),
        ("x A E", "whole", 0.0, [X]),
        ("x A E g", "whole", 0.0, [X]),
    ],
)
def test_what_is_kept(trained, how, dropout, expected, monkeypatch):
    monkeypatch.setattr(kernel, "order", lambda *_: ORDERS[how])
    case = Case(2, OPTIONS["padding"], gain="g" in trained).to(torch.float32)
    inputs = [case.x, *case.leaves]
    for tensor, name in zip(inputs, "xAEg", strict=False):
        tensor.requires_grad_(name in trained)
    kept = [each for each in saved(lambda: case.fused(*inputs, dropout=dropout)) if each[0] in (X, Y, H)]
    if dropout:
        assert kept.count((X, torch.uint8)) == 1
    assert sorted(shape for shape, _ in kept) == sorted(expected)


def test_nothing_is_kept_without_gradients():
    case = Case(2, OPTIONS["padding"], gain=True)
    with torch.no_grad():
        assert saved(lambda: case.fused(case.x, *case.leaves)) == []


def test_inference_mode_first_and_training_after(each_order):
    case = Case(2, OPTIONS["padding"], gain=True)
    with torch.inference_mode():
        first = case.fused(case.x * 1, *case.leaves)
    found = outputs_and_gradients(case.fused, case)
    torch.testing.assert_close(first.clone(), found[0])
    assert_near(found, outputs_and_gradients(case.plain, case), 1e-13)


@pytest.mark.parametrize("method", [lf.LoRA(r=2), lf.LoRA(r=2, dropout=0.2), lf.DoRA(lf.LoRA(r=2))], ids=str)
def test_what_comes_after_may_write_to_the_output(method, fill):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=inplace))
        handle = lf.attach(model, method, ["0"], seed=0)
        fill(handle)
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        found.append([parameter.grad for parameter in handle.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_merged_there_is_one_convolution():
    layer, x = nn.Conv2d(32, 48, 3, padding=1), torch.randn(2, 32, 20, 20, requires_grad=True)
    model = nn.Sequential(layer)

    def flops() -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            y = model(x)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y.sum(), [x, *(each for each in model.parameters() if each.requires_grad)])
        return forward.get_total_flops(), backward.get_total_flops()

    layer.requires_grad_(False)
    base, positions, r = flops(), 2 * 20 * 20, 4
    handle = lf.attach(model, lf.LoRA(r=r), ["0"])
    form, thin = 2 * 48 * r * 32 * 9, 2 * positions * r * (32 * 9 + 48)
    assert flops() == (base[0] + form, base[1] + form + 2 * thin)
    with torch.no_grad():
        for each in handle.parameters():
            each.requires_grad_(False)
    assert flops() == (base[0] + form, base[1] + form)


def test_the_order_is_that_of_the_fewest_multiplications():
    def order(shape: tuple[int, ...], out: int, r: int, groups: int = 1) -> Order:
        layer = nn.Conv2d(shape[1], out, 3, padding=1, groups=groups, device="meta").requires_grad_(False)
        geometry = kernel.Geometry((1, 1), (1, 1), (1, 1), groups)
        a = torch.empty(r, *layer.weight.shape[1:], device="meta", requires_grad=True)
        up = torch.empty(out, r // groups, device="meta", requires_grad=True)
        return kernel.order(torch.empty(shape, device="meta"), layer.weight, a, up, None, geometry)

    assert order((8, 64, 56, 56), 64, 8) == Order(merged=True)
    assert order((8, 64, 56, 56), 64, 64) == Order(merged=True, whole=True)  # r is large for so few channels
    assert order((8, 64, 56, 56), 64, 64, groups=64) == Order(merged=True, whole=True)
    assert order((1, 512, 7, 7), 512, 8) == Order()  # 49 places: forming W' twice costs more


def test_a_device_that_computes_channels_together_has_no_thin_convolutions():
    def order(device: str, r: int, groups: int) -> Order:
        weight = torch.empty(128, 128 // groups, 3, 3)
        a, up = torch.empty(r, *weight.shape[1:]), torch.empty(128, r // groups)
        geometry = kernel.Geometry((1, 1), (1, 1), (1, 1), groups)
        inputs = (torch.empty(2, 128, 20, 20, device=device), weight, a.requires_grad_(), up.requires_grad_())
        return kernel.order(*inputs, None, geometry)

    assert order("meta", 32, 8) == Order(merged=True)
    assert order("cpu", 32, 8) == Order(merged=True, whole=True)  # 4 channels a group cost as much as W's 16
    assert order("cpu", 16, 1) == order("meta", 16, 1) == Order(merged=True)


def test_an_output_is_the_same_trained_evaluated_and_loaded(fill, tmp_path):
    for size in range(3, 9):  # around where the orders cost the same
        model = nn.Sequential(nn.Conv2d(4, 8, 3))
        handle = lf.attach(model, lf.DoRA(lf.LoRA(r=2)), ["0"])
        fill(handle)
        x = torch.randn(2, 4, size, size)
        trained = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), trained)
        folder = handle.save(tmp_path / str(size))
        handle.detach()
        lf.load(model, folder)
        assert torch.equal(model(x), trained)


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
def test_autocast_gives_the_type_and_the_numbers_of_the_plain_path(base, gain):
    case = Case(2, OPTIONS["circular"], gain=gain).to(torch.bfloat16).to(DTYPES[base])
    with torch.autocast("cpu", torch.bfloat16):
        found, twin = outputs_and_gradients(case.fused, case), outputs_and_gradients(case.plain, case)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] + [DTYPES[base]] * (len(found) - 1)
    assert [tensor.dtype for tensor in twin] == [tensor.dtype for tensor in found]
    case.to(torch.float64)
    assert_near(found, outputs_and_gradients(case.plain, case), 4 * torch.finfo(torch.bfloat16).eps)


def test_backward_inside_autocast_is_that_of_the_forward_pass(each_order):
    case = Case(2, OPTIONS["padding"], gain=True).to(torch.float32)
    inputs = [case.x.requires_grad_(), *(leaf.requires_grad_() for leaf in case.leaves)]
    expected = torch.autograd.grad(case.fused(*inputs).square().sum(), inputs)
    outside = case.fused(*inputs).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(outside, inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_two_uses_of_one_layer_in_one_graph(each_order):
    # The memory in which W' is formed is everybody's: nothing may rely on it from one pass to the next.
    case = Case(2, {"kernel_size": 3, "padding": 1})
    other = Case(2, {"kernel_size": 1})
    case.layer, other.layer = nn.Conv2d(4, 4, 3, padding=1).double(), nn.Conv2d(4, 4, 1).double()
    for each in (case, other):
        each.layer.requires_grad_(False)
        each.leaves = [leaf[:4].detach().requires_grad_() for leaf in each.leaves]
    results = []
    for name in ("fused", "plain"):
        first, second = vars(Case)[name], vars(Case)[name]
        y = first(case, second(other, first(case, case.x, *case.leaves).relu(), *other.leaves), *case.leaves)
        results.append(torch.autograd.grad(y.square().sum(), [*case.leaves, *other.leaves]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize(("dims", "options"), CASES)
def test_shapes_can_be_asked_of_meta_tensors(dims, options, gain, dropout, last):
    case = Case(dims, options, gain=gain)
    expected = case.layer(case.x).shape
    x = case.x.movedim(1, -1).contiguous().movedim(-1, 1) if last else case.x
    case.layer.to("meta")
    inputs = [tensor.to("meta").requires_grad_() for tensor in (x, *case.leaves)]
    y = case.fused(*inputs, dropout=dropout)
    assert y.shape == expected
    y.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


def test_the_fused_path_is_taken_only_where_it_is_right(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lorafit.layers.convolution.convolution",
        lambda *args, **options: calls.append(1) or kernel.convolution(*args, **options),
    )
    x = torch.randn(2, 3, 6, 6)

    def count(change: Callable[[nn.Module, lf.Handle], object], method: lf.Method | None = None) -> int:
        calls.clear()
        model = nn.Sequential(nn.Conv2d(3, 8, 3))
        handle = lf.attach(model, method or lf.LoRA(r=2), ["0"])
        change(model[0], handle)
        model(x).sum().backward()
        return len(calls)

    assert count(lambda layer, handle: None) == 1
    assert count(lambda layer, handle: None, lf.LoRA(r=2, dropout=0.5)) == 1
    assert count(lambda layer, handle: None, lf.DoRA(lf.LoRA(r=2))) == 1
    assert count(lambda layer, handle: None, lf.IntrinsicDimension(d=3)) == 0  # its change is dense
    assert count(lambda layer, handle: layer.weight.requires_grad_()) == 0  # the kernel has no gradient for W
    assert count(lambda layer, handle: layer.bias.requires_grad_()) == 0
    both = ["default", "b"]
    assert count(lambda _, handle: lf.attach(handle.model, lf.LoRA(r=2), ["0"], name="b").activate(both)) == 0
