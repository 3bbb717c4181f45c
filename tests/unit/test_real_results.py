"""The page on real data says what the kept results say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import keeping, real
from benchmarks.__main__ import main
from lorafit.experiments.ranking import rank


def seed(number: int, losses: list[float], trainable: int) -> dict[str, Any]:
    return {
        "seed": number,
        "losses": losses,
        "counts": [1] * len(losses),
        "correct": [float(loss < 0.5) for loss in losses],
        "steps": 8 if trainable else 0,
        "seconds": 12.0,
        "peak_rss_bytes": 2**30,
        "trainable": trainable,
        "adapter_bytes": 2**20,
        "curve": [[0, 0.7], [8, 0.4]],
        "failed": None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of two methods and the base, as the command leaves it."""
    losses = {"lora": [0.1, 0.2, 0.3, 0.6], "vera": [0.2, 0.2, 0.4, 0.6], "base": [0.7, 0.8, 0.4, 0.9]}
    candidates = [
        {
            "name": name,
            "kind": "base" if name == "base" else "adapter",
            "options": {},
            "rate": None if name == "base" else 0.00123456789,
            "search": [] if name == "base" else [{"rate": 1e-3, "validation": 0.3, "seconds": 9.0, "failed": None}],
            "seeds": [
                seed(number, [one + 0.01 * number for one in values], 0 if name == "base" else 5_000)
                for number in ([1] if name == "base" else [1, 2, 3])
            ],
            "failed": None,
        }
        for name, values in losses.items()
    ]
    found = {
        "command": "lorafit compare --data some.jsonl",
        "data": {"train_records": 8, "validation_records": 4, "test_records": 4},
        "budget": {"steps": 8, "rates": 1},
        "candidates": candidates,
        "ranking": rank(candidates, resamples=200).to_json(),
        "advice": ["Take more records."],
    }
    found["data"]["test"] = str(tmp_path.resolve() / "data" / "test.jsonl")  # type: ignore[index]
    found["budget"]["seeds"] = [1, 2, 3]  # type: ignore[index]
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    return tmp_path


def test_what_is_kept_is_what_was_found_in_fewer_digits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(keeping, "FOLDER", tmp_path / "kept")
    assert main(["keep", "toy", str(folder), "--data", "Four records.", "--commit", "abc"]) == 0
    kept = real.read(tmp_path / "kept")["toy"]
    found = json.loads((folder / "comparison.json").read_text())
    assert kept["kind"] == "comparison" and kept["commit"] == {"hash": "abc", "changed": False}
    assert kept["found"]["candidates"][0]["rate"] == 0.0012346
    assert kept["found"]["data"]["test"] == "data/test.jsonl"  # and no path of the machine
    assert kept["found"]["candidates"][0]["seeds"][0]["losses"] == pytest.approx(
        found["candidates"][0]["seeds"][0]["losses"], rel=1e-4
    )


def test_the_page_has_scores_costs_and_sentences(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keeping, "FOLDER", tmp_path / "kept")
    main(["keep", "toy", str(folder), "--data", "Four records."])
    page = tmp_path / "page" / "compare.md"
    assert main(["real", "--page", str(page), "--no-pictures"]) == 0
    text = page.read_text()
    place = json.loads((folder / "comparison.json").read_text())["ranking"]["places"][0]
    assert f"| = | `{place['name']}` | 0.0012 | {place['score']:.4f} |" in text
    assert "75.0%" in text and "5,000" in text and "lorafit compare --data some.jsonl" in text
    assert "Four records." in text
    # The words are those of today's program on the numbers that were kept.
    assert "- Method: none can be recommended: no training was measured to be better" in text
    assert "Take more records" not in text


def test_runs_of_several_seeds_are_one_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keeping, "FOLDER", tmp_path / "kept")
    for number in (1, 2):
        side = {"records": 9, "before": 0.7, "after": 0.7 - 0.1 * number, "change": -0.1 * number, "margin": 0.05}
        gap = {
            "before": 0.0,
            "before_margin": 0.1,
            "after": 0.1,
            "after_margin": 0.1,
            "change": 0.1,
            "change_margin": 0.2,
        }
        loss = {"on_source": side, "on_target": {**side, "margin": None}, "gap": gap}
        shift = {"loss": loss, "accuracy": None, "sentence": f"seed {number} carries over"}
        (tmp_path / "result.json").write_text(json.dumps({"findings": {"shift": shift}}))
        assert main(["keep", f"shift-{number}", str(tmp_path), "--data", "Nine.", "--ran", f"train {number}"]) == 0
    text = real.text(real.read(tmp_path / "kept"))
    assert text.count("## Shift") == 1 and "train 1" in text and "seed 2 carries over" in text
    assert "| 2 | 0.700 → 0.500 (-0.200 ± 0.050) | 0.700 → 0.500 (-0.200) | +0.100 ± 0.200 |" in text


def test_nothing_to_keep_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keep", "toy", str(tmp_path), "--data", "None."]) == 1
    assert "comparison.json" in capsys.readouterr().err


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    kept = real.read(keeping.FOLDER)
    assert real.PAGE.is_file() == bool(kept)
    if kept:
        assert real.PAGE.read_text(encoding="utf-8") == real.text(copy.deepcopy(kept))
