"""Adapter arithmetic: the sum exactly, its best approximation of a rank, TIES and DARE, against dense formulas."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.combining import combine
from lorafit.compress import TruncationWarning, squeeze_dense, squeeze_low_rank

Handles = dict[str, lf.Handle]
WEIGHTS = {"one": 0.7, "two": -1.3}
said = pytest.mark.filterwarnings("ignore::lorafit.compress.TruncationWarning")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict((name, nn.Linear(9, 9)) for name in ("a", "b", "c")))


def two(
    model: nn.Module, first: lf.Method, second: lf.Method, fill, targets: Any = "all-linear"
) -> dict[str, lf.Handle]:
    handles = {}
    for seed, (name, method) in enumerate((("one", first), ("two", second))):
        handles[name] = lf.attach(model, method, targets, name=name, seed=seed)
        fill(handles[name], seed)
    return handles


def best(matrix: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * s[:r] @ vh[:r]


def summed(handles: dict[str, lf.Handle], path: str) -> Tensor:
    return sum(WEIGHTS[name] * handle.delta(path) for name, handle in handles.items())


def test_the_exact_sum_on_every_layer(layer, fill) -> None:
    model = layer.model()
    r = layer.rank(2)
    handles = two(model, lf.LoRA(r=r), lf.LoRA(r=2 * r, alpha=3, rslora=True), fill, ["layer"])
    new = combine(handles["one"], WEIGHTS, name="sum")
    assert new.active == ("sum",) and new.name == "sum"
    assert new.method == lf.LoRA(r=3 * r, alpha=3 * r) and new.adapter("layer").scale == 1
    torch.testing.assert_close(new.delta("layer"), summed(handles, "layer"), atol=1e-5, rtol=1e-5)
    x = layer.input()
    got = model.layer(x)
    with new.disabled():
        base = model.layer(x)
    changes = torch.zeros_like(base)
    for name, handle in handles.items():
        handle.activate(name)
        changes = changes + WEIGHTS[name] * (model.layer(x) - base)
    torch.testing.assert_close(got, base + changes, atol=2e-5, rtol=1e-4)


METHODS: dict[str, lf.Method] = {
    "lora-plus": lf.LoRAPlus(r=2),
    "lora-fa": lf.LoRAFA(r=2),
    "vera": lf.VeRA(r=3),
    "adalora": lf.AdaLoRA(init_r=3, target_r=2),
    "delta-lora": lf.DeltaLoRA(r=2),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=2), keep=("b",)),
    "pissa": lf.LoRA(r=2, init="pissa"),
}


@pytest.mark.parametrize("how", ["exact", "svd"])
@pytest.mark.parametrize("which", METHODS)
def test_whatever_is_low_rank_can_be_summed(which, how, fill, tmp_path) -> None:
    handles = two(network(), METHODS[which], lf.LoRA(r=1), fill)
    new = combine(handles["two"], WEIGHTS, name="sum", how=how, **({"r": 9} if how == "svd" else {}))
    for path in handles["one"].sites:
        torch.testing.assert_close(new.delta(path), summed(handles, path), atol=1e-5, rtol=1e-5)
    again = lf.load(network(), new.save(tmp_path), name="sum")
    assert torch.equal(again.delta("a"), new.delta("a"))


def test_absent_sites_contribute_nothing(fill) -> None:
    model = network()
    one = lf.attach(model, lf.LoRA(r=2), ["a", "b"], name="one")
    two_ = lf.attach(model, lf.LoRA(r=3), ["b", "c"], name="two")
    fill(one, 0)
    fill(two_, 1)
    new = combine(one, WEIGHTS, name="sum")
    assert list(new.sites) == ["a", "b", "c"]
    assert [new.method_at(path).r for path in new.sites] == [2, 5, 3]
    assert all(new.adapter(path).scale == 1 for path in new.sites)
    torch.testing.assert_close(new.delta("a"), 0.7 * one.delta("a"))
    torch.testing.assert_close(new.delta("b"), 0.7 * one.delta("b") - 1.3 * two_.delta("b"))
    torch.testing.assert_close(new.delta("c"), -1.3 * two_.delta("c"))


def test_the_sum_can_be_trained_and_the_others_stay(fill) -> None:
    model = network()
    handles = two(model, lf.LoRA(r=2), lf.LoRA(r=2), fill)
    before = {name: [p.detach().clone() for p in handle.parameters()] for name, handle in handles.items()}
    new = combine(handles["one"], WEIGHTS, name="sum")
    optimizer = new.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.randn(2, 9)).square().sum().backward()
    optimizer.step()
    for name, handle in handles.items():
        assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), before[name], strict=True))
        handle.detach()
    new.detach()
    assert type(model.a) is nn.Linear


@said
@pytest.mark.parametrize("r", [1, 2, 3, None])
def test_svd_is_the_best_of_its_rank(r, fill) -> None:
    handles = two(network(), lf.LoRA(r=2), lf.LoRA(r=3), fill)
    new = combine(handles["one"], WEIGHTS, name="sum", how="svd", r=r)
    for path in new.sites:
        torch.testing.assert_close(new.delta(path), best(summed(handles, path), r or 3), atol=1e-5, rtol=1e-4)
        adapter = new.adapter(path)
        torch.testing.assert_close(adapter.A.norm(dim=1), adapter.B.norm(dim=0), atol=1e-4, rtol=1e-4)


def test_what_the_rank_leaves_out_is_said(fill) -> None:
    handles = two(network(), lf.LoRA(r=2), lf.LoRA(r=3), fill)
    with pytest.warns(TruncationWarning, match=r"relative error 0\.\d+ over all sites") as caught:
        new = combine(handles["one"], WEIGHTS, name="sum", how="svd", r=2)
    warning = caught[0].message
    assert caught[0].filename == __file__
    wanted = {
        path: (new.delta(path) - summed(handles, path)).norm() / summed(handles, path).norm() for path in new.sites
    }
    assert warning.errors == pytest.approx({path: float(value) for path, value in wanted.items()}, rel=1e-3)
    lost = sum((new.delta(path) - summed(handles, path)).square().sum() for path in new.sites)
    whole = sum(summed(handles, path).square().sum() for path in new.sites)
    assert warning.overall == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)


@said
@pytest.mark.parametrize("method", [lf.DoRA(lf.LoRA(r=2)), lf.IntrinsicDimension(d=20)], ids=lambda m: m.name)
def test_gains_and_dense_changes_need_a_rank(method, fill) -> None:
    handles = two(network(), method, lf.LoRA(r=2), fill)
    with pytest.raises(lf.MergeError, match="no exact low-rank form") as caught:
        combine(handles["one"], WEIGHTS, name="sum")
    assert 'how="svd"' in caught.value.fix and caught.value.where == "a"
    new = combine(handles["one"], WEIGHTS, name="sum", how="svd", r=4)
    torch.testing.assert_close(new.delta("b"), best(summed(handles, "b"), 4), atol=1e-5, rtol=1e-4)


def ties(changes: list[Tensor], density: float) -> Tensor:
    """The paper's algorithm 1, written out number by number."""
    kept = round(density * changes[0].numel())
    trimmed = []
    for change in changes:
        bound = change.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append([value if abs(value) >= bound else 0.0 for value in change.flatten().tolist()])
    merged = []
    for values in zip(*trimmed, strict=True):
        total = sum(values)
        agreeing = [value for value in values if value and (value > 0) == (total > 0)]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return torch.tensor(merged).view_as(changes[0])


