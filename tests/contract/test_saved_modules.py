"""modules_to_save: modules of which a full copy is trained in their place."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from transformers.modeling_outputs import BaseModelOutput

import lorafit as lf
from lorafit.casting import cast
from lorafit.errors import CheckpointError


class Head(nn.Module):
    """A head with parameters, buffers and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.dense = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.out(torch.relu(self.dense(self.norm(x)))) * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x), scale=2.0)


@pytest.fixture
def x():
    return torch.randn(16, 6)


def train(model: nn.Module, handle: lf.Handle, x: Tensor, steps: int = 3) -> None:
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(now[key], value), key


def test_the_copy_is_trained_and_the_original_is_not(x):
    model = Net()
    base, y = copies(model.state_dict()), model.eval()(x)
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    assert list(handle.sites) == ["body.0", "body.2"] and list(handle.saved) == ["head"]
    assert torch.equal(model(x), y)
    expected = lf.LoRA(r=2).num_trainable(handle.shapes()) + sum(p.numel() for p in Net().head.parameters())
    assert handle.num_trainable == expected
    assert "1 modules trained in full" in handle.summary()
    train(model.train(), handle, x)
    assert_same({key: model.state_dict()[key] for key in base}, base)  # also the original's running statistics
    assert not torch.equal(handle.copies["head"].dense.weight, model.head.dense.weight)
    assert handle.copies["head"].norm.num_batches_tracked == 3
    assert not torch.equal(model.eval()(x), y)
    with handle.disabled():
        assert torch.equal(model(x), y)


def test_round_trip(x, tmp_path):
    model = Net()
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    train(model, handle, x)
    y = model.eval()(x)
    handle.save(tmp_path)
    handle.detach()
    base = model(x)
    again = lf.load(model, tmp_path)
    assert torch.equal(model(x), y)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again.detach()
    assert torch.equal(model(x), base)
    third = lf.load(model, tmp_path, trainable=True)
    assert all(parameter.requires_grad for parameter in third.copies["head"].parameters())
    train(model.train(), third, x, 1)


def test_merge_unmerge_detach(x):
    model = Net()
    before, classes = copies(model.state_dict()), [type(module) for module in model.modules()]
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    train(model, handle, x)
    y = model.eval()(x)
    state = copies(model.state_dict())
    handle.merge()
    torch.testing.assert_close(model(x), y)
    assert torch.equal(model.head.dense.weight, handle.copies["head"].dense.weight)
    assert torch.equal(model.head.norm.running_mean, handle.copies["head"].norm.running_mean)
    handle.unmerge()
    assert_same(model.state_dict(), state)
    assert torch.equal(model(x), y)
    handle.merge()
    handle.detach()
    assert_same(model.state_dict(), before)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merge_and_detach(x):
    model = Net()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    train(model, handle, x)
    y = model.eval()(x)
    handle.merge_and_detach()
    assert [type(module) for module in model.modules()] == classes and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), y)


def test_two_adapters_each_have_their_own_copy(x, tmp_path):
    model = Net()
    one = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"], name="one")
    train(model, one, x)
    two = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"], name="two")
    assert two.num_trainable == one.num_trainable
    assert torch.equal(two.copies["head"].dense.weight, model.head.dense.weight)  # from the base, not from "one"
    assert not [key for key in two.copies["head"].state_dict() if "adapters" in key]
    train(model, two, -x, 5)
    outputs = {}
    model.eval()
    for handle in (one, two):
        handle.activate(handle.name)
        outputs[handle.name] = model(x)
        handle.save(tmp_path)
    assert not torch.allclose(outputs["one"], outputs["two"])
    with pytest.raises(lf.StateError, match="cannot act together") as caught:
        one.activate(["one", "two"])
    assert caught.value.where == "head" and caught.value.found == "one, two"
    one.detach()
    two.detach()
    for name in ("two", "one"):
        lf.load(model, tmp_path, name=name)
        assert torch.equal(model(x), outputs[name])


def test_a_copy_hides_what_another_adapter_changes_below_it(x, fill):
    model = Net().eval()
    inner = lf.attach(model, lf.LoRA(r=2), ["dense"], name="inner")
    fill(inner)
    outer = lf.attach(model, lf.LoRA(r=2), ["body.0"], modules_to_save=["head"], name="outer")
    assert type(outer.copies["head"].dense) is nn.Linear  # no adapter inside the copy
    with pytest.raises(lf.StateError, match="cannot act together") as caught:
        inner.activate(["inner", "outer"])
    assert caught.value.where == "head.dense"
    outer.activate("outer")
    outer.detach()
    inner.detach()
    assert not [key for key in model.state_dict() if "adapters" in key]


