"""The figure of what LoRA-drop chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.report import importance, read_records, write_report
from lorafit.report.palette import LIGHT

SCORES = {"model.layers.0.q_proj": 0.5, "model.layers.0.v_proj": 0.125, "model.layers.1.q_proj": 0.375}
DROP = {
    "scores": SCORES,
    "kept": ["model.layers.0.q_proj", "model.layers.1.q_proj"],
    "shared": {"64 × 64": 1},
    "rest": "share",
    "threshold": 0.8,
    "sample_records": 60,
    "steps": 8,
}


def test_bars_are_ranked_and_tell_the_kept_from_the_rest(story: Any, path: Path) -> None:
    run = read_records(story().tell("run").tell("drop", **DROP).write(path))
    assert run.remarks == ()
    (plot,) = importance.draw(run)
    own, rest = plot.figure.data
    assert own.y == ("0.q_proj", "1.q_proj") and own.x == (0.5, 0.375) and own.marker.color == LIGHT.train
    assert rest.y == ("0.v_proj",) and rest.name == "shares an adapter" and rest.marker.color == LIGHT.faint
    assert plot.figure.layout.yaxis.categoryarray == ("0.q_proj", "1.q_proj", "0.v_proj")
    assert plot.notes == (
        "2 of 3 sites have an adapter of their own, and with it 87.5 % of the importance.",
        "The other 1 share one adapter for each shape: 64 × 64 (1).",
        "Measured after a trial of 8 steps on 60 records.",
    )


def test_a_run_without_a_choice_has_no_such_part(whole: Any, path: Path) -> None:
    run = read_records(whole.write(path))
    assert run.drop is None and importance.draw(run) == []
    assert "Importance of the sites" not in write_report(path, path.with_name("report.html")).read_text()


def test_many_sites_are_all_in_the_table_and_the_largest_are_drawn(story: Any, path: Path) -> None:
    scores = {f"layers.{place}.<b>": (place + 1) / 5050 for place in range(100)}
    told = story().tell("run").tell("drop", **{**DROP, "scores": scores, "kept": [], "rest": "freeze", "shared": {}})
    run = read_records(told.write(path))
    (plot,) = importance.draw(run)
    (rest,) = plot.figure.data
    assert len(rest.y) == importance.LONGEST and rest.y[0] == "99.&lt;b&gt;" and rest.name == "left as it is"
    assert "The 48 largest are drawn." in plot.notes
    page = write_report(path, path.with_name("report.html")).read_text()
    assert all(f"layers.{place}.&lt;b&gt;" in page for place in range(100))
    assert "Importance as numbers (100)" in page


def test_the_choice_of_the_last_process_stands(story: Any, path: Path) -> None:
    told = story().tell("run", resumed_from_step=0).tell("drop", **DROP)
    told.tell("step", step=1, loss=1.0).tell("run", resumed_from_step=1)
    assert read_records(told.write(path)).drop is not None
    told.tell("drop", **{**DROP, "kept": []})
    found = read_records(told.write(path)).drop
    assert found is not None and found.kept == ()


@pytest.mark.parametrize("damage", [{"scores": {"a": "much"}}, {"scores": [1]}, {"kept": "a"}, {"kept": [1]}])
def test_damage_is_told(story: Any, path: Path, damage: dict[str, Any]) -> None:
    told = story().tell("run").tell("drop", **{**DROP, **damage})
    with pytest.raises(DataError, match="event 'drop' is damaged"):
        read_records(told.write(path))
