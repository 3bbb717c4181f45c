"""The page on images and encoders says what was measured, and what was not."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dreambooth, vision_page
from benchmarks.__main__ import main
from lorafit.experiments.ranking import rank

LOSSES = {"probe": 0.5, "lora": 0.2, "lora-depthwise": 0.21, "lora-drop": 0.3, "full": 0.25}


def seed(name: str, number: int, classes: bool) -> dict[str, Any]:
    """One seed of a candidate on 40 records, of which the first has two predictions."""
    losses = [LOSSES[name] + 0.01 * number + 0.02 * (place % 7) for place in range(40)]
    one: dict[str, Any] = {
        "seed": number,
        "losses": losses,
        "correct": [float(loss < 0.3) for loss in losses] if classes else None,
        "steps": 64,
        "extra_steps": 0,
        "seconds": 20.0 + number,
        "total_seconds": 30.0,
        "peak_rss_bytes": 2**29,
        "trainable": 10_000,
        "adapter_bytes": 40_000,
        "validation": 0.4,
        "failed": None,
    }
    if not classes and name != "full":
        low_high = {"mean_absolute_error_low": 0.5, "mean_absolute_error_high": 0.7}
        one["agreement"] = {"mean_absolute_error": 0.55 + 0.05 * number, **low_high, "spearman": 0.8}
    if name == "lora-depthwise":
        one["adapter_bytes"] = 600 * 2**20
    if name.startswith("lora"):
        one |= {"apart": 2e-6 * number, "sites": 33, "told": ["PEFT reads it otherwise"]}
    if name == "lora-drop":
        one["kept"] = [f"layer{place}" for place in range(10 + number % 2)]
    return one


def kept(name: str, *, classes: bool = True, **facts: Any) -> dict[str, Any]:
    """What the command keeps of a set."""
    search = [
        {"rate": rate, "validation": 0.5 + rate, "seconds": 9.0, "failed": None} for rate in (1e-3, 3.16e-3, 1e-2)
    ]
    candidates = [
        {
            "name": each,
            "kind": {"probe": "probe", "full": "full"}.get(each, "adapter"),
            "options": {"depthwise": each == "lora-depthwise"},
            "rate": 1e-2 if each == "full" else 3.16e-3,
            "search": search,
            "seeds": [seed(each, number, classes) for number in (1, 2, 3)],
            "failed": None,
        }
        for each in LOSSES
    ]
    counts = [2] + [1] * 39
    counted = [{**each, "seeds": [{**one, "counts": counts} for one in each["seeds"]]} for each in candidates]
    ranking = rank(counted, metric="accuracy" if classes else "loss", resamples=200).to_json()
    return {
        "kind": "comparison",
        "name": name,
        "command": f"python -m benchmarks vision {name}",
        "date": "2026-01-01T00:00:00+00:00",
        "commit": {"hash": "0123456789abcdef", "changed": True},
        "versions": {"python": "3.11", "torch": "2.13.0", "trl": None},
        "machine": {"processor": "a processor", "capability": "AVX2", "cores": 2, "threads": 2},
        "seed": 0,
        **facts,
        "found": {
            "budget": {"rates": 3, "seeds": [1, 2, 3], "steps": 64, "batch": 32, "size": 64, "head_rate": 0.01},
            "counts": counts,
            "candidates": candidates,
            "ranking": ranking,
            "commits": ["0123456789abcdef", "fedcba9876543210"],
            "others": 1,
            "minutes": 27.4,
        },
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements of emoji and ratings, and none of the rest."""
    data = {"train_records": 1024, "validation_records": 256, "test_records": 40}
    pictures = {**data, "source": "a package", "test_pictures": 41, "majority": 0.36, "classes": ["x", "y"], "twice": 1}
    examples = {"columns": 8, "png": base64.b64encode(b"a picture").decode()}
    ratings = {**data, "source": "raters", "about": "Rated sentences."}
    results = tmp_path / "results"
    results.mkdir()
    for one in (
        kept("emoji", data=pictures, examples=examples),
        kept(
            "rating", classes=False, data=ratings, ran="lorafit compare --task regression --reference base,probe,full"
        ),
    ):
        (results / f"{one['name']}.json").write_text(json.dumps(one))
    monkeypatch.setattr(dreambooth, "section", lambda where: ["## DreamBooth", "", f"From {where.name}."])
    return results


