"""Several named adapters on one model: which of them act, and what `disabled` promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorafit as lf
from lorafit.method import Sample
from lorafit.state import load_state, save_state


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))


@pytest.fixture
def x():
    return torch.randn(4, 6)


@pytest.fixture
def pair(fill):
    """A model with adapters "a" (layers 0 and 2) and "b" (layers 2 and 3)."""
    model = network().eval()
    handles = []
    for seed, (name, targets) in enumerate((("a", ["0", "2"]), ("b", ["2", "3"]))):
        handle = lf.attach(model, lf.LoRA(r=2), targets, name=name)
        fill(handle, seed)
        handles.append(handle)
    return model, *handles


def test_the_newest_adapter_is_active_alone(pair):
    _, a, b = pair
    assert a.active == b.active == ("b",)
    b.activate("a")
    assert a.active == b.active == ("a",)
    b.activate(["b", "a"])
    assert a.active == ("a", "b")  # in the order of attaching
    b.activate(None)
    assert a.active == ()
    a.activate([])
    assert a.active == ()


def test_an_inactive_adapter_neither_acts_nor_learns(pair, x, fill):
    model, a, b = pair
    y = model(x)
    fill(a, seed=50)
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert all(parameter.grad is None for parameter in a.parameters())
    assert all(parameter.grad is not None for parameter in b.parameters())


def test_naming_an_adapter_twice_is_naming_it_once(pair, x):
    model, a, _ = pair
    a.activate("a")
    y = model(x)
    a.activate(["a", "a"])
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("names", ["c", ["a", "c"], ["bb"]])
def test_an_unknown_name_is_refused_and_nothing_changes(pair, x, names):
    model, a, _ = pair
    y = model(x)
    with pytest.raises(lf.StateError, match="no adapter of this name") as caught:
        a.activate(names)
    assert "a, b" in str(caught.value.expected) and caught.value.fix
    assert torch.equal(model(x), y)


def test_the_nearest_name_is_shown(pair):
    model, _, _ = pair
    long = lf.attach(model, lf.LoRA(r=1), ["0"], name="french")
    with pytest.raises(lf.StateError) as caught:
        long.activate("frensh")
    assert caught.value.near == ("french",)


@pytest.mark.parametrize(
    ("active", "merged"),
    [("a", None), ("a", "a"), ("b", None), ("b", "b"), ("ab", None), ("ab", "a"), ("ab", "b")],
    ids=lambda value: f"{value}",
)
def test_disabled_gives_the_exact_base_and_comes_back_exactly(fill, x, active, merged):
    model = network().eval()
    base, kept = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    handles = {}
    for seed, (name, targets) in enumerate((("a", ["0", "2"]), ("b", ["2", "3"]))):
        handles[name] = lf.attach(model, lf.LoRA(r=2), targets, name=name)
        fill(handles[name], seed)
    handle = handles["a"]
    handle.activate(list(active))
    if merged is not None:
        handle = handles[merged]
        handle.merge()
    y, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    with handle.disabled():
        assert torch.equal(model(x), base)
        assert handle.active == ()
        for key, value in kept.items():
            assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model(x), y)
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert handle.merged == (merged is not None)


def test_disabled_comes_back_after_an_error(pair, x):
    model, _, b = pair
    b.merge()
    y = model(x)
    with pytest.raises(ZeroDivisionError), b.disabled():
        1 / 0  # noqa: B018
    assert torch.equal(model(x), y)
    b.unmerge()


def test_disabled_nests(pair, x):
    model, a, b = pair
    y = model(x)
    with a.disabled(), b.disabled(), a.disabled():
        base = model(x)
    assert torch.equal(model(x), y)
    b.detach()
    a.detach()
    assert torch.equal(model(x), base)


def test_another_handle_cannot_disable_what_is_merged(pair, x):
    model, a, b = pair
    b.merge()
    y = model(x)
    with pytest.raises(lf.StateError, match="'b' is merged"), a.disabled():
        pass
    assert torch.equal(model(x), y)


def test_nothing_is_merged_unmerged_or_detached_while_a_merged_one_is_out(pair, x):
    model, a, b = pair
    a.activate("a")
    a.merge()
    y, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    with a.disabled():
        a.activate("b")
        for handle in (a, b):
            for call in (handle.merge, handle.unmerge, handle.merge_and_detach, handle.detach):
                with pytest.raises(lf.StateError, match=r"inside disabled\(\): adapter 'a' is merged") as caught:
                    call()
                assert caught.value.fix == "leave the with block first"
        with a.disabled(), pytest.raises(lf.StateError, match="inside disabled"):
            b.merge()
        twin = copy.deepcopy(model)
        with pytest.raises(lf.StateError, match="inside disabled"):
            b.merge()
    assert vars(twin)["_lorafit"].lifted is None  # the copy is in no block
    assert a.merged and not b.merged and a.active == ("a",)
    assert torch.equal(model(x), y)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert [model[index].adapters.merged for index in (0, 2, 3)] == [("a",), ("a",), ()]
    a.unmerge()
    b.activate("b")
    b.merge()
    b.detach()


@pytest.mark.parametrize("names", [None, "a", []])
def test_a_merged_adapter_cannot_be_left_out(pair, x, names):
    model, a, b = pair
    b.merge()
    y = model(x)
    with pytest.raises(lf.StateError, match="'b' is merged into the weights") as caught:
        a.activate(names)
    assert "unmerge" in caught.value.fix
    assert torch.equal(model(x), y)
    a.activate(["a", "b"])  # with it: fine, the rest acts on top
    assert not torch.equal(model(x), y)
    b.unmerge()


def test_an_inactive_adapter_cannot_be_merged(pair, x):
    model, a, _ = pair
    y = model(x)
    with pytest.raises(lf.StateError, match="'a' is not active") as caught:
        a.merge()
    assert "active: b" in caught.value.found and caught.value.fix == "activate('a') first"
    assert torch.equal(model(x), y)


def test_only_one_is_merged_at_a_time_and_merging_for_good_makes_room(pair, x):
    model, a, b = pair
    a.activate(["a", "b"])
    y = model(x)
    a.merge()
    with pytest.raises(lf.MergeError, match="'a' is merged already") as caught:
        b.merge()
    assert "merge_and_detach" in caught.value.fix
    with pytest.raises(lf.MergeError, match="'a' is merged already"):
        a.merge()
    a.merge_and_detach()
    b.merge_and_detach()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_detaching_one_leaves_the_other(pair, x):
    model, a, b = pair
    a.activate(["a", "b"])
    a.activate("a")
    only_a = model(x)
    b.detach()
    assert torch.equal(model(x), only_a)
    assert type(model[3]) is nn.Linear and type(model[2]) is not nn.Linear
    assert a.active == ("a",)
    third = lf.attach(model, lf.LoRA(r=1), name="b")  # the name is free again
    assert third.active == ("b",)


def test_a_detached_handle_says_so(pair):
    _, a, b = pair
    a.detach()
    for call in (
        a.detach,
        a.parameters,
        a.summary,
        lambda: a.activate("b"),
        lambda: a.active,
        lambda: a.delta("0"),
        lambda: a.param_groups(lr=1.0),
        a.merge,
    ):
        with pytest.raises(lf.StateError, match=r"not attached any more|was replaced"):
            call()
    assert repr(a) == "<Handle 'a': lora, detached>"
    assert repr(b).startswith("<Handle 'b': lora (r 2, alpha 4")


def test_attach_while_another_is_merged_is_refused(pair, tmp_path):
    model, _, b = pair
    b.save(tmp_path)
    b.merge()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (
        lambda: lf.attach(model, lf.LoRA(r=1), name="c"),
        lambda: lf.load(model, tmp_path / "b", name="c"),
    ):
        with pytest.raises(lf.StateError, match="merged") as caught:
            call()
        assert "'b'" in caught.value.found and "unmerge" in caught.value.fix
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert model.state_dict().keys() == state.keys()


def test_merged_adapters_refuse_training_and_reloading(pair, tmp_path):
    _, _, b = pair
    save_state(b, tmp_path)
    b.merge()
    with pytest.raises(lf.StateError, match="is merged") as caught:
        b.optimizer(torch.optim.SGD, lr=0.1)
    assert caught.value.fix == "unmerge it first"
    with pytest.raises(lf.StateError, match="is merged"):
        load_state(b, tmp_path)


def test_unmerge_without_merge_is_an_error(pair):
    _, _, b = pair
    with pytest.raises(lf.StateError, match="'b' is not merged") as caught:
        b.unmerge()
    assert caught.value.fix == "merge it first"
    b.merge()
    b.unmerge()
    with pytest.raises(lf.StateError, match="not merged"):
        b.unmerge()


def test_delta_is_the_same_merged_or_not(pair):
    _, _, b = pair
    before = b.delta("2")
    b.merge()
    assert torch.equal(b.delta("2"), before)
    assert torch.equal(b.delta(b.sites["2"]), before)
    b.unmerge()


def test_delta_of_no_site_names_the_nearest(pair):
    _, _, b = pair
    with pytest.raises(lf.StateError, match="no such site") as caught:
        b.delta("22")
    assert caught.value.near == ("2",)


def test_a_part_of_an_adapted_model_keeps_no_books_of_its_own(x):
    model = nn.Sequential(network(), nn.Linear(3, 3))
    handle = lf.attach(model[0], lf.LoRA(r=2))
    for part, name in ((model, "outer"), (model[0][0], "inner")):
        with pytest.raises(lf.StateError, match="a part of this model") as caught:
            lf.attach(part, lf.LoRA(r=1), name=name)
        assert caught.value.fix
    assert len(handle.parameters()) == 6
    lf.attach(model[1], lf.LoRA(r=1), name="apart")  # parts that share no layer are independent


def test_seed_makes_the_start_repeatable_and_leaves_torch_alone():
    def start(seed: int) -> list[torch.Tensor]:
        model = network()
        state = torch.get_rng_state()
        handle = lf.attach(model, lf.LoRA(r=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [parameter.detach() for parameter in handle.parameters()]

    first, second, other = start(3), start(3), start(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(9)
    one = lf.attach(network(), lf.LoRA(r=2)).adapter("0").A
    assert not torch.equal(one, lf.attach(network(), lf.LoRA(r=2)).adapter("0").A)  # torch's own generator goes on


@pytest.mark.parametrize("seed", ["x", 1.5, 2**70, 2**64, -1, True, [1]], ids=repr)
def test_a_seed_is_a_whole_number(pair, seed):
    model, a, _ = pair
    for call, where in (
        (lambda: lf.attach(model, lf.LoRA(r=2), name="c", seed=seed), "attach.seed"),
        (lambda: lf.combine(a, {"a": 1.0}, name="c", how="dare", r=2, seed=seed), "combine.seed"),
    ):
        with pytest.raises(lf.ConfigError, match="seed is no seed") as caught:
            call()
        assert caught.value.where == where and caught.value.found == repr(seed) and caught.value.fix == "seed=0"
    assert "c" not in model[0].adapters


def test_the_largest_seed():
    assert lf.attach(network(), lf.LoRA(r=2), seed=2**64 - 1).parameters()


def test_a_sample_is_a_sample(x):
    model = network()
    with pytest.raises(lf.ConfigError, match="no sample") as caught:
        lf.attach(model, lf.LoRA(r=2, init="eva"), sample=[x])
    assert caught.value.found == "a list" and caught.value.fix == "sample=Sample(batches)"
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("init", ["default", "pissa", "eva", "lora_ga"])
def test_what_is_attached_in_inference_mode_can_be_trained(x, init):
    model = network()
    sample = Sample([torch.randn(8, 6)], loss=lambda model, x: model(x).square().sum())
    with torch.inference_mode():
        handle = lf.attach(
            model, lf.LoRA(r=2, init=init), ["0", "2"], sample=sample if init in ("eva", "lora_ga") else None
        )
        assert torch.is_inference_mode_enabled()
    model(x).square().sum().backward()
    assert any(parameter.grad.any() for parameter in handle.parameters())
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


def test_what_is_loaded_or_combined_in_inference_mode_can_be_trained(pair, x, tmp_path):
    model, a, b = pair
    a.save(tmp_path)
    with torch.inference_mode():
        loaded = lf.load(model, tmp_path / "a", name="loaded", trainable=True)
        sums = [
            lf.combine(b, {"a": 1.0, "b": 0.5}, name=how, how=how, **options)
            for how, options in (("exact", {}), ("svd", {"r": 4}))
        ]
    for handle in (loaded, *sums):
        handle.activate(handle.name)
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in handle.parameters())


def test_adapters_are_laid_out_as_a_file_gives_them_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 47), nn.ReLU(), nn.Linear(47, 33)).eval()
    sample = Sample([torch.randn(64, 33) for _ in range(2)])
    handle = lf.attach(model, lf.LoRA(r=5, init="eva"), sample=sample)
    with torch.no_grad():
        for path in handle.sites:
            handle.adapter(path).B.normal_()
    assert all(parameter.is_contiguous() for parameter in handle.parameters())
    x = torch.randn(7, 33)
    y = model(x)
    handle.save(tmp_path)
    handle.detach()
    lf.load(model, tmp_path)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("method", "layer", "fix"),
    [
        (lf.LoRA(r=64), nn.Linear(6, 8), "a smaller r (rank_pattern={'0': ...}), another method, or exclude=['0']"),
        (
            lf.LoRA(r=2),
            nn.Conv1d(4, 8, 3, groups=4),
            "another r (rank_pattern={'0': ...}), another method, or exclude=['0']",
        ),
        (lf.AdaLoRA(init_r=64, target_r=2, total_steps=9), nn.Linear(6, 8), "another method, or exclude=['0']"),
        (lf.VeRA(r=6), nn.Conv1d(4, 8, 3, groups=4), "another method, or exclude=['0']"),
    ],
    ids=["lora", "lora-groups", "adalora", "vera"],
)
def test_a_rank_pattern_is_advised_only_where_one_helps(method, layer, fix):
    with pytest.raises(lf.ConfigError, match="cannot be put on this layer") as caught:
        lf.attach(nn.Sequential(layer), method, ["0"])
    assert caught.value.where == "0" and caught.value.fix == fix


def test_no_rank_unties_a_weight():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(lf.ConfigError, match="its weight is also") as caught:
        lf.attach(model, lf.DeltaLoRA(r=2), ["1"])
    assert caught.value.fix == "another method, or exclude=['1']"
