"""Files that do not fit: each is refused with file, key, found, expected and a fix, and the model stays as it was."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.errors import CheckpointError, LorafitWarning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."


def network() -> nn.Sequential:
    layers = OrderedDict(
        embed=nn.Embedding(11, 8),
        q_proj=nn.Linear(8, 6),
        k_proj=nn.Linear(8, 6),
        mix=Conv1D(5, 8),
        conv=nn.Conv1d(4, 4, 3),
    )
    return nn.Sequential(layers)


@pytest.fixture
def folder(tmp_path, fill) -> Path:
    """A good adapter in all layers but k_proj."""
    handle = lf.attach(network(), lf.LoRA(r=2, alpha=4), ["embed", "q_proj", "mix", "conv"])
    fill(handle)
    return handle.save(tmp_path / "adapter")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, *parts: str, kind: type[lf.LorafitError] = CheckpointError, name: str = "default") -> str:
    """The message of the error that loading raises, after checking its parts and that nothing happened."""
    model = network()
    before, flags = list(model.state_dict().items()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind) as caught:
        lf.load(model, folder, name=name)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert caught.value.where and caught.value.fix
    now = list(model.state_dict().items())
    assert [key for key, _ in now] == [key for key, _ in before]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(now, before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert "_lorafit" not in vars(model)
    return text


def test_the_good_folder_loads(folder):
    handle = lf.load(network(), folder)
    assert list(handle.sites) == ["embed", "q_proj", "mix", "conv"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert lf.load(network(), str(folder), name="other").name == "other"


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "unexpected-key": (
        lambda t: t.update({P + "q_proj.lora_C.weight": torch.zeros(2, 8)}),
        ["unexpected key", "q_proj.lora_C.weight", WEIGHTS, "nearest:  q_proj.lora_"],
    ),
    "unexpected-layer": (
        lambda t: t.update({P + "v_proj.lora_A.weight": torch.zeros(2, 8)}),
        ["layer that this model does not have", "v_proj", "q_proj", "base_model_name_or_path"],
    ),
    "not-a-layer": (
        lambda t: t.update({P + "lora_A.weight": torch.zeros(2, 8)}),
        ["layer that this model does not have", "a Sequential"],
    ),
    "no-prefix": (
        lambda t: t.update({"q_proj.lora_A.weight": t.pop(P + "q_proj.lora_A.weight")}),
        ["unexpected key", "'q_proj.lora_A.weight'", "start with 'base_model.model.'"],
    ),
    "missing-A": (
        lambda t: t.pop(P + "q_proj.lora_A.weight"),
        ["missing key", WEIGHTS, P + "q_proj.lora_A.weight", "7 tensors", "nearest:"],
    ),
    "missing-B": (lambda t: t.pop(P + "mix.lora_B.weight"), ["missing key", P + "mix.lora_B.weight"]),
    "missing-layer": (
        lambda t: [t.pop(P + f"q_proj.lora_{x}.weight") for x in "AB"],
        ["missing key", P + "q_proj.lora_A.weight"],
    ),
    "missing-embedding": (
        lambda t: [t.pop(P + f"embed.lora_embedding_{x}") for x in "AB"],
        ["missing key", P + "embed.lora_embedding_A"],
    ),
    "empty": (lambda t: t.clear(), ["missing key", "0 tensors"]),
    "layer-not-in-config": (
        lambda t: t.update({P + f"k_proj.lora_{x}.weight": t[P + f"q_proj.lora_{x}.weight"].clone() for x in "AB"}),
        ["layer that its config does not name", "k_proj", "target_modules"],
    ),
    "wrong-shape-A": (
        lambda t: t.update({P + "q_proj.lora_A.weight": torch.zeros(2, 9)}),
        ["wrong shape", P + "q_proj.lora_A.weight", "found:    (2, 9)", "expected: (2, 8)"],
    ),
    "wrong-shape-B": (
        lambda t: t.update({P + "q_proj.lora_B.weight": torch.zeros(6, 3)}),
        ["wrong shape", P + "q_proj.lora_B.weight", "(6, 3)", "(6, 2)"],
    ),
    "wrong-shape-conv": (
        lambda t: t.update({P + "conv.lora_A.weight": torch.zeros(2, 4, 5)}),
        ["wrong shape", P + "conv.lora_A.weight", "(2, 4, 5)", "(2, 4, 3)"],
    ),
    "flat-conv": (
        lambda t: t.update({P + "conv.lora_B.weight": torch.zeros(4, 2)}),
        ["wrong shape", P + "conv.lora_B.weight", "(4, 2)", "(4, 2, 1)"],
    ),
    "transposed-embedding": (
        lambda t: t.update({P + "embed.lora_embedding_B": torch.zeros(2, 8)}),
        ["wrong shape", P + "embed.lora_embedding_B", "(2, 8)", "(8, 2)"],
    ),
    "scalar": (
        lambda t: t.update({P + "q_proj.lora_A.weight": torch.tensor(1.0)}),
        ["wrong shape", "found:    ()", "expected: (2, 8)"],
    ),
    "rank": (
        lambda t: t.update(
            {P + "q_proj.lora_A.weight": torch.zeros(3, 8), P + "q_proj.lora_B.weight": torch.zeros(6, 3)}
        ),
        ["rank in the file is not the rank in its config", "q_proj.lora_A.weight", "r = 3", "expected: r = 2", CONFIG],
    ),
    "integers": (
        lambda t: t.update({P + "q_proj.lora_A.weight": torch.zeros(2, 8, dtype=torch.int32)}),
        ["wrong type", "torch.int32", "floating-point"],
    ),
    "not-finite": (
        lambda t: t[P + "q_proj.lora_B.weight"][0].fill_(torch.nan),
        ["infinite or not a number", P + "q_proj.lora_B.weight", "2 of 12", "diverged"],
    ),
    "infinite": (lambda t: t[P + "conv.lora_A.weight"].fill_(torch.inf), ["infinite or not a number", "24 of 24"]),
    "matrix-key-for-an-embedding": (
        lambda t: t.update({P + "embed.lora_A.weight": torch.zeros(2, 11)}),
        ["layer of another type", "lora_A.weight for a layer of type Embedding", "lora_embedding_A"],
    ),
    "embedding-key-for-a-matrix": (
        lambda t: t.update({P + "q_proj.lora_embedding_A": torch.zeros(2, 8)}),
        ["layer of another type", "lora_embedding_A for a layer of type Linear", "lora_A.weight"],
    ),
    "dora": (
        lambda t: t.update({P + "q_proj.lora_magnitude_vector": torch.ones(6)}),
        ["tensor of DoRA", "q_proj.lora_magnitude_vector", "copy config and weights again"],
    ),
    "dora-new-spelling": (
        lambda t: t.update({P + "q_proj.lora_magnitude_vector.weight": torch.ones(6)}),
        ["tensor of DoRA"],
    ),
    "adalora": (lambda t: t.update({P + "q_proj.lora_E": torch.ones(2, 1)}), ["tensor of AdaLoRA", "q_proj.lora_E"]),
    "vera": (lambda t: t.update({P + "q_proj.vera_lambda_b": torch.ones(6)}), ["tensor of VeRA"]),
    "biased": (lambda t: t.update({P + "q_proj.lora_B.bias": torch.ones(6)}), ["LoRA with trained biases"]),
    "other-base-weight": (
        lambda t: t.update({P + "embed.weight": torch.zeros(12, 8)}),
        ["base weight that differs", "embed.weight", "(12, 8)", "(11, 8)", "resize"],
    ),
}


@pytest.mark.parametrize("case", list(TENSORS))
def test_tensors_that_do_not_fit(case, folder):
    change, parts = TENSORS[case]
    change_tensors(folder, change)
    refused(folder, *parts)


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "type": (
        {"peft_type": "LORRA"},
        ["type that this version does not read", "peft_type", "'LORRA'", "nearest:  LORA"],
    ),
    "no-type": ({"peft_type": ...}, ["peft_type", "None", "'LORA'"]),
    "adalora": ({"peft_type": "ADALORA"}, ["peft_type", "'ADALORA'"]),
    "vera": ({"peft_type": "VERA"}, ["peft_type", "'VERA'"]),
    "r-zero": ({"r": 0}, [": r", "rank is out of range", "found:    0", "at least 1"]),
    "r-bool": ({"r": True}, [": r", "True", "whole number"]),
    "r-text": ({"r": "8"}, [": r", "'8'", "whole number"]),
    "r-fraction": ({"r": 2.0}, [": r", "2.0", "whole number"]),
    "r-null": ({"r": None}, [": r", "None"]),
    "alpha-negative": ({"lora_alpha": -4}, ["lora_alpha", "alpha is out of range", "-4", "greater than 0"]),
    "alpha-zero": ({"lora_alpha": 0}, ["lora_alpha", "found:    0"]),
    "alpha-null": ({"lora_alpha": None}, ["lora_alpha", "missing", "greater than 0"]),
    "alpha-nan": ({"lora_alpha": float("nan")}, ["lora_alpha", "nan"]),
    "alpha-infinite": ({"lora_alpha": float("inf")}, ["lora_alpha", "inf"]),
    "dropout-one": ({"lora_dropout": 1}, ["lora_dropout", "found:    1", "less than 1"]),
    "dropout-negative": ({"lora_dropout": -0.1}, ["lora_dropout", "-0.1"]),
    "dropout-bool": ({"lora_dropout": False}, ["lora_dropout", "False"]),
    "rslora-text": ({"use_rslora": "yes"}, ["use_rslora", "'yes'"]),
    "rank-in-config": ({"r": 4}, ["rank in the file is not the rank in its config", "r = 2", "r = 4"]),
    "rank-pattern-value": ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']", "out of range", "0"]),
    "rank-pattern-float": ({"rank_pattern": {"q_proj": 2.0}}, ["rank_pattern['q_proj']", "2.0", "int"]),
    "rank-pattern-list": ({"rank_pattern": ["q_proj"]}, ["rank_pattern", "an object"]),
    "rank-pattern-regex": ({"rank_pattern": {"(": 2}}, ["rank_pattern", "not a regular expression"]),
    "alpha-pattern-value": ({"alpha_pattern": {"q_proj": True}}, ["alpha_pattern['q_proj']", "True"]),
    "alpha-pattern-huge": ({"alpha_pattern": {"q_proj": float("inf")}}, ["alpha_pattern['q_proj']", "inf"]),
    "unknown-target": (
        {"target_modules": ["embed", "q_prj", "mix", "conv"]},
        ["modules that this model does not have", "target_modules", "'q_prj'", "q_proj", "base_model_name_or_path"],
    ),
    "target-regex-without-match": ({"target_modules": ".*nothing"}, ["target_modules", "'.*nothing'"]),
    "target-regex-broken": ({"target_modules": "("}, ["target_modules", "not a regular expression", "'('"]),
    "target-number": ({"target_modules": 3}, ["target_modules", "no module names", "3"]),
    "target-empty-name": ({"target_modules": ["", "q_proj"]}, ["target_modules", "no module names"]),
    "target-missing-layer": (
        {"target_modules": ["embed", "q_proj", "mix"]},
        ["layer that its config does not name", "conv", "mend target_modules"],
    ),
    "target-more": (
        {"target_modules": ["embed", "q_proj", "mix", "conv", "k_proj"]},
        ["missing key", "k_proj.lora_A.weight"],
    ),
    "excluded": ({"exclude_modules": ["conv"]}, ["layer that its config does not name", "conv"]),
    "exclude-regex-broken": ({"exclude_modules": "["}, ["exclude_modules", "not a regular expression"]),
    "layers-text": ({"layers_to_transform": ["0"]}, ["layers_to_transform", "whole number"]),
    "layers-bool": ({"layers_to_transform": True}, ["layers_to_transform", "True"]),
    "layers-pattern": ({"layers_pattern": 5}, ["layers_pattern", "no module names", "5"]),
    "layers-pattern-regex": ({"layers_pattern": ["("]}, ["layers_pattern", "not a regular expression"]),
    "saved-text": ({"modules_to_save": "head"}, ["modules_to_save", "'head'", "a list of names"]),
    "saved-absent": ({"modules_to_save": ["head"]}, ["saved in full is missing", "modules_to_save", "'head'"]),
    "dora-flag": ({"use_dora": True}, ["missing key", "lora_magnitude_vector"]),
    "bias": ({"bias": "all"}, ["bias", "'all'", "'none'"]),
    "lora-bias": ({"lora_bias": True}, ["lora_bias", "True"]),
    "replicated": ({"layer_replication": [[0, 4]]}, ["layer_replication"]),
    "pissa": ({"init_lora_weights": "pissa"}, ["init_lora_weights", "'pissa'", "path_initial_model"]),
    "loftq": ({"init_lora_weights": "loftq"}, ["init_lora_weights", "keeps a part of the base weight"]),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_configs_that_cannot_be(case, folder):
    changes, parts = CONFIGS[case]
    change_config(folder, **changes)
    text = refused(folder, *parts)
    assert CONFIG in text or WEIGHTS in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"r": 2,\n "lora_alpha": }', ["the config is no JSON", f"{CONFIG}:2"]),
        (b"", ["the config is no JSON", f"{CONFIG}:1"]),
        (b"[1, 2]", ["the config is no JSON object", "list"]),
        (b'"LORA"', ["the config is no JSON object", "str"]),
        (b"\xff\xfe{}", ["the config cannot be read", "utf-8"]),
        (b"[" * 200_000, ["the config is no JSON"]),
    ],
    ids=["syntax", "empty", "list", "string", "bytes", "deep"],
)
def test_configs_that_cannot_be_read(content, parts, folder):
    (folder / CONFIG).write_bytes(content)
    refused(folder, CONFIG, *parts)


def test_unknown_settings_are_reported_and_harmless(folder):
    change_config(folder, shiny_new_thing=3, another={"a": 1}, peft_version="9.9")
    with pytest.warns(LorafitWarning, match="settings that are not known here") as caught:
        lf.load(network(), folder)
    text = str(caught[0].message)
    assert "another, shiny_new_thing" in text and str(folder / CONFIG) in text
    assert "peft_version" not in text and len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 0.5, -1], ids=str)
def test_truncated_files(keep, folder):
    file = folder / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    refused(folder, "damaged or cut short", WEIGHTS, "copy or download it again")


def test_every_flipped_byte_of_the_values_is_noticed(folder):
    file = folder / WEIGHTS
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in range(start, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        refused(folder, "changed after it was written", WEIGHTS, "checksum")


@pytest.mark.filterwarnings("ignore:.*differs from the config that was saved:lorafit.LorafitWarning")
def test_flipped_bytes_of_the_header_never_give_another_adapter(folder):
    """A damaged header is an error, or it changed nothing that counts: never other values in silence."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    model = network()
    good = lf.load(model, folder)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    good.detach()
    survived = 0
    for place in range(0, length, 5):
        damaged = bytearray(data)
        damaged[place] ^= 0x01
        file.write_bytes(damaged)
        try:
            handle = lf.load(model, folder)
        except CheckpointError:
            assert not [key for key in model.state_dict() if "adapters" in key]
            continue
        survived += 1
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        handle.detach()
    assert survived < length / 5


