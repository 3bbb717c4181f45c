"""LoRA-drop (Zhou et al. 2024): the score, the choice, the sharing."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafit as lf
from lorafit.importance import importance
from lorafit.layers import Shape
from lorafit.methods import describe, revive
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.dora import DoRA
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_drop import BorrowingAdapter, LoRADrop
from lorafit.methods.lora_plus import LoRAPlus
from lorafit.methods.vera import VeRA

TRIAL = LoRADrop(LoRA(r=2), per_kind=False)
PATHS = ["0.q", "0.v", "0.up", "1.q", "1.v", "1.up"]


def model() -> nn.Sequential:
    """Two blocks: q and v (6, 6), up (5, 6), the output of up is not used further on."""
    torch.manual_seed(3)

    def block() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6, bias=False), "up": nn.Linear(6, 5)})

    class Blocks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            total = x.new_zeros(())
            for part in self:
                x = torch.tanh(part["v"](torch.tanh(part["q"](x))))
                total = total + part["up"](x).square().mean()
            return total

    return Blocks(OrderedDict({"0": block(), "1": block()}))


def attached(method: lf.Method, fill: Callable[..., None] | None = None) -> lf.Handle:
    handle = lf.attach(model(), method, seed=0)
    if fill is not None:
        fill(handle)
    return handle


def kept(*paths: str, **changes: Any) -> LoRADrop:
    return dataclasses.replace(TRIAL, keep=paths, **changes)


def batches(count: int = 3, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 6, generator=generator) for _ in range(count)]


# The score


@pytest.mark.parametrize("method", [TRIAL, LoRADrop(DoRA(LoRA(r=2)))], ids=["lora", "dora"])
def test_the_score_is_the_mean_squared_norm_of_what_the_update_puts_out(method: LoRADrop, fill: Any) -> None:
    handle = attached(method, fill)
    inputs: dict[str, list[Tensor]] = {path: [] for path in PATHS}
    hooks = [
        handle.sites[path].module.register_forward_pre_hook(lambda _, x, path=path: inputs[path].append(x[0].detach()))
        for path in PATHS
    ]
    for batch in batches():
        handle.model(batch)
    for hook in hooks:
        hook.remove()
    g = {
        path: sum(((x.double() @ handle.delta(path).double().T) ** 2).sum().item() for x in inputs[path]) / 6
        for path in PATHS
    }
    found = importance(handle, batches())
    assert list(found) == PATHS
    assert found == pytest.approx({path: g[path] / math.fsum(g.values()) for path in PATHS}, rel=1e-5)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)


def test_the_score_leaves_the_model_as_it_was_even_when_it_fails(fill: Any) -> None:
    handle = attached(LoRADrop(LoRA(r=2, dropout=0.5)), fill)
    handle.model.train()
    handle.model[0]["q"].eval()
    before = {key: value.clone() for key, value in handle.model.state_dict().items()}
    modes = [module.training for module in handle.model.modules()]
    assert importance(handle, batches()) == importance(handle, batches()), "no dropout"

    def broken(model: nn.Module, batch: Any) -> None:
        model(batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        importance(handle, batches(), forward=broken)
    assert modes == [module.training for module in handle.model.modules()]
    assert not any(module._forward_hooks for module in handle.model.modules())
    assert all(torch.equal(before[key], value) for key, value in handle.model.state_dict().items())
    assert handle.model(batches()[0]).requires_grad


def test_batches_may_be_mappings_tuples_or_tensors(fill: Any) -> None:
    handle = attached(TRIAL, fill)
    plain = importance(handle, batches())
    assert importance(handle, [(batch,) for batch in batches()]) == plain
    assert importance(handle, [{"input": batch} for batch in batches()], forward=lambda m, b: m(b["input"])) == plain
    mask = torch.ones(2, 4)
    mask[:, 2:] = 0
    first = [{"input": batch, "attention_mask": mask} for batch in batches()]
    cut = importance(handle, first, forward=lambda m, b: m(b["input"]))
    assert cut == pytest.approx(importance(handle, [batch[:, :2] for batch in batches()]), rel=1e-5)
    assert importance(handle, batches(), mask=lambda batch: mask) == pytest.approx(cut, rel=1e-6)
    assert importance(handle, first, forward=lambda m, b: m(b["input"].flatten(0, 1))) == pytest.approx(cut, rel=1e-5)
    with pytest.raises(lf.DataError, match=r"mask does not fit(.|\n)*0\.q"):
        importance(handle, first, forward=lambda m, b: m(b["input"][:, :3]))


def test_padding_changes_no_score(fill: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    handle = lf.attach(LlamaForCausalLM(config), TRIAL, targets=["q_proj", "down_proj", "embed_tokens"], seed=0)
    fill(handle, std=0.1)

    def batch(pad: int, *, left: bool = False) -> dict[str, Tensor]:
        ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(1))
        spare = torch.zeros(2, pad, dtype=torch.int64)
        ones = torch.ones_like(ids)
        parts = ([spare, ids], [spare, ones]) if left else ([ids, spare], [ones, spare])
        made = {"input_ids": torch.cat(parts[0], 1), "attention_mask": torch.cat(parts[1], 1)}
        return {**made, "position_ids": (made["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    plain = importance(handle, [batch(0)])
    assert min(plain.values()) > 0
    for padded in (batch(3), batch(7), batch(4, left=True)):
        assert importance(handle, [padded]) == pytest.approx(plain, rel=1e-4)
    blind = importance(handle, [batch(7)], mask=lambda batch: None)
    assert blind != pytest.approx(plain, rel=1e-2), "without the mask padding would count"


def test_padding_changes_no_score_of_a_classifier(fill: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    handle = lf.attach(BertForSequenceClassification(config), LoRADrop(DoRA(LoRA(r=2))), seed=0)
    fill(handle, std=0.1)
    assert "bert.pooler.dense" in handle.sites, "a layer that sees one vector of each sample"
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    plain = importance(handle, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    spare = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.cat([torch.ones_like(ids), spare], 1)
    padded = importance(handle, [{"input_ids": torch.cat([ids, spare], 1), "attention_mask": mask}])
    assert padded == pytest.approx(plain, rel=1e-3)
    handle.model.bfloat16()
    assert importance(handle, [{"input_ids": ids}]) == pytest.approx(plain, rel=0.1, abs=1e-3)


@pytest.mark.parametrize("inner", [LoRA(r=2), DoRA(LoRA(r=2))], ids=["lora", "dora"])
def test_the_files_hold_a_shared_pair_under_every_site(inner: lf.Method, fill: Any, tmp_path: Any) -> None:
    handle = attached(LoRADrop(inner, keep=("1.v",)), fill)
    fresh = model()
    loaded = lf.load(fresh, handle.save(tmp_path))
    assert list(loaded.sites) == PATHS
    assert torch.allclose(fresh(batches()[0]), handle.model(batches()[0]), rtol=1e-6)


def test_convolutions_are_scored_by_their_positions(fill: Any) -> None:
    torch.manual_seed(0)
    handle = lf.attach(nn.Sequential(nn.Conv1d(3, 4, 3, padding=1)), TRIAL, targets=["0"], seed=0)
    other = lf.attach(handle.model, TRIAL, targets=["0"], seed=1, name="other")
    for each in (handle, other):
        fill(each)
    with pytest.raises(lf.StateError, match="not active"):
        importance(handle, [torch.randn(2, 3, 4)])
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert importance(other, [x], mask=lambda batch: mask) == {"0": 1.0}


def test_an_adapter_that_learnt_nothing_has_no_score() -> None:
    with pytest.raises(lf.DataError, match="learnt nothing"):
        importance(attached(TRIAL), batches())
    with pytest.raises(lf.DataError, match="nothing to score"):
        importance(attached(TRIAL), [])


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("wrap", [lambda inner: inner, DoRA], ids=["lora", "dora"])
def test_rounding_is_no_score(init: str, wrap: Any, fill: Any) -> None:
    handle = attached(LoRADrop(wrap(LoRA(r=2, init=init))))
    with pytest.raises(lf.DataError, match="learnt nothing"):
        importance(handle, batches())
    fill(handle, std=1e-3)
    assert len(importance(handle, batches())) == 6


def test_a_mask_that_leaves_nothing_is_said(fill: Any) -> None:
    handle = attached(TRIAL, fill)
    nothing, something = torch.zeros(2, 4), torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(lf.DataError, match=r"mask leaves nothing(.|\n)*3 batches"):
        importance(handle, batches(), mask=lambda batch: nothing)
    masks = iter([nothing, something, nothing])
    assert importance(handle, batches(), mask=lambda batch: next(masks))


@pytest.mark.parametrize("wrong", [5, None, {"input": torch.zeros(2, 4, 6)}, "batches"], ids=type)
def test_what_is_no_iterable_of_batches_is_refused(wrong: Any) -> None:
    with pytest.raises(lf.ConfigError, match=r"importance\(handle, \[batch\]\)"):
        importance(attached(TRIAL), wrong)
    with pytest.raises(lf.ConfigError, match=r"Sample\(\[batch\]\)") as caught:
        lf.Sample(wrong)
    assert caught.value.where == "Sample.batches"


# The choice

SCORES = {"0.q": 0.3, "0.v": 0.05, "0.up": 0.05, "1.q": 0.3, "1.v": 0.3, "1.up": 0.0}


@pytest.mark.parametrize(
    ("threshold", "wanted"),
    [
        (0.2, ("0.q",)),
        (0.3, ("0.q",)),
        (0.31, ("0.q", "1.q")),
        (0.9, ("0.q", "1.q", "1.v")),
        (0.91, ("0.q", "0.v", "1.q", "1.v")),
        (0.99, ("0.q", "0.v", "0.up", "1.q", "1.v")),
        (1.0, tuple(SCORES)),
    ],
)
def test_the_smallest_prefix_is_kept_and_of_equal_ones_the_first(threshold: float, wanted: tuple[str, ...]) -> None:
    assert dataclasses.replace(TRIAL, threshold=threshold).chosen(SCORES).keep == wanted


def test_each_kind_of_module_may_choose_by_itself() -> None:
    method = dataclasses.replace(TRIAL, threshold=0.6, per_kind=True)
    assert method.chosen(SCORES).keep == ("0.q", "0.up", "1.q", "1.v")
    assert dataclasses.replace(method, threshold=1).chosen(SCORES).keep == tuple(SCORES)


@pytest.mark.parametrize("per_kind", [False, True])
def test_a_larger_threshold_never_drops_a_kept_site(per_kind: bool) -> None:
    chance = random.Random(0)
    for _ in range(200):
        count = chance.randint(1, 12)
        raw = [chance.choice([0.0, 1.0, chance.random(), chance.random() ** 8]) for _ in range(count)]
        raw[0] += 1e-3
        scores = {f"{place}.{chance.choice('qv')}": value / math.fsum(raw) for place, value in enumerate(raw)}
        before: set[str] = set()
        for threshold in sorted({*(chance.uniform(1e-6, 1) for _ in range(8)), 0.5, 1.0}):
            chosen = dataclasses.replace(TRIAL, threshold=threshold, per_kind=per_kind).chosen(scores)
            now = set(chosen.keep or ())
            assert before <= now
            assert per_kind or math.fsum(scores[path] for path in now) >= threshold - 1e-6
            before = now
        assert before == set(scores)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": 0.0, "b": 0.0}, "learnt nothing"),
        ({"a": 0.5, "b": 0.4}, "no importances"),
        ({"a": 1.5, "b": -0.5}, "no importances"),
        ({"a": math.nan, "b": 1.0}, "no importances"),
        ({"a": math.inf}, "no importances"),
        ({}, "no importances"),
    ],
)
def test_scores_that_are_none_are_refused(scores: dict[str, float], message: str) -> None:
    with pytest.raises(lf.DataError, match=message):
        TRIAL.chosen(scores)


def test_a_choice_survives_json() -> None:
    chosen = TRIAL.chosen(SCORES)
    assert revive(json.loads(json.dumps(describe(chosen)))) == chosen


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0},
        {"threshold": 1.1},
        {"threshold": "most"},
        {"sample": 0.0},
        {"sample": True},
        {"rest": "forget"},
        {"per_kind": 1},
        {"keep": ["0.q"]},
        {"keep": (1,)},
        {"inner": VeRA(r=4)},
        {"inner": AdaLoRA()},
        {"inner": LoRADrop()},
        {"inner": LoRAPlus()},
        {"inner": DoRA(VeRA(r=4))},
        {"inner": "lora"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(lf.ConfigError, match=rf"LoRADrop\.{name}(.|\n)*fix:"):
        LoRADrop(**change)


# The sharing


def test_threshold_1_is_lora(fill: Any) -> None:
    plain, dropped = attached(LoRA(r=2)), attached(kept(*PATHS))
    assert dict(plain.named_parameters()).keys() == dict(dropped.named_parameters()).keys()
    for first, second in zip(plain.parameters(), dropped.parameters(), strict=True):
        assert torch.equal(first, second)
    phase_one = attached(TRIAL)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), phase_one.parameters(), strict=True))
    for handle in (plain, dropped):
        fill(handle)
    assert torch.equal(plain.model(batches()[0]), dropped.model(batches()[0]))


def test_the_count_is_the_papers(fill: Any) -> None:
    shapes = {path: Shape(5 if path.endswith("up") else 6, 6) for path in PATHS}
    handle = attached(kept("1.v"))
    assert handle.num_trainable == kept("1.v").count(shapes) == 2 * (12 + 12 + 11)
    frozen = kept("1.v", rest="freeze")
    assert attached(frozen).num_trainable == frozen.count(shapes) == 2 * 12
    dora = LoRADrop(DoRA(LoRA(r=2)), keep=("1.v",))
    assert attached(dora).num_trainable == dora.count(shapes) == 2 * (12 + 12 + 11) + 4 * 6 + 2 * 5
    assert attached(TRIAL).num_trainable == TRIAL.count(shapes) == TRIAL.num_trainable(shapes.values())
    with pytest.raises(lf.ConfigError, match="depends on their paths"):
        kept("1.v").num_trainable(shapes.values())


def test_shared_tensors_are_one_storage_and_their_gradients_add_up(fill: Any) -> None:
    apart, shared = attached(LoRA(r=2)), attached(kept("1.v"))
    fill(shared)
    assert isinstance(shared.adapter("1.q"), BorrowingAdapter)
    owner_of = {"0.q": "0.q", "0.v": "0.q", "1.q": "0.q", "0.up": "0.up", "1.up": "0.up", "1.v": "1.v"}
    with torch.no_grad():
        for path, owner in owner_of.items():
            for name in "AB":
                apart.adapter(path).get_parameter(name).copy_(shared.adapter(owner).get_parameter(name))
    losses = [handle.model(batches()[0]) for handle in (apart, shared)]
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for owner in set(owner_of.values()):
        for name in "AB":
            users = [path for path in PATHS if owner_of[path] == owner]
            added = sum(apart.adapter(path).get_parameter(name).grad for path in users)
            grad = shared.adapter(owner).get_parameter(name).grad
            assert torch.allclose(grad, added, rtol=1e-4, atol=1e-7)
    assert {key for key, _ in shared.named_parameters()} == {f"{p}.{n}" for p in set(owner_of.values()) for n in "AB"}


def test_freeze_leaves_sites_untouched(fill: Any) -> None:
    handle = attached(kept("1.v", "1.q", rest="freeze"), fill)
    assert list(handle.sites) == ["1.q", "1.v"]
    assert type(handle.model[0]["q"]) is nn.Linear
    seen: list[bool] = []
    handle.model[1]["q"].register_forward_pre_hook(lambda _, x: seen.append(x[0].requires_grad))
    handle.model(batches()[0]).backward()
    assert seen == [False], "backward ends at the lowest kept site"


def test_dora_inside_shares_directions_and_no_magnitudes(fill: Any) -> None:
    base = model()
    handle = attached(LoRADrop(DoRA(LoRA(r=2)), keep=("1.v",)))
    x = batches()[0]
    assert torch.allclose(handle.model(x), base(x), rtol=1e-6)
    first, second = handle.adapter("0.q"), handle.adapter("0.v")
    assert isinstance(second.inner, BorrowingAdapter) and second.inner.common is first.inner
    assert not torch.equal(first.m, second.m)
    assert {key for key, _ in handle.named_parameters()} == {
        *(f"{path}.m" for path in PATHS),
        *(f"{path}.inner.{name}" for path in ("0.q", "0.up", "1.v") for name in "AB"),
    }
    fill(handle, std=0.1)
    for path in PATHS:
        weight = handle.sites[path].weight().detach() + handle.delta(path)
        assert torch.allclose(weight.norm(dim=1), handle.adapter(path).m.abs(), rtol=1e-5)


def test_only_what_is_equal_is_shared() -> None:
    handle = lf.attach(model(), kept("1.v"), rank_pattern={"0.v": 1, "1.q": 4}, seed=0)
    assert not any(isinstance(handle.adapter(path), BorrowingAdapter) for path in ("0.q", "0.v", "1.q", "0.up"))
    assert isinstance(handle.adapter("1.up"), BorrowingAdapter)


def test_names_that_are_no_sites_are_refused_with_near_ones() -> None:
    before = model().state_dict()
    handle_free = model()
    with pytest.raises(lf.ConfigError, match=r"keep names layers(.|\n)*'1\.w'(.|\n)*1\.v"):
        lf.attach(handle_free, kept("1.v", "1.w"))
    assert handle_free.state_dict().keys() == before.keys()


def test_dropout_of_a_borrowed_adapter_is_the_owners() -> None:
    handle = attached(LoRADrop(LoRA(r=2, dropout=0.25), keep=()))
    assert {handle.adapter(path).dropout for path in PATHS} == {0.25}


@pytest.mark.parametrize("inner", [LoRA(r=2), DoRA(LoRA(r=2))], ids=["lora", "dora"])
def test_sharing_survives_copies_pickles_and_state_dicts(inner: lf.Method, fill: Any) -> None:
    handle = attached(LoRADrop(inner, keep=("1.v",)), fill)
    x = batches()[0]
    expected = handle.model(x)
    copied = copy.deepcopy(handle)
    stored = io.BytesIO()
    torch.save(handle.model.state_dict(), stored)
    one_copy = [key for key in handle.model.state_dict() if key.endswith((".A", ".B"))]
    assert len(one_copy) == 6, "three adapters for six sites"
    for other in (copied.model, copy.deepcopy(handle.model)):
        assert torch.equal(other(x), expected)
        adapters = [other[0]["q"].adapters["default"], other[0]["v"].adapters["default"]]
        owner, borrower = (a.inner if isinstance(inner, DoRA) else a for a in adapters)
        assert borrower.common is owner
    stored.seek(0)
    fresh = attached(LoRADrop(inner, keep=("1.v",)))
    fresh.model.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(fresh.model(x), expected)
    handle.model.to(torch.float64)
    assert torch.allclose(handle.model(x.double()).float(), expected, rtol=1e-5)


def test_a_borrowed_adapter_pickles_with_its_owner() -> None:
    import pickle

    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    handle = lf.attach(layers, LoRADrop(LoRA(r=2), keep=()), targets=["0", "1"], seed=0)
    with torch.no_grad():
        handle.adapter("0").B.normal_()
    x = torch.randn(3, 6)
    again = pickle.loads(pickle.dumps(layers))
    assert torch.equal(again(x), layers(x))
    assert again[1].adapters["default"].common is again[0].adapters["default"]


def test_merging_and_taking_out(fill: Any) -> None:
    handle = attached(kept("1.v"), fill)
    x = batches()[0]
    base = {key: value.clone() for key, value in model().state_dict().items()}
    expected = handle.model(x)
    handle.merge()
    assert torch.allclose(handle.model(x), expected, rtol=1e-5)
    handle.unmerge()
    handle.detach()
    assert all(torch.equal(base[key], value) for key, value in handle.model.state_dict().items())


def test_lora_plus_goes_around_it() -> None:
    handle = attached(LoRAPlus(ratio=4.0, inner=kept("1.v")))
    groups = handle.param_groups(lr=1e-3)
    assert sorted((group["lr"], len(group["params"])) for group in groups) == [(1e-3, 3), (4e-3, 3)]


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_the_model_compiles_to_one_graph() -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    handle = lf.attach(layers, LoRADrop(LoRA(r=2), keep=()), targets=["0", "1"], seed=0)
    with torch.no_grad():
        handle.adapter("0").B.normal_()
    x = torch.randn(3, 6)
    compiled = torch.compile(layers, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layers(x), rtol=1e-6)


# Initialisers that learn from data first


def learning(init: str, *paths: str, wrap: Any = None, **options: Any) -> LoRADrop:
    inner = LoRA(r=2, alpha=4, init=init)
    return LoRADrop(inner if wrap is None else wrap(inner), keep=paths, **options)


def sample(count: int = 3) -> lf.Sample:
    """Readable once, as what comes out of a loader often is."""
    sizes = torch.tensor([4.0, 0.1, 0.1, 0.1, 0.1, 0.1])  # the first site's inputs have one direction above all
    return lf.Sample(iter([batch * sizes for batch in batches(count)]), lambda model, batch: model(batch))


def ranks(handle: lf.Handle) -> dict[str, int]:
    adapters = {path: handle.adapter(path) for path in handle.sites}
    plain = {path: each.inner if isinstance(handle.method.inner, DoRA) else each for path, each in adapters.items()}
    return {path: len(each.A) for path, each in plain.items() if not isinstance(each, BorrowingAdapter)}


@pytest.mark.parametrize("wrap", [None, DoRA], ids=["lora", "dora"])
def test_eva_moves_ranks_between_kept_sites_alone(wrap: Any, fill: Any, tmp_path: Any) -> None:
    kept = ("0.q", "0.up", "1.v")
    method = learning("eva", *kept, wrap=wrap)
    handle = lf.attach(model(), method, seed=0, sample=sample())
    found = ranks(handle)
    assert set(found) == {*kept, "0.v", "1.up"}
    assert sum(found[path] for path in kept) == 6 and min(found.values()) >= 1
    assert found["0.v"] == found["1.up"] == 2, "shared pairs keep their rank"
    assert found != dict.fromkeys(found, 2), "ranks have moved"
    frozen = lf.attach(model(), dataclasses.replace(method, rest="freeze"), seed=0, sample=sample())
    assert ranks(frozen) == {path: found[path] for path in kept}
    x = batches()[0]
    assert torch.allclose(handle.model(x), model()(x), rtol=1e-6), "B = 0"
    fill(handle, std=0.1)
    again = lf.load(model(), handle.save(tmp_path), trainable=True)
    assert again.method == method and again.num_trainable == handle.num_trainable and ranks(again) == found


def test_a_shared_pair_has_the_directions_of_its_first_site() -> None:
    handle = lf.attach(model(), learning("eva", "0.q"), seed=0, sample=sample(1))
    alone = lf.attach(model(), LoRA(r=2, init="eva"), ["0.v"], seed=0, sample=sample(1))
    assert torch.allclose(handle.adapter("0.v").A, alone.adapter("0.v").A, atol=1e-5)
    assert handle.adapter("1.q").common is handle.adapter("0.v")


@pytest.mark.parametrize("rest", ["share", "freeze"])
def test_the_first_gradient_is_that_of_kept_sites_and_of_owners(rest: Any) -> None:
    handle = lf.attach(model(), learning("lora_ga", "1.v", rest=rest), seed=0, sample=sample())
    plain = lf.attach(model(), LoRA(r=2, alpha=4, init="lora_ga"), seed=0, sample=sample())
    owners = ["1.v"] if rest == "freeze" else ["0.q", "0.up", "1.v"]
    for path in owners:
        assert torch.allclose(handle.adapter(path).A, plain.adapter(path).A, atol=1e-6)
    assert list(ranks(handle)) == owners


def test_lora_plus_around_it_passes_the_choice_on() -> None:
    handle = lf.attach(model(), LoRAPlus(inner=learning("eva", "0.q", "1.v")), seed=0, sample=sample())
    assert len(handle.adapter("0.q").A) + len(handle.adapter("1.v").A) == 4
    assert len(handle.adapter("0.v").A) == len(handle.adapter("0.up").A) == 2


def test_a_kept_site_that_learns_nothing_from_the_sample_is_said() -> None:
    same = lf.Sample([torch.ones(2, 4, 6)])
    with pytest.raises(lf.DataError, match=r"fewer directions|never vary"):
        lf.attach(model(), learning("eva", "0.q"), seed=0, sample=same)
    with pytest.raises(lf.ConfigError, match=r"keep names layers"):
        lf.attach(model(), learning("eva", "0.z"), seed=0, sample=sample())
