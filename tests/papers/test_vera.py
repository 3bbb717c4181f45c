"""VeRA, Kopiczko et al. 2023, arXiv:2310.11454: the paper's equation, counts and invariants, and PEFT's draw."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import OrderedDict
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.delta import LowRank
from lorafit.layers import Shape
from lorafit.method import Spot
from lorafit.methods.vera import Projection, VeRA, VeRAAdapter
from lorafit.state import load_state, save_state

TARGETS = ["one", "two", "three"]


def mixed() -> nn.Sequential:
    """Three sites, no two of one shape."""
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(one=nn.Embedding(11, 6), two=nn.Linear(6, 9), act=nn.Tanh(), three=nn.Linear(9, 5, bias=False))
    )


def spot(method: VeRA, shape: Shape, path: str = "site", **options: object) -> Spot:
    return Spot(path, shape, lambda: torch.zeros(shape.out, shape.inn), method, **options)


def projections(model: nn.Module) -> list[Projection]:
    return [module for module in model.modules() if isinstance(module, Projection)]


def train(model: nn.Module, handle: lf.Handle, x: Tensor, steps: int = 3) -> None:
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


# The equation -----------------------------------------------------------------


def equation(weight: Tensor, shape: Shape, b: Tensor, d: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W₀ + Λ_b B Λ_d A for a weight of any layout, group by group, written with diagonal matrices and loops."""
    rows, ranks = shape.out // shape.groups, len(d) // shape.groups
    blocks = []
    for g in range(shape.groups):
        own = slice(g * ranks, (g + 1) * ranks)
        lambda_b, lambda_d = torch.diag(b[g * rows : (g + 1) * rows]), torch.diag(d[own])
        blocks.append(lambda_b @ B[g * rows : (g + 1) * rows, :ranks] @ lambda_d @ A[own, : shape.inn])
    change = torch.cat(blocks)
    transposed = tuple(weight.shape) == (shape.inn, shape.out) != (shape.out, shape.inn)
    return weight + (change.t() if transposed else change.reshape(weight.shape))


def test_the_equation_of_the_paper_on_every_layer_type(layer, fill):
    model, plain = layer.model().double(), layer.model().double()
    plain.load_state_dict(model.state_dict())
    handle = lf.attach(model, VeRA(r=layer.rank(6)), ["layer"], seed=1)
    fill(handle)
    site, adapter = handle.sites["layer"], handle.adapter("layer")
    b, d = (parameter.detach().clone().requires_grad_() for parameter in (adapter.b, adapter.d))
    if site.shape.lookup:
        x = layer.input()
        # What padding_idx and scale_grad_by_freq do to the gradient of a trained table says nothing of b and d.
        plain.layer.padding_idx, plain.layer.scale_grad_by_freq = None, False
    else:
        x = layer.input().double().requires_grad_()
    weight = equation(plain.layer.weight.detach(), site.shape, b, d, adapter.common.A, adapter.common.B)
    expected = torch.func.functional_call(plain, {"layer.weight": weight}, (x,))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, layer.model().double()(x), atol=1e-2)  # the adapter does something
    inputs = () if site.shape.lookup else (x,)
    ours = torch.autograd.grad(found.sin().sum(), (adapter.b, adapter.d, *inputs))
    theirs = torch.autograd.grad(expected.sin().sum(), (b, d, *inputs))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(handle.delta("layer"), (weight - plain.layer.weight).detach())