def test_an_older_file_without_a_checksum_is_read(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    lf.load(network(), folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_pickles_are_never_read(name, folder):
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, "pickle is never read", name, "safe_serialization=True")


def test_there_is_no_adapter(folder, tmp_path):
    refused(tmp_path / "nowhere", "no such folder", "nowhere", "huggingface_hub")
    refused(folder / WEIGHTS, "an adapter is a folder, this is a file", WEIGHTS)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no adapter", f"no {CONFIG} and no {WEIGHTS}")
    text = refused(tmp_path, "holds no adapter", "adapters below it in adapter", "nearest:  adapter")
    assert f"give {folder}" in text
    (folder / WEIGHTS).unlink()
    refused(folder, "holds no adapter", CONFIG, WEIGHTS)


def test_named_adapters_lie_in_folders_of_their_name(tmp_path, fill):
    model = network()
    handles = {}
    for seed, name in enumerate(("default", "b", "c")):
        handles[name] = lf.attach(model, lf.LoRA(r=2), ["q_proj"], name=name)
        fill(handles[name], seed)
        assert handles[name].save(tmp_path) == (tmp_path if name == "default" else tmp_path / name)
    deltas = {name: handle.delta("q_proj") for name, handle in handles.items()}
    for handle in handles.values():
        handle.detach()
    for name in ("c", "default", "b"):
        assert torch.equal(lf.load(model, tmp_path, name=name).delta("q_proj"), deltas[name])
    other = network()
    assert torch.equal(lf.load(other, tmp_path / "b").delta("q_proj"), deltas["b"])  # under another name


def test_a_name_that_is_taken_is_refused(folder):
    model = network()
    lf.load(model, folder)
    with pytest.raises(lf.ConfigError, match="has an adapter of this name already") as caught:
        lf.load(model, folder)
    assert "'default'" in caught.value.found and caught.value.fix


def test_another_model_is_refused_before_it_is_touched(folder):
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(11, 8), q_proj=nn.Linear(8, 6)))
    with pytest.raises(CheckpointError, match="that this model does not have"):
        lf.load(model, folder)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_files_of_half_precision_are_read_as_they_are(folder, fill):
    change_tensors(folder, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    handle = lf.load(network(), folder)
    stored = load_file(folder / WEIGHTS)[P + "q_proj.lora_A.weight"]
    adapter = handle.adapter("q_proj")
    assert adapter.A.dtype == torch.float32 and torch.equal(adapter.A, stored.float())


def test_a_base_embedding_beside_the_adapter_is_accepted_where_it_is_the_models(folder):
    model = network()
    change_tensors(folder, lambda t: t.update({P + "embed.weight": model.embed.weight.detach().clone()}))
    assert len(lf.load(model, folder).sites) == 4


def test_errors_survive_a_process_boundary(folder):
    change_config(folder, r=0)
    with pytest.raises(CheckpointError) as caught:
        lf.load(network(), folder)
    back = pickle.loads(pickle.dumps(caught.value))
    assert type(back) is CheckpointError and str(back) == str(caught.value) and back.fix == caught.value.fix