def test_a_module_is_changed_or_replaced_not_both(tmp_path):
    model = Net()
    first = lf.attach(model, lf.LoRA(r=2), ["dense"], name="first")
    with pytest.raises(lf.TargetError, match="cannot be saved in full") as caught:
        lf.attach(model, lf.LoRA(r=2), ["body.0"], modules_to_save=["dense"], name="second")
    assert caught.value.where == "head.dense" and "'first' changes it" in caught.value.found
    other = Net()
    lf.attach(other, lf.LoRA(r=2), ["body.0"], modules_to_save=["dense"]).save(tmp_path)
    with pytest.raises(lf.TargetError, match="cannot be saved in full"):
        lf.load(model, tmp_path)
    first.detach()
    lf.attach(model, lf.LoRA(r=2), ["body.0"], modules_to_save=["dense"], name="second")
    with pytest.raises(lf.TargetError, match="cannot be adapted") as caught:
        lf.attach(model, lf.LoRA(r=2), ["dense"], name="third")
    assert "'second' replaces it" in caught.value.found
    assert list(model.head.dense.adapters) == ["second"]


def test_a_name_inside_another_is_part_of_its_copy(x, tmp_path):
    model = Net()
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head", "out"])
    assert list(handle.saved) == ["head"]
    train(model, handle, x)  # no tensor is left without a gradient
    y = model.eval()(x)
    handle.save(tmp_path)
    handle.detach()
    lf.load(model, tmp_path)
    assert torch.equal(model(x), y)


def test_a_vanilla_checkpoint_loads_strictly(x):
    model, other = Net(), Net()
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    kept = copies(handle.copies["head"].state_dict())
    model.load_state_dict(other.state_dict(), strict=True)
    assert_same(handle.copies["head"].state_dict(), kept)
    assert torch.equal(model.head.dense.weight, other.head.dense.weight)


