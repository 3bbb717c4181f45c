"""Forgetting, slices and another domain in the report."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.report import write_report
from lorafit.report.history import read_records
from lorafit.report.lines import Line
from lorafit.report.watched import Forgetting, Shift, Slices

LOSS = {"records": 42, "before": 3.21, "after": 3.4, "change": 0.19, "margin": 0.03}
FORGETTING = {
    "text": "general <text>",
    "loss": LOSS,
    "sentence": "forgot: general <text> 3.210 → 3.400 nats/token (+0.190 ± 0.030)",
    "hints": ["a lower rate forgets less"],
}
SLICES = {
    "column": "domain",
    "parts": [
        {"name": "films & books", "loss": {**LOSS, "margin": None}, "worse": False, "better": False},
        {"name": "sums", "loss": {**LOSS, "change": -0.25}, "worse": False, "better": True},
        {"name": "words", "loss": LOSS, "worse": True, "better": False},
    ],
    "sentence": "held-out loss by domain: of 3 slices 1 fell and 1 rose: words (+0.190 ± 0.030)",
    "hints": [],
}
GAP = {
    **{"before": 0.5, "before_margin": 0.25, "after": 0.6, "after_margin": 0.26},
    **{"change": 0.1, "change_margin": 0.04},
}
SHIFT = {
    "source": "films.jsonl",
    "target": "books.jsonl",
    "loss": {"on_source": {**LOSS, "change": -0.25}, "on_target": LOSS, "gap": GAP},
    "accuracy": {"on_source": None, "on_target": {**LOSS, "before": 0.5, "after": 0.75, "change": 0.25}, "gap": None},
    "sentence": "what was learnt does not carry over",
    "hints": ["mix records like its own into the training data"],
}


def test_all_three_are_told(whole: Any, tmp_path: Path) -> None:
    whole.tell("watched", 0.1, what="general", phase="before", step=0, name="x", digest="0", losses=[1], counts=[1])
    whole.tell("forgetting", 0.1, **FORGETTING).tell("slices", 0.1, **SLICES).tell("shift", 0.1, **SHIFT)
    path = whole.write(tmp_path / "records.jsonl")
    run = read_records(path)
    assert not any("does not know" in remark for remark in run.remarks)
    for found, expected in ((run.forgetting, FORGETTING), (run.slices, SLICES), (run.shift, SHIFT)):
        assert found is not None and json.loads(json.dumps(asdict(found))) == expected
    page = write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (
        *("<h2>Forgetting</h2>", "Forgot: general &lt;text&gt; 3.210 → 3.400", "A lower rate forgets less."),
        *(
            "<h2>Slices of the held-out records</h2>",
            "films &amp; books",
            "−0.250 ± 0.030",
            ">worse<",
            ">better<",
            'data-figure="slices"',
        ),
        *("<h2>Another domain</h2>", "films.jsonl, held out", "+0.100 ± 0.040", "50.0 %", "+25.0 %"),
    ):
        assert words in page, words
    assert 'data-figure="slices"' in page and "Left of the dotted line the loss fell." in page


def test_a_run_that_looked_at_none_has_no_place_for_them(whole: Any, tmp_path: Path) -> None:
    path = whole.write(tmp_path / "records.jsonl")
    page = write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("<h2>(Forgetting|Slices of the held-out records|Another domain)</h2>", page)


@pytest.mark.parametrize(
    ("event", "fields", "where"),
    [
        ("forgetting", {**FORGETTING, "loss": 3}, "'loss'"),
        ("forgetting", {**FORGETTING, "loss": {**LOSS, "before": "much"}}, "loss, key 'before'"),
        ("slices", {**SLICES, "parts": [3]}, "'parts'"),
        ("slices", {**SLICES, "parts": [{"name": "a"}]}, "parts.0, key 'loss'"),
        ("shift", {**SHIFT, "loss": {**SHIFT["loss"], "on_target": None}}, "loss, key 'on_target'"),  # type: ignore[dict-item]
    ],
)
def test_what_is_damaged_is_named(whole: Any, tmp_path: Path, event: str, fields: dict[str, Any], where: str) -> None:
    whole.tell(event, 0.1, **fields)
    with pytest.raises(DataError, match=f"event '{event}' is damaged") as raised:
        read_records(whole.write(tmp_path / "records.jsonl"))
    assert where in str(raised.value.where)


def test_it_reads_what_a_run_writes() -> None:
    """The names of the keys are those of the values that `training` records."""
    from lorafit.training import findings

    moved = findings.Moved(3, 1.0, 2.0, 1.0, None)
    both = findings.Compared(moved, moved, findings.Gap(0.0, 0.1, 0.0, 0.1, 0.0, 0.1))
    for kind, found in (
        (Forgetting, findings.Forgetting("text", moved, "said", ("do",))),
        (Slices, findings.Slices("domain", (findings.Slice("a", moved, True, False),), "said", ())),
        (Shift, findings.Shift("a", "b", both, both, "said", ())),
    ):
        line = Line("records.jsonl:1", json.loads(json.dumps({"event": kind.event, **asdict(found)})))
        assert asdict(kind.read(line)) == asdict(found)
