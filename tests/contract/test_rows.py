"""`Handle.rows`: each row of a batch gives what its adapter gives alone, with and without gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafit as lf

NAMES = ["b", None, "a", "a", "b", "a", None, "c"]


@pytest.fixture
def three(layer, member, fill):
    """A model with adapters "a" and "b" of one member, and "c", a LoRA of another rank; and a batch for `NAMES`."""
    model = layer.model().double().eval()
    handles = {name: lf.attach(model, member.make(layer), ["layer"], name=name, seed=3) for name in ("a", "b")}
    handles["c"] = lf.attach(model, lf.LoRA(r=layer.rank(4)), ["layer"], name="c")
    for seed, handle in enumerate(handles.values()):
        fill(handle, seed)
    x = torch.cat([layer.input(seed=seed) for seed in range(8)])[: len(NAMES)]
    return model, handles, x if layer.kind is nn.Embedding else x.double()


def one_by_one(model, handle, x, names):
    """Each row by itself, its adapter alone active."""
    rows = []
    before = handle.active
    for row, name in zip(x, names, strict=True):
        handle.activate(name)
        rows.append(model(row[None]))
    handle.activate(before)
    return torch.cat(rows)


def test_each_row_is_what_its_adapter_gives_alone(three):
    model, handles, x = three
    expected = one_by_one(model, handles["a"], x, NAMES)
    assert not torch.allclose(expected, one_by_one(model, handles["a"], x, [None] * 8), atol=1e-3)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with handles["a"].rows(NAMES), mode():
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert handles["a"].active == ("c",)
    torch.testing.assert_close(model(x), one_by_one(model, handles["a"], x, ["c"] * 8), rtol=1e-9, atol=1e-9)


def test_gradients_of_rows_are_those_of_each_adapter_alone(three):
    model, handles, x = three
    inputs = [parameter for handle in handles.values() for parameter in handle.parameters()]
    expected = torch.autograd.grad(one_by_one(model, handles["a"], x, NAMES).sin().sum(), inputs)
    with handles["a"].rows(NAMES):
        found = torch.autograd.grad(model(x).sin().sum(), inputs)
    if any(isinstance(each, nn.Embedding) and each.scale_grad_by_freq for each in model):
        return  # gradients by frequency depend on the batch on purpose
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.fixture
def pair(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3)).eval()
    handles = []
    for seed, (name, targets) in enumerate((("a", ["0", "2"]), ("b", ["2", "3"]))):
        handles.append(lf.attach(model, lf.LoRA(r=2), targets, name=name))
        fill(handles[-1], seed)
    return model, *handles


def test_adapters_of_different_layers(pair):
    model, a, _ = pair
    x, names = torch.randn(4, 6), ["a", "b", None, "b"]
    with torch.no_grad():
        expected = one_by_one(model, a, x, names)
        with a.rows(names):
            torch.testing.assert_close(model(x), expected)


def test_rows_see_an_adapter_change(pair, fill):
    model, a, b = pair
    x, names = torch.randn(2, 6), ["a", "b"]
    with torch.no_grad(), a.rows(names):
        before = model(x)
        fill(b, 9)
        after = model(x)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
    with torch.no_grad():
        torch.testing.assert_close(after, one_by_one(model, a, x, names))


def test_training_rows_trains_their_adapters_alone(pair):
    model, a, b = pair
    with a.rows(["a", "a"]):
        model(torch.randn(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in a.parameters())
    assert all(parameter.grad is None for parameter in b.parameters())


def test_dropout_acts_row_by_row(fill):
    model = nn.Sequential(nn.Linear(64, 64)).train()
    handle = lf.attach(model, lf.LoRA(r=4, dropout=0.5), ["0"])
    fill(handle)
    x = torch.randn(1, 64).expand(2, 64)
    with torch.no_grad(), handle.rows(["default", "default"]):
        one, other = model(x)
    assert not torch.allclose(one, other)


def test_low_precision_and_autocast(pair):
    model, a, _ = pair
    x, names = torch.randn(4, 6), ["a", "b", None, "b"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = one_by_one(model, a, x, names)
        with a.rows(names):
            found = model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    low = model.to(torch.bfloat16)
    with torch.no_grad():
        expected = one_by_one(low, a, x.bfloat16(), names)
        with a.rows(names):
            found = low(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_modules_saved_in_full_go_row_by_row(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    for seed, name in enumerate("ab"):
        handle = lf.attach(model, lf.LoRA(r=2), ["0"], name=name, modules_to_save=["1"])
        fill(handle, seed)
    x, names = torch.randn(5, 6), ["a", "b", None, "b", "a"]
    with torch.no_grad():
        expected = one_by_one(model, handle, x, names)
        with handle.rows(names):
            torch.testing.assert_close(model(x), expected)
        alike = one_by_one(model, handle, x, ["b"] * 5)
        with handle.rows(["b"] * 5):
            torch.testing.assert_close(model(x), alike)


class Two(nn.Module):
    """A head with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 2)

    def forward(self, x):
        return self.one(x), x


def test_a_copy_whose_rows_cannot_be_told_apart_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), Two())
    for name in "ab":
        handle = lf.attach(model, lf.LoRA(r=2), ["0"], name=name, modules_to_save=["1"])
    with handle.rows(["a", "b"]), pytest.raises(lf.StateError, match="cannot be told apart") as caught:
        model(torch.randn(2, 6))
    assert caught.value.where == "1" and "a tuple" in str(caught.value.found)