@said
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_against_the_formula(density, fill) -> None:
    handles = two(network(), lf.LoRA(r=2), lf.LoRA(r=3), fill)
    third = lf.attach(handles["one"].model, lf.LoRA(r=2), name="three", seed=5)
    fill(third, 5)
    weights = {"one": 1.0, "two": 1.0, "three": 1.0}
    new = combine(third, weights, name="joined", how="ties", r=9, density=density)
    for path in new.sites:
        changes = [handle.delta(path) for handle in (*handles.values(), third)]
        torch.testing.assert_close(new.delta(path), ties(changes, density), atol=1e-5, rtol=1e-4)


@said
def test_dare_drops_at_random_and_keeps_the_mean(fill) -> None:
    handles = two(network(), lf.LoRA(r=2), lf.LoRA(r=3), fill)

    def merged(name: str, **options: Any) -> Tensor:
        return combine(handles["one"], {"one": 1.0}, name=name, how="dare", r=9, **options).delta("a")

    first, delta = merged("x", density=0.5, seed=3), handles["one"].delta("a")
    assert torch.equal(first, merged("y", density=0.5, seed=3))
    assert not torch.equal(first, merged("z", density=0.5, seed=4))
    kept = first.abs() > 1e-4
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(first[kept], 2 * delta[kept], atol=1e-4, rtol=1e-3)
    mean = sum(merged(f"m{seed}", density=0.5, seed=seed) for seed in range(100)) / 100
    assert (mean - delta).abs().mean() < 0.2 * delta.abs().mean()
    torch.testing.assert_close(merged("all", density=1.0, seed=0), delta, atol=1e-5, rtol=1e-4)


