"""`lorafit inspect` on adapters from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def adapter(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of a trained adapter in which one site is zero and another one a hundred times as large."""
    import shutil

    folder = tmp_path / "odd"
    shutil.copytree(trained[0] / "adapter", folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    keys = sorted(key for key in tensors if key.endswith("lora_B.weight"))
    for key, factor in ((keys[0], 0.0), (keys[-1], 100.0)):
        tensors[key] = tensors[key] * factor
    save_file(tensors, path)
    return folder


def test_it_needs_no_base(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    result = lorafit("inspect", trained[0] / "adapter")
    assert result.status == 0
    assert result.out.splitlines()[-1].startswith("it learnt: all ")


def test_what_is_out_of_line_is_named(lorafit: Callable[..., Any], adapter: Path) -> None:
    found = lorafit("inspect", adapter, "--json").json
    assert len(found["dead"]) == 1
    kinds = {finding["path"]: finding["kind"] for finding in found["findings"]}
    assert kinds[found["dead"][0]] == "dead"
    assert any(kind.startswith("far larger") or kind == "does all the work" for kind in kinds.values())
    assert found["logits"] is None


def test_with_the_base_changes_are_shares_of_it(
    lorafit: Callable[..., Any], trained: tuple[Path, Any], llama: Path
) -> None:
    found = lorafit("inspect", trained[0] / "adapter", "--model", llama, "--json").json
    assert found["logits"]["effect"] > 0
    assert all(0 < site["relative"] < 10 and site["direction"] >= 0 for site in found["sites"].values())


def test_two_side_by_side(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    folder = trained[0] / "adapter"
    found = lorafit("inspect", folder, folder, "--json").json
    assert found["other"]["mean"] == pytest.approx({"outputs": 1, "inputs": 1, "cosine": 1}, abs=1e-5)
    assert found["other"]["alone"] == [0, 0]


def test_no_adapter(lorafit: Callable[..., Any], tmp_path: Path) -> None:
    result = lorafit("inspect", tmp_path)
    assert result.status == 1 and "fix:" in result.err


def test_a_damaged_number_is_named(lorafit: Callable[..., Any], adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path)
    result = lorafit("inspect", adapter)
    assert result.status == 1 and key in result.err
