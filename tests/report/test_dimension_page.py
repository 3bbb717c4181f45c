"""The page of a search for d90: with an answer, with half of one, and before there is any."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorafit.report.dimension_page import document, write_dimension


def point(d: int, kept: float, seeds: int = 1) -> dict[str, Any]:
    score = 4.0 - 2.0 * kept
    search = [
        {"rate": rate, "validation": score + off, "seconds": 9.0, "failed": None}
        for rate, off in ((0.01, 0.1), (0.03, 0))
    ]
    search.append({"rate": 0.1, "validation": None, "seconds": 1.0, "failed": "not finite"})
    ends = [kept - 0.03, kept + 0.03]
    made = {"d": d, "rate": 0.03, "score": score, "seeds": [score] * seeds, "kept": kept, "kept_interval": ends}
    return made | {"search": search, "diverged_seeds": 0}


@pytest.fixture
def dimension() -> dict[str, Any]:
    return {
        "format": 1,
        "kind": "said",
        "metric": "loss",
        "definition": "gain",
        "share": 0.9,
        "data": {"name": "my.jsonl"},
        "settings": {"max_steps": 60},
        "base": 4.0,
        "full": 2.0,
        "threshold": 2.2,
        "d90": 1500,
        "interval": [1100, 2600],
        "below": 1000,
        "above": 2000,
        "reference": {"told": "full fine-tuning"},
        "points": [point(100, 0.5), point(1000, 0.85, 3), point(2000, 0.94, 3)],
        "seconds": 700.0,
        "said": ["d90 is the smallest d that …"],
        "advice": ["Rank: <b>8</b>."],
    }


def test_it_begins_with_d90_and_its_interval(dimension: Any) -> None:
    made = document(dimension, "dimension.json")
    assert made.title == "Intrinsic dimension of my.jsonl"
    assert made.lead == (
        "Training in a random subspace of 1,500 dimensions is enough for 90 % of what full fine-tuning gains. "
        "Its 95 % interval is 1,100 to 2,600."
    )
    assert dict(made.facts)["d90 (SAID)"] == "1,500"
    assert [section.title for section in made.sections] == [
        "Score against d", "What follows", "Each d", "Learning rates", "Data", "Settings",
    ]  # fmt: skip


def test_the_curve_has_the_threshold_d90_and_its_interval(dimension: Any) -> None:
    (curve,) = document(dimension, "x").sections[0].plots
    mean, seeds = curve.figure.data
    assert list(mean.x) == [100, 1000, 2000] and mean.y[1] == pytest.approx(2.3)
    assert list(seeds.x) == [1000] * 3 + [2000] * 3
    levels = {shape.y0 for shape in curve.figure.layout.shapes if shape.xref == "paper"}
    assert levels == {4.0, 2.2, 2.0}
    band = next(shape for shape in curve.figure.layout.shapes if shape.type == "rect")
    assert (band.x0, band.x1) == (1100, 2600)
    d90 = next(note for note in curve.figure.layout.annotations if note.text == "d90 = 1,500")
    assert d90.x == pytest.approx(math.log10(1500)), "annotations of a logarithmic axis are placed by the logarithm"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"interval": [None, 2600]}, "begins below all d tried and ends at 2,600"),
        ({"interval": [1100, None]}, "begins at 1,100 and ends beyond all d tried"),
        ({"interval": None}, "wider than all d tried"),
        ({"d90": None, "interval": None, "below": None}, "At most 2,000 dimensions are enough"),
        ({"d90": None, "interval": None, "above": None}, "More than 1,000 dimensions are needed"),
        ({"d90": None, "interval": None, "above": None, "below": None}, "No number of dimensions is known yet"),
        ({"definition": "score"}, "90 % of what full fine-tuning reaches"),
    ],
)
def test_what_is_not_known_is_said(dimension: Any, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in document(dimension | change, "x").lead
    assert write_dimension(dimension | change, tmp_path / "d.html").is_file()


def test_a_search_under_way(dimension: Any, tmp_path: Path) -> None:
    early = {"full": None, "threshold": None, "d90": None, "interval": None, "points": [], "said": [], "advice": []}
    page = write_dimension(dimension | early, tmp_path / "d.html").read_text(encoding="utf-8")
    assert "Intrinsic dimension of my.jsonl" in page
    none = point(4000, 1.0) | {"score": None, "kept": None, "kept_interval": None, "seeds": [], "rate": None}
    assert write_dimension(dimension | {"points": [none]}, tmp_path / "d.html").is_file()


def test_texts_are_texts(dimension: Any, tmp_path: Path) -> None:
    page = write_dimension(dimension, tmp_path / "d.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;8" in page and "<b>8" not in page


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_it_opens_in_a_browser(open_page: Any, dimension: Any, tmp_path: Path, width: int) -> None:
    page = open_page(write_dimension(dimension, tmp_path / "d.html"), width=width)
    assert page.run("return document.querySelectorAll('[data-figure] .main-svg').length") >= 2
    assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.complaints() == []
