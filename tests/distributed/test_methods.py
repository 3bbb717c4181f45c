"""Every method by two processes is the method by one: DistributedDataParallel and FSDP2, on gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

NAMES = (
    "lora",
    "lora-plus",
    "lora-fa",
    "vera",
    "lora-drop",
    "adalora",
    "dora",
    "delta-lora",
    "intrinsic",
    "pissa",
    "lora-drop-dora",
    "dora-vera",
    "lora-plus-adalora",
)
SHAPES = (
    "everywhere",
    "head in full",
    "head in full, subspace",
    "tied",
    "bfloat16",
    "sequence",
    "accumulated",
    "accumulated subspace",
)
WHOLE = {"lora-drop": 4, "lora-drop-dora": 18, "intrinsic": 0}
"""Methods whose sites share trained tensors → how many of their parameters are sharded all the same."""
Together = Callable[[str], dict[str, Any]]


def test_all_methods_are_here() -> None:
    import lorafit as lf

    assert set(lf.METHODS) <= set(NAMES)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(together: Together, name: str, how: str) -> None:
    row = together("methods")[f"{name} {how}"]
    assert row["loss"] < 5e-6  # of about 4, at each of 8 steps
    assert row["delta"] < 1e-3  # of the largest change; rounding, which Adam magnifies where gradients are near zero
    assert row["same in both"], "the processes hold different adapters"
    assert row["loaded"] == 0.0 and row["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert row["num_trainable"][0] == row["num_trainable"][1] and row["facts"]
    assert row["parts"] == (0 if how == "ddp" else WHOLE.get(name, row["trained"]))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SHAPES)
def test_other_models_sites_and_accumulated_batches(together: Together, name: str, how: str) -> None:
    row = together("shapes")[f"{name} {how}"]
    half = name == "bfloat16"  # sums over half of a batch are rounded to 8 bits
    assert row["loss"] < (2e-3 if half else 5e-6)
    assert row["delta"] < (0.3 if half else 1e-3) and row["copies"] < 1e-3


def test_what_the_first_process_drew_counts(together: Together) -> None:
    assert together("shapes")["drawn apart"]


@pytest.mark.parametrize("way", ["fsdp one", "one fsdp", "ddp fsdp"])
@pytest.mark.parametrize("name", ["lora", "adalora", "delta-lora", "intrinsic", "lora-drop"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(together: Together, name: str, way: str) -> None:
    row = together("state")[f"{name} {way}"]
    assert row["loss"] < 5e-6 and row["delta"] < 1e-3


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        ("attach", "TargetError", "attach, shard, compile"),
        ("load", "TargetError", "attach, shard, compile"),
        ("twice", "StateError", "sharded already"),
        ("merge", "MergeError", "lorafit.load(model, folder).merge()"),
        ("merge and detach", "StateError", "cannot be undone"),
        ("detach", "StateError", "cannot be undone"),
        ("deepcopy", "AssertionError", "does not support deepcopy"),
        ("optimizer first", "StateError", "attach, shard, then handle.optimizer"),
        ("backward pass", "TrainingError", "dicts and dataclasses"),
        ("merged", "StateError", "unmerge it first"),
        ("blocks", "ConfigError", "nearest:  LlamaDecoderLayer"),
        ("quantised", "ConfigError", "a quantised base cannot be sharded"),
        ("cannot be written", "CheckpointError", "Not a directory"),
    ],
)
def test_what_cannot_be_is_refused(together: Together, call: str, kind: str, said: str) -> None:
    found = together("refused")
    assert found[call][0] == kind and said in found[call][1]


def test_a_failure_of_the_first_process_is_one_of_all(together: Together) -> None:
    assert together("refused")["both"] == ["CheckpointError"] * 2


def test_a_sharded_model(together: Together) -> None:
    found = together("refused")
    assert found["sharded"] and found["units"] == ["model.layers.0", "model.layers.1"]
    assert found["freed after evaluation"] and found["disabled"] and found["not merged"]


def test_without_processes_there_is_nothing_to_shard_over() -> None:
    import lorafit as lf
    from lorafit.distributed import shard
    from tests.distributed.work import llama

    with pytest.raises(lf.StateError, match="no processes") as caught:
        shard(lf.attach(llama(), lf.LoRA(r=2)))
    assert "torchrun" in str(caught.value.fix)
