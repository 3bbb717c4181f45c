"""Layers and models on which an adapter would be wrong or without effect: each is refused, by name and with a fix."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import lorafit as lf
from lorafit.state import load_state, save_state
from lorafit.training import ranks


class Doubled(nn.Linear):
    """A linear layer that is none."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Standardised(nn.Conv2d):
    """A convolution that changes its weight on the way, in the inner method."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight / weight.std(), bias)


class Named(nn.Linear):
    """A subclass that computes what its base computes: that is fine."""

    extra = 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def instance_forward() -> nn.Module:
    model = network()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)  # as accelerate's hooks do
    return model


def with_attribute() -> nn.Module:
    model = network()
    model[0].adapters = "mine"
    return model


def old_weight_norm() -> nn.Module:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has deprecated it; models still hold it
        nn.utils.weight_norm(model[0])
    return model


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def parametrized() -> nn.Module:
    model = network()
    parametrizations.orthogonal(model[0])
    return model


def integer() -> nn.Module:
    model = network()
    model[0].weight = nn.Parameter(torch.ones(8, 6, dtype=torch.int8), requires_grad=False)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return network()


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "attention-out-proj": (
        lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "last": nn.Linear(8, 8)}),
        "all-linear",
        ["attention.out_proj", "MultiheadAttention", "would do nothing", 'exclude=["out_proj"]'],
    ),
    "encoder-fast-path": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        ["linear1"],
        ["linear1", "fast path", "set_fastpath_enabled(False)"],
    ),
    "own-forward": (
        lambda: nn.Sequential(Doubled(6, 8)),
        ["0"],
        ["Doubled has a forward of its own", "its bias is not added as it is", "where:    0", "exclude=['0']"],
    ),
    "own-inner-forward": (
        lambda: nn.Sequential(Standardised(3, 4, 3)),
        ["0"],
        ["Standardised has a forward of its own", "Conv2d", "not linear in its weight", "exclude=['0']"],
    ),
    "instance-forward": (instance_forward, ["0"], ["replaced on this one object", "attach first, then dispatch"]),
    "meta": (on_meta, "all-linear", ["meta device", "load the weights, then attach"]),
    "integer": (integer, "all-linear", ["torch.int8", "load the model in bfloat16 or float32"]),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), ["0"], ["no shape yet", "run the model on one example batch"]),
    "max-norm": (
        lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)),
        ["0"],
        ["max_norm", "rewrites its own weight", "set max_norm = None"],
    ),
    "weight-norm": (old_weight_norm, ["0"], ["computed from other tensors", "remove_weight_norm"]),
    "pruned": (pruned, ["0"], ["computed from other tensors", "prune.remove"]),
    "parametrized": (parametrized, ["0"], ["computed from other tensors", "remove_parametrizations"]),
    "attribute": (with_attribute, ["0"], ["attribute named 'adapters'", "rename"]),
    "unknown-type": (
        lambda: nn.Sequential(nn.Bilinear(3, 3, 3), nn.Linear(3, 3)),
        ["0"],
        ["cannot be adapted", "Bilinear", "Linear, Embedding, Conv1d", "exclude=['0']"],
    ),
    "recurrent": (lambda: nn.ModuleDict({"rnn": nn.LSTM(3, 3)}), ["rnn"], ["cannot be adapted", "LSTM"]),
    "nothing-there": (lambda: nn.Sequential(nn.ReLU()), "all-linear", ["no layer is left"]),
    "no-weights": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), ["0"], ["no layer is left", "targets=['1']"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_layers(case, tmp_path):
    build, targets, parts = REFUSED[case]
    model = build()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(lf.TargetError) as caught:
        lf.attach(model, lf.LoRA(r=1), targets)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.fix
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert "_lorafit" not in vars(model)


@pytest.mark.parametrize("case", ["own-forward", "instance-forward", "meta", "integer", "max-norm", "parametrized"])
def test_loading_refuses_the_same_layers(case, tmp_path):
    build, targets, _ = REFUSED[case]
    plain = {
        "own-forward": lambda: nn.Sequential(nn.Linear(6, 8)),
        "max-norm": lambda: nn.Sequential(nn.Embedding(5, 4)),
    }
    handle = lf.attach(plain.get(case, network)(), lf.LoRA(r=1), targets)
    handle.save(tmp_path)
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(lf.TargetError, match="this layer cannot be adapted") as caught:
        lf.load(model, tmp_path)
    assert caught.value.where == "0" and caught.value.fix
    assert list(model.state_dict()) == keys


def test_what_is_near_a_refused_case_is_fine(fill):
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "last": nn.Linear(8, 8)})
    assert list(lf.attach(attention, lf.LoRA(r=1), exclude=["out_proj"]).sites) == ["last"]
    named = nn.Sequential(Named(6, 8))
    handle = lf.attach(named, lf.LoRA(r=1))
    assert isinstance(named[0], Named) and named[0].extra == 3 and list(handle.sites) == ["0"]
    handle.detach()
    assert type(named[0]) is Named
    embedding = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    embedding[0].max_norm = None
    lf.attach(embedding, lf.LoRA(r=1), ["0"])
    biases = network()
    nn.utils.parametrize.register_parametrization(biases[0], "bias", nn.Identity())  # the weight is what counts
    handle = lf.attach(biases, lf.LoRA(r=1), ["2"])


def test_encoder_layers_without_the_fast_path_are_adapted(fill):
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        x = torch.randn(2, 3, 8)
        base = layer(x)
        handle = lf.attach(layer, lf.LoRA(r=1), ["linear1", "linear2"])
        fill(handle)
        with torch.no_grad():
            assert not torch.allclose(layer(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    ranks.leave()


def compiled() -> nn.Module:
    return torch.compile(network(), backend="eager")


def compiled_inside() -> nn.Module:
    return nn.Sequential(torch.compile(network(), backend="eager"))


def data_parallel() -> nn.Module:
    return nn.DataParallel(network())


def distributed() -> nn.Module:
    return nn.parallel.DistributedDataParallel(network())


def sharded() -> nn.Module:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.parametrize(
    ("build", "found", "fix"),
    [
        (compiled, "OptimizedModule", "attach, then compile"),
        (compiled_inside, "OptimizedModule", "attach, then compile"),
        (data_parallel, "DataParallel", "then wrap it"),
        (distributed, "DistributedDataParallel", "then wrap it"),
        (sharded, "FSDPModule", "then call fully_shard"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrapped_model_is_refused_with_the_order(one_process, build, found, fix, tmp_path):
    lf.attach(network(), lf.LoRA(r=1)).save(tmp_path)
    model = build()
    for call in (lambda: lf.attach(model, lf.LoRA(r=1)), lambda: lf.load(model, tmp_path)):
        with pytest.raises(lf.TargetError, match="compiled, sharded or wrapped already") as caught:
            call()
        assert caught.value.found == found and fix in caught.value.fix
        assert "attach, shard, compile" in caught.value.expected


def test_the_right_order_works(one_process):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=1))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    wrapped = network()
    handle = lf.attach(wrapped, lf.LoRA(r=1))
    parallel = nn.parallel.DistributedDataParallel(wrapped)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=0.1)
    parallel(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in handle.parameters())


def test_a_sharded_adapter_is_saved_whole(one_process, tmp_path, fill):
    model, plain = network(), network()
    handle = lf.attach(model, lf.LoRA(r=1))
    fill(handle)
    delta = handle.delta("0")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert torch.equal(handle.delta("0"), delta)
    handle.save(tmp_path / "adapter")
    assert torch.equal(lf.load(network(), tmp_path / "adapter").delta("0"), delta)
    # and through torch's own gathering of a state
    unsharded = lf.attach(plain, lf.LoRA(r=1))
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert torch.equal(unsharded.delta("0"), delta)


def test_a_layer_that_got_another_class_since_is_not_detached_by_halves(one_process):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=1))
    fully_shard(model[2], mesh=init_device_mesh("cpu", (1,)))
    for call in (handle.detach, handle.merge_and_detach):
        with pytest.raises(lf.StateError, match="another class") as caught:
            call()
        assert caught.value.where == "2" and "fully_shard" in caught.value.fix
    assert type(model[0]) is not nn.Linear and not handle.merged
    model(torch.randn(2, 6)).sum().backward()


def test_something_that_is_no_model():
    with pytest.raises(lf.TargetError, match="no model") as caught:
        lf.attach({"layer": nn.Linear(2, 2)}, lf.LoRA(r=1))
    assert caught.value.found == "dict"


class Stubborn(nn.Linear):
    """A layer that forbids subclasses, so that adapting it fails late."""

    def __init_subclass__(cls, **options: object) -> None:
        raise RuntimeError("no subclasses of Stubborn")


def test_a_failure_in_the_last_moment_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(6, 6), Stubborn(6, 6))
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(RuntimeError, match="no subclasses"):
        lf.attach(model, lf.LoRA(r=1))
    assert [type(module) for module in model.modules()] == classes and list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "_lorafit" not in vars(model)
    lf.attach(model, lf.LoRA(r=1), ["0"])


REPLACEMENTS: dict[str, Callable[[nn.Sequential], None]] = {
    "new": lambda model: model.__setitem__(2, nn.Linear(8, 5)),
    "gone": lambda model: model.__delitem__(2),
    "copy": lambda model: model.__setitem__(2, copy.deepcopy(model[2])),
    "none": lambda model: model.register_module("2", None),
}


@pytest.mark.parametrize("replace", list(REPLACEMENTS))
@pytest.mark.parametrize("saved", [False, True], ids=["site", "saved-module"])
def test_a_module_replaced_after_attach_is_noticed(replace, saved, tmp_path):
    model = network()
    handle = lf.attach(model, lf.LoRA(r=1), ["0"] if saved else ["0", "2"], modules_to_save=["2"] if saved else ())
    handle.save(tmp_path)
    save_state(handle, tmp_path)
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.1)
    REPLACEMENTS[replace](model)
    model[:2](torch.randn(2, 6)).sum().backward()
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: handle.save(tmp_path),
        "merge": handle.merge,
        "train": lambda: handle.param_groups(lr=0.1),
        "reload": lambda: load_state(handle, tmp_path),
    }
    for doing, call in calls.items():
        with pytest.raises(lf.StateError, match=rf"a layer was replaced.*cannot {doing}") as caught:
            call()
        assert caught.value.where == "2" and "then attach" in caught.value.fix
    before = [parameter.clone() for parameter in handle.parameters()]
    with pytest.raises(lf.StateError, match=r"a layer was replaced.*cannot train"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    handle.detach()  # what is left of it can always be taken out
    assert not [key for key in model[:2].state_dict() if "adapters" in key]
