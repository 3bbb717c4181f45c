"""What of peft's this version does not read: refused by file and key, with the model as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    get_peft_model,
)
from torch import Tensor, nn

import lorafit as lf

TARGETS = ["q_proj", "down_proj"]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that a model is afterwards, in every tensor, class, attribute and flag, what it was before."""

    def picture() -> dict[str, Any]:
        return {path: (type(module), set(vars(module)), module.training) for path, module in model.named_modules()}

    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    identities = {key: id(parameter) for key, parameter in model.named_parameters()}
    before = picture()
    yield
    assert picture() == before
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == identities


def refused(model: nn.Module, folder, key: str, found: str | None = None) -> lf.CheckpointError:
    """The error of a load, which names the config file and the key."""
    with unchanged(model), pytest.raises(lf.CheckpointError) as caught:
        lf.load(model, folder)
    message = str(caught.value)
    assert f"{folder / 'adapter_config.json'}: {key}" in message
    assert caught.value.found == found if found is not None else caught.value.found is not None
    assert caught.value.expected and caught.value.fix
    return caught.value


WRITTEN = {
    "bias": {"bias": "all"},
    "bias of LoRA layers": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["attention.self.query"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 5]},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "init_lora_weights pissa": {"init_lora_weights": "pissa"},
    "init_lora_weights pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights olora": {"init_lora_weights": "olora"},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape:UserWarning")
@pytest.mark.parametrize("which", WRITTEN)
def test_a_setting_that_changes_the_mathematics(oracle, tiny, which) -> None:
    build = tiny.bert if which == "lora_bias" else tiny.llama
    settings = {"target_modules": TARGETS, **WRITTEN[which]}
    _, folder = oracle.written_by_peft(build, LoraConfig(r=2, **settings))
    error = refused(build(), folder, which.split()[0])
    assert "merge" in error.fix or "path_initial_model" in error.fix


EDITED = {
    "init_lora_weights": ["corda", "loftq", "lora_ga", "something new", None],
    "alora_invocation_tokens": [[3, 4]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "monteclora_config": [{"num_samples": 2}],
    "kasa_config": [{"beta": 0.1}],
    "arrow_config": [{"top_k": 2}],
    "velora_config": [{"num_groups": 2}],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "ensure_weight_tying": [True],
    "bias": ["some", True],
    "use_dora": [1, "yes"],
    "r": [0, -1, 2.5, True, "2", None],
    "lora_alpha": [0, -3, "6", None, True],
    "lora_dropout": [1.0, -0.1, "0"],
    "use_rslora": ["yes", 2],
    "rank_pattern": [["q_proj"], {"q_proj": 0}, {"q_proj": 2.5}, {"(": 2}],
    "alpha_pattern": [["q_proj"], {"q_proj": -1}, {"q_proj": "2"}, {"*": 2}],
    "target_modules": [3, [1], [""]],
    "exclude_modules": [3, [None]],
    "modules_to_save": ["lm_head", [2]],
    "layers_to_transform": ["0", [0.5], [True]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in EDITED.items() for value in values], ids=str
)
def test_a_value_that_is_not_read(oracle, tiny, edit, key, value) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS))
    edit(folder, **{key: value})
    refused(tiny.llama(), folder, key)


OTHER_TYPES: dict[str, Callable[[], Any]] = {
    "IA3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LOHA": lambda: LoHaConfig(target_modules=TARGETS, r=2),
    "LOKR": lambda: LoKrConfig(target_modules=TARGETS, r=2),
    "OFT": lambda: OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
    "BOFT": lambda: BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "HRA": lambda: HRAConfig(target_modules=TARGETS, r=2),
    "VBLORA": lambda: VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=8, topk=2, r=2),
    "RANDLORA": lambda: RandLoraConfig(target_modules=["q_proj"], r=2),
    "FOURIERFT": lambda: FourierFTConfig(target_modules=TARGETS, n_frequency=10),
    "LN_TUNING": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "TRAINABLE_TOKENS": lambda: TrainableTokensConfig(token_indices=[1, 2]),
    "PROMPT_TUNING": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_another_type_of_adapter(oracle, tiny, kind) -> None:
    folder = oracle.folder / "peft"
    get_peft_model(tiny.llama(), OTHER_TYPES[kind]()).save_pretrained(folder)
    error = refused(tiny.llama(), folder, "peft_type", repr(kind))
    assert "'LORA'" in error.expected


