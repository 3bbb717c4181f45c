"""The page of a comparison: the numbers that it shows, half-finished and failed ones, and how it opens in a browser."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lorafit.experiments.ranking import rank
from lorafit.report.comparison_page import document, write_comparison
from lorafit.report.comparison_plots import Hues, far
from lorafit.report.scales import logarithmic, price, short, upto

HOSTILE = "</script><b>vera</b>"


def candidate(name: str, losses: list[float], *, kind: str = "adapter", seconds: float = 30.0, **more: Any) -> Any:
    hard = random.Random(1)
    records = [hard.gauss(0, 0.5) for _ in range(40)]
    seeds = []
    for number, loss in enumerate(losses):
        own = random.Random(f"{name} {number}")
        sums = [10 * (loss + each + own.gauss(0, 0.002)) for each in records]
        known = {"losses": sums, "counts": [10] * 40, "correct": [5 + number] * 40, "failed": None}
        trained = kind != "base"
        cost = {"seconds": seconds, "total_seconds": seconds + 9, "peak_rss_bytes": 2**30, "tokens": 5000, "steps": 60}
        cost |= {"trainable": 4000 if trained else 0, "adapter_bytes": 9000 if trained else None}
        curve = [[step, loss + 1 / step] for step in (20, 40, 60)] if trained else []
        seeds.append(
            {"seed": number, "trial": name, "validation": loss, "curve": curve, "extra_steps": 0} | known | cost
        )
    search = [
        {"rate": rate, "validation": losses[0] + off, "seconds": 12.0, "failed": None}
        for rate, off in ((1e-4, 0.3), (1e-3, 0.0), (1e-2, 0.2))
        if losses and kind != "base"
    ]
    rate = 1e-3 if search else None
    made = {"name": name, "kind": kind, "options": {"r": 8}, "rate": rate, "search": search, "seeds": seeds}
    return made | {"failed": None} | more


@pytest.fixture
def comparison() -> Any:
    candidates = [
        candidate("base", [3.0], kind="base", seconds=0.0),
        candidate("lora", [1.500, 1.503, 1.497]),
        candidate("dora", [1.499, 1.502, 1.496], seconds=60.0),
        candidate(HOSTILE, [1.90, 1.91, 1.89], seconds=20.0),
    ]
    candidates[2]["search"].append({"rate": 0.1, "validation": None, "seconds": 3.0, "failed": "not finite at step 7"})
    return {
        "format": 1,
        "command": "lorafit compare",
        "settings": {"max_steps": 60},
        "data": {"name": "my.jsonl", "test_records": 40},
        "budget": {"seconds": None, "steps": 60, "said": ["60 steps of 8 records."]},
        "environment": {"torch": "2"},
        "candidates": candidates,
        "ranking": rank(candidates).to_json(),
        "advice": ["Method: lora."],
    }


def plain(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_it_begins_with_the_best_and_what_to_pick(comparison: Any) -> None:
    made = document(comparison, "comparison.json")
    assert made.title == "3 ways to fine-tune, compared on my.jsonl"
    assert made.lead.startswith("dora has the lowest loss on the 40 test records: 1.")
    assert made.lead.endswith("Pick lora: it is not significantly worse than dora and trains in 30 s instead of 60 s.")
    assert dict(made.facts)["best"] == "dora" and dict(made.facts)["share its place"] == "1"
    titles = [section.title for section in made.sections]
    assert titles == [
        "In words", "What to do next", "Ranking", "Score against price", "Learning rates", "Held-out loss in training",
        "What was spent", "Options of each candidate", "Data", "Settings", "Environment",
    ]  # fmt: skip


def test_the_ranking_table(comparison: Any) -> None:
    rows = document(comparison, "x").sections[2].html.split("<tr>")[2:]
    shown = [plain(row) for row in rows]
    assert [row.split()[0] for row in shown] == ["1=", "2=", "3", "4"]
    assert "dora" in shown[0] and "best" in shown[0]
    assert "lora" in shown[1] and "not significantly worse" in shown[1]
    assert "significantly worse" in shown[3] and "3.0" in shown[3]


def test_the_figures(comparison: Any) -> None:
    plots = {plot.key: plot for section in document(comparison, "x").sections for plot in section.plots}
    assert set(plots) == {"scores", "differences", "price-seconds", "rates", "curves"}
    seeds = plots["scores"].figure.data[-1]
    assert len(seeds.x) == 9 and "base (3.0" in " ".join(plots["scores"].notes)
    bars = plots["scores"].figure.data[0]
    best = comparison["ranking"]["places"][0]
    assert bars.x[0] - bars.error_x.arrayminus[0] == pytest.approx(best["low"])
    assert bars.x[0] + bars.error_x.array[0] == pytest.approx(best["high"])
    worth = plots["price-seconds"].figure.data[0]
    assert list(worth.x) == [20.0, 30.0, 60.0]
    assert "Failed: dora at 0.1." in plots["rates"].notes
    assert list(plots["curves"].figure.data[0].x) == [20, 40, 60, None] * 3


def test_a_failed_candidate_and_a_failed_seed_are_named(comparison: Any) -> None:
    comparison["candidates"].append(candidate("full", [], kind="full", failed="every rate diverged"))
    comparison["candidates"][2]["seeds"][1] |= {"failed": "not finite at step 9", "losses": [], "counts": []}
    comparison["ranking"] = rank(comparison["candidates"]).to_json()
    table = plain(document(comparison, "x").sections[2].html)
    assert "failed: every rate diverged" in table and "1 of 3 seeds failed" in table


def test_accuracy_is_in_percent(comparison: Any) -> None:
    comparison["ranking"] = rank(comparison["candidates"], metric="accuracy").to_json()
    made = document(comparison, "x")
    assert dict(made.facts)["its accuracy"] == "60.0 %"
    assert "60.0 %" in plain(made.sections[2].html)


def test_a_comparison_under_way(comparison: Any, tmp_path: Path) -> None:
    for each in comparison["candidates"]:
        each |= {"seeds": [], "rate": None}
    for key in ("budget", "advice", "environment"):
        del comparison[key]
    comparison["ranking"] = None
    page = write_comparison(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "under way" in page and "What was spent" in page
    comparison["candidates"] = []
    assert write_comparison(comparison, tmp_path / "report.html").is_file()


def test_names_are_texts(comparison: Any, tmp_path: Path) -> None:
    page = write_comparison(json.loads(json.dumps(comparison)), tmp_path / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page and "<b>vera" not in page and "&lt;b&gt;vera" in page


def test_each_candidate_has_its_own_look() -> None:
    hues = Hues([{"name": str(at), "kind": "adapter"} for at in range(21)] + [{"name": "base", "kind": "base"}])
    looks = [hues.style(str(at))["meta"] for at in range(21)] + [hues.style("base")["meta"]]
    assert len(set(looks)) == 22


def test_what_is_far_off_is_left_out() -> None:
    def place(name: str, score: float, kind: str = "adapter") -> dict[str, Any]:
        return {"name": name, "score": score, "kind": kind}

    near = [place("a", 1.0), place("b", 1.1), place("c", 1.2)]
    assert far(near) == []
    assert far([*near, place("base", 1.25, "base")]) == []
    assert far([*near, place("d", 2.5), place("base", 4.0, "base")]) == ["d", "base"]


def test_scales() -> None:
    assert short(1e-4) == "1e-4" and short(106_168_320) == "106M" and short(999) == "999"
    axis = logarithmic([1000, 134_515_008])
    assert axis["type"] == "log" and axis["ticktext"] == ["1k", "10k", "100k", "1M", "10M", "100M"]
    assert len(logarithmic([1e-9, 1e9])["tickvals"]) <= 7
    assert logarithmic([5.0])["range"][0] < 0.7 < logarithmic([5.0])["range"][1]
    assert "type" not in price([30, 60]) and price([1, 60])["type"] == "log"
    assert upto([1.0, 1.1], [1.0, 1.1, 1.2]) == (None, 0)
    assert upto([1.0, 1.1], [1.0, 1.1, 9.0])[1] == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_it_opens_in_a_browser(open_page: Any, comparison: Any, tmp_path: Path, width: int) -> None:
    page = open_page(write_comparison(comparison, tmp_path / "report.html"), width=width)
    assert page.run("return document.querySelectorAll('[data-figure] .main-svg').length") >= 5
    assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.run("return [...document.querySelectorAll('.legend li')].length") > 8
    assert page.complaints() == []