def test_the_page_has_scores_costs_and_commands(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page" / "vision.md"
    assert main(["vision-page", "--output", str(folder), "--page", str(page), "--no-pictures"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text == vision_page.text(folder)
    assert "Not measured yet: fashion-mnist, sentiment." in text
    emoji, rating = text.index("## Emoji"), text.index("## Rating")
    assert emoji < rating < text.index("## DreamBooth") < text.index("## Where")
    row = next(line for line in text[emoji:rating].splitlines() if line.startswith("| = | `lora` |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    place = next(
        one
        for one in json.loads((folder / "emoji.json").read_text())["found"]["ranking"]["places"]
        if one["name"] == "lora"
    )
    assert cells[2:5] == ["0.0032", f"{place['score']:.1%}", f"{place['low']:.1%}–{place['high']:.1%}"]
    assert cells[-4:] == ["10,000", "22.0", "512", "0.0381"]
    losses = [sum(seed("lora", number, True)["losses"]) / 41 for number in (1, 2, 3)]
    assert cells[-5] == f"{sum(losses) / 3:.4f}", "the loss of a picture, and not of a family"
    flat = " ".join(text.split())
    assert "41 of 40 families (" in flat and "dot for dot: 1." in flat and "the largest has 36% of the test" in flat
    assert "lorafit compare --task regression" in text and "From results." in text


def test_the_page_says_what_the_ranking_does_not(folder: Path) -> None:
    text = " ".join(vision_page.text(folder).split())
    assert "The highest rate that was tried was the best for full (0.01); a higher one may be better still." in text
    assert "moved the outputs by 6e-06 of their size at most" in text
    assert "lora-drop kept own adapters at 10 of 33, 11 of 33 layers" in text
    assert "The file of lora-depthwise is 600 MiB for 10,000 numbers" in text
    assert "Said when lora, lora-depthwise, lora-drop were saved: PEFT reads it otherwise." in text
    assert "The runs are of 2 commits: 012345678, fedcba987" in text
    assert "Up to 1 other process or thread was at work" in text
    assert "| `emoji` | 012345678, changed | 2026-01-01 | 27 | a processor, 2 cores, 2 threads |" in text


def test_numbers_have_losses_and_no_accuracy(folder: Path) -> None:
    text = vision_page.text(folder)
    rating = text[text.index("## Rating") : text.index("## DreamBooth")]
    assert "| test loss | 95 % |" in rating and "accuracy" not in rating.lower()
    assert "Rated sentences. From raters." in rating
    rows = {line.split("|")[2].strip(" `"): line for line in rating.splitlines() if line.startswith("| ")}
    assert "| mean error | Spearman | numbers |" in rows["method"]
    assert "| 0.650 | 0.800 | 10,000 |" in rows["lora"] and "| – | – | 10,000 |" in rows["full"]
    assert "uncertain by ±0.100 at most" in " ".join(rating.split())


def test_tables_and_lines_are_well_formed(folder: Path) -> None:
    text = vision_page.text(folder)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block.splitlines()[0]
    plain = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, plain)) <= 120


def test_figures_and_sheets_are_drawn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(vision_page.shutil, "which", lambda name: "browser")
    monkeypatch.setattr(vision_page.pictures, "take", lambda browser, figure, path: taken.append(path.name))
    vision_page.draw(vision_page.read(folder), tmp_path / "pictures")
    assert (tmp_path / "pictures" / "vision-emoji-examples.png").read_bytes() == b"a picture"
    text = vision_page.text(folder)
    named = set(re.findall(r"\(pictures/(vision-[\w-]+\.png)\)", text))
    assert {*taken, "vision-emoji-examples.png"} == named and {"vision-emoji-scores.png"} < named


def test_without_measurements_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dreambooth, "section", lambda where: [])
    text = vision_page.text(tmp_path)
    assert "Not measured yet: fashion-mnist, emoji, sentiment, rating." in text and "## Where" not in text


def test_a_damaged_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "emoji.json").write_text('{"found": ')
    assert main(["vision-page", "--output", str(tmp_path), "--page", str(tmp_path / "page.md"), "--no-pictures"]) == 1
    assert "emoji.json" in capsys.readouterr().err and not (tmp_path / "page.md").exists()


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    assert vision_page.PAGE.is_file() or not any(vision_page.FOLDER.glob("*.json"))
    if vision_page.PAGE.is_file():
        written = vision_page.PAGE.read_text(encoding="utf-8")
        assert written == vision_page.text(vision_page.FOLDER), "run: python -m benchmarks vision-page"
