"""The map of what LoRA-drop chose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.report import read_records, write_report

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


def page_of(told: Any, path: Path) -> str:
    return write_report(told.write(path), path.with_name("report.html")).read_text(encoding="utf-8")


def chosen(story: Any, **fields: Any) -> Any:
    return story().tell("run").tell("drop", **{**DROP, **fields})


def rows_of(page: str) -> list[list[str]]:
    (table,) = re.findall(r'<table class="map".*?</table>', page, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[re.sub("</?wbr>", "", cell) for cell in row] for row in cells]


def caption_of(page: str) -> str:
    (caption,) = re.findall(r'<table class="map".*?<figcaption>(.*?)</figcaption>', page, flags=re.DOTALL)
    return caption


def test_shares_are_those_within_the_kind_and_the_kept_are_marked(story: Any, path: Path) -> None:
    told = chosen(story)
    assert read_records(told.write(path)).remarks == ()
    page = page_of(told, path)
    assert rows_of(page) == [
        ["layer", "0", "1", "of all"],
        ["q_proj", "<b>57</b>", "<b>43</b>", "87.5 %"],
        ["v_proj", "100", "", "12.5 %"],
    ]
    assert '<td class="site own" style="--share:0.756" title="model.layers.0.q_proj: 57.1 % of its kind, ' in page
    assert '<td class="site" style="--share:1" title="model.layers.0.v_proj: 100.0 % of its kind, shares ' in page
    assert '<li class="own">an adapter of its own</li><li class="rest">shares an adapter</li>' in page


def test_the_caption_tells_what_was_chosen_and_what_the_numbers_are(story: Any, path: Path) -> None:
    assert caption_of(page_of(chosen(story), path)) == (
        "2 of 3 sites have an adapter of their own, and with it 87.5 % of the importance. "
        "The other 1 share one adapter for each shape: 64 × 64 (1). "
        "Measured after a trial of 8 steps on 60 records. "
        "In the cells: a site&#x27;s share of the importance of its kind, in percent; in the last column: the "
        "kind&#x27;s share of the importance of all sites."
    )


@pytest.mark.parametrize(
    ("apart", "expected"),
    [(True, "made apart among the sites whose paths end in the same name."), (False, "made among all sites together.")],
)
def test_the_settings_tell_among_which_sites_the_choice_was_made(
    story: Any, path: Path, apart: bool, expected: str
) -> None:
    told = story().begin(per_kind=apart).tell("drop", **DROP)
    assert caption_of(page_of(told, path)).endswith(f"The choice was {expected}")


def test_small_shares_are_told_from_none_and_large_ones_from_all(story: Any, path: Path) -> None:
    parts = [0.9905, 0.0095, 0.0, 0.0]
    scores = {f"a.{layer}.q": part / 2 for layer, part in enumerate(parts)} | {"a.0.v": 0.5}
    page = page_of(chosen(story, scores=scores, kept=[]), path)
    assert rows_of(page)[1:] == [
        ["q", "&gt;99", "&lt;1", "0", "0", "50.0 %"],
        ["v", "100", "", "", "", "50.0 %"],
    ]
    assert '<li class="own">' not in page


def test_a_run_without_a_choice_has_no_such_part(whole: Any, path: Path) -> None:
    assert read_records(whole.write(path)).drop is None
    page = page_of(whole, path)
    assert "Importance of the sites" not in page and "$importance" not in page
    assert "Importance of the sites" not in page_of(chosen(lambda: whole, scores={}, kept=[]), path)


def test_all_sites_are_in_the_map_and_in_the_table(story: Any, path: Path) -> None:
    scores = {f"layers.{layer}.<b>": (layer + 1) / 5050 for layer in range(100)}
    page = page_of(chosen(story, scores=scores, kept=[], rest="freeze", shared={}), path)
    assert all(f'title="layers.{layer}.&lt;b&gt;: ' in page for layer in range(100))
    (numbers,) = re.findall(r"Importance as numbers \(100\)</summary>(.*?)</details>", page, flags=re.DOTALL)
    found = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", numbers)
    assert [row[0] for row in found] == [f"layers.{layer}.&lt;b&gt;" for layer in reversed(range(100))]
    assert found[0][1:] == ("1.98 %", "1.98 %", "left as it is")
    assert "The other 100 are left as they are." in caption_of(page)


def test_what_is_not_finite_is_left_out_and_told(story: Any, path: Path) -> None:
    lost = {"model.layers.1.v_proj": None, "model.layers.2.q_proj": None, "lm_head": None}
    told = chosen(story, scores=SCORES | lost, nonfinite=["scores"])
    assert read_records(told.write(path)).remarks == ()
    page = page_of(told, path)
    assert rows_of(page) == [
        ["layer", "–", "0", "1", "2", "of all"],
        ["q_proj", "", "<b>57</b>", "<b>43</b>", "–", "87.5 %"],
        ["v_proj", "", "100", "–", "", "12.5 %"],
        ["lm_head", "–", "", "", "", "–"],
    ]
    assert 'title="lm_head: no known share of its kind, shares an adapter"' in page
    assert caption_of(page).endswith(
        "3 sites are left out of the shares, since what was measured is not a finite number. "
        "Column –: modules whose path has no number."
    )
    assert "<td>lm_head</td><td>–</td><td>–</td><td>shares an adapter</td></tr></tbody>" in page, "at the end"


@pytest.mark.parametrize("score", [None, 0.0])
def test_nothing_but_what_is_unknown_or_zero_makes_no_share(story: Any, path: Path, score: float | None) -> None:
    page = page_of(chosen(story, scores=dict.fromkeys(SCORES, score)), path)
    assert [row[1] for row in rows_of(page)[1:]] == ["<b>–</b>", "–"]
    assert ("and with it" in caption_of(page)) == (score is not None)


def test_the_choice_of_the_last_process_stands(story: Any, path: Path) -> None:
    told = story().tell("run", resumed_from_step=0).tell("drop", **DROP)
    told.tell("step", step=1, loss=1.0).tell("run", resumed_from_step=1)
    assert read_records(told.write(path)).drop is not None
    told.tell("drop", **{**DROP, "kept": []})
    found = read_records(told.write(path)).drop
    assert found is not None and found.kept == ()


@pytest.mark.parametrize(
    "damage",
    [{"scores": {"a": "much"}}, {"scores": [1]}, {"kept": "a"}, {"kept": [1]}, {"shared": {"4 × 4": 1.5}}],
)
def test_damage_is_told(story: Any, path: Path, damage: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="event 'drop' is damaged"):
        read_records(chosen(story, **damage).write(path))


def test_a_score_that_is_too_large_is_damage(path: Path) -> None:
    path.write_text('{"event": "run"}\n{"event": "drop", "scores": {"a": 1e999}, "kept": []}\n')
    with pytest.raises(DataError, match="finite numbers and nulls"):
        read_records(path)
