"""`lorafit plan`: what it prints, its exit status, its JSON, and that it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.training import planning_child

KINDS = {
    "fits": bool,
    "peak_bytes": int,
    "limit_bytes": int,
    "limit_of": str,
    "device": str,
    "formula": dict,
    "steps": int,
    "micro_batches": int,
    "evaluations": int,
    "longest_batch": dict,
    "tokens_per_batch": float,
    "advice": list,
}
SECONDS = {
    *("step_seconds", "longest_step_seconds", "train_seconds", "evaluation_seconds"),
    *("answer_seconds", "watched_seconds", "rest_seconds", "seconds"),
}


@pytest.fixture
def planned(command: list[str]) -> list[str]:
    """The training command of the shared runs, as a plan."""
    return ["plan", *command[1:]]


def test_dry(lorafit: Callable[..., Any], planned: list[str], tmp_path: Path) -> None:
    result = lorafit(*planned, "--dry", "--output-dir", "nothing")
    assert result.status == 0, result.err
    for text in ("base weights", "activations", "peak", "steps, 10", "general text, before and after", "whole run"):
        assert text in result.out
    assert result.out.splitlines()[-1].startswith("fits: ")
    assert list(tmp_path.iterdir()) == []


def test_json(lorafit: Callable[..., Any], planned: list[str]) -> None:
    told = lorafit(*planned, "--dry", "--json", "--memory", "6GB").json
    assert {name: type(told[name]) for name in KINDS} == KINDS
    assert set(told) == {*KINDS, "measured", "not_measured"} and told["measured"] is None
    assert told["limit_bytes"] == 6 * 10**9 and told["fits"] and told["steps"] == 10
    assert set(told["formula"]) == {"parts", "peak_bytes", *SECONDS}
    assert told["formula"]["peak_bytes"] == pytest.approx(sum(told["formula"]["parts"].values()), abs=5)
    assert told["formula"]["seconds"] > told["formula"]["train_seconds"] > 0


def test_what_does_not_fit(lorafit: Callable[..., Any], planned: list[str]) -> None:
    result = lorafit(*planned, "--dry", "--memory", "1MB")
    assert result.status == 1
    assert result.out.splitlines()[-1].startswith("does not fit in 0.00 GiB (--memory)")
    assert "no single change above is enough" in result.out


def test_a_change_that_is_enough_is_named(lorafit: Callable[..., Any], planned: list[str]) -> None:
    options = (*planned, "--dry", "--set", "packing=false", "--per-device-train-batch-size", "32")
    peak = lorafit(*options, "--json").json["formula"]
    limit = peak["peak_bytes"] - peak["parts"]["activations"] // 4
    result = lorafit(*options, "--json", "--memory", f"{limit / 10**6:.3f}MB")
    told = result.json
    if told["fits"]:  # this process has grown less than a quarter of the activations since
        pytest.skip("the process has given memory back in between")
    assert result.status == 1
    assert {"change", "effect", "peak_bytes", "enough"} == set(told["advice"][0])
    enough = [one for one in told["advice"] if one["enough"]]
    assert not enough or f"try {enough[0]['change']}" in result.err


def test_measured(lorafit: Callable[..., Any], planned: list[str], tmp_path: Path) -> None:
    result = lorafit(*planned, "--json", "--output-dir", "nothing")
    assert result.status == 0, result.err
    measured = result.json["measured"]
    assert set(measured) == {"peak_bytes", "steps", *SECONDS}
    assert len(measured["steps"]) == planning_child.STEPS and measured["peak_bytes"] > 10**8
    assert all(measured[name] > 0 for name in SECONDS)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_base(lorafit: Callable[..., Any], planned: list[str]) -> None:
    plain, packed = (
        lorafit(*planned, "--json", *more) for more in (["--dry"], ["--quantise", "int8", "--recompute", "cheap"])
    )
    assert packed.status == 0, packed.err
    parts = [one.json["formula"]["parts"] for one in (plain, packed)]
    assert parts[1]["base weights"] < parts[0]["base weights"]
    assert packed.json["measured"]["peak_bytes"] > 10**8


def test_a_classifier_of_packed_records_is_refused(lorafit: Callable[..., Any], bert: Path, films: Path) -> None:
    result = lorafit("plan", "--model", bert, "--data", films, "--packing", "true", "--dry")
    assert result.status == 1 and "a classifier cannot have several records in a row" in result.err


def test_a_classifier(lorafit: Callable[..., Any], bert: Path, films: Path) -> None:
    result = lorafit("plan", "--model", bert, "--data", films, "--r", 4, "--json")
    assert result.status == 0, result.err
    assert result.json["measured"]["peak_bytes"] > 0 and result.json["measured"]["answer_seconds"] == 0


def test_steps_that_the_system_ends(
    lorafit: Callable[..., Any], planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(planning_child.subprocess, "run", lambda *args, **options: killed)
    result = lorafit(*planned)
    assert result.status == 1
    assert "not measured: the system ended it for want of memory" in result.out
    assert "does not fit" in result.out


def test_steps_that_fail(lorafit: Callable[..., Any], planned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: that")
    monkeypatch.setattr(planning_child.subprocess, "run", lambda *args, **options: failed)
    result = lorafit(*planned)
    assert result.status == 1
    assert "ValueError: that" in result.err and "--dry" in result.err


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (("--memory", "8"), 2, "no amount of memory"),
        (("--lora_rr", "8"), 2, "unknown setting"),
        (("--targets", "nowhere"), 1, "nowhere"),
        (("--set", "rank_pattern.q_proj=999"), 1, "rank"),
    ],
)
def test_bad_input(
    lorafit: Callable[..., Any], planned: list[str], options: tuple[str, ...], status: int, text: str
) -> None:
    result = lorafit(*planned, "--dry", *options)
    assert result.status == status and text in result.err


def test_help(lorafit: Callable[..., Any]) -> None:
    result = lorafit("plan", "--help")
    assert result.status == 0
    assert all(
        text in result.out for text in ("--dry", "--memory", "--json", "--max-length", "--quantise", "lorafit train")
    )


@pytest.mark.slow
def test_it_comes_near(lorafit: Callable[..., Any], tmp_path: Path) -> None:
    """On the embedded model and data; the time only roughly, for other programs may be running."""
    options = ("--max-steps", 6, "--eval-limit", 32, "--samples", 1)
    told = lorafit("plan", *options, "--json").json
    lorafit_run = subprocess.run(
        [*_python(), "train", *map(str, options), "--output-dir", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    ran = json.loads(lorafit_run.stdout)
    assert told["measured"]["peak_bytes"] == pytest.approx(ran["peak_rss_bytes"], rel=0.15)
    assert told["formula"]["peak_bytes"] == pytest.approx(ran["peak_rss_bytes"], rel=0.35)
    assert told["measured"]["train_seconds"] == pytest.approx(ran["train_seconds"], rel=0.5)


def _python() -> list[str]:
    import sys

    return [sys.executable, "-m", "lorafit"]
