"""Files of every method: what is saved comes back bit for bit, as the method that it was; contradictions are said."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafit as lf
from lorafit.delta import Dense, LowRank, Update
from lorafit.errors import CheckpointError, LorafitWarning
from lorafit.layouts.lora import alpha_for
from lorafit.method import Adapter, Method, Spot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings(
    "ignore:PEFT has no (AdaLoRA|VeRA) for layers:lorafit.LorafitWarning",
    "ignore:PEFT cannot compute DoRA on grouped convolutions:lorafit.LorafitWarning",
)


def disturb(handle: lf.Handle, seed: int = 1) -> None:
    """Other values in everything that an adapter trains, and in what Delta-LoRA keeps of an earlier step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in handle.entries().values():
            for name, tensor in adapter.state_dict(keep_vars=True).items():
                if tensor.requires_grad or name in ("A_K", "B_K"):
                    tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.1)
            if isinstance(handle.method, lf.DeltaLoRA):
                adapter.lam.fill_(handle.method.lam)


def trained(handle: lf.Handle) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in handle.named_parameters()]


def comes_back(handle: lf.Handle, again: lf.Handle, folder: Path, x: Tensor, *, restored: bool = True) -> None:
    if not restored:  # a method from outside of the package: the same function, as a plain LoRA
        assert type(again.method) is lf.LoRA
        for path in handle.sites:
            torch.testing.assert_close(again.delta(path), handle.delta(path))
        return
    assert again.method == handle.method
    assert [again.method_at(path) for path in again.sites] == [handle.method_at(path) for path in handle.sites]
    assert trained(again) == trained(handle)
    for path in handle.sites:
        assert type(again.adapter(path)) is type(handle.adapter(path))
        assert torch.equal(again.delta(path), handle.delta(path))
    assert torch.equal(again.model.eval()(x), handle.model.eval()(x))
    other = again.save(folder / "again")
    mine, theirs = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (folder / CONFIG).read_text() == (other / CONFIG).read_text()


def test_every_method_on_every_layer(member, layer, tmp_path) -> None:
    model = layer.model()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    handle = lf.attach(model, member.make(layer), ["layer"], seed=0)
    disturb(handle)
    folder = handle.save(tmp_path)
    fresh = layer.model()
    fresh.load_state_dict(weights)
    again = lf.load(fresh, folder, trainable=True)
    comes_back(handle, again, folder, layer.input(), restored=member.restored)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_method_in_every_precision(member, some_layer, dtype, tmp_path) -> None:
    model = some_layer.model().to(dtype)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    handle = lf.attach(model, member.make(some_layer), ["layer"], seed=0)
    disturb(handle)
    folder = handle.save(tmp_path)
    fresh = some_layer.model().to(dtype)
    fresh.load_state_dict(weights)
    again = lf.load(fresh, folder, trainable=True)
    assert all(parameter.dtype == torch.promote_types(dtype, torch.float32) for parameter in again.parameters())
    x = some_layer.input()
    comes_back(handle, again, folder, x.to(dtype) if x.is_floating_point() else x, restored=member.restored)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict((name, nn.Linear(6, 6)) for name in ("a", "b", "c", "d")))


def saved(method: Method, folder: Path, **options: Any) -> tuple[lf.Handle, Path]:
    handle = lf.attach(network(), method, "all-linear", seed=0, **options)
    disturb(handle)
    return handle, handle.save(folder)