def test_the_update_is_a_low_rank_operator_over_slices_of_the_pair():
    shapes = {"wide": Shape(4, 12), "tall": Shape(10, 3), "grouped": Shape(8, 5, groups=2)}
    method = VeRA(r=6)
    made = method.adapters([spot(method, shape, path) for path, shape in shapes.items()])
    for path, shape in shapes.items():
        delta = made[path].update(lambda: pytest.fail("VeRA needs no weight")).delta
        assert isinstance(delta, LowRank) and delta.scale == 1 and delta.groups == shape.groups
        pair = made[path].common
        assert pair.A.shape == (6, 12) and pair.B.shape == (10, 6)
        assert torch.equal(delta.down, pair.A[:, : shape.inn])
        assert torch.equal(delta.up, pair.B[: shape.out, : 6 // shape.groups])
        assert delta.mid is made[path].d and delta.out is made[path].b
        assert delta.down.untyped_storage().data_ptr() == pair.A.untyped_storage().data_ptr()  # no copy a forward pass


def test_dropout_acts_on_the_adapters_own_input_in_training_alone():
    model = nn.Sequential(nn.Linear(64, 4))
    handle = lf.attach(model, VeRA(r=8, dropout=0.5), ["0"], seed=1)
    with torch.no_grad():
        handle.adapter("0").b.fill_(1)
    x = torch.randn(3, 64)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with handle.disabled():
        assert torch.equal(model(x), model(x))


# Invariants -------------------------------------------------------------------


def test_the_change_is_zero_at_the_start(layer):
    model = layer.model()
    expected = model(layer.input())
    handle = lf.attach(model, VeRA(r=layer.rank(6)), ["layer"])
    assert torch.equal(model(layer.input()), expected)
    assert not handle.delta("layer").any()
    adapter = handle.adapter("layer")
    assert not adapter.b.any() and torch.equal(adapter.d, torch.full((layer.rank(6),), 0.1))
    # dL/dd = 0 while b = 0; b moves first.
    model(layer.input()).square().sum().backward()
    assert adapter.b.grad.any() and not adapter.d.grad.any()


def test_a_and_b_are_one_storage_without_gradient_and_never_change():
    model = mixed()
    handle = lf.attach(model, VeRA(r=7), TARGETS, seed=3)
    [pair] = projections(model)
    assert {id(handle.adapter(path).common) for path in TARGETS} == {id(pair)}
    assert pair.A.shape == (7, 11) and pair.B.shape == (9, 7)
    assert not pair.A.requires_grad and not pair.B.requires_grad
    assert {name.rpartition(".")[2] for name, _ in handle.named_parameters()} == {"b", "d"}
    before = pair.A.clone(), pair.B.clone()
    x = torch.randint(11, (4, 5))
    start = model(x).detach()
    train(model, handle, x)
    assert torch.equal(pair.A, before[0]) and torch.equal(pair.B, before[1])
    assert pair.A.grad is None and pair.B.grad is None
    assert not torch.allclose(model(x), start)
    assert all(parameter.grad.any() for parameter in handle.parameters())
    # Who asks for gradients on everything gets none on a buffer.
    model.requires_grad_(True)
    assert not pair.A.requires_grad and not pair.B.requires_grad


@pytest.mark.parametrize("r", [4, 16, 64, 256, 1024])
def test_the_size_of_b_d_a_x_is_independent_of_r(r):
    # Kaiming uniform: var A = 2 / in and var B = 2 / r, so the std of B Λ_d A x is 2 d_init for x ~ N(0, 1).
    generator = torch.Generator().manual_seed(5)
    method, shape = VeRA(r=r, d_init=0.1), Shape(96, 64)
    outputs = []
    for _ in range(40):
        delta = method.adapter(spot(method, shape), generator=generator).update(lambda: torch.empty(0)).delta
        x = torch.randn(64, 32, generator=generator)
        outputs.append(delta.up @ (delta.mid[:, None] * (delta.down @ x)))
    assert torch.cat(outputs).std().item() == pytest.approx(0.2, rel=0.06)


def test_nothing_but_small_tensors_is_kept_for_the_backward_pass():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    handle = lf.attach(model, VeRA(r=2), ["0"], seed=1)
    handle.adapter("0").b.data.fill_(1)
    x = torch.randn(128, 64, requires_grad=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert y.requires_grad and all(tensor.data_ptr() != x.data_ptr() for tensor in kept)  # A is frozen: x is not needed


# Counts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "r", "shapes", "expected"),
    [
        ("RoBERTa-base, q and v", 1024, [(768, 768)] * 24, 43_008),
        ("RoBERTa-large, q and v", 256, [(1024, 1024)] * 48, 61_440),
        (
            "Llama-2-7B, all linear layers",
            1024,
            ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32,
            1_589_248,
        ),
        ("GPT-3, q and v", 16, [(12288, 12288)] * 192, 2_362_368),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_counts_of_the_literature(model, r, shapes, expected):
    assert VeRA(r=r).num_trainable(shapes) == expected, model
    assert VeRA(r=r).num_trainable(Shape(*shape) for shape in shapes) == expected


def test_the_28_million_of_the_literature_count_the_frozen_pair_too():
    frozen = 16 * 12288 + 12288 * 16
    assert VeRA(r=16).num_trainable([(12288, 12288)] * 192) + frozen == 2_755_584


def test_the_count_is_that_of_the_adapters(layer):
    method = VeRA(r=layer.rank(6))
    handle = lf.attach(layer.model(), method, ["layer"])
    assert handle.num_trainable == method.num_trainable(handle.shapes()) == handle.shapes()[0].out + layer.rank(6)


# The draw ---------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 1, 12345, 2**40, 2**63 + 5, -7])
def test_the_draw_is_pefts_bit_for_bit(key):
    from peft import VeraConfig, get_peft_model

    model = nn.Sequential(OrderedDict(first=nn.Linear(6, 9), second=nn.Linear(9, 13)))
    config = VeraConfig(r=5, projection_prng_key=key, target_modules=["first", "second"])
    theirs = get_peft_model(model, config).base_model
    ours = Projection.draw(key, 5, out=13, inn=9)
    assert torch.equal(ours.A, theirs.vera_A["default"]) and torch.equal(ours.B, theirs.vera_B["default"])
    assert ours.A.dtype == ours.B.dtype == torch.float32
    assert ours.key is not None and ours.key % 2**64 == key % 2**64


def test_the_draw_is_uniform_within_its_bounds_and_knows_no_default_type():
    pair = Projection.draw(1, 64, out=48, inn=32)
    for tensor, fan in ((pair.A, 32), (pair.B, 64)):
        assert tensor.abs().max() <= math.sqrt(6 / fan) * (1 + 1e-6)
        assert tensor.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
    torch.set_default_dtype(torch.float64)
    try:
        again = Projection.draw(1, 64, out=48, inn=32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.A.dtype == torch.float32 and torch.equal(again.A, pair.A) and torch.equal(again.B, pair.B)


def test_a_seed_gives_the_same_adapters_again():
    x = torch.randint(11, (4, 5))
    outputs, keys = [], []
    for seed in (1, 1, 2):
        model = mixed()
        handle = lf.attach(model, VeRA(r=7), TARGETS, seed=seed)
        train(model, handle, x)
        outputs.append(model(x))
        keys.append(handle.adapter("one").common.key)
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert keys[0] == keys[1] != keys[2]
    again = Projection.draw(keys[0], 7, out=9, inn=11)
    model = mixed()
    pair = lf.attach(model, VeRA(r=7), TARGETS, seed=1).adapter("two").common
    assert torch.equal(pair.A, again.A) and torch.equal(pair.B, again.B)


def test_without_a_seed_torchs_own_generator_draws():
    keys = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3))
        keys.append(lf.attach(model, VeRA(r=2), ["0"]).adapter("0").common.key)
    assert keys[0] == keys[1] != keys[2]


# State ------------------------------------------------------------------------


def test_the_state_dict_holds_the_pair_once_and_restores_a_model_of_another_seed():
    model, other = mixed(), mixed()
    handle = lf.attach(model, VeRA(r=7), TARGETS, seed=1)
    second = lf.attach(other, VeRA(r=7), TARGETS, seed=2)
    x = torch.randint(11, (4, 5))
    train(model, handle, x)
    state = model.state_dict()
    large = [key for key in state if key.rpartition(".")[2] in ("A", "B")]
    assert large == ["one.adapters.default.shared.A", "one.adapters.default.shared.B"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert (
        not torch.equal(other(x), model(x)) and second.adapter("three").common.key != handle.adapter("one").common.key
    )
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    pair = second.adapter("three").common
    assert pair is second.adapter("one").common and torch.equal(pair.A, handle.adapter("one").common.A)
    assert pair.key == handle.adapter("one").common.key  # who now saves the seed alone saves the right one
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), model(x))


def test_a_training_checkpoint_restores_the_pair_and_its_seed(tmp_path):
    model, other = mixed(), mixed()
    handle = lf.attach(model, VeRA(r=7, save_projection=False), TARGETS, seed=1)
    second = lf.attach(other, VeRA(r=7, save_projection=False), TARGETS, seed=2)
    x = torch.randint(11, (4, 5))
    train(model, handle, x)
    save_state(handle, tmp_path)
    load_state(second, tmp_path)
    assert torch.equal(other(x), model(x))
    assert second.adapter("two").common.key == handle.adapter("two").common.key


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_keep_one_storage_of_their_own(way):
    model = mixed()
    handle = lf.attach(model, VeRA(r=7), TARGETS, seed=1)
    x = torch.randint(11, (4, 5))
    train(model, handle, x)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), model(x))
    [pair], [original] = projections(copied), projections(model)
    used = {id(module.common) for module in copied.modules() if isinstance(module, VeRAAdapter)}
    assert used == {id(pair)} and pair is not original
    assert pair.A.data_ptr() != original.A.data_ptr() and pair.key == original.key
    with torch.no_grad():
        pair.A.zero_()
    assert not torch.equal(copied(x), model(x))
    assert torch.equal(copied.three(torch.ones(9)), mixed().three(torch.ones(9)))  # its sites all read the copy


