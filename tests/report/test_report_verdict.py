"""The verdict of a run in its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.report import write_report
from lorafit.report.history import read_records

VERDICT = {
    "kind": "overfitting",
    "sentence": "overfitting since step 160: the held-out loss rose from 1.4 to 1.6 (+0.2000 ± 0.0500)",
    "hints": ["stop at step 160 (early_stopping), or <lower> r"],
    "kept": 160,
}


def test_the_verdict_is_told_with_its_hints(whole: Any, tmp_path: Path) -> None:
    whole.tell("held_out", 0.1, step=0, losses=[1.0, 2.0], counts=[1, 2])
    whole.tell("verdict", 0.1, **VERDICT)
    path = whole.write(tmp_path / "records.jsonl")
    run = read_records(path)
    assert run.verdict is not None and (run.verdict.kind, run.verdict.kept) == ("overfitting", 160)
    assert not any("does not know" in remark for remark in run.remarks)
    page = write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'data-kind="overfitting"' in page
    assert "Overfitting since step 160: the held-out loss rose" in page
    assert "&lt;lower&gt; r." in page and "The adapter of step 160 was kept" in page


def test_a_run_without_a_verdict_has_no_place_for_one(whole: Any, tmp_path: Path) -> None:
    path = whole.write(tmp_path / "records.jsonl")
    assert read_records(path).verdict is None
    assert 'class="verdict"' not in write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_verdict_of_another_kind_of_value_is_an_error(whole: Any, tmp_path: Path) -> None:
    whole.tell("verdict", 0.1, **{**VERDICT, "sentence": 3})
    with pytest.raises(DataError, match="sentence"):
        read_records(whole.write(tmp_path / "records.jsonl"))
