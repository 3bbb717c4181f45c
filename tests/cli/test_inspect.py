"""`lorafit inspect` on adapters from disk."""

from __future__ import annotations

import warnings
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
    assert all(len(site["output_cosines"]) == 4 for site in found["other"]["sites"].values())
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


@pytest.fixture
def of_peft(llama: Path, tmp_path: Path) -> Path:
    """An adapter that PEFT made: one site's B is zero, another's a hundred times as large."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(llama)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in a way that is going out
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                factor = {ZEROED: 0.0, SCALED: 100.0}.get(name.split(".model.", 1)[1].split(".lora_B")[0], 1.0)
                parameter.copy_(torch.randn_like(parameter) * 0.01 * factor)
    wrapped.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


ZEROED, SCALED = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "with its base"])
def test_both_odd_sites_are_named_on_screen_in_json_and_on_the_page(
    lorafit: Callable[..., Any], of_peft: Path, llama: Path, tmp_path: Path, with_base: bool
) -> None:
    base = ["--model", llama] if with_base else []
    result = lorafit("inspect", of_peft, *base, "--report", "page.html")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert f"{ZEROED}: dead (ΔW is zero: nothing was learnt here)" in lines
    assert any(line.startswith(f"{SCALED}: far larger than its peers (") for line in lines)
    assert "without any change: 1 of 10 sites (10.0%)" in lines
    assert lines[-1] == "report: page.html" and lines[-2].startswith("it learnt: 9 of 10 sites changed")

    found = lorafit("inspect", of_peft, *base, "--json").json
    assert {(one["path"], one["kind"]) for one in found["findings"]} == {
        (ZEROED, "dead"), (SCALED, "far larger than its peers"), (SCALED, "does all the work"),
    }  # fmt: skip
    assert found["dead"] == [ZEROED] and found["dead_share"] == 0.1 and found["base"] is with_base
    assert (found["method"], found["adapter"], found["report"]) == ("lora", str(of_peft), None)

    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("<wbr>", "")
    rows = page[page.index("What is out of line") : page.index("Where it learnt")]
    assert f'<td class="words">{ZEROED}</td><td class="words">dead</td>' in rows
    assert f'<td class="words">{SCALED}</td><td class="words">far larger than its peers</td>' in rows
    assert page.count('<td class="site own"') == 2, "both are marked on the map"
    assert ("Lengths and directions of the weights" in page) is with_base


def test_a_report_goes_with_json(lorafit: Callable[..., Any], of_peft: Path, tmp_path: Path) -> None:
    found = lorafit("inspect", of_peft, of_peft, "--json", "--report", tmp_path / "new" / "page.html").json
    assert found["report"] == str(tmp_path / "new" / "page.html")
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert f"Beside {of_peft}" in page and "Cosines of the principal angles" in page


def test_a_report_that_cannot_be_written(lorafit: Callable[..., Any], of_peft: Path, tmp_path: Path) -> None:
    result = lorafit("inspect", of_peft, "--report", tmp_path)
    assert result.status == 2 and "cannot be written over this path" in result.err
    assert result.out == ""  # before anything is looked at


def test_an_adapter_whose_files_do_not_tell_sizes_beside_another(
    lorafit: Callable[..., Any], of_peft: Path, llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import lorafit as lf

    handle = lf.attach(AutoModelForCausalLM.from_pretrained(llama), lf.VeRA(r=4), ["q_proj", "k_proj"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    vera = handle.save(tmp_path / "vera")
    for order in ([of_peft, vera], [vera, of_peft]):
        refused = lorafit("inspect", *order)
        assert refused.status == 1 and "--base" in refused.err and "does not tell the size" in refused.err
        assert "it learnt" not in refused.out, "said before anything else is"
        found = lorafit("inspect", *order, "--model", llama, "--json").json
        assert len(found["other"]["sites"]) == 4 and found["other"]["mean"]["outputs"] > 0