def test_a_batch_of_another_size_is_refused_by_its_layer(pair):
    model, a, _ = pair
    with a.rows(["a", "b"]), pytest.raises(lf.StateError, match="one row for each name") as caught:
        model(torch.randn(3, 6))
    assert caught.value.where == "0" and "(3, 6)" in str(caught.value.found)


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ("a", lf.ConfigError, "one name for each row"),
        ([], lf.ConfigError, "one name for each row"),
        (["a", "bb"], lf.StateError, "no adapter of this name"),
        ([3], lf.StateError, "no adapter of this name"),
    ],
)
def test_names_that_cannot_be(pair, names, error, says):
    model, a, _ = pair
    y = model(x := torch.randn(2, 6))
    with pytest.raises(error, match=says), a.rows(names):
        pass
    assert torch.equal(model(x), y)


def test_a_merged_adapter_and_rows_within_rows_are_refused(pair):
    model, a, b = pair
    with a.rows(["a"]), pytest.raises(lf.StateError, match="already"), b.rows(["b"]):
        pass
    b.merge()
    with pytest.raises(lf.StateError, match="merged"), a.rows(["a"]):
        pass
    b.unmerge()
    with a.rows(["a", "b"]):
        assert model(torch.randn(2, 6)).shape == (2, 3)


def test_an_error_within_leaves_the_model_as_it_was(pair):
    model, a, _ = pair
    y = model(x := torch.randn(2, 6))
    with pytest.raises(ZeroDivisionError), a.rows(["a", "b"]):
        raise ZeroDivisionError
    assert torch.equal(model(x), y)
    assert pickle.loads(pickle.dumps(model))(x).equal(y)


def test_a_detached_handle_has_no_rows(pair):
    _, a, _ = pair
    a.detach()
    with pytest.raises(lf.StateError, match="not attached"):
        a.rows(["a"])


def test_rows_of_a_language_model_generate_what_each_adapter_generates(fill):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    for seed, (name, method) in enumerate(
        {"a": lf.LoRA(r=4), "b": lf.DoRA(lf.LoRA(r=2)), "c": lf.VeRA(r=8, d_init=0.5)}.items()
    ):
        handle = lf.attach(model, method, name=name)
        fill(handle, seed, std=0.2)
    ids = torch.randint(64, (6, 5))
    names = ["c", "a", None, "b", "a", "c"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = []
    for row, name in zip(ids, names, strict=True):
        handle.activate(name)
        expected.append(model.generate(row[None], **options)[0])
    assert len({tuple(row.tolist()) for row in expected}) == 6
    with handle.rows(names):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


@pytest.fixture
def shared(fill):
    """Three layers of which the last ones share one pair of LoRA-drop, twice."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    for seed, name in enumerate("ab"):
        handle = lf.attach(model, lf.LoRADrop(lf.LoRA(r=2), keep=("0",)), ["0", "1", "2"], name=name, seed=seed)
        fill(handle, seed)
    return model[2], handle


def test_a_layer_that_uses_the_adapter_of_another_follows_it(shared, fill):
    layer, handle = shared
    x, names = torch.randn(2, 6), ["a", "b"]
    with handle.rows(names):
        assert layer(x).requires_grad
        with torch.no_grad():
            before = layer(x)
            fill(handle, 9)
            after = layer(x)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_training_mode_and_a_changed_base_are_seen(fill):
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    handle = lf.attach(model, lf.DoRA(lf.LoRA(r=4, dropout=0.5)), ["0"], name="a")
    fill(handle)
    x = torch.randn(1, 64).expand(2, 64)
    with torch.no_grad():
        with handle.rows(["a", "a"]):
            assert torch.equal(*model(x))
            model[0].weight.mul_(2)
            changed = model(x)
            assert not torch.equal(*model.train()(x))
        torch.testing.assert_close(changed, model.eval()(x), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_gets_another_rank_is_seen(fill):
    made = {}
    for seed, rank in enumerate((4, 3)):
        model = nn.Sequential(nn.Linear(6, 6)).eval()
        handle = lf.attach(model, lf.AdaLoRA(init_r=rank, target_r=2, total_steps=9), ["0"], name="a")
        fill(handle, seed)
        made[rank] = model, handle
    (model, handle), (other, _) = made.values()
    x = torch.randn(1, 6)
    with torch.no_grad():
        with handle.rows(["a"]):
            model(x)
            model.load_state_dict(other.state_dict())
            found = model(x)
        torch.testing.assert_close(found, other(x))


def test_rows_whose_adapters_change_meanwhile_are_refused(pair):
    model, a, b = pair
    x, names = torch.randn(2, 6), ["a", "b"]

    def disabled():
        with a.disabled():
            model(x)

    for change in (disabled, lambda: a.activate("a"), b.merge, b.detach):
        b.activate("b")
        with torch.no_grad(), a.rows(names):
            model(x)
            with pytest.raises(lf.StateError, match="have changed"):
                change()
                model(x)
        if b.merged:
            b.unmerge()
    with a.rows(["a", None]), pytest.raises(lf.StateError, match="would not act"):
        lf.attach(model, lf.LoRA(r=2), ["3"], name="c")


def test_copies_made_within_are_copies_of_the_model(pair):
    model, a, _ = pair
    y = model(x := torch.randn(3, 6))
    with a.rows(["a", "b"]):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(torch.equal(copied(x), y) for copied in copies)


def test_inference_first_and_then_training(fill):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    for name in "ab":
        handle = lf.attach(model, lf.LoRA(r=2), ["0"], name=name, modules_to_save=["1"])
    with handle.rows(["a", "b"]):
        with torch.inference_mode():
            model(torch.randn(2, 6))
        model(torch.randn(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
