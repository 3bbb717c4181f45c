"""What `lorafit check` finds in data that can be read: warnings and notes leave the status 0, errors make it 1."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.training import datacheck, datacheck_tokens
from lorafit.training.leakage import can_compare_nearly

GOOD = [{"question": f"how is {word} written here?", "answer": f"like {word}, by all"} for word in "abcdefghijkl"]
BASE = " ".join(f"word{n}" for n in range(26))
USER, ASSISTANT = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "it is so"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Look = Callable[..., Any]


@pytest.fixture
def look(lorafit: Callable[..., Any], tmp_path: Path, llama: Path) -> Look:
    """The findings of some records by name, after the status was compared."""

    def look(rows: list[Any], *options: object, held: list[Any] | None = None, status: int = 0) -> dict[str, Any]:
        write(tmp_path / "data.jsonl", rows)
        split: tuple[object, ...] = ("--eval-split", 0)
        if held is not None:
            split = ("--eval-data", write(tmp_path / "held.jsonl", held).name)
        model = () if "--model" in options else ("--model", llama)
        result = lorafit("check", "data.jsonl", *split, *model, *options, "--json")
        assert result.status == status, result.err
        assert result.json["ok"] is (status == 0)
        found = {finding["name"]: finding for finding in result.json["findings"]}
        assert all(finding["fix"] and finding["text"] for finding in found.values())
        return found

    return look


def answer(text: str) -> dict[str, str]:
    return {"question": "another one?", "answer": text}


@pytest.mark.parametrize(
    ("rows", "name", "level", "field"),
    [
        ([GOOD[0]], "duplicate", "warning", "question + answer"),
        ([{**GOOD[0], "answer": "otherwise"}], "repeated-question", "note", "question"),
        ([{"question": "How is A written here", "answer": "x"}], "alike", "note", "question"),
        ([answer("a \ufffd b")], "replacement-characters", "warning", "answer"),
        ([answer("a \ufeffb")], "byte-order-mark", "warning", "answer"),
        ([answer("a \x07 b")], "control-characters", "warning", "answer"),
        ([answer("it is a cafÃ©")], "garbled", "warning", "answer"),
        ([answer("it isnâ€™t")], "garbled", "warning", "answer"),
        ([answer("another one? it repeats")], "echo", "warning", "answer"),
        ([answer("stop <|im_end|> here")], "special", "warning", "question + answer"),
    ],
)
def test_of_one_record(look: Look, rows: list[Any], name: str, level: str, field: str) -> None:
    found = look([*GOOD, *rows])
    assert set(found) == {name}
    assert (found[name]["level"], found[name]["field"]) == (level, field)
    assert found[name]["count"] == 1 and found[name]["at"] == ["data.jsonl:13"]


def test_good_text_in_other_languages_is_no_finding(look: Look) -> None:
    texts = [
        "Ärger über Öl, ça va",
        "Zürich — «naïve» façade…",
        "日本語の文",
        "emoji 👩‍👩‍👧",
        "São Paulo, À bientôt, ÃO",
    ]
    assert look([*GOOD, *({"question": f"{text} {n}", "answer": text} for n, text in enumerate(texts))]) == {}


def test_places_are_five_and_counts_are_whole(look: Look) -> None:
    found = look([*GOOD, *[GOOD[0]] * 9])
    assert found["duplicate"]["count"] == 9 and len(found["duplicate"]["at"]) == 5


def test_leaks(look: Look) -> None:
    long = "a long answer that nobody gives to two questions by chance"
    held = [GOOD[0], {**GOOD[1], "answer": "x"}, {"question": "HOW is c written here", "answer": "x"}]
    found = look([*GOOD, answer(long)], held=[*held, {"question": "why, then?", "answer": long}])
    assert {name: finding["at"] for name, finding in found.items()} == {
        "leak-whole": ["held.jsonl:1"],
        "leak-question": ["held.jsonl:2"],
        "leak-alike": ["held.jsonl:3"],
        "leak-answer": ["held.jsonl:4"],
    }


@pytest.mark.skipif(not can_compare_nearly(), reason="needs datasketch")
def test_near_repetitions_and_leaks(look: Look) -> None:
    rows = [*GOOD, {"question": BASE, "answer": "so"}, {"question": f"{BASE} again", "answer": "so"}]
    found = look(rows, held=[{"question": f"once {BASE}", "answer": "so"}])
    assert found["near-duplicate"]["at"] == ["data.jsonl:14"] and "data.jsonl:13" in found["near-duplicate"]["found"]
    assert found["near-leak"]["at"] == ["data.jsonl:13", "data.jsonl:14"]


def test_without_datasketch_it_is_said(
    lorafit: Callable[..., Any], tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.training.datacheck.can_compare_nearly", lambda: False)
    write(tmp_path / "data.jsonl", [*GOOD, GOOD[0]])
    result = lorafit("check", "data.jsonl", "--model", llama)
    assert result.status == 0 and "pip install 'lorafit[check]'" in result.out
    assert "The whole record repeats an earlier one." in result.out
    assert lorafit("check", "data.jsonl", "--model", llama, "--json").json["near_compared"] is None


def test_what_is_cut_is_measured(look: Look) -> None:
    found = look([*GOOD, {"question": "long?", "answer": "it is " * 40}], "--max-length", 60)
    assert found["truncated"]["level"] == "warning" and found["truncated"]["at"] == ["data.jsonl:13"]
    lost, _, learnt, *_ = found["truncated"]["found"].split()
    assert 0 < int(lost) < int(learnt)
    found = look([*GOOD, {"question": "why " * 40, "answer": "so"}], "--max-length", 60, status=1)
    assert found["untrained"]["level"] == "error" and "are lost" in found["untrained"]["found"]


def test_outliers(look: Look) -> None:
    rows = [{"question": f"{n}?", "answer": "it"} for n in range(20)]
    found = look(
        [*rows, {"question": "all?", "answer": "abcd " * 50}], "--max-length", 1024, "--set", "eval_limit=1", status=1
    )
    assert "positions" in found and found["outlier"]["at"] == ["data.jsonl:21"]


def test_turns_that_do_not_alternate(look: Look) -> None:
    chats = [{"messages": [{**USER, "content": f"what {n}?"}, ASSISTANT]} for n in range(4)]
    found = look([*chats, {"messages": [USER, USER, ASSISTANT, USER, ASSISTANT]}])
    assert set(found) == {"turns"} and found["turns"]["found"] == "user user assistant user assistant"


def test_columns_that_say_nothing(look: Look) -> None:
    rows = [{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(6)]
    assert look(rows)["empty-column"]["field"] == "input"
    assert look([*rows, {"instruction": "do", "input": "it", "output": "so"}]) == {}


def test_records_that_cannot_be_read_do_not_hide_the_others(look: Look) -> None:
    rows = [*GOOD, answer(""), {"question": 3, "answer": "x"}, answer("a \ufffd b")]
    found = look(rows, status=1)
    assert set(found) == {"unreadable", "replacement-characters"}


@pytest.mark.parametrize("held", [None, [{"text": "fine film", "label": "pos"}, {"text": "so so", "label": "mixed"}]])
def test_labels(look: Look, bert: Path, held: list[Any] | None) -> None:
    rows = [{"text": f"good film {n}", "label": "pos"} for n in range(30)]
    rows += [{"text": "bad film", "label": "neg"}, {"text": "good film 0", "label": "neg"}]
    found = look(rows, "--model", bert, held=held, status=0 if held is None else 1)
    assert found["conflicting-label"]["at"] == ["data.jsonl:32"] and found["conflicting-label"]["level"] == "warning"
    assert "'neg' is rare: 2 records" in found["unbalanced"]["text"]
    assert ("unseen-label" in found) is (held is not None)
    assert "unknown-tokens" in found, "the tiny vocabulary has no numbers"


def test_a_label_that_stands_for_none(look: Look, bert: Path) -> None:
    rows = [{"text": f"film {'good' * (n % 5)} {n}", "label": n % 3 - 1} for n in range(12)]
    assert look(rows, "--model", bert)["no-label"]["count"] == 4


def test_what_is_wrong_with_a_part_is_shown_before_what_ends_it(
    lorafit: Callable[..., Any], tmp_path: Path, llama: Path
) -> None:
    write(tmp_path / "data.jsonl", [*GOOD, answer("")])
    result = lorafit("check", "data.jsonl", "--model", llama, "--max-length", 6, "--set", "early_stopping=true")
    assert result.status == 1 and result.err.startswith("error: There is nothing to learn")
    assert "The value of 'answer' is empty." in result.out


def test_it_says_what_took_how_long(lorafit: Callable[..., Any], sums: Path, llama: Path) -> None:
    result = lorafit("check", sums, "--model", llama, "--json")
    seconds = result.json["seconds"]
    assert list(seconds)[:5] == ["reading", "repetitions", "tokenizer", "tokens", "model"]
    assert "took: reading" in result.err and result.json["findings"] == []


def test_the_embedded_data_are_fine(lorafit: Callable[..., Any], llama: Path) -> None:
    result = lorafit("check", "--model", llama, "--max-length", 1000, "--json", "--set", "samples=0")
    assert not [finding for finding in result.json["findings"] if finding["name"] in ("unreadable", "garbled")]


def test_the_page_lists_every_finding() -> None:
    names = {"stopped", *datacheck_tokens._NOTICED}
    for path in Path(datacheck.__file__).parent.glob("datacheck*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "findings.add",
                "findings.all",
                "findings.raised",
                "self._findings.add",
                "found",
            ):
                texts = [one.value for one in ast.walk(node.args[1]) if isinstance(one, ast.Constant)]
                names |= {text for text in texts if isinstance(text, str)}
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    first = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    assert {name for cell in first for name in re.findall(r"`([\w-]+)`", cell)} == names
