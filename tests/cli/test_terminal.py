"""What people see on a terminal: colours and tables that fit its width."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

WIDTH = 80


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rich is told to take what it writes to for a terminal."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def test_a_run_shows_a_bar_and_a_table_that_fit(lorafit: Callable[..., Any], command: list[str]) -> None:
    result = lorafit(*command, "--output-dir", "out")
    said = bare(result.out)
    assert result.status == 0 and "\x1b[" in result.out
    assert "10/10" in said and re.search(r"question +┃ before +┃ after +┃ reference", said)
    assert all(cell_len(line) <= WIDTH for line in said.splitlines() if line.startswith(("┃", "│")))
    assert said.splitlines()[-1].startswith("held-out loss")


def test_a_path_is_never_broken(lorafit: Callable[..., Any], command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    result = lorafit(*command, "--output-dir", folder, "--max-steps", "1", "--samples", "0")
    assert f"adapter: {folder / 'adapter'}" in bare(result.out).splitlines()


def test_both_sides_of_a_chat_stand_beside_each_other(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    result = lorafit("chat", trained[0] / "adapter", "--prompt", "what is 3 plus one?", "--max-new-tokens", "4")
    said = bare(result.out)
    head = next(line for line in said.splitlines() if "╭" in line)
    assert "base" in head and "adapter" in head and cell_len(head) == WIDTH and "cut at 4 tokens" in said


def test_what_is_learnt_is_coloured(lorafit: Callable[..., Any], llama: Path, sums: Path) -> None:
    result = lorafit("check", sums, "--model", llama, "--samples", "1")
    assert "\x1b[1;32mit is 1<|im_end|>" in result.out and "[[" not in result.out and "█" in result.out


def test_errors_stand_out_on_a_terminal(lorafit: Callable[..., Any]) -> None:
    result = lorafit("train", "--learnig-rate", "3")
    assert "\x1b[1;31merror: " in result.err and "nearest:  learning_rate" in bare(result.err)