def test_all_linear_leaves_saved_modules_out():
    handle = lf.attach(Net(), lf.LoRA(r=2), modules_to_save=["dense"])
    assert list(handle.sites) == ["body.0", "body.2", "head.out"]


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"modules_to_save": ["hed"]}, lf.TargetError, ["modules_to_save matches no module", "'hed'", "head"]),
        ({"modules_to_save": ["head", "nix"]}, lf.TargetError, ["modules_to_save", "'nix'"]),
        ({"modules_to_save": "head"}, lf.ConfigError, ["must be a list", "modules_to_save=['head']"]),
        ({"modules_to_save": ["body.1"]}, lf.TargetError, ["no parameters", "body.1", "ReLU", "remove 'body.1'"]),
        (
            {"modules_to_save": ["head"], "targets": ["body.0", "dense"]},
            lf.ConfigError,
            ["both adapted and saved", "head.dense", "exclude=['head.dense']"],
        ),
    ],
    ids=["unknown", "one-unknown", "string", "no-parameters", "adapted-too"],
)
def test_refusals_leave_the_model_alone(options, kind, parts):
    model = Net()
    before, classes = copies(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(kind) as caught:
        lf.attach(model, lf.LoRA(r=2), **{"targets": ["body.0"], **options})
    for part in parts:
        assert part in str(caught.value)
    assert_same(model.state_dict(), before)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_whose_forward_is_never_called_are_refused():
    attention = nn.Sequential(OrderedDict(attention=nn.MultiheadAttention(8, 2), last=nn.Linear(8, 8)))
    with pytest.raises(lf.TargetError, match="cannot be saved in full") as caught:
        lf.attach(attention, lf.LoRA(r=2), ["last"], modules_to_save=["out_proj"])
    assert caught.value.where == "attention.out_proj" and "around it" in caught.value.fix
    whole = lf.attach(attention, lf.LoRA(r=2), ["last"], modules_to_save=["attention"])
    y, _ = attention.attention(*[torch.randn(3, 2, 8)] * 3)
    attention.last(y).sum().backward()
    assert all(parameter.grad is not None for parameter in whole.copies["attention"].parameters())


def test_a_missing_copy_in_the_file_is_noticed(tmp_path):
    model = Net()
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    handle.save(tmp_path)
    handle.detach()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.head.norm.running_var"
    save_file({name: value for name, value in tensors.items() if name != key}, file)
    with pytest.raises(CheckpointError, match="missing key") as caught:
        lf.load(model, tmp_path)
    assert key in str(caught.value.where)
    save_file({name: value for name, value in tensors.items() if ".head." not in name}, file)
    with pytest.raises(CheckpointError, match="saved in full is missing") as caught:
        lf.load(model, tmp_path)
    assert "modules_to_save" in str(caught.value.where) and "'head'" in str(caught.value.found)
    wrong = {name: value[:2] if name.endswith("out.weight") else value for name, value in tensors.items()}
    save_file(wrong, file)
    with pytest.raises(CheckpointError, match="wrong shape") as caught:
        lf.load(model, tmp_path)
    assert caught.value.found == (2, 8) and caught.value.expected == (3, 8)
    save_file({**tensors, "base_model.model.head.extra": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="unexpected key") as caught:
        lf.load(model, tmp_path)
    assert "head.extra" in str(caught.value.where)
    assert not [name for name in model.state_dict() if "adapters" in name]


# A base of low precision -------------------------------------------------------


class Rows(NamedTuple):
    """What a module may return: a named tuple."""

    first: Tensor
    rest: Tensor


class Many(nn.Module):
    """Takes and returns tensors in every wrapping."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor, more: dict[str, list[Tensor]], *, mask: Tensor, flag: str) -> tuple[object, ...]:
        y = self.lin(x) + more["extra"][0]
        whole = BaseModelOutput(last_hidden_state=y, hidden_states=(y, y))
        return y, [y, mask], {"y": y, "flag": flag}, Rows(y, y), whole, OrderedDict(y=y), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_trained_in_single_precision(x, tmp_path, dtype):
    model = Net().to(dtype)
    x = x.to(dtype)
    base = model.eval()(x)
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    assert {value.dtype for value in handle.copies["head"].state_dict().values()} == {torch.float32, torch.int64}
    assert {value.dtype for value in handle.parameters()} == {torch.float32}
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x), base, rtol=2e-2, atol=2e-2)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-5)  # steps that bfloat16 would round away
    before = handle.copies["head"].dense.weight.detach().clone()
    model.train()(x).float().square().mean().backward()
    optimizer.step()
    moved = handle.copies["head"].dense.weight.detach() - before
    assert (moved != 0).float().mean() > 0.9
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
    y = model.eval()(x)
    state = copies(model.state_dict())
    handle.merge()
    assert model(x).dtype == dtype and model.head.dense.weight.dtype == dtype
    torch.testing.assert_close(model(x), y, rtol=5e-2, atol=5e-2)
    handle.unmerge()
    assert_same(model.state_dict(), state)
    handle.save(tmp_path)
    assert (
        load_file(tmp_path / "adapter_model.safetensors")["base_model.model.head.dense.weight"].dtype == torch.float32
    )
    handle.detach()
    assert torch.equal(model(x), base)
    lf.load(model, tmp_path)
    assert torch.equal(model(x), y)


def test_a_value_of_a_copy_that_the_base_cannot_hold_is_not_merged():
    model = Net().half()
    handle = lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    with torch.no_grad():
        handle.copies["head"].out.weight[0, 0] = 1e6
    with pytest.raises(lf.MergeError, match="not finite") as caught:
        handle.merge()
    assert caught.value.where == "head.out.weight" and not handle.merged


def test_everything_around_a_copy_stays_in_the_type_of_the_base():
    model = nn.ModuleDict({"many": Many(), "lin": nn.Linear(8, 8)}).bfloat16()
    x, mask = torch.randn(2, 8).bfloat16(), torch.ones(2, dtype=torch.bool)
    given = {"mask": mask, "flag": "on"}
    base = model["many"](x, {"extra": [x]}, **given)
    lf.attach(model, lf.LoRA(r=2), "lin", modules_to_save=["many"])
    found = model["many"](x, {"extra": [x]}, **given)
    assert [type(each) for each in found] == [type(each) for each in base]
    y, several, mapping, rows, whole, ordered, nothing = found
    tensors = [y, several[0], mapping["y"], *rows, whole.last_hidden_state, whole["last_hidden_state"], ordered["y"]]
    for tensor in [*tensors, *whole.hidden_states]:
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, base[0], rtol=2e-2, atol=2e-2)
    assert several[1] is mask and mapping["flag"] == "on" and nothing is None


def test_an_embedding_s_copy_puts_out_what_the_base_does():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3)).bfloat16()
    ids = torch.arange(6)
    base = model(ids)
    handle = lf.attach(model, lf.LoRA(r=2), ["1"], modules_to_save=["0"])
    assert torch.equal(model(ids), base)
    assert handle.copies["0"].weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
    model.bfloat16()
    assert torch.equal(model(ids), base)  # a copy that was given the base's own type needs no cast


def test_a_module_of_two_types_puts_out_the_type_of_its_last_parameter():
    mixed = nn.Sequential(OrderedDict(low=nn.Linear(8, 8).bfloat16(), cast=Up(), high=nn.Linear(8, 3)))
    model = nn.ModuleDict({"lin": nn.Linear(8, 8), "mixed": mixed})
    x = torch.randn(2, 8).bfloat16()
    base = mixed(x)
    lf.attach(model, lf.LoRA(r=2), "lin", modules_to_save=["mixed"])
    assert model["mixed"](x).dtype == base.dtype == torch.float32
    torch.testing.assert_close(model["mixed"](x), base, rtol=2e-2, atol=2e-2)


class Up(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_tied_weights_inside_a_copy_stay_tied():
    head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    head[1].weight = head[0].weight
    model = nn.ModuleDict({"lin": nn.Linear(8, 8).bfloat16(), "head": head})
    handle = lf.attach(model, lf.LoRA(r=2), ["lin"], modules_to_save=["head"])
    copied = handle.copies["head"]
    assert copied[0].weight is copied[1].weight and copied[0].weight.dtype == torch.float32
    assert model["head"](torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_a_cast_copy_compiles_whole(x):
    model = Net().bfloat16().eval()
    lf.attach(model, lf.LoRA(r=2), modules_to_save=["head"])
    x = x.bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


class Packing(nn.Module):
    """Calls a recurrent module with a sequence that is packed."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.into, self.recurrent = nn.Linear(8, 8), kind(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        out, _ = self.recurrent(pack_sequence([x[0], x[1, :2]]))
        return out.data


@dataclasses.dataclass(frozen=True)
class Scored:
    scores: Tensor
    rows: tuple[Tensor, ...] = ()
    size: int = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(slots=True)
class Slim:
    scores: Tensor


class Scoring(nn.Module):
    """Gives a data class, and takes one."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.dense = kind, nn.Linear(8, 8)

    def forward(self, given: Scored | Slim) -> Scored | Slim:
        return self.kind(self.dense(given.scores))


class ScoringNet(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 8), Scoring(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head.kind(self.into(x))).scores


@pytest.mark.parametrize(
    ("make", "saved"),
    [
        (lambda: Packing(nn.LSTM), "recurrent"),
        (lambda: Packing(nn.GRU), "recurrent"),
        (lambda: ScoringNet(Scored), "head"),
        (lambda: ScoringNet(Slim), "head"),
    ],
    ids=["lstm", "gru", "data-class", "slots"],
)
def test_copies_take_and_give_what_holds_tensors(make, saved):
    model = make().bfloat16()
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    before = model(x)
    handle = lf.attach(model, lf.LoRA(r=2), ["into"], modules_to_save=[saved], seed=0)
    out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, before, atol=2e-2, rtol=2e-2)
    out.float().sum().backward()
    assert all(copied.grad is not None for copied in handle.copies[saved].parameters())


def test_what_holds_no_such_tensor_stays_itself():
    cache = Scored(torch.ones(2), (torch.ones(1),))
    assert cast(cache, torch.bfloat16, torch.float32) is cache and cast(Scored, torch.float32, torch.bfloat16) is Scored
    changed = cast(cache, torch.float32, torch.bfloat16)
    assert changed.scores.dtype == changed.rows[0].dtype == torch.bfloat16 and changed.size == 3
    top = cast(torch.ones(2, 2).max(0), torch.float32, torch.bfloat16)
    assert top.values.dtype == torch.bfloat16 and type(top) is torch.return_types.max


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_what_torch_cannot_copy_is_refused(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = getattr(nn.utils, norm)(nn.Linear(8, 2))
    model = nn.Sequential(nn.Linear(8, 8), old)
    model(torch.ones(1, 8))
    with pytest.raises(lf.TargetError, match=r"(?s)computed from others.*torch\.nn\.utils\.parametrizations"):
        lf.attach(model, lf.LoRA(r=2), ["0"], modules_to_save=["1"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    model[1] = getattr(nn.utils.parametrizations, norm)(nn.Linear(8, 2))
    assert lf.attach(model, lf.LoRA(r=2), ["0"], modules_to_save=["1"]).saved