@pytest.mark.parametrize("kind", [None, 3, "LoRA", "lora", "LORA2"])
def test_a_type_that_does_not_exist(oracle, tiny, edit, kind) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS))
    refused(tiny.llama(), edit(folder, peft_type=kind), "peft_type", repr(kind))


def test_a_config_that_names_no_type(oracle, tiny) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"r": 2, "target_modules": TARGETS}))
    refused(tiny.llama(), folder, "peft_type", "None")


def test_tensors_of_dora_under_a_config_that_hides_them(oracle, tiny, edit) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    model = tiny.llama()
    with unchanged(model), pytest.raises(lf.CheckpointError, match=r"DoRA[\s\S]*lora_magnitude_vector"):
        lf.load(model, edit(folder, use_dora=False))


def test_biases_under_a_config_that_hides_them(oracle, tiny, edit, edit_tensors) -> None:
    config = LoraConfig(r=2, target_modules=["attention.self.query"], bias="all")
    _, folder = oracle.written_by_peft(tiny.bert, config)
    edit_tensors(folder, lambda tensors: [value.add_(1) for key, value in tensors.items() if key.endswith("bias")])
    model = tiny.bert()
    with unchanged(model), pytest.raises(lf.CheckpointError, match=r"base weight that differs[\s\S]*bias"):
        lf.load(model, edit(folder, bias="none"))


# Files that are not of this model


@pytest.mark.parametrize(
    ("build", "match"),
    [
        ("gpt2", r"down_proj"),
        ("bert", r"down_proj"),
        ("wider", r"wrong shape[\s\S]*\(32, 2\)[\s\S]*\(64, 2\)"),
        ("deeper", r"missing key[\s\S]*layers\.2"),
        ("shallower", r"layers\.1"),
    ],
)
def test_a_file_of_another_model(oracle, tiny, build, match) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS))
    other = {
        "gpt2": tiny.gpt2,
        "bert": tiny.bert,
        "wider": lambda: tiny.llama(hidden_size=64),
        "deeper": lambda: tiny.llama(num_hidden_layers=3),
        "shallower": lambda: tiny.llama(num_hidden_layers=1),
    }[build]()
    with unchanged(other), pytest.raises(lf.CheckpointError, match=match):
        lf.load(other, folder)


def test_a_head_of_another_size(oracle, tiny) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    _, folder = oracle.written_by_peft(tiny.llama_classifier, config)
    other = tiny.llama_classifier(num_labels=5)
    with unchanged(other), pytest.raises(lf.CheckpointError, match=r"wrong shape[\s\S]*score[\s\S]*num_labels"):
        lf.load(other, folder)


def _scale(tensors: dict[str, Tensor]) -> None:
    tensors[next(key for key in tensors if "lora_A" in key)][0, 0] = float("nan")


def _rank(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key] = tensors[key][:1] if "lora_A" in key else tensors[key][:, :1].contiguous()


def _integers(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key] = tensors[key].to(torch.int8)


def _flat(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key] = tensors[key].flatten()


def _scalar(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key] = torch.tensor(1.0)


def _only_a(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_B" in key]:
        del tensors[key]


def _nothing(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


def _prefix(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (_scale, "not a number"),
        (_rank, r"r = 1[\s\S]*r = 2"),
        (_integers, "wrong type"),
        (_flat, r"shape \(96,\)"),
        (_scalar, "wrong shape"),
        (_only_a, r"missing key[\s\S]*lora_B"),
        (_nothing, "missing key"),
        (_prefix, "unexpected key"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_tensors_that_do_not_fit(oracle, tiny, edit_tensors, how, match) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS))
    edit_tensors(folder, how)
    model = tiny.llama()
    with unchanged(model), pytest.raises(lf.CheckpointError, match=match) as caught:
        lf.load(model, folder)
    assert "adapter_model.safetensors" in str(caught.value)


def test_pickled_weights_are_never_read(oracle, tiny) -> None:
    theirs, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS))
    shutil.rmtree(folder)
    theirs.save_pretrained(folder, safe_serialization=False)
    model = tiny.llama()
    with unchanged(model), pytest.raises(lf.CheckpointError, match=r"pickle[\s\S]*adapter_model\.bin"):
        lf.load(model, folder)


def test_a_named_adapter_that_is_not_named(oracle, tiny) -> None:
    _, folder = oracle.written_by_peft(tiny.llama, LoraConfig(r=2, target_modules=TARGETS), "german")
    model = tiny.llama()
    with unchanged(model), pytest.raises(lf.CheckpointError, match=r"german"):
        lf.load(model, folder)
