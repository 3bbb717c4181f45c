"""Transposed convolutions: the contract of every method, output sizes that a model asks for, and a file of their own.

PEFT has no adapter for `ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.bare import bare_model
from lorafit.layers import TransposedSite, following, site_of
from tests.conftest import Layer
from tests.contract import test_household as household
from tests.contract import test_rows as of_rows

CASES = [
    Layer("1d-stride", nn.ConvTranspose1d, (4, 8), (2, 4, 9), {"kernel_size": 3, "stride": 2}),
    Layer(
        "2d-output-padding",
        nn.ConvTranspose2d,
        (4, 8),
        (2, 4, 5, 6),
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "output_padding": 1, "bias": False},
    ),
    Layer(
        "2d-groups-dilated", nn.ConvTranspose2d, (4, 8), (2, 4, 5, 4), {"kernel_size": 3, "dilation": 2, "groups": 2}
    ),
    Layer("2d-depthwise", nn.ConvTranspose2d, (4, 8), (2, 4, 5, 4), {"kernel_size": 2, "stride": 2, "groups": 4}),
    Layer("3d", nn.ConvTranspose3d, (4, 8), (2, 4, 3, 2, 4), {"kernel_size": 2, "stride": 2}),
]
FEW = [CASES[1], CASES[2]]


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


# The weight as a matrix


def test_the_matrix_and_its_place_in_the_weight(layer):
    module = layer.model().layer
    site = site_of(module)
    assert isinstance(site, TransposedSite)
    matrix = site.weight()
    assert matrix.shape == site.shape[:2] and site.shape.groups == layer.groups
    assert torch.equal(site.unfold(matrix), module.weight)
    x = layer.input()
    y = site.project(x, matrix)
    bias = 0 if module.bias is None else site.channel(module.bias)
    torch.testing.assert_close(y + bias, module(x))
    rows = torch.arange(site.shape.out, dtype=torch.float32)  # each row of the matrix is one channel of the output
    torch.testing.assert_close(site.project(x, rows[:, None] * matrix), site.channel(rows) * y)
    with pytest.raises(lf.MergeError, match="mixes the groups"):
        site.unfold(torch.zeros(site.shape.out, 2 * site.shape.inn))


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


# Output sizes


def test_an_output_size_reaches_the_adapter_too(fill):
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1)).eval()
    x, sizes = torch.randn(2, 4, 5, 6), ([9, 11], [10, 12], [9, 12])
    base = [model[0](x, output_size=size) for size in sizes]
    handle = lf.attach(model, lf.LoRA(r=2), ["0"])
    fill(handle)
    adapted = [model[0](x, output_size=size) for size in sizes]
    assert [list(y.shape[2:]) for y in adapted] == list(sizes)
    torch.testing.assert_close(model[0](x, sizes[1]), adapted[1])
    with handle.disabled():
        assert all(torch.equal(model[0](x, output_size=size), y) for size, y in zip(sizes, base, strict=True))
    with handle.rows(["default", None]), pytest.raises(lf.StateError, match="more than its input") as caught:
        model[0](x, output_size=sizes[0])
    assert "output_size" in str(caught.value)
    handle.merge()
    for size, y in zip(sizes, adapted, strict=True):
        torch.testing.assert_close(model[0](x, output_size=size), y, rtol=1e-5, atol=1e-5)


# First values that look at weights and data


class Upwards(nn.Module):
    """A small decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.up = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1)
        self.last = nn.ConvTranspose2d(4, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.norm(self.inner(x)).relu()).relu())


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "lora_ga", "eva"])
def test_first_values(init):
    model = Upwards().eval()
    x = torch.randn(4, 3, 5, 5)
    expected = model(x)
    sample = lf.Sample([x], lambda model, x: model(x).square().mean()) if init in ("lora_ga", "eva") else None
    handle = lf.attach(model, lf.LoRA(r=2, init=init), ["up", "last"], sample=sample, seed=0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert handle.sites


@pytest.mark.parametrize("method", [lf.LoRA(r=2), lf.DoRA(lf.LoRA(r=3))], ids=["lora", "dora"])
def test_a_decoder_learns_and_is_kept_in_channels_last(method, fill):
    model = Upwards().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    kept = model(x).stride()
    handle = lf.attach(model, method, ["inner", "up", "last"], seed=0)
    wanted = torch.randn(4, 5, 24, 24)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        y = model(x)
        loss = (y - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert y.stride() == kept
    model.eval()
    expected = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("method", [lf.LoRA(r=1), lf.DoRA(lf.LoRA(r=4))], ids=["lora-r1", "dora-r4"])
def test_a_whole_graph_with_the_same_numbers(layer, method, fill):
    model = layer.model()
    handle = lf.attach(model, method.at(r=layer.rank(4 if isinstance(method, lf.DoRA) else 1)), ["layer"])
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


# The file


def saved(folder, method: lf.Method, targets: list[str]) -> tuple[Upwards, lf.Handle]:
    model = Upwards().eval()
    handle = lf.attach(model, method, targets, seed=0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    handle.save(folder)
    return model, handle


def test_a_file_is_of_our_own_type_and_no_other_reader_takes_it_for_a_convolutions(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path, lf.LoRA(r=2), ["inner", "up"])
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORAFIT_LORA"
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(Upwards(), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: lorafit" in card and "PeftModel" not in card


def test_without_a_transposed_layer_the_file_is_pefts(tmp_path):
    saved(tmp_path, lf.LoRA(r=2), ["inner"])
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "method",
    [lf.LoRA(r=2), lf.LoRA(r=2, init="pissa"), lf.DoRA(lf.LoRA(r=2)), lf.DeltaLoRA(r=2, start=2), lf.LoRAFA(r=2)],
    ids=["lora", "pissa", "dora", "delta-lora", "lora-fa"],
)
def test_a_folder_comes_back_into_a_model_with_both_kinds(tmp_path, method):
    model, handle = saved(tmp_path, method, ["inner", "up", "last"])
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    handle.detach()
    again = lf.load(model, tmp_path, trainable=True)
    assert again.method == method
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [lf.LoRA(r=2), lf.DoRA(lf.LoRA(r=2)), lf.VeRA(r=2), lf.AdaLoRA(init_r=2, target_r=2)],
    ids=["lora", "dora", "vera", "adalora"],
)
@pytest.mark.parametrize("turned", [True, False], ids=["of-transposed", "of-a-convolution"])
@pytest.mark.filterwarnings("ignore::lorafit.LorafitWarning")
def test_numbers_that_fit_the_other_kind_of_convolution_are_refused(tmp_path, method, turned):
    kinds: list[type[nn.Module]] = [nn.Conv2d, nn.ConvTranspose2d]
    mine, other = kinds[turned], kinds[not turned]
    lf.attach(nn.Sequential(mine(4, 4, 2)), method, ["0"], seed=0).save(tmp_path)
    model = nn.Sequential(other(4, 4, 2))
    with pytest.raises(lf.CheckpointError, match="another kind of layer") as caught:
        lf.load(model, tmp_path)
    assert caught.value.found == other.__name__ and ": 0" in caught.value.where
    assert type(model[0]) is other
    lf.load(nn.Sequential(mine(4, 4, 2)), tmp_path)


@pytest.mark.parametrize("told", [7, "0", {"0": 1}])
def test_a_list_of_transposed_layers_that_is_none_is_refused(tmp_path, told):
    lf.attach(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), lf.LoRA(r=2), ["0"]).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["lorafit"]["transposed"] == ["0"]
    config["lorafit"]["transposed"] = told
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(lf.CheckpointError, match="no list"):
        lf.load(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), tmp_path)