def test_two_adapters_have_two_pairs():
    model = mixed()
    one = lf.attach(model, VeRA(r=7), TARGETS, name="one", seed=1)
    two = lf.attach(model, VeRA(r=3), ["two", "three"], name="two", seed=2)
    assert len(projections(model)) == 2
    assert one.adapter("two").common.A.shape == (7, 11) and two.adapter("two").common.A.shape == (3, 9)
    two.detach()
    assert projections(model) == [one.adapter("one").common]
    one.detach()
    assert projections(model) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_pair_follows_the_precision_of_the_model(dtype):
    model = mixed().to(dtype)
    handle = lf.attach(model, VeRA(r=7), TARGETS, seed=1)
    expected = torch.promote_types(dtype, torch.float32)
    [pair] = projections(model)
    assert pair.A.dtype == pair.B.dtype == handle.adapter("three").b.dtype == expected
    assert pair.key is not None and torch.equal(pair.A, Projection.draw(pair.key, 7, 9, 11).A.to(expected))
    x = torch.randint(11, (4, 5))
    train(model, handle, x)
    assert model(x).dtype == dtype


def test_one_pair_for_each_device_and_precision():
    # "meta" stands for a second device: nothing is moved here, only chosen.
    method, shape = VeRA(r=4), Shape(3, 5)
    places = [("a", "cpu", torch.float32), ("b", "meta", torch.float32), ("c", "cpu", torch.float64)]
    spots = [
        spot(method, Shape(3 + i, 5 + i), f"{path}{i}", device=torch.device(device), dtype=dtype)
        for path, device, dtype in places
        for i in range(2)
    ]
    made = method.adapters(spots, generator=torch.Generator().manual_seed(1))
    for path, _, _ in places:
        first, second = made[f"{path}0"], made[f"{path}1"]
        assert first.common is second.common
        assert "shared.A" in first.state_dict() and "shared.A" not in second.state_dict()
    pairs = [made[f"{path}0"].common for path, _, _ in places]
    assert len({pair.A.data_ptr() for pair in pairs}) == 3
    assert all(pair.A.shape == (4, 6) and pair.B.shape == (4, 4) for pair in pairs)  # maxima over all devices
    assert all(torch.equal(pair.A, pairs[0].A) and pair.key == pairs[0].key for pair in pairs)
    assert made["a0"].update(lambda: torch.empty(0)).delta.down.shape == (4, shape.inn)


