"""The whole way of a regression: check, train, eval, inspect, merge, resize; and a linear probe beside adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.training.numbers import SCALE

Run = Callable[..., Any]


def test_train_shows_error_and_correlations(regressed: tuple[Path, Any]) -> None:
    _, result = regressed
    assert result.status == 0, result.err
    assert "the model lies in" in result.out and "the head reads the mean" in result.out
    rows = [line.split() for line in result.out.splitlines()]
    assert any(row[:3] == ["mean", "absolute", "error"] for row in rows)
    assert any(row[:1] == ["Pearson"] for row in rows) and any(row[:1] == ["Spearman"] for row in rows)
    assert not any(row[:1] == ["perplexity"] for row in rows)
    assert result.out.splitlines()[-1].endswith("of the labels' variance)")
    assert f"try it:  lorafit eval {Path('regressed/adapter')}" in result.out


def test_the_report_has_the_correlation_and_no_perplexity(regressed: tuple[Path, Any]) -> None:
    page = (regressed[0] / "report.html").read_text(encoding="utf-8")
    assert "Held-out correlation" in page and "Mean absolute error" in page and "Perplexity" not in page
    assert "this report does not know" not in page


def test_eval_repeats_the_runs_figures(lorafit: Run, regressed: tuple[Path, Any]) -> None:
    folder, _ = regressed
    result = lorafit("eval", folder / "adapter", "--json")
    assert result.status == 0, result.err
    told, scores = json.loads((folder / "result.json").read_text()), result.json["scores"]
    assert scores["adapter"]["loss"] == pytest.approx(told["eval_loss_after"], rel=1e-5)
    for name, value in told["agreement"].items():
        assert scores["adapter"]["agreement"][name] == pytest.approx(value, rel=1e-2), name
    assert scores["adapter"]["perplexity"] is None and scores["adapter"]["predictions"] == 30
    assert scores["base"]["loss"] > scores["adapter"]["loss"]
    assert "mean absolute error" in result.err and "95 % intervals" in result.err


def test_merge_gives_a_model_whose_outputs_are_labels(
    lorafit: Run, regressed: tuple[Path, Any], tmp_path: Path
) -> None:
    from lorafit.training.headed import Headed
    from lorafit.training.models import Located, load_classifier

    result = lorafit("merge", regressed[0] / "adapter", "--output-dir", "merged", "--json")
    assert result.status == 0, result.err
    assert "the head gives labels now" in result.err and "PooledBertModel" in result.err
    merged, fresh = load_classifier(Located(str(tmp_path / "merged"), "x"), torch.float32, (), 0, pooling="mean")
    ids = torch.tensor([[2, 10, 10, 10, 4, 3], [2, 5, 5, 5, 4, 3]])  # great great great, awful awful awful
    with torch.no_grad():
        good, bad = merged.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten().tolist()
    head = Headed.read(regressed[0] / "adapter")
    assert fresh == [] and head is not None and head.scale is not None
    assert good > head.scale.offset > bad and abs(good - bad) > head.scale.spread


def test_labels_too_large_for_the_heads_type_are_not_put_into_it(
    lorafit: Run, regressed: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(regressed[0] / "adapter", tmp_path / "times")
    told = json.loads((tmp_path / "times" / "task.json").read_text())
    told["scale"]["offset"] = 1.7e9  # seconds of a clock, some of them apart
    (tmp_path / "times" / "task.json").write_text(json.dumps(told))
    result = lorafit("merge", "times", "--output-dir", "merged", "--json")
    assert result.status == 0, result.err
    assert "labels of 1.7e+09 in the head's type would be 2e+02 apart at least: a label is 1.7e+09 + " in result.err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())[SCALE]["offset"] == 1.7e9


def test_the_card_of_an_export_says_how_it_is_loaded(lorafit: Run, regressed: tuple[Path, Any], tmp_path: Path) -> None:
    result = lorafit("export", regressed[0] / "adapter", "--to", "hf", "--output-dir", "exported")
    assert result.status == 0, result.err
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    code = card.rsplit("```python\n", 1)[1].split("```")[0].replace("this/folder", str(tmp_path / "exported"))
    known: dict[str, Any] = {}
    exec(code, known)
    assert type(known["model"]).__name__ == "PooledBertModel" and known["model"].num_labels == 1


def test_inspect_and_resize(lorafit: Run, regressed: tuple[Path, Any], tmp_path: Path) -> None:
    seen = lorafit("inspect", regressed[0] / "adapter", "--base", "--json")
    assert seen.status == 0, seen.err
    small = lorafit("resize", regressed[0] / "adapter", "--r", "2", "--output-dir", "small")
    assert small.status == 0, small.err
    assert (tmp_path / "small" / "task.json").is_file()
    assert "PEFT over AutoModelForSequenceClassification" in (tmp_path / "small" / "README.md").read_text()


def test_chat_refuses(lorafit: Run, regressed: tuple[Path, Any]) -> None:
    result = lorafit("chat", regressed[0] / "adapter", "--prompt", "x")
    assert result.status == 1 and "regression" in result.err and "lorafit eval" in result.err


def test_eval_refuses_data_without_labels(lorafit: Run, regressed: tuple[Path, Any], sums: Path) -> None:
    result = lorafit("eval", regressed[0] / "adapter", "--data", sums)
    assert result.status == 1 and "the adapter is a regression" in result.err


def test_eval_of_other_data_counts_in_the_spread_that_was_learnt(
    lorafit: Run, regressed: tuple[Path, Any], tmp_path: Path
) -> None:
    rows = [{"text": f"film n{number}", "label": 10.0 * number} for number in range(6)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = lorafit("eval", regressed[0] / "adapter", "--data", "other.jsonl")
    assert result.status == 0, result.err
    assert "labels are numbers from 0 to 50, mean 25; the loss" in result.out
    assert "of the labels that were learnt" in result.out and "no trained classifier" in result.out
    named = lorafit("eval", regressed[0] / "adapter", "--labels", "good,bad")
    assert named.status == 1 and "a regression has no classes" in named.err


def test_check_looks_at_the_numbers(lorafit: Run, sentences: Path, rated: Path, tmp_path: Path) -> None:
    good = lorafit("check", rated, "--model", sentences, "--samples", "1")
    assert good.status == 0, good.err
    assert "labels are numbers from" in good.out and "[[ → " in good.out and "labels of" in good.out
    rows = rated.read_text().splitlines()
    rows[0] = json.dumps({"text": "fine film", "label": 999.5})
    (tmp_path / "far.jsonl").write_text("\n".join(rows) + "\n")
    far = lorafit("check", "far.jsonl", "--model", sentences, "--eval-split", "0", "--samples", "0")
    assert far.status == 0 and "more than 6 spreads" in far.out and "far.jsonl:1" in far.out
    (tmp_path / "named.jsonl").write_text(
        "\n".join([*rows[1:], json.dumps({"text": "a film", "label": "fine"})]) + "\n"
    )
    named = lorafit("check", "named.jsonl", "--model", sentences, "--task", "regression", "--samples", "0")
    assert named.status == 1 and "no number" in named.err and "named.jsonl:120" in named.err


def test_plan_knows_the_head(lorafit: Run, sentences: Path, rated: Path) -> None:
    result = lorafit("plan", "--model", sentences, "--data", rated, "--dry", "--json")
    assert result.status == 0, result.err


@pytest.mark.slow
def test_compare_has_a_linear_probe(lorafit: Run, sentences: Path, rated: Path, tmp_path: Path) -> None:
    sizes = "--max-steps 20 --eval-split 20 --rates 1 --lora_r 4 --reference base,full,probe --methods lora"
    command = ("compare", "--model", sentences, "--data", rated, "--output-dir", "compared", *sizes.split())
    result = lorafit(*command)
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    kinds = {one["name"]: one for one in found["candidates"]}
    assert {name: one["kind"] for name, one in kinds.items()} == {
        "lora": "adapter",
        "base": "base",
        "full": "full",
        "probe": "probe",
    }
    probe = kinds["probe"]["seeds"][0]
    assert probe["trainable"] == 33 and probe["failed"] is None  # 32 weights and a bias
    assert kinds["full"]["seeds"][0]["trainable"] > kinds["lora"]["seeds"][0]["trainable"] > 33
    assert len(probe["pairs"]) == 20 and probe["agreement"]["mean_absolute_error"] > 0
    assert [right for _, right in probe["pairs"]] == [right for _, right in kinds["lora"]["seeds"][0]["pairs"]]
    assert "Pearson" in result.out and "as a share" in found["ranking"]["unit"]
    assert "Predicted and right numbers" in (tmp_path / "compared" / "comparison.html").read_text(encoding="utf-8")


def test_a_probe_of_a_language_model_is_refused(lorafit: Run, llama: Path, sums: Path) -> None:
    result = lorafit("compare", "--model", llama, "--data", sums, "--reference", "probe", "--methods", "lora")
    assert result.status == 1 and "no head that could be trained alone" in result.err