@said
@pytest.mark.parametrize("how", ["svd", "ties", "dare"])
def test_grouped_convolutions(how, fill) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    handles = two(model, lf.LoRA(r=2), lf.LoRA(r=4), fill, ["0"])
    with pytest.raises(lf.ConfigError, match="rank does not fit"):
        combine(handles["one"], WEIGHTS, name="odd", how=how, r=3)
    new = combine(handles["one"], WEIGHTS, name="sum", how=how, r=8, **({} if how == "svd" else {"density": 1.0}))
    if how != "ties":
        torch.testing.assert_close(new.delta("0"), summed(handles, "0"), atol=1e-5, rtol=1e-4)
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    new.merge()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_never_more_than_the_layer_has(fill) -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(9, 3), b=nn.Linear(3, 9)))
    handles = two(model, lf.LoRA(r=2), lf.LoRA(r=3), fill)
    new = combine(handles["one"], WEIGHTS, name="sum", how="svd", r=8)
    assert [new.method_at(path).r for path in new.sites] == [3, 3]


def test_squeezing_factors_is_squeezing_their_product() -> None:
    for groups in (1, 2):
        up, down = torch.randn(6, 4 // groups), torch.randn(4, 5)
        dense = torch.cat([u @ d for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True)])
        for r in (groups, 2 * groups):
            one, other = squeeze_low_rank(up, down, r, groups), squeeze_dense(dense, r, groups)
            products = [
                torch.cat([u @ d for u, d in zip(s.up.chunk(groups), s.down.chunk(groups), strict=True)])
                for s in (one, other)
            ]
            torch.testing.assert_close(*products, atol=1e-5, rtol=1e-4)
            assert one.error == pytest.approx(other.error, abs=1e-5)
            assert one.error == pytest.approx(float((products[0] - dense).norm() / dense.norm()), abs=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], type[lf.LorafitError], str]] = {
    "how": ({"how": "linear"}, lf.ConfigError, "combine.how"),
    "no weights": ({"weights": {}}, lf.ConfigError, "combine.weights"),
    "weight": ({"weights": {"one": float("nan")}}, lf.ConfigError, "combine.weights"),
    "unknown": ({"weights": {"onw": 1.0}}, lf.StateError, "no adapter of this name"),
    "taken": ({"name": "two"}, lf.ConfigError, "has an adapter of this name already"),
    "r": ({"how": "svd", "r": 0}, lf.ConfigError, "combine.r"),
    "r without use": ({"r": 3}, lf.ConfigError, "r has no meaning for how='exact'"),
    "density": ({"how": "ties", "density": 0}, lf.ConfigError, "combine.density"),
    "density without use": ({"how": "svd", "r": 2, "density": 0.5}, lf.ConfigError, "density has no meaning"),
    "seed without use": ({"how": "ties", "seed": 0}, lf.ConfigError, "seed has no meaning"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(which, fill) -> None:
    options, kind, match = REFUSED[which]
    handles = two(network(), lf.LoRA(r=2), lf.LoRA(r=3), fill)
    keys = list(handles["one"].model.state_dict())
    with pytest.raises(kind, match=match.replace(".", r"\.")) as caught:
        combine(handles["one"], **{"weights": WEIGHTS, "name": "sum", **options})
    assert caught.value.fix
    assert list(handles["one"].model.state_dict()) == keys and handles["one"].active == ("two",)


def test_merged_adapters_and_full_copies_are_refused(fill) -> None:
    model = network()
    one = lf.attach(model, lf.LoRA(r=2), ["a"], name="one", modules_to_save=["c"])
    fill(one)
    with pytest.raises(lf.MergeError, match="replaces in full") as caught:
        combine(one, {"one": 1.0}, name="sum")
    assert caught.value.where == "c"
    one.merge()
    with pytest.raises(lf.StateError, match="merged"):
        combine(one, {"one": 1.0}, name="sum")


def test_a_mixed_grouped_convolution_of_pefts(fill) -> None:
    """PEFT's A of a grouped convolution sees all channels: a sum of outputs there is, a change of the weight not."""
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2))
    handles = two(model, lf.LoRA(r=2), lf.LoRA(r=2), fill, ["0"])
    adapter = handles["two"].adapter("0")
    adapter.A = nn.Parameter(torch.randn(2, 4 * 3))
    x = torch.randn(2, 4, 7)
    with handles["one"].disabled():
        base = model(x)
    changes = 0.0
    for name, handle in handles.items():
        handle.activate(name)
        changes = changes + WEIGHTS[name] * (model(x) - base)
    combine(handles["one"], WEIGHTS, name="sum")
    torch.testing.assert_close(model(x), base + changes, atol=1e-4, rtol=1e-4)
    with pytest.raises(lf.MergeError, match="mixes the groups"):
        combine(handles["one"], WEIGHTS, name="svd", how="svd", r=2)
