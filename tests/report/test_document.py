"""The kit that every page is made of: what stands where, tables, and what may not happen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import ConfigError
from lorafit.report import read_records
from lorafit.report.document import Document, Section, frame, render_document, table, write_document
from lorafit.report.figures import Plot, blank
from lorafit.report.head import lead
from lorafit.report.summary import summarize

HOSTILE = "</script><img src=x onerror=alert(1)> ${title} & \x1b"


def plot(key: str = "line", height: int = 220) -> Plot:
    figure = blank(height)
    figure.add_scatter(x=[1, 2], y=[3, 4], name="<b>one</b>", meta="train")
    figure.add_scatter(x=[1, 2], y=[4, 3], name="two")
    return Plot(key, "A line", "It rises.", ("Drawn by hand.",), figure)


def made(source: Path | str = "numbers.json", **given: Any) -> Document:
    parts: dict[str, Any] = {
        "title": "Three methods",
        "lead": "Three methods were compared.",
        "facts": [("records", "600"), ("best", "lora")],
        "sections": [Section("Ranking", table(["name", "loss"], [["a", "1.5"], ["b", "2"]]), [plot()], "Fine print.")],
    }
    return Document(**(parts | given), source=str(source))


def test_everything_stands_where_it_was_said() -> None:
    page = render_document(made())
    order = (
        "Three methods</h1>",
        'class="lead">Three methods were',
        "<dt>records</dt><dd>600</dd>",
        "<h2>Ranking</h2>",
        "<tbody><tr>",
        "<h3>A line</h3>",
        'data-figure="line"',
        "Drawn by hand.",
        "Fine print.",
        "numbers.json",
    )
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert page.count("default-src 'none'") == 1 and "<title>Three methods – lorafit report</title>" in page


def test_texts_are_texts() -> None:
    page = render_document(
        made(
            HOSTILE,
            title=HOSTILE,
            lead=HOSTILE,
            facts=[(HOSTILE, HOSTILE)],
            sections=[
                Section(HOSTILE, table([HOSTILE], [[HOSTILE], [(HOSTILE, HOSTILE)]], caption=HOSTILE), (), HOSTILE)
            ],
        )
    )
    assert "<img" not in page.partition("</footer>")[0]
    # The title twice, lead, two of a tile, section, note, caption, name of a column, three of cells, source.
    assert page.count("&lt;/script&gt;&lt;img src=x") == 13 and "${title}" in page


def test_a_page_without_anything_is_a_page() -> None:
    page = render_document(made(lead="", facts=[], sections=[]))
    assert 'class="lead"' not in page and 'class="tiles"' not in page


def test_low_figures_stand_beside_each_other() -> None:
    page = render_document(made(sections=[Section("Curves", "", [plot("a"), plot("tall", 460), plot("b")])]))
    (beside,) = re.findall(r'<div class="smalls">(.*?)</section>', page, flags=re.DOTALL)
    assert 'data-figure="a"' in beside and 'data-figure="b"' in beside and 'data-figure="tall"' not in beside


def test_a_legend_names_the_traces() -> None:
    html = frame(plot())
    assert '<li class="train">&lt;b&gt;one&lt;/b&gt;</li><li class="">two</li>' in html
    assert 'aria-label="It rises."' in html and "height:220px" in html


def test_columns_of_numbers_stand_on_the_right() -> None:
    html = table(
        ["site", "loss", "share", "which"], [["a", "1,234.5", "\N{MINUS SIGN}3.2 %", "one"], ["b", "–", "", "2"]]
    )
    assert re.findall(r'<th scope="col"( class="words")?>', html) == [' class="words"', "", "", ' class="words"']
    assert "<td>1,234.5</td>" in html and '<td class="words">one</td>' in html


@pytest.mark.parametrize(
    ("key", "written"),
    [(1, "1.0"), (-0.25, "-0.25"), (1e-30, "1e-30"), (float("inf"), "Infinity"), (None, ""), (float("nan"), ""),
     ("a<b", "a&lt;b")],
)  # fmt: skip
def test_keys_are_written_down(key: Any, written: str) -> None:
    assert f'data-key="{written}">shown</td>' in table(["x"], [[("shown", key)], ["0"]])


def test_what_cannot_be_sorted_is_not_said_to_be() -> None:
    assert "data-sortable" in table(["x"], [["1"], ["2"]])
    assert "data-sortable" not in table(["x"], [["1"], ["2"]], sortable=False)
    assert "data-sortable" not in table(["x"], [["1"]])
    with pytest.raises(ValueError, match="zip"):
        table(["x", "y"], [["1"]])


def test_a_page_does_not_replace_what_it_was_drawn_from(tmp_path: Path) -> None:
    source = tmp_path / "comparison.json"
    source.write_text("{}")
    for target in (source, tmp_path):
        with pytest.raises(ConfigError, match="cannot be written over this path"):
            write_document(made(source), target)
    target = tmp_path / "new" / "page.html"
    assert write_document(made(source), str(target)) == target
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert source.read_text() == "{}" and [one.name for one in target.parent.iterdir()] == ["page.html"]


# The first paragraph of a training run's page


def lead_of(told: Any, path: Path) -> str:
    run = read_records(told.write(path))
    return lead(run, summarize(run))


def test_the_first_paragraph_tells_the_run(whole: Any, path: Path) -> None:
    assert lead_of(whole, path) == (
        "SmolLM2-135M-Instruct was trained on 600 records of python-qa.jsonl for 240 steps by LoRA, which adjusts "
        "3.50 % as many numbers as the model has. On 64 records that it was not trained on, the loss fell from 2.550 "
        "to 1.459, by 42.8 %: it predicts them better than before."
    )


def test_the_first_paragraph_of_a_run_that_tells_nothing(bare: Any, path: Path) -> None:
    assert lead_of(bare, path) == ""


def test_a_loss_that_rose_is_told(story: Any, path: Path) -> None:
    told = story().tell("run").tell("evaluation", step=0, loss=1.0).tell("evaluation", step=1, loss=1.5)
    assert lead_of(told, path) == (
        "On records that it was not trained on, the loss rose from 1.000 to 1.500, by 50.0 %: "
        "it predicts them worse than before."
    )
    told.tell("evaluation", step=2, loss=1.0)
    assert "the loss stayed at 1.000." in lead_of(told, path)
