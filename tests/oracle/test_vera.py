"""VeRA files: peft's read here, ours read by peft, with the projections in the file and with their seed alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))

# What peft says of projections that are not in the file.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning:peft")


def linear() -> nn.Module:
    """Layers of different sizes: each takes its part of the one pair."""
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4), nn.Linear(4, 7, bias=False))


def gpt() -> nn.Module:
    return nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(5, 10))


KINDS = {"Linear": (linear, ["0", "2", "3"]), "HF Conv1D": (gpt, ["0", "2"])}


@pytest.fixture(params=KINDS)
def kind(request, tiny) -> tuple[Callable[[], nn.Module], list[str]]:
    make, targets = KINDS[request.param]
    return (lambda: tiny.seeded(make)), targets


def written_by_peft(oracle, model: nn.Module, **settings: object) -> PeftModel:
    theirs = get_peft_model(model, VeraConfig(**settings))
    oracle.randomise({key: value for key, value in theirs.state_dict().items() if "lambda" in key})
    theirs.save_pretrained(oracle.folder / "peft")
    return theirs.eval()


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "seed alone"])
@pytest.mark.parametrize("key", [0, 41])
def test_what_peft_wrote_is_read(oracle, kind, stored, key) -> None:
    build, targets = kind
    theirs = written_by_peft(
        oracle, build(), r=4, target_modules=targets, save_projection=stored, projection_prng_key=key
    )
    expected = oracle.run(theirs, X)
    oracle.differ(expected, oracle.run(build(), X))
    handle = lf.load(build(), oracle.folder / "peft")
    assert handle.method == lf.VeRA(r=4, save_projection=stored)
    torch.testing.assert_close(oracle.run(handle.model, X), expected, atol=1e-5, rtol=1e-5)
    projection = handle.adapter("0").common
    assert projection.key == key
    assert torch.equal(projection.A, theirs.base_model.vera_A["default"])
    assert torch.equal(projection.B, theirs.base_model.vera_B["default"])
    oracle.same_tensors(handle.save(oracle.folder / "again"), oracle.folder / "peft")
    oracle.same_merged(handle, theirs)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "seed alone"])
def test_what_is_written_here_is_read_by_peft(oracle, kind, stored) -> None:
    build, targets = kind
    method = lf.VeRA(r=4, d_init=0.2, save_projection=stored)
    handle = lf.attach(build(), method, targets, seed=7)
    oracle.randomise(dict(handle.named_parameters()))
    expected = oracle.run(handle.model, X)
    oracle.differ(expected, oracle.run(build(), X))
    folder = handle.save(oracle.folder / "ours")
    tensors, config = oracle.read(folder)
    assert ("base_model.vera_A" in tensors) == stored
    assert config["projection_prng_key"] == handle.adapter("0").common.key
    theirs = PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(oracle.run(theirs, X), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(oracle.folder / "again")
    oracle.same_tensors(folder, oracle.folder / "again")
    again = lf.load(build(), folder, trainable=True)
    assert again.method == method and torch.equal(oracle.run(again.model, X), expected)
    assert len({id(again.adapter(path).common) for path in again.sites}) == 1


def test_a_language_model_both_ways(oracle, tiny) -> None:
    inputs = tiny.tokens()
    theirs = written_by_peft(oracle, tiny.llama(), r=8, target_modules=["q_proj", "down_proj"])
    handle = lf.load(tiny.llama(), oracle.folder / "peft")
    expected = oracle.run(theirs, inputs)
    torch.testing.assert_close(oracle.run(handle.model, inputs), expected, atol=1e-5, rtol=1e-5)
    back = PeftModel.from_pretrained(tiny.llama(), handle.save(oracle.folder / "ours"))
    torch.testing.assert_close(oracle.run(back, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_pair_larger_than_the_layers_is_read(oracle, tiny) -> None:
    # A file whose other adapters were wider; peft wants the exact size, the mathematics the upper left part.
    written_by_peft(oracle, tiny.seeded(linear), r=4, target_modules=["2"])
    tensors, config = oracle.read(oracle.folder / "peft")
    expected = oracle.run(lf.load(tiny.seeded(linear), oracle.folder / "peft").model, X)
    tensors["base_model.vera_A"] = torch.cat([tensors["base_model.vera_A"], torch.ones(4, 3)], dim=1)
    folder = oracle.write(config, tensors)
    assert torch.equal(oracle.run(lf.load(tiny.seeded(linear), folder).model, X), expected)


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no A": (lambda t: t.pop("base_model.vera_A"), r"missing key[\s\S]*vera_A"),
    "neither": (lambda t: [t.pop("base_model.vera_A"), t.pop("base_model.vera_B")], r"save_projection = True"),
    "narrow A": (lambda t: t.update({"base_model.vera_A": torch.ones(4, 5)}), r"do not fit[\s\S]*A \(4, 5\)"),
    "integers": (lambda t: t.update({"base_model.vera_B": torch.ones(10, 4, dtype=torch.int8)}), "wrong type"),
    "no b": (lambda t: t.pop("base_model.model.0.vera_lambda_b"), r"missing key[\s\S]*0\.vera_lambda_b"),
    "long d": (lambda t: t.update({"base_model.model.0.vera_lambda_d": torch.ones(5)}), r"rank in the file"),
    "long b": (lambda t: t.update({"base_model.model.0.vera_lambda_b": torch.ones(5)}), r"wrong shape[\s\S]*\(10,\)"),
    "infinite A": (lambda t: t["base_model.vera_A"].fill_(float("inf")), r"not a number[\s\S]*vera_A"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_broken_files(oracle, tiny, edit_tensors, which) -> None:
    how, match = BROKEN[which]
    written_by_peft(oracle, tiny.seeded(linear), r=4, target_modules=["0", "2"])
    edit_tensors(oracle.folder / "peft", how)
    with pytest.raises(lf.CheckpointError, match=match):
        lf.load(tiny.seeded(linear), oracle.folder / "peft")


CONFIGS = {"r": [0, None], "projection_prng_key": [None, "3", True], "d_initial": [0, "x"], "vera_dropout": [1.5]}
CONFIGS["bias"] = ["all"]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in CONFIGS.items() for value in values], ids=str
)
def test_configs_that_cannot_be(oracle, tiny, edit, key, value) -> None:
    written_by_peft(oracle, tiny.seeded(linear), r=4, target_modules=["0", "2"])
    edit(oracle.folder / "peft", **{key: value})
    with pytest.raises(lf.CheckpointError) as caught:
        lf.load(tiny.seeded(linear), oracle.folder / "peft")
    assert key in str(caught.value.where) and caught.value.expected and caught.value.fix


def test_projections_that_the_config_denies_are_said(oracle, tiny, edit) -> None:
    theirs = written_by_peft(oracle, tiny.seeded(linear), r=4, target_modules=["0", "2"])
    edit(oracle.folder / "peft", save_projection=False)
    with pytest.warns(lf.LorafitWarning, match=r"save_projection is false[\s\S]*the seed is used"):
        handle = lf.load(tiny.seeded(linear), oracle.folder / "peft")
    torch.testing.assert_close(oracle.run(handle.model, X), oracle.run(theirs, X), atol=1e-5, rtol=1e-5)


def test_layers_that_peft_does_not_know_are_said(oracle, tiny) -> None:
    build = lambda: tiny.seeded(lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 1)))  # noqa: E731
    handle = lf.attach(build(), lf.VeRA(r=4), ["0", "1"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    with pytest.warns(lf.LorafitWarning, match="PEFT has no VeRA for layers of this type: 0, 1"):
        folder = handle.save(oracle.folder / "ours")
    x = torch.randn(2, 4, 7)
    assert torch.equal(oracle.run(lf.load(build(), folder).model, x), oracle.run(handle.model, x))
