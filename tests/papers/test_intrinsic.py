"""Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255: equations, invariants, and Li's toy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.fastfood import Fastfood
from lorafit.layers import Shape
from lorafit.method import Spot
from lorafit.methods.intrinsic import IntrinsicAdapter, IntrinsicDimension, layer_of
from lorafit.methods.subspace import Subspace
from lorafit.state import load_state, save_state

BOTH = pytest.mark.parametrize("layerwise", [False, True], ids=["DID", "SAID"])
SITES = ["embed", "blocks.0.mix", "blocks.0.conv", "blocks.1.up", "blocks.1.down"]
COUNTS = [11 * 6, 6 * 6, 6 * 2 * 3, 6 * 8, 8 * 5]


class Block(nn.Module):
    """Two layers, the first of which may be a grouped convolution over the sequence."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            if isinstance(layer, nn.Conv1d):
                x = layer(x.transpose(1, 2)).transpose(1, 2).contiguous()
            elif not isinstance(layer, nn.ModuleDict):
                x = torch.tanh(layer(x))
        return x


def mixed(*, checkpointed: bool | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An embedding and two blocks of a layer of each other kind; `checkpointed`: reentrant or not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.blocks = nn.ModuleList(
                [
                    Block(mix=nn.Linear(6, 6), conv=nn.Conv1d(6, 6, 3, padding=1, groups=3)),
                    Block(up=Conv1D(8, 6), down=nn.Linear(8, 5)),
                ]
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h) if checkpointed is None else checkpoint(block, h, use_reentrant=checkpointed)
            return h

    torch.manual_seed(0)
    return Model().to(dtype)


def tokens() -> Tensor:
    return torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(2))


def attach(model: nn.Module, d: int = 24, *, layerwise: bool = True, seed: int = 3) -> lf.Handle:
    return lf.attach(model, IntrinsicDimension(d=d, layerwise=layerwise), SITES, seed=seed)


def subspace(model: nn.Module) -> Subspace:
    (found,) = [module for module in model.modules() if isinstance(module, Subspace)]
    return found


def loss_of(y: Tensor) -> Tensor:
    return (y - 0.3).square().sum()


def gradients(model: nn.Module, handle: lf.Handle) -> list[Tensor]:
    model.zero_grad()
    loss_of(model(tokens())).backward()
    return [parameter.grad.clone() for parameter in handle.parameters()]


def spots(method: IntrinsicDimension, paths: list[str], **options: object) -> list[Spot]:
    return [Spot(path, Shape(4, 5), lambda: torch.zeros(4, 5), method, **options) for path in paths]


