"""Input that must be mended: the message names place, finding and fix, and the status is 1 (2 for wrong usage)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QA = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(6)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", ["train", "check"])
@pytest.mark.parametrize(
    ("file", "content", "options", "words"),
    [
        pytest.param("a.jsonl", b"", "", ["empty", "a.jsonl"], id="empty file"),
        pytest.param("a.xyz", b"hello", "", ["format of the file is unknown", ".jsonl"], id="unknown format"),
        pytest.param("a.jsonl", bytes(range(256)), "", ["a.jsonl"], id="binary file"),
        pytest.param("a.jsonl", lines([*QA, {"question": 1}]), "", ["a.jsonl:7", "answer"], id="mixed schemas"),
        pytest.param("a.jsonl", b'{"question": "a",\n', "", ["a.jsonl:1"], id="broken line"),
        pytest.param(
            "a.jsonl", lines(QA), "--max-length 6", ["nothing to learn", "max_length=6"], id="all labels masked"
        ),
        pytest.param("a.jsonl", lines(QA), "--columns prompt=qestion", ["not there", "question"], id="missing columns"),
        pytest.param("a.jsonl", lines([{"foo": "x", "bar": "y"}]), "", ["not recognised", "columns"], id="no form"),
        pytest.param("b.jsonl", lines(QA), "--data a.jsonl", ["a.jsonl", "b.jsonl"], id="no such file"),
    ],
)
def test_data_that_cannot_be_used(
    lorafit: Callable[..., Any],
    tmp_path: Path,
    llama: Path,
    name: str,
    file: str,
    content: bytes,
    options: str,
    words: list[str],
) -> None:
    (tmp_path / file).write_bytes(content)
    data = options.split("--data ")[1] if "--data" in options else file
    named = [data] if name == "check" else ["--data", data]
    result = lorafit(name, *named, "--model", llama, *(options.split() if "--data" not in options else ()))
    assert result.status == 1, result.out + result.err
    assert all(word in result.err for word in words), result.err
    assert result.err.startswith("error: ") and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        pytest.param("--lerning-rate 3", 2, ["unknown setting", "learning_rate"], id="unknown key"),
        pytest.param("--method lroa", 2, ["unknown method", "nearest:  lora"], id="unknown method"),
        pytest.param("--targets q_porj", 1, ["targets matches no module", "q_proj"], id="targets match nothing"),
        pytest.param("--r 0", 2, ["rank is out of range", "at least 1"], id="r = 0"),
        pytest.param("--r 64", 1, ["larger than the layer", "32"], id="r larger than the layer"),
        pytest.param("--model nope/a/b", 1, ["no such model directory"], id="no such model"),
        pytest.param("--set rank_pattern.q_porj=2", 1, ["rank_pattern", "q_proj"], id="rank pattern"),
    ],
)
def test_settings_that_do_not_do(
    lorafit: Callable[..., Any], command: list[str], options: str, status: int, words: list[str]
) -> None:
    free = [word for word in command if word not in ("--lora_r", "4")]  # r is what some of these set
    result = lorafit(*free, "--output-dir", "out", *options.split())
    assert result.status == status and all(word in result.err for word in words), result.err


def test_who_mends_a_command_may_use_its_folder(lorafit: Callable[..., Any], command: list[str]) -> None:
    wrong = lorafit(*command, "--output-dir", "out", "--targets", "q_porj")
    assert wrong.status == 1 and "targets matches no module" in wrong.err
    mended = lorafit(*command, "--output-dir", "out", "--targets", "q_proj")
    assert mended.status == 0, mended.err


def test_the_folder_of_another_run_is_left_alone(
    lorafit: Callable[..., Any], command: list[str], trained: tuple[Path, Any]
) -> None:
    folder, _ = trained
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    result = lorafit(*command, "--seed", "7", "--output-dir", folder)
    assert result.status == 1
    assert "output directory of another run" in result.err and "seed was 42 and is 7" in result.err
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_folder_that_holds_something_else_is_left_alone(
    lorafit: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    result = lorafit(*command, "--output-dir", "mine")
    assert result.status == 1 and "thesis.txt" in result.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_over_long_records_are_counted(lorafit: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    rows = [*QA, {"question": "long?", "answer": "it is " * 90}, {"question": "why " * 90, "answer": "so"}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    result = lorafit("check", "a.jsonl", "--model", llama, "--max-length", "60", "--eval-split", "0")
    assert result.status == 1, "a record that teaches nothing must be mended"
    assert "1 record cut to max_length=60 on the right (a.jsonl:7)" in result.out
    assert "1 record dropped" in result.out and "a.jsonl:8" in result.out
    assert "what to fix:" in result.out and "shorten the prompts (1 × untrained" in result.out.splitlines()[-1]
    (tmp_path / "a.jsonl").write_bytes(lines(rows[:-1]))
    result = lorafit("check", "a.jsonl", "--model", llama, "--max-length", "60", "--eval-split", "0")
    assert result.status == 0 and "1 are cut or dropped: raise --max-length to" in result.out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["eval", "nope"], ["chat", "nope"], ["merge", "nope", "--output-dir", "out"]], ids=" ".join
)
def test_no_adapter_there(lorafit: Callable[..., Any], arguments: list[str]) -> None:
    result = lorafit(*arguments)
    assert result.status == 1 and "there is no such folder" in result.err and not result.out


def test_an_unexpected_error_is_one_line(
    lorafit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise RuntimeError("the sky fell\nand more")

    monkeypatch.setattr("lorafit.training.run.train", explode)
    result = lorafit(*command, "--output-dir", "out")
    assert result.status == 1
    assert result.err.splitlines() == [
        "error: RuntimeError: the sky fell",
        "  fix:      this is a bug or an unexpected condition; --debug shows where",
    ]
    assert "Traceback" in lorafit(*command, "--output-dir", "out", "--debug").err
