"""`lorafit resize`: a smaller adapter from the command line, and the table that helps to choose how small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit import store

Run = Callable[..., Any]


@pytest.fixture
def adapter(trained: tuple[Path, Any]) -> Path:
    return trained[0] / "adapter"


def test_a_rank_makes_a_new_adapter_that_eval_reads(lorafit: Run, adapter: Path, tmp_path: Path, sums: Path) -> None:
    result = lorafit("resize", adapter, "--r", 2, "--output-dir", "small")
    assert result.status == 0, result.err
    assert result.out.strip().splitlines()[-1].startswith("new adapter: small (max difference of ΔW")
    config = store.read(tmp_path / "small").config
    assert (
        config["r"] == 2 and config["base_model_name_or_path"] == store.read(adapter).config["base_model_name_or_path"]
    )
    assert lorafit("eval", "small", "--data", sums, "--eval-limit", 4).status == 0


def test_an_energy_gives_layers_ranks_of_their_own(lorafit: Run, adapter: Path, tmp_path: Path) -> None:
    result = lorafit("resize", adapter, "--energy", "0.8", "--output-dir", "small", "--json")
    assert result.status == 0, result.err
    row = result.json["sizes"][-1]
    assert row["energy"] >= 0.8 and row["share"] < 1 and len(row["r"]) > 1
    assert store.read(tmp_path / "small").config["rank_pattern"]


def test_scan_shows_energies_without_a_model_and_scores_with_data(lorafit: Run, adapter: Path, sums: Path) -> None:
    plain = lorafit("resize", adapter, "--scan")
    assert plain.status == 0 and "energy 0.95" in plain.out and "r 2" in plain.out and "loss" not in plain.out
    scored = lorafit("resize", adapter, "--scan", "--r", "3,1", "--held-out", "--json")
    assert scored.status == 0, scored.err
    rows = {row["size"]: row for row in scored.json["sizes"]}
    assert list(rows) == ["as it is", "r 3", "r 1"]
    assert rows["as it is"]["change"] == 0 and rows["r 1"]["loss"] != rows["as it is"]["loss"]
    assert abs(rows["r 3"]["change"]) < abs(rows["r 1"]["change"]) and rows["r 1"]["margin"] > 0
    assert rows["r 1"]["share"] == pytest.approx(0.25)


def test_drop_leaves_out_layers_by_their_importance_on_data(
    lorafit: Run, adapter: Path, tmp_path: Path, sums: Path
) -> None:
    result = lorafit("resize", adapter, "--drop", "0.5", "--data", sums, "--eval-limit", 8, "--output-dir", "small")
    assert result.status == 0 and "importance from" in result.out and "change" in result.out, result.err
    assert len(store.read(tmp_path / "small").config["target_modules"]) == 7
    assert lorafit("eval", "small", "--data", sums, "--eval-limit", 4).status == 0


def test_a_classifier_is_scored_by_its_accuracy(lorafit: Run, classified: tuple[Path, Any]) -> None:
    result = lorafit("resize", classified[0] / "adapter", "--scan", "--drop", "0.5", "--held-out", "--json")
    assert result.status == 0, result.err
    assert all(0 <= row["accuracy"] <= 1 for row in result.json["sizes"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output-dir", "o"], "--r, --energy and --drop"),
        (["--r", "4", "--energy", "0.9", "--output-dir", "o"], "one of"),
        (["--r", "4"], "--output-dir"),
        (["--r", "4,2", "--output-dir", "o"], "--scan"),
        (["--scan", "--output-dir", "o"], "writes nothing"),
        (["--drop", "0.5", "--output-dir", "o"], "--held-out"),
        (["--energy", "2", "--output-dir", "o"], "share"),
        (["--r", "0", "--output-dir", "o"], "rank"),
    ],
)
def test_wrong_words(lorafit: Run, adapter: Path, tmp_path: Path, words: list[str], said: str) -> None:
    result = lorafit("resize", adapter, *words)
    assert result.status == 2 and said in result.err
    assert not (tmp_path / "o").exists()


def test_a_smaller_classifier_keeps_its_classes_and_its_tokenizer(
    lorafit: Run, classified: tuple[Path, Any], films: Path, tmp_path: Path
) -> None:
    adapter = classified[0] / "adapter"
    assert lorafit("resize", adapter, "--r", 4, "--output-dir", "small").status == 0
    names = ["labels.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "small" / name).read_bytes() == (adapter / name).read_bytes() for name in names)
    scores = [lorafit("eval", each, "--data", films, "--eval-limit", 8, "--json") for each in (adapter, "small")]
    assert [each.status for each in scores] == [0, 0], scores[1].err
    before, after = (each.json["scores"]["adapter"]["loss"] for each in scores)
    assert after == pytest.approx(before, abs=1e-5)


def test_a_share_that_leaves_no_layer_is_refused_before_data_are_read(lorafit: Run, adapter: Path) -> None:
    result = lorafit("resize", adapter, "--drop", "1", "--data", "nowhere.jsonl", "--output-dir", "small")
    assert result.status == 2 and "--drop" in result.err and "nowhere" not in result.err