class Counted:
    """How often P and its adjoint were applied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.projections = self.adjoints = 0
        project, adjoint = Fastfood.project, Fastfood.adjoint_

        def counted_project(operator: Fastfood, v: Tensor) -> Tensor:
            self.projections += 1
            return project(operator, v)

        def counted_adjoint(operator: Fastfood, u: Tensor) -> Tensor:
            self.adjoints += 1
            return adjoint(operator, u)

        monkeypatch.setattr(Fastfood, "project", counted_project)
        monkeypatch.setattr(Fastfood, "adjoint_", counted_adjoint)

    def take(self) -> tuple[int, int]:
        taken = self.projections, self.adjoints
        self.projections = self.adjoints = 0
        return taken


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    yield Counted(monkeypatch)


# Settings and counts ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"d": 0}, "IntrinsicDimension.d"),
        ({"d": 1.5}, "IntrinsicDimension.d"),
        ({"d": True}, "IntrinsicDimension.d"),
        ({"layerwise": 1}, "IntrinsicDimension.layerwise"),
    ],
    ids=str,
)
def test_values_out_of_range(options, where):
    with pytest.raises(lf.ConfigError) as caught:
        IntrinsicDimension(**options)
    assert caught.value.where == where and caught.value.fix


def test_no_layer_has_a_size_of_its_own():
    method = IntrinsicDimension(d=50)
    assert method.at() == method and method.ups() == () and method.rate([(8, 2 * method.d)]) == 4
    for change in ({"r": 4}, {"alpha": 2.0}):
        with pytest.raises(lf.ConfigError, match="no rank or alpha"):
            method.at(**change)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("model.layers.13.mlp.experts.2.up", "model.layers.13"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("0", "0"),
        ("classifier.dense", "classifier.dense"),
        ("layer2.conv", "layer2.conv"),
        ("", ""),
    ],
)
def test_a_layer_is_a_path_up_to_its_first_number(path, layer):
    assert layer_of(path) == layer


@BOTH
def test_d_counts_everything(layerwise):
    handle = attach(mixed(), 24, layerwise=layerwise)
    assert handle.num_trainable == 24 == handle.method.num_trainable(handle.shapes())
    shapes = {key.rpartition(".")[2]: len(value) for key, value in handle.named_parameters()}
    assert shapes == ({"theta": 21, "lam": 3} if layerwise else {"theta": 24})


@pytest.mark.parametrize(
    ("method", "paths", "message"),
    [
        (IntrinsicDimension(d=41), ["a.0", "a.1"], "at most D = 40"),
        (IntrinsicDimension(d=2), ["a.0.q", "a.0.k", "a.1.q"], "more than 2"),
        (IntrinsicDimension(d=61, layerwise=False), ["a.0.q", "a.0.k", "a.1.q"], "at most D = 60"),
    ],
    ids=["too many", "no room for the subspace", "too many of one projection"],
)
def test_a_size_that_does_not_fit(method, paths, message):
    with pytest.raises(lf.ConfigError, match=message) as caught:
        method.adapters(spots(method, paths))
    assert caught.value.fix
    smaller = replace(method, d=40 if method.d > 40 else 3)
    assert len(smaller.adapters(spots(smaller, paths))) == len(paths)


def test_layers_on_several_devices_are_refused():
    method = IntrinsicDimension(d=10)
    places = [*spots(method, ["a"]), *spots(method, ["b"], device=torch.device("cuda", 1))]
    with pytest.raises(lf.ConfigError, match="one device"):
        method.adapters(places)


def test_a_refusal_leaves_the_model_alone():
    model = mixed()
    with pytest.raises(lf.ConfigError):
        attach(model, 10_000)
    assert type(model.embed) is nn.Embedding and all(p.requires_grad for p in model.parameters())


def test_one_site_alone():
    method = IntrinsicDimension(d=7)
    (spot,) = spots(method, ["a"])
    adapter = method.adapter(spot, generator=torch.Generator().manual_seed(0))
    assert isinstance(adapter, IntrinsicAdapter) and sum(p.numel() for p in adapter.parameters()) == 7
    assert not adapter.update(spot.weight).delta.dense().any()


# The equation -----------------------------------------------------------------


def dense_changes(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """P formed column by column, and each site's rows of it."""
    common = subspace(model)
    units = torch.eye(len(common.theta), dtype=torch.float64)
    whole = torch.stack([common.operator().project(unit) for unit in units], 1)
    return whole, list(whole.split(COUNTS))


@BOTH
def test_the_change_is_the_equation(layerwise, fill):
    model = mixed(dtype=torch.float64)
    handle = attach(model, layerwise=layerwise)
    fill(handle)
    common = subspace(model)
    _, rows = dense_changes(model)
    layers = [0, 1, 1, 2, 2]
    for path, part, layer in zip(SITES, rows, layers, strict=True):
        expected = part @ common.theta * (1 if common.lam is None else common.lam[layer])
        site = handle.sites[path]
        expected = site.unfold(expected.view(site.shape.out, site.shape.inn))
        torch.testing.assert_close(handle.delta(path), expected, rtol=0, atol=1e-12)


