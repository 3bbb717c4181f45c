"""The table of AdaLoRA's ranks, and where a module's path says that it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.report import ranks, read_records, write_report
from lorafit.report.places import Place, places

FEW = {"model.layers.0.q_proj": 3, "model.layers.0.up_proj": 1, "model.layers.2.q_proj": 0, "lm_head": 4}


def page_of(told: Any, path: Path) -> str:
    return write_report(told.write(path), path.with_name("report.html")).read_text(encoding="utf-8")


def rows_of(page: str) -> list[list[str]]:
    (table,) = re.findall(r'<table class="map".*?</table>', page, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[re.sub("<.*?>", "", cell) for cell in row] for row in cells]


# Where a module is


def test_kind_and_layer() -> None:
    found = places(["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "lm_head"])
    assert list(found.values()) == [Place("q_proj", 0), Place("q_proj", 11), Place("lm_head", None)]


@pytest.mark.parametrize(
    ("paths", "kinds"),
    [
        (
            ["e.layer.0.attention.output.dense", "e.layer.0.intermediate.dense", "e.layer.0.output.dense"],
            ["attention.output.dense", "intermediate.dense", "output.dense"],
        ),
        (
            ["encoder.block.0.layer.0.Self.q", "decoder.block.0.layer.0.Self.q", "decoder.block.0.layer.1.Cross.q"],
            ["encoder…Self.q", "decoder…Self.q", "Cross.q"],
        ),
        (["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2"], ["layer1…conv1", "layer2…conv1", "conv2"]),
        (["net.0", "net.2"], ["net", "net"]),
        (["0", "2"], ["*", "*"]),
        (["one", "two.one"], ["one", "two.one"]),
        # What no short name tells apart has its whole path.
        (["layers.0.norm", "norm", "layers.0.x"], ["layers.*.norm", "norm", "x"]),
        (["a.b", "a.0.b"], ["a.b", "b"]),
        ([], []),
    ],
)
def test_kinds_have_names_that_tell_them_apart(paths: list[str], kinds: list[str]) -> None:
    found = places(paths)
    assert [place.kind for place in found.values()] == kinds
    assert len(set(found.values())) == len(paths), "each has a cell of its own"


def test_a_number_is_written_as_numbers_are() -> None:
    found = places(["a.00.b", "a.0.b", "a.٣.b"])
    assert [place.layer for place in found.values()] == [None, 0, None]
    assert len(set(found.values())) == 3


# The records


def test_the_later_record_of_a_step_stands(story: Any, path: Path) -> None:
    told = story().tell("run").tell("step", step=4, loss=2.0)
    told.tell("schedule", step=2, budget=9, interval=1, ranks={"a.0.q": 9})
    told.tell("schedule", step=4, budget=8, interval=1, ranks={"a.0.q": 8})
    told.tell("run", resumed_from_step=2).tell("step", step=3, loss=2.0)
    told.tell("schedule", step=3, budget=7, interval=1, ranks={"a.0.q": 7})
    run = read_records(told.write(path))
    assert [(one.step, one.budget, dict(one.ranks)) for one in run.schedules] == [
        (2, 9, {"a.0.q": 9}),
        (3, 7, {"a.0.q": 7}),
    ]


def test_every_key_is_known_but_strange_ones_are_remarked(story: Any, path: Path) -> None:
    told = story().tell("run").tell("schedule", step=1, budget=9, interval=1, ranks={})
    assert read_records(told.tell("schedule", step=2, start=3, started=False).write(path)).remarks == ()
    told.tell("schedule", step=3, ends=4)
    (remark,) = read_records(told.write(path)).remarks
    assert remark == "Keys that this report does not know are not shown: schedule.ends."


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "step"),
        ({"step": 1, "budget": 1.5}, "budget"),
        ({"step": 1, "ranks": [1]}, "ranks"),
        ({"step": 1, "ranks": {"a": -1}}, "ranks"),
        ({"step": 1, "ranks": {"a": True}}, "ranks"),
        ({"step": 1, "ranks": {"a": None}}, "ranks"),
        ({"step": 1, "started": 1}, "started"),
        ({"step": 1, "start": 0.1}, "start"),
    ],
)
def test_damage_is_an_error(story: Any, path: Path, fields: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError, match=f"event 'schedule' is damaged(.|\n)*:2, key '{key}'"):
        read_records(story().tell("run").tell("schedule", **fields).write(path))


# The page


def test_rows_are_kinds_and_columns_are_layers(story: Any, path: Path) -> None:
    told = story().tell("run").tell("schedule", step=5, budget=12, interval=1, ranks=dict.fromkeys(FEW, 9))
    page = page_of(told.tell("schedule", step=10, budget=8, interval=1, ranks=FEW), path)
    assert rows_of(page) == [
        ["layer", "–", "0", "2"],
        ["q_proj", "", "3", "0"],
        ["up_proj", "", "1", ""],
        ["lm_head", "4", "", ""],
    ]
    assert 'style="--share:0.75" title="model.layers.0.q_proj">3<' in page
    assert (
        "At step 10: 8 ranks in use at 4 sites, 2.00 on average, of a budget of 8. 1 site has none left. "
        "At step 5 the budget was 12. Column –: modules whose path has no number." in page
    )


def test_a_whole_map(pruned: Any, path: Path) -> None:
    rows = rows_of(page_of(pruned, path))
    kinds = ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [row[0] for row in rows] == kinds
    assert rows[0][1:] == [str(layer) for layer in range(30)]
    run = read_records(path)
    assert rows[2][4] == str(run.schedules[-1].ranks["model.layers.3.self_attn.k_proj"])


def test_ranks_begin_at_zero_and_a_map_of_them_says_why(story: Any, path: Path) -> None:
    told = story().tell("run").tell("schedule", step=0, ranks={"a.0.q": 0, "a.1.q": 0})
    page = page_of(told, path)
    assert rows_of(page) == [["layer", "0", "1"], ["q", "0", "0"]]
    assert "0 ranks in use at 2 sites, 0.00 on average. A rank is in use once its λ is not zero" in page


def test_the_curve_of_the_budget(pruned: Any, path: Path) -> None:
    run = read_records(pruned.write(path))
    (plot,) = ranks.draw(run)
    budget, used = plot.figure.data
    assert budget.x == tuple(range(0, 241, 40)) and budget.y[0] == 1260 and budget.y[-1] == 840
    assert used.x == budget.x[1:], "before the first step no rank is in use"
    assert used.y[-1] == sum(run.schedules[-1].ranks.values())
    assert plot.spoken == "Budget from 1,260 ranks at step 0 to 840 at step 240."


@pytest.mark.parametrize("budgets", [[9, 8], [9, 9, 9], [None, 9, 8]])
def test_a_curve_needs_three_points_and_a_change(story: Any, path: Path, budgets: list[int | None]) -> None:
    told = story().tell("run")
    for step, budget in enumerate(budgets):
        told.tell("schedule", step=step, budget=budget, ranks={"a.0.q": 1})
    assert ranks.draw(read_records(told.write(path))) == []
    assert "Ranks of all sites together" not in page_of(told, path)


def test_runs_without_ranks_have_no_such_part(whole: Any, path: Path) -> None:
    whole.tell("schedule", step=240, start=24, started=True)
    page = page_of(whole, path)
    assert "Ranks of the sites" not in page and "$ranks" not in page
    assert "From step 24 on, the adapted weights moved too." in page


def test_hostile_paths_stay_text(story: Any, path: Path) -> None:
    paths = ['a.0.<b>"x', 'a.1.<b>"x']
    page = page_of(story().tell("run").tell("schedule", step=1, ranks=dict.fromkeys(paths, 1)), path)
    assert 'title="a.0.&lt;b&gt;&quot;x"' in page
    assert rows_of(page) == [["layer", "0", "1"], ["&lt;b&gt;&quot;x", "1", "1"]], "no tag was taken out"
