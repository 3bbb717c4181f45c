"""`lorafit dimension` on a tiny model: its table, its files, going on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = "--max-steps 8 --eval-split 10 --points 2 --rates 1 --seeds 2 --max-d 2000"
"""Some trials of a second each: base, full fine-tuning with two seeds, two d, and a second seed of these."""


@pytest.fixture(scope="module")
def asked(llama: Path, sums: Path) -> list[str]:
    return ["dimension", "--model", str(llama), "--data", str(sums), *SMALL.split()]


def process(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "lorafit", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def measured(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished experiment, and what its command said."""
    folder = tmp_path_factory.mktemp("dimension")
    running = process([*asked, "--output-dir", "whole"], folder)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    return folder / "whole", out


def finished(folder: Path) -> list[Path]:
    return sorted(folder.glob("trials/**/trial.json"))


def figures(folder: Path) -> dict[str, Any]:
    """What an experiment found, without times."""
    told = json.loads((folder / "dimension.json").read_text())
    kept = ("kind", "metric", "base", "full", "threshold", "d90", "interval", "points", "verdict")
    for point in told["points"]:
        for tried in point["search"]:
            tried.pop("seconds")
    return {name: told[name] for name in kept}


def test_the_command_shows_and_keeps_what_it_found(measured: tuple[Path, str]) -> None:
    folder, out = measured
    told = json.loads((folder / "dimension.json").read_text())
    assert told["format"] == 1 and told["complete"] and told["kind"] == "said" and told["metric"] == "loss"
    assert told["full"] < told["base"] and len(told["points"]) == 2 and told["trials"] == len(finished(folder)) >= 6
    for point in told["points"]:
        assert point["kept"] == pytest.approx((told["base"] - point["score"]) / (told["base"] - told["full"]))
    lines = out.splitlines()
    assert lines[-1] == told["verdict"] and lines[-1].startswith("d90 ")
    assert any(line.startswith("[6/") for line in lines) and "untrained" in out and "full fine-tuning" in out
    assert (folder / "dimension.html").read_text().lower().startswith("<!doctype html>")
    assert not list(folder.glob("trials/full/**/*.safetensors")), "all weights of every trial would fill the disk"


def test_the_same_command_trains_nothing_again(
    lorafit: Callable[..., Any], asked: list[str], measured: tuple[Path, str]
) -> None:
    folder, _ = measured
    before = {path: path.stat().st_mtime_ns for path in finished(folder)}
    result = lorafit(*asked, "--output-dir", folder, "--json")
    assert result.status == 0, result.err
    assert "runs " not in result.err and {path: path.stat().st_mtime_ns for path in finished(folder)} == before
    assert result.json["verdict"] == result.err.splitlines()[-1] == figures(folder)["verdict"]
    other = lorafit(*asked, "--output-dir", folder, "--max-steps", "9")
    assert other.status != 0


def test_without_plotly_the_numbers_are_told_all_the_same(
    lorafit: Callable[..., Any], asked: list[str], measured: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = measured
    for name in ("plotly", "plotly.offline", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    result = lorafit(*asked, "--output-dir", folder)
    assert result.status == 0, result.err
    assert "no report: " in result.out and "report:  not written" in result.out
    assert result.out.splitlines()[-1] == figures(folder)["verdict"]


@pytest.mark.slow
def test_a_kill_changes_nothing(asked: list[str], measured: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = measured
    for enough in (2, 4):
        running = process([*asked, "--output-dir", "killed"], tmp_path)
        deadline = time.monotonic() + 120
        while len(finished(tmp_path / "killed")) < enough and running.poll() is None:
            assert time.monotonic() < deadline, "no trial ends"
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    there = {path: path.stat().st_mtime_ns for path in finished(tmp_path / "killed")}
    running = process([*asked, "--output-dir", "killed"], tmp_path)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert {path: path.stat().st_mtime_ns for path in there} == there, "finished trials are trained once"
    assert figures(tmp_path / "killed") == figures(whole)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--kind", "sai"], 2, ["--kind", "said"]),
        (["--budget", "soon"], 2, ["--budget", "20min"]),
        (["--r", "8"], 1, ["--against lora"]),
        (["--method", "intrinsic"], 1, ["intrinsic"]),
        (["--max-d", "2"], 1, ["at least 3", "--kind did"]),
        (["--comparison", "nowhere.json"], 1, ["--comparison", "comparison.json"]),
        (["--targets", "q_porj"], 1, ["q_proj"]),
        (["--max_stepz", "8"], 2, ["max_steps"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    lorafit: Callable[..., Any], asked: list[str], tmp_path: Path, options: list[str], status: int, words: list[str]
) -> None:
    result = lorafit(*asked, "--output-dir", "run", *options)
    assert result.status == status, result.err
    for word in words:
        assert word in result.err
    assert not finished(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("dimension --of scor", "--of score"),
        ("dimension --kind dit", "--kind did"),
        ("dimension --of xyz", "--of gain"),
        ("compare --metric acuracy", "--metric accuracy"),
    ],
)
def test_a_word_that_is_nearly_right_is_mended_to_the_nearest(lorafit: Any, words: str, fix: str) -> None:
    result = lorafit(*words.split())
    assert result.status == 2 and result.err.rstrip().endswith(fix)