@BOTH
def test_gradients_against_a_dense_matrix(layerwise, fill):
    """θ_d and λ get what they get when P is a matrix and its product with θ_d is put into the weights."""
    model = mixed(dtype=torch.float64)
    handle = attach(model, layerwise=layerwise)
    fill(handle)
    common = subspace(model)
    got = gradients(model, handle)
    _, rows = dense_changes(model)
    plain = mixed(dtype=torch.float64).requires_grad_(False)
    leaves = [p.detach().clone().requires_grad_() for p in handle.parameters()]
    weights = {}
    for path, part, layer in zip(SITES, rows, [0, 1, 1, 2, 2], strict=True):
        site = handle.sites[path]
        flat = part @ leaves[0] * (leaves[1][layer] if layerwise else 1)
        own = plain.get_submodule(path).weight
        weights[f"{path}.weight"] = own + site.unfold(flat.view(site.shape.out, site.shape.inn))
    expected = torch.autograd.grad(loss_of(torch.func.functional_call(plain, weights, tokens())), leaves)
    assert len(got) == len(expected) == len(list(common.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_linear_in_theta():
    model = mixed(dtype=torch.float64)
    handle = attach(model, layerwise=False)
    theta = subspace(model).theta
    a, b = torch.randn(2, 24, dtype=torch.float64)
    changes = []
    for value in (a, b, 2 * a - 3 * b):
        with torch.no_grad():
            theta.copy_(value)
        changes.append(torch.cat([handle.delta(path).flatten() for path in SITES]))
    torch.testing.assert_close(changes[2], 2 * changes[0] - 3 * changes[1], rtol=0, atol=1e-12)


@BOTH
def test_nothing_at_the_start(layerwise):
    model, plain = mixed(), mixed()
    handle = attach(model, layerwise=layerwise)
    assert torch.equal(model(tokens()), plain(tokens()))
    theta_grad, *lam_grad = gradients(model, handle)
    assert theta_grad.abs().min() > 0 and all(not grad.any() for grad in lam_grad)


def test_said_with_frozen_factors_is_did():
    said, did = mixed(), mixed()
    handles = attach(said, 24, layerwise=True), attach(did, 21, layerwise=False)  # 3 of the 24 are factors
    subspace(said).lam.requires_grad_(False)
    losses = []
    for model, handle in zip((said, did), handles, strict=True):
        optimizer = torch.optim.Adam(handle.parameters(), lr=0.1)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model(tokens()))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert torch.equal(subspace(said).theta, subspace(did).theta)


def test_a_seed_makes_p_whatever_theta_is(fill):
    models = [mixed(), mixed(), mixed()]
    handles = [attach(model, seed=seed) for model, seed in zip(models, (3, 3, 4), strict=True)]
    fill(handles[1])
    keys = [subspace(model).key for model in models]
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])
    for handle in handles:
        fill(handle)
    y = [model(tokens()) for model in models]
    assert torch.equal(y[0], y[1]) and not torch.allclose(y[0], y[2])


def test_without_a_seed_it_is_torchs_own():
    keys = []
    for seed in (0, 0, 1):
        model = mixed()
        torch.manual_seed(seed)
        attach(model, seed=None)
        keys.append(subspace(model).key)
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])


# Li's toy ---------------------------------------------------------------------


def toy(d: int) -> tuple[nn.Linear, lf.Handle]:
    """1000 weights in ten rows of a hundred; row i has to sum to i."""
    torch.manual_seed(0)
    layer = nn.Linear(100, 10, bias=False, dtype=torch.float64)
    return layer, lf.attach(layer, IntrinsicDimension(d=d, layerwise=False), r"", seed=d)


def toy_loss(layer: nn.Linear) -> Tensor:
    sums = layer(torch.ones(100, dtype=torch.float64))
    return (sums - torch.arange(1, 11)).square().sum()