def test_a_site_that_is_moved_after_attaching_finds_the_pair():
    # As accelerate.dispatch_model does it: the owner stays where it is. "meta" stands for the second device.
    method = VeRA(r=4)
    made = method.adapters([spot(method, Shape(3, 5), "owner"), spot(method, Shape(3, 5), "moved")])
    delta = made["moved"].to("meta").update(lambda: torch.empty(0)).delta
    assert {tensor.device.type for tensor in (delta.up, delta.down, delta.mid, delta.out)} == {"meta"}
    assert made["owner"].common.A.device.type == "cpu"


def test_a_model_of_two_precisions():
    model = mixed()
    model.three.double()
    x = torch.randint(11, (4, 5))
    handle = lf.attach(model, VeRA(r=7), TARGETS, seed=1)
    hidden = model.act(model.two(model.one(x)))
    assert model.three(hidden.double()).dtype == torch.float64
    pairs = projections(model)
    assert [pair.A.dtype for pair in pairs] == [torch.float32, torch.float64]
    assert handle.adapter("three").common is pairs[1] and torch.equal(pairs[1].A, pairs[0].A.double())


def test_adapters_over_a_given_pair():
    method = VeRA(r=4)
    spots = [spot(method, Shape(3, 5), "a"), spot(method, Shape(6, 2), "b")]
    for given in (Projection.draw(9, 4, out=6, inn=5), Projection(torch.randn(4, 8), torch.randn(7, 4))):
        made = method.adapters_on(spots, given)
        assert list(made) == ["a", "b"] and all(adapter.common is given for adapter in made.values())
        assert dict(made["a"].named_modules())["shared"] is given and not list(made["b"].children())
    assert given.key is None and "seed" in given.state_dict()
    assert method.adapters_on([], given) == method.adapters([]) == {}
    for a, b in (((4, 4), (6, 4)), ((4, 5), (5, 4)), ((3, 5), (6, 3)), ((4, 5), (6, 5))):
        with pytest.raises(lf.ConfigError, match="do not fit the layers") as caught:
            method.adapters_on(spots, Projection(torch.empty(a), torch.empty(b)))
        assert str(a) in str(caught.value) and "A (4, 5 or more), B (6 or more, 4)" in str(caught.value)


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_it_compiles_into_one_graph():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    handle = lf.attach(model, VeRA(r=7), ["0", "2"], seed=1)
    for path in handle.sites:
        handle.adapter(path).b.data.fill_(0.5)
    x = torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    expected = torch.autograd.grad(model(x).sum(), handle.parameters())
    for ours, theirs in zip(torch.autograd.grad(compiled(x).sum(), handle.parameters()), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    handle = lf.attach(model, VeRA(r=7), ["0", "2"], seed=1)
    handle.adapter("2").b.data.fill_(0.5)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in handle.parameters())


