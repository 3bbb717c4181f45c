"""The whole way of a classifier: train, eval, merge, check; its classes keep their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_train_shows_accuracy(classified: tuple[Path, Any]) -> None:
    folder, result = classified
    assert result.status == 0, result.err
    assert "new in this model, and trained in full: classifier" in result.out
    assert f"try it:  lorafit eval {Path('classified/adapter')}" in result.out
    rows = [line.split() for line in result.out.splitlines()]
    accuracy = next(row for row in rows if row[:1] == ["accuracy"])
    assert float(accuracy[2].rstrip("%")) > 90 and not any(row[:1] == ["perplexity"] for row in rows)
    assert "nats per record" in result.out.splitlines()[-1]
    assert json.loads((folder / "adapter" / "labels.json").read_text()) == ["negative", "positive"]


def test_eval_repeats_the_runs_figures_and_explains_the_bases_row(
    lorafit: Callable[..., Any], classified: tuple[Path, Any]
) -> None:
    folder, _ = classified
    result = lorafit("eval", folder / "adapter", "--json")
    value = result.json["scores"]
    told = json.loads((folder / "result.json").read_text())
    assert result.status == 0
    assert value["adapter"]["loss"] == pytest.approx(told["eval_loss_after"], abs=1e-6)
    assert value["adapter"]["accuracy"] > 0.9 > value["base"]["accuracy"] and value["adapter"]["predictions"] == 24
    assert "the base has no trained classifier" in result.err and "accuracy" in result.err


def test_classes_without_names_must_be_named(
    lorafit: Callable[..., Any], classified: tuple[Path, Any], tmp_path: Path, films: Path
) -> None:
    import shutil

    shutil.copytree(classified[0] / "adapter", tmp_path / "foreign")
    (tmp_path / "foreign" / "labels.json").unlink()
    refused = lorafit("eval", "foreign", "--data", films)
    assert refused.status == 1 and "--labels negative,positive" in refused.err
    right = lorafit("eval", "foreign", "--data", films, "--labels", "negative,positive", "--json").json
    swapped = lorafit("eval", "foreign", "--data", films, "--labels", "positive,negative", "--json").json
    assert right["scores"]["adapter"]["accuracy"] == pytest.approx(1 - swapped["scores"]["adapter"]["accuracy"])


def test_merge_keeps_the_head_and_the_names(
    lorafit: Callable[..., Any], classified: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    result = lorafit("merge", classified[0] / "adapter", "--output-dir", "merged", "--json")
    assert result.status == 0 and result.json["difference"] <= result.json["tolerance"]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "negative", 1: "positive"}


def test_chat_refuses(lorafit: Callable[..., Any], classified: tuple[Path, Any]) -> None:
    result = lorafit("chat", classified[0] / "adapter", "--prompt", "x")
    assert result.status == 1 and "classifier" in result.err and "lorafit eval" in result.err


def test_check_shows_labels(lorafit: Callable[..., Any], bert: Path, films: Path) -> None:
    result = lorafit("check", films, "--model", bert, "--samples", "1")
    assert result.status == 0 and "[CLS]" in result.out and "[[ → " in result.out
    assert "2 classes, with their training records" in result.out and "labels of" in result.out