def test_it_is_not_converted_and_not_looked_at_without_its_model(tmp_path):
    model, handle = saved(tmp_path / "lora", lf.LoRA(r=2), ["up"])
    handle.detach()
    with pytest.raises(lf.CheckpointError, match="transposed convolution") as caught:
        lf.convert(tmp_path / "lora")
    assert "merge_and_detach" in caught.value.fix
    with pytest.raises(lf.CheckpointError, match="which of its convolutions are transposed"):
        bare_model(tmp_path / "lora")
    _, handle = saved(tmp_path / "dora", lf.DoRA(lf.LoRA(r=2)), ["up"])
    with pytest.raises(lf.CheckpointError, match="transposed convolution"):
        lf.convert(tmp_path / "dora", model=model, r=4)
    assert not (tmp_path / "lora-lora").exists() and not (tmp_path / "dora-lora").exists()


def test_adapters_of_one_layer_are_combined(fill):
    model = nn.Sequential(OrderedDict(up=nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))).eval()
    x, deltas = torch.randn(2, 4, 5, 5), []
    for seed, name in enumerate(("a", "b")):
        handle = lf.attach(model, lf.LoRA(r=2), ["up"], name=name)
        fill(handle, seed)
        deltas.append(handle.delta("up"))
    both = lf.combine(handle, {"a": 1.0, "b": -0.5}, name="both")
    torch.testing.assert_close(both.delta("up"), deltas[0] - 0.5 * deltas[1], rtol=1e-5, atol=1e-6)
    expected = model(x)
    both.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
