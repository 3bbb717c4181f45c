"""The page on serving says what the stored measurements say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks import load, serving, stored
from benchmarks.load import Tally, Target


def document(name: str, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": name,
        "name": name,
        "command": f"python -m benchmarks {name}",
        "date": "2026-01-01",
        "commit": {"hash": "0123456789", "changed": False},
        "versions": {"torch": "2.13.0"},
        "machine": {
            "processor": "a processor",
            "capability": "AVX2",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 2**34,
            "platform": "Linux",
        },
        "seed": 0,
        "load": {"others": 0, "averages": [0.0]},
        "warnings": [],
        "seconds": 60.0,
        "results": results,
    }


def mixed(decode_of_eight: float) -> dict[str, Any]:
    names = [f"{side}, {count}" for side in ("lorafit", "PEFT") for count in (1, 4, 8, 32)]
    seconds = {"base": [1.0, 1.0, 1.0], **{name: [1.1, 1.1, 1.1] for name in names}}
    return {
        "rows": 32,
        "prompt": 64,
        "rank": 16,
        "added": {"lorafit": [0.03, 0.04, 0.05], "PEFT": [1.3, 1.4, 1.5]},
        "apart": {"1": 1e-6},
        "prefill": seconds,
        "decode": {**seconds, "lorafit, 8": [decode_of_eight] * 3},
    }


def test_bars_are_passed_or_missed_by_their_medians() -> None:
    good = serving.text({"mixed-smollm2": document("mixed", mixed(1.5))})
    assert good.count("| passed |") == 9 and "missed" not in good
    assert "Not measured yet: throughput, load." in good
    bad = serving.text({"mixed-smollm2": document("mixed", mixed(1.51))})
    (line,) = [line for line in bad.splitlines() if "| missed |" in line]
    assert line.startswith("| decode, 8 adapters | ≤ 1.5 | 1.51 (1.51–1.51) |")
    assert "| adding an adapter | ≤ 0.05 s | 0.040 s (0.035–0.045) | passed | 1.400 s (1.350–1.450) |" in bad


def test_throughput_is_shown_beside_the_base() -> None:
    points = [
        {"adapters": count, "tokens_per_second": [rate] * 3, "resident_bytes": 2**20 * count, "process_bytes": 2**30}
        for count, rate in ((0, 200.0), (1, 180.0), (1000, 90.0))
    ]
    found = {"requests": 9, "prompt": 8, "answer": 8, "rank": 16, "resident": 64, "points": points}
    text = serving.text({"throughput-smollm2": document("throughput", found)})
    assert "| the base alone | 200 (200–200) | 1.00 | 0 MiB | 1024 MiB |" in text
    assert "| 1,000 | 90 (90–90) | 0.45 | 1000 MiB | 1024 MiB |" in text
    assert len(serving.figure(found).data) == 2


def test_the_load_says_what_went_wrong() -> None:
    found = {
        "model": "a-model",
        "clients": 64,
        "duration": 60.0,
        "adapters": 16,
        "tokens": 16,
        "done": {"stream": 1200, "mistaken": 3},
        "wrong": [],
        "first_token": {"p50": 0.5, "p95": 1.25},
        "whole_answer": {"p50": 2.0, "p95": 4.0},
        "tokens_per_second": 123.4,
        "memory": [2**30, 2**30, 2**30 + 2**20, 2**30],
        "left": {"lorafit_requests_running": 0.0, "lorafit_requests_waiting": 0.0},
        "status": 0,
    }
    text = serving.text({"load": document("load", found)})
    for part in (
        "| streams | 1,200 |",
        "| answers that were wrong | 3 |",
        "| time to the first token | p50 0.50 s, p95 1.25 s |",
        "1024 MiB, 1024 MiB, 1025 MiB, 1024 MiB",
    ):
        assert part in text


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    assert serving.PAGE.read_text(encoding="utf-8") == serving.text(stored.read(serving.FOLDER))


class Lying:
    """Stands in for a stream whose answer is another one."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"choices": [{"delta": {"content": self._text}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(("answer", "wrong"), [("right", 0), ("left", 1)])
def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch, answer: str, wrong: int) -> None:
    from contextlib import asynccontextmanager
    from pathlib import Path

    @asynccontextmanager
    async def streamed(*_: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        yield Lying(answer).events()

    monkeypatch.setattr(load, "_streamed", streamed)
    tally = Tally()
    target = Target("", "base", ("base",), {("base", "hi"): "right"}, 4, Path(), "base")
    asyncio.run(load._read_stream(None, target, tally, "base", "base", "hi"))
    assert tally.done["mistaken"] == wrong and len(tally.wrong) == wrong
    assert json.dumps(tally.wrong)