def change(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_shared_adapters_share_again(tmp_path) -> None:
    _, folder = saved(lf.LoRADrop(lf.LoRA(r=2), keep=("b",)), tmp_path)
    again = lf.load(network(), folder, trainable=True)
    assert again.num_trainable == 2 * 2 * (6 + 6)
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["a", "b", "c", "d"] and len(load_file(folder / WEIGHTS)) == 8
    assert again.adapter("c").common is again.adapter("a") and again.adapter("d").common is again.adapter("a")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_shared_adapters_that_started_elsewhere_share_again(init, dora, tmp_path) -> None:
    plain = lf.LoRA(r=2, init=init)
    method = lf.LoRADrop(lf.DoRA(plain) if dora else plain, keep=("b",))
    model, x = network(), torch.randn(5, 6)
    sample = lf.Sample([x], lambda model, batch: model(batch).square().sum()) if init == "lora_ga" else None
    handle = lf.attach(model, method, ["a", "b", "c", "d"], seed=0, sample=sample)
    disturb(handle)
    folder = handle.save(tmp_path / "x")
    other = network()
    again = lf.load(other, folder, trainable=True)
    assert again.method == method and again.num_trainable == handle.num_trainable
    inner = [again.adapter(path).inner if dora else again.adapter(path) for path in "acd"]
    assert inner[1].common is inner[0] and inner[2].common is inner[0]
    torch.testing.assert_close(other(x), model(x))
    kept, loaded = dict(handle.named_parameters()), dict(again.named_parameters())
    assert kept.keys() == loaded.keys() and all(torch.equal(kept[key], loaded[key]) for key in kept)


def test_sites_without_an_adapter_are_absent(tmp_path) -> None:
    _, folder = saved(lf.LoRADrop(lf.LoRA(r=2), keep=("b", "d"), rest="freeze"), tmp_path)
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == ["b", "d"]
    assert list(lf.load(network(), folder).sites) == ["b", "d"]


def test_a_share_that_was_edited_is_set_aside(tmp_path) -> None:
    _, folder = saved(lf.LoRADrop(lf.LoRA(r=2), keep=("b",)), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.c.lora_A.weight"][0, 0] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.warns(LorafitWarning, match=r"is set aside[\s\S]*as LoRA\(r=2[\s\S]*A at c"):
        again = lf.load(network(), folder, trainable=True)
    assert again.method == lf.LoRA(r=2, alpha=4) and again.num_trainable == 4 * 24


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_looks_at_weights_does_not_run_when_loading(init, tmp_path) -> None:
    handle, folder = saved(lf.LoRA(r=2, init=init), tmp_path)
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(math.inf)  # a decomposition of this would fail
    again = lf.load(other, folder, trainable=True)
    assert again.method.init == init
    for key, value in handle.adapter("a").state_dict().items():
        assert torch.equal(again.adapter("a").state_dict()[key], value)


def test_a_pruned_adalora_comes_back(tmp_path) -> None:
    for method in (lf.AdaLoRA(init_r=3, target_r=2), lf.DoRA(lf.AdaLoRA(init_r=3, target_r=2))):
        handle = lf.attach(network(), method, "all-linear", seed=0)
        for k, path in enumerate(handle.sites):
            adapter = handle.adapter(path)
            inner = adapter.inner if isinstance(method, lf.DoRA) else adapter
            inner.resize({"P": torch.Size((6, k)), "lam": torch.Size((k,)), "Q": torch.Size((k, 6))})
        disturb(handle)
        folder = handle.save(tmp_path / method.name)
        comes_back(handle, lf.load(network(), folder, trainable=True), folder, torch.randn(2, 6))


def test_ranks_and_alphas_of_single_sites_come_back(tmp_path) -> None:
    for method in (
        lf.LoRA(r=2, alpha=4),
        lf.LoRA(r=2, init="pissa", rslora=True),
        lf.DoRA(lf.LoRAFA(r=2)),
        lf.DeltaLoRA(r=2),
    ):
        options: dict[str, Any] = {"rank_pattern": {"a": 3, "b": 1}, "alpha_pattern": {"b": 7.5, "c": 0.3}}
        handle, folder = saved(method, tmp_path / method.name, **options)
        comes_back(handle, lf.load(network(), folder, trainable=True), folder, torch.randn(2, 6))


def test_a_projection_left_out_of_the_file_is_drawn_again(tmp_path) -> None:
    for method in (lf.VeRA(r=4, save_projection=False), lf.DoRA(lf.VeRA(r=4, save_projection=False))):
        handle, folder = saved(method, tmp_path / method.name)
        assert sum(value.numel() for value in load_file(folder / WEIGHTS).values()) < 4 * (6 + 4 + 6) + 2
        comes_back(handle, lf.load(network(), folder, trainable=True), folder, torch.randn(2, 6))


def test_training_goes_on_as_the_method(tmp_path) -> None:
    for method in (lf.LoRAFA(r=2), lf.LoRAPlus(r=2, ratio=3.0), lf.DeltaLoRA(r=2, start=0)):
        _, folder = saved(method, tmp_path / method.name)
        again = lf.load(network(), folder, trainable=True)
        optimizer = again.optimizer(torch.optim.SGD, lr=0.1)
        before = {key: value.clone() for key, value in again.adapter("a").state_dict().items()}
        again.model.train()(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        after = again.adapter("a").state_dict()
        changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
        assert changed == ({"B"} if isinstance(method, lf.LoRAFA) else {"A", "B"})
        rates = {group["lr"] for group in optimizer.param_groups}
        assert rates == ({0.1, 0.1 * 3.0} if isinstance(method, lf.LoRAPlus) else {0.1})
        frozen = lf.load(network(), folder)
        assert frozen.method == method and not any(p.requires_grad for p in frozen.model.parameters())


# What contradicts the key "lorafit"


EDITS: dict[str, tuple[Method, dict[str, Any], Method]] = {
    "alpha": (lf.LoRAFA(r=2), {"lora_alpha": 9}, lf.LoRA(r=2, alpha=9)),
    "alpha of DoRA": (lf.DoRA(lf.LoRAFA(r=2)), {"lora_alpha": 9}, lf.DoRA(lf.LoRA(r=2, alpha=9))),
    "alpha pattern": (lf.LoRAPlus(r=2), {"alpha_pattern": {"c": 1}}, lf.LoRA(r=2, alpha=4)),
    "rslora": (lf.LoRAFA(r=2), {"use_rslora": True}, lf.LoRA(r=2, alpha=4, rslora=True)),
    "dropout": (lf.LoRAPlus(r=2, dropout=0.1), {"lora_dropout": 0.2}, lf.LoRA(r=2, alpha=4, dropout=0.2)),
    "init_r": (
        lf.AdaLoRA(init_r=3, target_r=2, alpha=6),
        {"lora_alpha": 3},
        lf.AdaLoRA(3, 2, alpha=3, total_steps=1, warmup=0, final=0),
    ),
    "d_initial": (lf.VeRA(r=4), {"d_initial": 0.3}, lf.VeRA(r=4, d_init=0.3)),
}


@pytest.mark.parametrize("which", EDITS)
def test_settings_of_pefts_that_were_edited_count_and_it_is_said(which, tmp_path) -> None:
    method, changes, read = EDITS[which]
    _, folder = saved(method, tmp_path)
    change(folder, **changes)
    with pytest.warns(LorafitWarning) as caught:
        again = lf.load(network(), folder)
    texts = [str(each.message) for each in caught]
    assert any("differs from the config that was saved" in text for text in texts)
    assert any(
        f'key "lorafit" says is set aside, and the adapter is used as PEFT reads it, as {read}' in t for t in texts
    )
    assert again.method == read


RECORDS: dict[str, Any] = {
    "no object": "lora",
    "no method": {"x": 1},
    "unknown method": {"method": {"method": "lora-x"}},
    "unknown field": {"method": {"method": "lora-fa", "shiny": 1}},
    "a value out of range": {"method": {"method": "lora-fa", "r": -1}},
    "sites are a list": {"method": {"method": "lora-fa", "r": 2}, "sites": [1]},
    "another method": {"method": {"method": "vera", "r": 2}},
    "another rank": {"method": {"method": "lora-fa", "r": 3}},
    "another kind": {"method": {"method": "dora", "inner": {"method": "lora", "r": 2}}},
    "twice the rank": {"method": {"method": "delta-lora", "r": 2}, "lam": 2.0},
    "no lam": {"method": {"method": "delta-lora", "r": 1, "alpha": 2}},
    "keep of other layers": {"method": {"method": "lora-drop", "inner": {"method": "lora", "r": 2}, "keep": ["z"]}},
}


@pytest.mark.parametrize("which", RECORDS)
def test_a_record_that_does_not_fit_is_set_aside_and_said(which, tmp_path) -> None:
    handle, folder = saved(lf.LoRAFA(r=2), tmp_path)
    change(folder, lorafit=RECORDS[which])
    with pytest.warns(LorafitWarning, match="is set aside") as caught:
        again = lf.load(network(), folder)
    assert len(caught) == 1 and caught[0].filename == __file__ and str(folder / CONFIG) in str(caught[0].message)
    assert again.method == lf.LoRA(r=2, alpha=4)
    assert torch.equal(again.delta("a"), handle.delta("a"))


@pytest.mark.parametrize("method", [lf.DoRA(lf.VeRA(r=4)), lf.IntrinsicDimension(d=20)], ids=lambda m: m.name)
@pytest.mark.parametrize("record", [None, {"x": 1}, {"method": {"method": "lora"}, "paths": ["a"]}, "x"], ids=str)
def test_a_file_of_our_own_type_is_nothing_without_its_record(method, record, tmp_path) -> None:
    _, folder = saved(method, tmp_path)
    change(folder, lorafit=record)
    with pytest.raises(CheckpointError) as caught:
        lf.load(network(), folder)
    assert caught.value.where and caught.value.fix


OWN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("base_model.model.b.inner.b"), r"missing key[\s\S]*b\.inner\.b"),
    "unexpected": (lambda t: t.update({"base_model.model.b.inner.c": torch.ones(2)}), r"unexpected key[\s\S]*inner\.c"),
    "shape": (lambda t: t.update({"base_model.model.b.m": torch.ones(5)}), r"wrong shape[\s\S]*b\.m[\s\S]*\(6,\)"),
    "infinite": (lambda t: t["base_model.model.b.m"].fill_(math.nan), r"not a number"),
    "elsewhere": (lambda t: t.update({"base_model.model.z.m": torch.ones(6)}), r"unexpected key[\s\S]*z\.m"),
}


@pytest.mark.parametrize("which", OWN)
def test_broken_files_of_our_own_type(which, tmp_path) -> None:
    how, match = OWN[which]
    _, folder = saved(lf.DoRA(lf.VeRA(r=4)), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    how(tensors)
    save_file(tensors, folder / WEIGHTS)
    model = network()
    with pytest.raises(CheckpointError, match=match):
        lf.load(model, folder)
    assert "_lorafit" not in vars(model)


# Methods from outside of this package


@dataclass(frozen=True)
class Diagonal(Method):
    """A method that nobody here knows: two vectors around a random pair, and a scale of its own."""

    name = "diagonal"
    paper = "none"
    trains = "u, v"

    r: int = 2
    dense: bool = False

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        return DiagonalAdapter(spot, self.r, self.dense)

    def num_trainable(self, shapes: Iterable[Any]) -> int:
        return 0

    def at(self, *, r: int | None = None, alpha: float | None = None) -> Method:
        return self

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name,)


class DiagonalAdapter(Adapter):
    def __init__(self, spot: Spot, r: int, dense: bool) -> None:
        super().__init__()
        out, inn, groups, _ = spot.shape
        self.A, self.B = nn.Parameter(torch.randn(r, inn)), nn.Parameter(torch.randn(out, r // groups))
        self.u, self.v = nn.Parameter(torch.randn(out)), nn.Parameter(torch.randn(r))
        self.groups, self.dense = groups, dense

    def update(self, weight: Callable[[], Tensor]) -> Update:
        delta = LowRank(self.B, self.A, mid=self.v, out=self.u, scale=1 / 3, groups=self.groups)
        return Update(Dense(delta.dense()) if self.dense else delta)


def test_a_method_from_outside_is_written_as_plain_lora(some_layer, tmp_path) -> None:
    model = some_layer.model()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    handle = lf.attach(model, Diagonal(r=some_layer.rank(2)), ["layer"])
    folder = handle.save(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["lorafit"] == {"method": None, "trained": "diagonal"}
    fresh = some_layer.model()
    fresh.load_state_dict(weights)
    again = lf.load(fresh, folder)
    assert isinstance(again.method, lf.LoRA) and again.adapter("layer").scale == 1 / 3
    torch.testing.assert_close(again.delta("layer"), handle.delta("layer"))


def test_a_dense_method_from_outside_has_no_place(tmp_path) -> None:
    handle = lf.attach(network(), Diagonal(dense=True), "all-linear")
    with pytest.raises(CheckpointError, match="that a file of PEFT's can hold") as caught:
        handle.save(tmp_path)
    assert "merge_and_detach" in caught.value.fix and not any(tmp_path.iterdir())


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_gives_the_scale_to_the_last_bit(rslora) -> None:
    generator = torch.Generator().manual_seed(0)
    for r in (1, 2, 3, 5, 7, 8, 12, 48, 100):
        divisor = math.sqrt(r) if rslora else r
        for alpha in [1, 2, 16, 0.1, 0.3, 1e-7, 12345, 2 / 3, *torch.rand(50, generator=generator).tolist()]:
            found = alpha_for(alpha / divisor, r, rslora)
            assert found / divisor == alpha / divisor
    assert isinstance(alpha_for(2.0, 8, False), int)