@pytest.mark.parametrize("d", [1, 5, 9, 10, 11, 40])
def test_the_toy_of_section_2_has_dimension_ten(d):
    layer, handle = toy(d)
    columns = torch.stack([subspace(layer).operator().project(unit) for unit in torch.eye(d).double()], 1)
    sums = columns.view(10, 100, d).sum(1)
    left = torch.arange(1, 11) - layer.weight.sum(1)
    best = float((left - sums @ torch.linalg.lstsq(sums, left).solution).square().sum())

    (theta,) = handle.parameters()
    optimizer = torch.optim.LBFGS([theta], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-18,
                                  history_size=50, line_search_fn="strong_wolfe")  # fmt: skip
    handle.bind(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy_loss(layer)
        loss.backward()
        return loss

    optimizer.step(closure)
    reached = toy_loss(layer).item()
    assert reached == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert reached < 1e-9 if d >= 10 else reached > 0.01


# Once for all sites -----------------------------------------------------------


def test_once_per_step(counted):
    model = mixed()
    handle = attach(model)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for micro in range(3):
            loss_of(model(tokens())).backward()
            assert counted.take() == (1 if micro == 0 else 0, 1)
        optimizer.step()
    with torch.no_grad():
        model(tokens())
        model(tokens())
    assert counted.take() == (1, 0)
    handle.delta(SITES[0])
    assert counted.take() == (0, 0)


@BOTH
def test_accumulated_gradients_are_sums(layerwise, fill):
    model = mixed(dtype=torch.float64)
    handle = attach(model, layerwise=layerwise)
    fill(handle)
    once = gradients(model, handle)
    loss_of(model(tokens())).backward()
    loss_of(model(tokens())).backward()
    for parameter, grad in zip(handle.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, fill, counted):
    plain, recomputing = mixed(dtype=torch.float64), mixed(checkpointed=reentrant, dtype=torch.float64)
    results = []
    for model in (plain, recomputing):
        handle = attach(model)
        fill(handle)
        counted.take()
        results.append(gradients(model, handle))
    projections, adjoints = counted.take()
    assert projections <= 3 and adjoints <= 3
    if not reentrant:
        assert (projections, adjoints) == (1, 1)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.detach().add_(0.5),
        lambda p: p.data.add_(0.5),
        lambda p: setattr(p, "data", p.data + 0.5),
    ],
    ids=["in place", "through data", "other data"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_change_of_theta_is_seen(write, grad, fill):
    model, same = mixed(), mixed()
    handle = attach(model)
    fill(handle)
    fill(attach(same))
    theta = subspace(model).theta
    with torch.set_grad_enabled(grad):
        before = model(tokens())
        write(theta)
        after = model(tokens())
        with torch.no_grad():
            subspace(same).theta.copy_(theta)
        assert torch.equal(after, same(tokens())) and not torch.allclose(after, before)
    gradients(model, handle)
    assert theta.grad.any()


def test_after_inference_mode_one_can_train(fill):
    model = mixed()
    handle = attach(model)
    fill(handle)
    with torch.inference_mode():
        inferred = model(tokens())
    with torch.no_grad():
        assert torch.equal(model(tokens()), inferred)
    assert gradients(model, handle)[0].any()
    with torch.inference_mode():
        assert torch.equal(model(tokens()), inferred)


def test_values_that_are_not_a_number_are_not_projected_again(counted):
    model = mixed()
    attach(model)
    with torch.no_grad():
        subspace(model).theta.fill_(float("nan"))
    model(tokens())
    assert counted.take() == (1, 0)


def test_autocast_leaves_p_in_full_precision(fill):
    model = mixed()
    handle = attach(model)
    fill(handle)
    full = gradients(model, handle)
    with torch.no_grad():
        subspace(model).theta.add_(0)  # so that it is computed under autocast
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(tokens())
        theta_change = subspace(model).matrices()
    assert all(matrix.dtype == torch.float32 for matrix in theta_change)
    loss_of(y.float()).backward()
    for parameter, grad in zip(handle.parameters(), full, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - grad).norm() < 0.1 * grad.norm()


# Copies and files -------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate, fill):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    handle = lf.attach(model, IntrinsicDimension(d=12), seed=1)
    fill(handle)
    x = torch.randn(5, 4)
    y = model(x)
    y.sum().backward()  # what is kept has a graph now
    other = duplicate(model)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        subspace(other).theta.zero_()
    assert torch.equal(model(x), y) and not torch.allclose(other(x), y)
    other(x).sum().backward()
    assert subspace(other).theta.grad is not subspace(model).theta.grad


def test_pickles_do_not_hold_the_tables():
    model = nn.Linear(64, 64, bias=False)
    lf.attach(model, IntrinsicDimension(d=12), r"", seed=1)
    model(torch.randn(2, 64))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert len(file.getvalue()) < 1.3 * 4 * 64 * 64 and len(pickle.dumps(model)) < 1.5 * 4 * 64 * 64


@BOTH
def test_a_state_dict_brings_its_p(layerwise, fill):
    model, other = mixed(), mixed()
    fill(attach(model, layerwise=layerwise, seed=1))
    handle = attach(other, layerwise=layerwise, seed=2)
    y = model(tokens())
    other(tokens())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()), y)
    gradients(other, handle)
    with torch.no_grad():
        subspace(other).key.copy_(subspace(model).key)  # the same again: nothing happens
    assert torch.equal(other(tokens()), y)


