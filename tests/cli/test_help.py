"""Help is quick, light and complete."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import lorafit as lf

COMMANDS = ("demo", "train", "eval", "chat", "merge", "check", "plan", "methods", "dreambooth", "draw")
SECONDS = 0.5


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def _children() -> float:
    """Seconds of the processor that ended children of this process have taken."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_answers_in_half_a_second(arguments: list[str]) -> None:
    seconds = []
    for _ in range(5):
        # Of the processor, not of the clock: another test runs beside this one.
        started = _children()
        done = python("-m", "lorafit", *arguments)
        seconds.append(_children() - started)
        assert done.returncode == 0 and "Usage: lorafit" in done.stdout and not done.stderr
    assert min(seconds) < SECONDS


def test_no_help_imports_anything_heavy() -> None:
    script = (
        "import sys; from lorafit.cli.main import main\n"
        f"for name in {COMMANDS}: assert main([name, '--help']) == 0, name\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("demo", ["--max-steps", "--output-dir", "--seed", "--json", "--set", "runs/demo"]),
        (
            "train",
            [
                *(
                    "--model",
                    "--data",
                    "--eval-data",
                    "--eval-split",
                    "--columns",
                    "--task",
                    "--max-length",
                    "--method",
                ),
                *("--r ", "--alpha", "--dropout", "--targets", "--exclude", "--output-dir", "--seed", "--samples"),
                *("--learning-rate", "--max-steps", "--num-train-epochs", "--per-device-train-batch-size"),
                *("--gradient-accumulation-steps", "--config", "--set", "--json", "--debug"),
                *("all-linear", "re:", "TrainingArguments", "q_proj,v_proj"),
            ],
        ),
        ("eval", ["ADAPTER", "--base", "--model", "--data", "--samples", "--labels", "--json"]),
        ("chat", ["ADAPTER", "--prompt", "--temperature", "--system", "--max-new-tokens"]),
        ("merge", ["ADAPTER", "--output-dir", "--untie", "--dtype", "--json"]),
        ("check", ["DATA", "--model", "--eval-split", "--config", "--samples", "--json"]),
        ("methods", ["--model", "--json"]),
    ],
)
def test_help_names_what_a_command_takes(lorafit: Callable[..., Any], name: str, lines: list[str]) -> None:
    result = lorafit(name, "--help")
    assert result.status == 0 and f"Usage: lorafit {name}" in result.out
    missing = [line for line in lines if line not in result.out]
    assert not missing


def test_the_root_lists_every_command_and_the_statuses(lorafit: Callable[..., Any]) -> None:
    result = lorafit("--help")
    assert all(re.search(rf"^│ {name}\b", result.out, flags=re.MULTILINE) for name in COMMANDS)
    assert "130" in result.out and "2 wrong usage" in result.out
    bare = lorafit()
    assert bare.status == 2 and "Usage: lorafit" in bare.out


def test_version(lorafit: Callable[..., Any]) -> None:
    assert lorafit("--version").out == f"lorafit {lf.__version__}\n"


def test_without_its_extra_the_command_line_names_the_install_line(
    lorafit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    result = lorafit("--help")
    assert result.status == 1 and "pip install 'lorafit[train]'" in result.err