def test_merged_equals_unmerged(layer, fill):
    model = layer.model().eval()
    handle = lf.attach(model, VeRA(r=layer.rank(6), d_init=0.5), ["layer"], seed=1)
    fill(handle)
    expected = model(layer.input())
    handle.merge()
    torch.testing.assert_close(model(layer.input()), expected, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert torch.equal(model(layer.input()), expected)


# Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "parts"),
    [
        ({"r": 0}, "VeRA.r", ["0", "at least 1"]),
        ({"r": True}, "VeRA.r", ["True"]),
        ({"r": 2.5}, "VeRA.r", ["2.5", "whole number"]),
        ({"d_init": math.nan}, "VeRA.d_init", ["nan", "finite"]),
        ({"d_init": math.inf}, "VeRA.d_init", ["inf"]),
        ({"d_init": 0}, "VeRA.d_init", ["0", "gradient"]),
        ({"d_init": "0.1"}, "VeRA.d_init", ["'0.1'"]),
        ({"save_projection": 1}, "VeRA.save_projection", ["1", "true or false"]),
        ({"dropout": 1.0}, "VeRA.dropout", ["1.0", "less than 1"]),
        ({"dropout": None}, "VeRA.dropout", ["None"]),
    ],
    ids=str,
)
def test_values_out_of_range(options, where, parts):
    with pytest.raises(lf.ConfigError) as caught:
        VeRA(**options)
    assert caught.value.where == where and caught.value.fix
    for part in parts:
        assert part in str(caught.value)


def test_defaults():
    method = VeRA()
    assert method.settings() == {"r": 256, "d_init": 0.1, "save_projection": True, "dropout": 0.0}
    assert method.adapter_settings() == VeRA(d_init=0.3).adapter_settings() != VeRA(r=128).adapter_settings()
    assert method.ups() == () and method.rate([]) == 50.0 and method.schedule({}) is None and method.evidence() is None
    assert VeRA(d_init=-1).d_init == -1
    assert pickle.loads(pickle.dumps(method)) == method and hash(method) == hash(VeRA())
    with pytest.raises(FrozenInstanceError):
        method.r = 3


def test_a_site_has_no_rank_and_no_alpha_of_its_own():
    method = VeRA(r=4)
    assert method.at() is method
    with pytest.raises(lf.ConfigError, match="share one pair A, B, so they have one rank"):
        method.at(r=8)
    with pytest.raises(lf.ConfigError, match="has no alpha"):
        method.at(alpha=8.0)
    model = mixed()
    with pytest.raises(lf.ConfigError, match="rank_pattern"):
        lf.attach(model, method, TARGETS, rank_pattern={"two": 8})
    assert projections(model) == []


def test_a_rank_that_groups_cannot_share():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=4))
    with pytest.raises(lf.ConfigError, match="does not divide into its 4 groups; the next rank that does is 8"):
        lf.attach(model, VeRA(r=6), ["0"])
    lf.attach(model, VeRA(r=1024), ["0"])  # a rank above the layer's own is what VeRA is for