def test_a_key_that_is_written_by_hand_is_noticed(fill):
    model, other = mixed(), mixed()
    fill(attach(model, seed=1))
    fill(attach(other, seed=2))
    assert not torch.allclose(other(tokens()), model(tokens()))
    with torch.no_grad():
        subspace(other).key.copy_(subspace(model).key)
    assert torch.equal(other(tokens()), model(tokens()))


def test_a_file_brings_its_p(tmp_path, fill):
    model = mixed()
    handle = attach(model, seed=1)
    fill(handle)
    y = model(tokens())
    handle.save(tmp_path)
    fresh = mixed()
    lf.load(fresh, tmp_path)
    assert torch.equal(fresh(tokens()), y)
    attached = mixed()
    other = attach(attached, seed=2)
    attached(tokens())
    load_state(other, save_state(handle, tmp_path).parent)
    assert torch.equal(attached(tokens()), y)


def test_other_layers_and_other_numbers_are_refused():
    model = mixed()
    attach(model)
    common = subspace(model)
    good = common.key.clone()
    for place, message in ((1, "other layers"), (2, "draws other random numbers"), (12, "draws other random numbers")):
        bad = good.clone()
        bad[place] += 1000
        with torch.no_grad():
            common.key.copy_(bad)
        with pytest.raises(lf.CheckpointError, match=message):
            model(tokens())
    with torch.no_grad():
        common.key.copy_(good)
    model(tokens())


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.parametrize("eager_first", [False, True])
def test_compiled(eager_first, fill):
    torch.compiler.reset()
    model, other = mixed(), mixed()
    handle = attach(model)
    fill(handle)
    fill(attach(other, seed=9), seed=1)
    if eager_first:
        model(tokens())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(tokens())
    torch.testing.assert_close(y, model(tokens()), rtol=1e-5, atol=1e-6)
    loss_of(y).backward()
    got = [parameter.grad.clone() for parameter in handle.parameters()]
    expected = gradients(model, handle)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()), other(tokens()), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


# Training ---------------------------------------------------------------------


@BOTH
def test_it_learns_and_goes_without_a_trace(layerwise):
    model, plain = mixed(), mixed()
    handle = attach(model, 60, layerwise=layerwise)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model(tokens()))
        loss.backward()
        nn.utils.clip_grad_norm_(handle.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        y = model(tokens())
        handle.merge()
        torch.testing.assert_close(model(tokens()), y, rtol=1e-4, atol=1e-5)
        handle.unmerge()
    handle.detach()
    assert torch.equal(model(tokens()), plain(tokens()))
    assert not any(isinstance(module, Subspace) for module in model.modules())


def test_two_subspaces_add_up(fill):
    model = mixed(dtype=torch.float64)
    one = attach(model)
    two = lf.attach(model, IntrinsicDimension(d=30), SITES, name="b", seed=8)
    fill(one, 1)
    fill(two, 2)
    one.activate(["default", "b"])
    both = model(tokens())
    plain = mixed(dtype=torch.float64)
    with torch.no_grad():
        for path in SITES:
            plain.get_submodule(path).weight.add_(one.delta(path) + two.delta(path))
    torch.testing.assert_close(both, plain(tokens()), rtol=0, atol=1e-12)
