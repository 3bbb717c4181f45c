"""The frozen Python Q&A data are clean and do not leak, and the functions that made them do what they say."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lorafit.errors import ConfigError
from lorafit.training.embedded_data import SPLITS, embedded_data_path

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_python_qa.py"

Records = list[dict[str, str]]


@pytest.fixture(scope="module")
def data() -> dict[str, Records]:
    return {
        split: [json.loads(line) for line in embedded_data_path(split).read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def records(data: dict[str, Records]) -> Records:
    return [*data["train"], *data["eval"]]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("make_python_qa", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


# --- the frozen files --------------------------------------------------------------------------------------


def test_counts(data: dict[str, Records]) -> None:
    assert {split: len(read) for split, read in data.items()} == {"train": 2493, "eval": 221}
    assert {split: len({record["module"] for record in read}) for split, read in data.items()} == {
        "train": 136,
        "eval": 13,
    }


def test_the_notice_tells_the_counts_and_the_licence() -> None:
    folder = embedded_data_path("train").parents[1]
    notice = (folder / "NOTICE.md").read_text("utf-8")
    for said in ("2,493 records, 136", "221 records, 13", "CPython 3.11.7", "Python Software Foundation"):
        assert said in notice
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (folder / "LICENSE-PYTHON.txt").read_text("utf-8")


def test_every_record_has_the_same_fields(records: Records) -> None:
    for record in records:
        assert list(record) == ["question", "answer", "module"]
        assert all(isinstance(value, str) and value.strip() == value != "" for value in record.values())


def test_no_module_is_in_both_splits(data: dict[str, Records]) -> None:
    modules = {split: {record["module"] for record in read} for split, read in data.items()}
    assert not modules["train"] & modules["eval"]


def test_the_module_is_that_of_the_name(records: Records) -> None:
    import builtins

    for record in records:
        first = re.search(r"`(\w+)[.`]", record["question"])
        assert first is not None
        expected = "builtins" if first[1] in vars(builtins) else first[1]
        assert record["module"] == expected


def test_nothing_is_asked_or_answered_twice(records: Records) -> None:
    for field in ("question", "answer"):
        values = [record[field].lower() for record in records]
        assert len(set(values)) == len(values)


def test_no_held_out_answer_is_nearly_in_training(data: dict[str, Records]) -> None:
    learnt = [words(record["answer"]) for record in data["train"]]
    for record in data["eval"]:
        held = words(record["answer"])
        assert all(len(held & other) < 0.85 * len(held | other) for other in learnt), record


def test_questions_have_three_forms_and_public_names(records: Records) -> None:
    form = re.compile(r"What (does Python's `([\w.]+)` do|is Python's `([\w.]+)`( module)?)\?")
    for record in records:
        match = form.fullmatch(record["question"])
        assert match is not None, record
        name = match[2] or match[3]
        assert not any(part.startswith("_") for part in name.split(".")), record


def test_answers_are_one_clean_sentence(records: Records) -> None:
    for record in records:
        answer = record["answer"]
        assert 4 <= len(answer.split()) <= 30, record
        assert answer.isascii(), record
        assert answer[0].isupper(), record
        assert answer.endswith("."), record
        assert not answer.endswith(".."), record
        assert "  " not in answer, record
        assert "\n" not in answer, record
        assert not re.search(r"->|>>>|::|``|:[a-z]+:`|\b(see|deprecated|internal)\b", answer, re.I), record
        assert not re.search(r"(?<!\w)_\w", answer), record
        for left, right in ("()", "[]"):
            assert answer.count(left) == answer.count(right), record
        assert answer.count("`") % 2 == 0, record


def test_answers_are_in_one_voice(script: ModuleType, records: Records) -> None:
    for record in records:
        first = record["answer"].split()[0].lower()
        if record["question"].startswith("What does"):
            assert first in script.VERBS or first.endswith("ly"), record
        else:
            assert first in script.NOUN_STARTS, record


def test_there_is_no_third_split() -> None:
    with pytest.raises(ConfigError, match="train or eval"):
        embedded_data_path("test")  # type: ignore[arg-type]


# --- the generator -----------------------------------------------------------------------------------------


def test_examples_in_the_script(script: ModuleType) -> None:
    result = doctest.testmod(script)
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Returns the name of x.", "Return the name of x."),
        (
            "find(sub[, start]) -> int\n\nReturn the lowest index\n    of sub.\n\nMore.",
            "Return the lowest index of sub.",
        ),
        ("Return a :class:`Future` or ``None``", "Return a `Future` or `None`."),
        ("Recursively copies a whole tree.", "Recursively copy a whole tree."),
        ("Return it at once. Raises ValueError if not.", "Return it at once."),
        ("Return the name, e.g. `x`, of it.", "Return the name, e.g. `x`, of it."),
        ("Add a writer callback..", "Add a writer callback."),
        ("", ""),
        ("Return it.", ""),  # too short
        ("The name of x.", ""),  # no verb
        ("return the name of x.", ""),  # begins like a fragment
        ("Return one of the following:", ""),
        ("Return the name (of x.", ""),
        ("Return the name as shown below.", ""),
        ("Deprecated alias of that name.", ""),
        ("Return self._name of the thing.", ""),
        ("Return x -> y for all x.", ""),
        ("Return the naïve name of it.", ""),
        ("Copies the tree and returns it all.", ""),  # the second verb would stay in the third person
        ("Return the name. and the rest of it", ""),  # two sentences after all
        (f"Return {'very ' * 30}long names.", ""),
    ],
)
def test_answers_of_functions(script: ModuleType, doc: str, expected: str) -> None:
    assert script.answer(doc, "function") == expected


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Abstract base class for readers", "Abstract base class for readers."),
        ("A queue of many things.\n\nMore.", "A queue of many things."),
        ("The reply code was not expected.", ""),  # a sentence, not a description
        ("Return the name of x.", ""),
    ],
)
def test_answers_of_classes(script: ModuleType, doc: str, expected: str) -> None:
    assert script.answer(doc, "class") == expected


def test_questions(script: ModuleType) -> None:
    assert script.question("os.path.join", "function") == "What does Python's `os.path.join` do?"
    assert script.question("io.BytesIO", "class") == "What is Python's `io.BytesIO`?"
    assert script.question("json", "module") == "What is Python's `json` module?"


def test_of_equal_answers_the_shortest_held_out_name_is_kept(script: ModuleType) -> None:
    entries = [
        ("os.a.b", "function", "Return the size of a file."),
        ("os.b", "function", "Return the size of a file."),
        ("tarfile.T.c", "function", "Returns the size of a file"),
        ("str.x", "function", "Return the upper case of it."),
        ("os.c", "function", ""),
    ]
    for order in (entries, entries[::-1]):
        found = [(pair.question, pair.module) for pair in script.pairs(order)]
        assert found == [
            ("What does Python's `str.x` do?", "builtins"),
            ("What does Python's `tarfile.T.c` do?", "tarfile"),
        ]


def test_walking_finds_public_names_only(script: ModuleType) -> None:
    names = [name for name, _, _ in script.objects()]
    assert {"json.dumps", "json", "os.path.join", "str.join", "socket.socket.connect"} <= set(names)
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert not [name for name in names if name.split(".")[0] in script.SKIPPED_MODULES]
