"""Which form records have, what is said of it, and what each record means."""

from __future__ import annotations

import pytest

from lorafit.errors import DataError
from lorafit.training.examples import Conversation, Document, Labelled, Turn
from lorafit.training.forms import SHAPES, announcement, examples, label_names, recognise
from lorafit.training.sources import Record, Source

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def source_of(*rows, note="") -> Source:
    records = [Record(row, f"data.jsonl:{line}") for line, row in enumerate(rows, start=1)]
    return Source(records, "JSON Lines", "data.jsonl", note)


def read(*rows, columns=None):
    source = source_of(*rows)
    return examples(source, recognise(source, columns))


def refused(*rows, columns=None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(*rows, columns=columns)
    assert caught.value.fix, "every error names a fix"
    return caught.value


def chat(*turns, where="data.jsonl:1"):
    return Conversation(tuple(Turn(role, content) for role, content in turns), where)


PAIR = chat(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "meaning", "form"),
    [
        ({"prompt": "q", "completion": "a"}, PAIR, "prompt/completion (prompt → completion)"),
        ({"question": "q", "answer": "a"}, PAIR, "prompt/completion (question → answer)"),
        ({"prompt": "q", "response": "a"}, PAIR, "prompt/completion (prompt → response)"),
        ({"input": "q", "output": "a"}, PAIR, "prompt/completion (input → output)"),
        (
            {"system": "s", "prompt": "q", "completion": "a"},
            chat(("system", "s"), ("user", "q"), ("assistant", "a")),
            "prompt/completion (system + prompt → completion)",
        ),
        ({"instruction": "q", "output": "a"}, PAIR, "alpaca (instruction → output)"),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            chat(("user", "q\n\ni"), ("assistant", "a")),
            "alpaca (instruction + input → output)",
        ),
        (
            {"instruction": "q", "input": "", "output": "a", "text": "q a"},
            PAIR,
            "alpaca (instruction + input → output)",
        ),
        (
            {"instruction": "q", "context": None, "response": "a"},
            PAIR,
            "alpaca (instruction + context → response)",
        ),
        ({"messages": TURNS}, PAIR, "chat (messages: messages of role and content)"),
        ({"conversations": TURNS}, PAIR, "chat (messages: conversations of role and content)"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "user", "value": "r", "id": 3},
                    {"from": "model", "value": "b"},
                ]
            },
            chat(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")),
            "chat (ShareGPT: conversations of from and value)",
        ),
        (
            {"system": "s", "messages": TURNS},
            chat(("system", "s"), ("user", "q"), ("assistant", "a")),
            "chat (system + messages: messages of role and content)",
        ),
        ({"text": "t"}, Document("t", "data.jsonl:1"), "text (text, every token is learnt)"),
        ({"content": "t"}, Document("t", "data.jsonl:1"), "text (content, every token is learnt)"),
        (
            {"text": "t", "label": "x"},
            Labelled("t", None, "x", "data.jsonl:1"),
            "text/label (text → label)",
        ),
        (
            {"text": "t", "pair": "p", "label": "x"},
            Labelled("t", "p", "x", "data.jsonl:1"),
            "text/label (text + pair → label)",
        ),
        (
            {"premise": "t", "hypothesis": "p", "label": 0},
            Labelled("t", "p", 0, "data.jsonl:1"),
            "text/label (premise + hypothesis → label)",
        ),
        (
            {"sentence1": "t", "sentence2": "p", "label": True},
            Labelled("t", "p", True, "data.jsonl:1"),
            "text/label (sentence1 + sentence2 → label)",
        ),
        (
            {"sentence": "t", "label": 1},
            Labelled("t", None, 1, "data.jsonl:1"),
            "text/label (sentence → label)",
        ),
    ],
)
def test_recognised(row, meaning, form):
    source = source_of(row)
    found = recognise(source)
    assert f"{found.name} ({found.describe()})" == form
    assert examples(source, found) == [meaning]


def test_every_row_of_the_table_is_recognised_as_itself():
    for kind in SHAPES:
        for shape in kind:
            row = dict.fromkeys(shape.required.values(), "x")
            form = recognise(source_of(row))
            assert dict(form.columns) == dict(shape.required), shape


def test_announcement():
    rows = [{"question": "q", "answer": "a", "id": i} for i in range(2597)]
    source = source_of(*rows)
    assert announcement(source, recognise(source)) == (
        "data.jsonl: JSON Lines, 2,597 records in prompt/completion form (question → answer); columns not used: id"
    )
    source = source_of({"text": "t"}, note="left out of the directory: x.py")
    assert announcement(source, recognise(source)) == (
        "data.jsonl: JSON Lines, 1 record in text form (text, every token is learnt); left out of the directory: x.py"
    )


def test_an_optional_column_may_come_late():
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "i", "output": "a"}]
    assert [example.turns[0].content for example in read(*rows)] == ["q", "q\n\ni"]


def test_not_recognised():
    error = refused({"Prompt": "q", "completions": "a"})
    assert error.where == "data.jsonl:1"
    assert error.found == "the columns 'Prompt', 'completions'"
    assert error.near == ("'Prompt' ~ 'prompt'", "'completions' ~ 'completion'")
    assert "prompt, completion" in error.expected
    assert "columns=" in error.fix


def test_two_readings():
    error = refused({"prompt": "q", "completion": "a", "response": "b"})
    assert error.expected == "one of prompt + completion | prompt + response"
    assert "columns={'prompt': 'prompt', 'completion': 'completion'}" in error.fix


def test_mixed_schemas_name_both_lines_and_their_keys():
    error = refused({"prompt": "q", "completion": "a"}, {"question": "q", "answer": "a"})
    assert error.where == "data.jsonl:2"
    assert error.found == "no 'prompt', 'completion' in the columns 'question', 'answer'"
    assert error.expected == "the columns of data.jsonl:1: 'prompt', 'completion'"


def test_missing_column_names_the_nearest():
    error = refused({"prompt": "q", "completion": "a"}, {"prompt": "q", "completoin": "a"})
    assert error.near == ("completoin",)


@pytest.mark.parametrize(
    ("columns", "row", "meaning"),
    [
        ({"prompt": "q1", "completion": "a1"}, {"q1": "q", "a1": "a", "prompt": "no"}, PAIR),
        ({"completion": "chosen"}, {"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        (
            {"instruction": "x", "input": "y", "output": "z"},
            {"x": "q", "y": "i", "z": "a"},
            chat(("user", "q\n\ni"), ("assistant", "a")),
        ),
        ({"instruction": "x", "output": "z"}, {"x": "q", "input": "i", "z": "a"}, PAIR),
        ({"messages": "dialogue"}, {"dialogue": TURNS}, PAIR),
        ({"messages": "d", "system": "s"}, {"d": TURNS, "s": None}, PAIR),
        ({"text": "body"}, {"body": "t", "label": "x"}, Document("t", "data.jsonl:1")),
        ({"label": "stars"}, {"text": "t", "stars": 5}, Labelled("t", None, 5, "data.jsonl:1")),
        (
            {"text": "a", "pair": "b", "label": "c"},
            {"a": "t", "b": "p", "c": "x"},
            Labelled("t", "p", "x", "data.jsonl:1"),
        ),
    ],
)
def test_mapped_columns(columns, row, meaning):
    assert read(row, columns=columns) == [meaning]


def test_mapping_errors_name_the_nearest():
    error = refused({"question": "q", "answer": "a"}, columns={"prompt": "questoin", "completion": "answer"})
    assert (error.found, error.near) == ("the columns 'question', 'answer'", ("question",))
    error = refused({"q": "q", "a": "a"}, columns={"promt": "q", "completion": "a"})
    assert (error.found, error.near) == ("'promt'", ("prompt",))
    error = refused({"q": "q", "a": "a"}, columns={"prompt": "q"})
    assert error.message == "The mapping of columns makes no form."
    assert error.expected == "prompt + completion"
    error = refused({"q": "q", "a": "a"}, columns={"prompt": "q", "label": "a"})
    assert "text + label" in error.expected


@pytest.mark.parametrize(
    ("value", "found", "expected"),
    [
        (42, "int 42", "a string"),
        (None, "NoneType None", "a string"),
        (["a"], "list ['a']", "a string"),
        ("", "''", "at least one word"),
        (" \n", "' \\n'", "at least one word"),
        ("a\ud83d", "the lone surrogate '\\ud83d' at character 1", "whole Unicode characters"),
    ],
)
def test_values_that_are_no_text(value, found, expected):
    for row in ({"prompt": "q", "completion": value}, {"prompt": value, "completion": "a"}):
        error = refused({"prompt": "q", "completion": "a"}, row)
        assert (error.where, error.found, error.expected) == ("data.jsonl:2", found, expected)
    turns = [TURNS[0], {"role": "assistant", "content": value}]
    error = refused({"messages": turns})
    assert (error.where, error.found) == ("data.jsonl:1, messages, turn 2", found)


def test_all_places_of_one_mistake_are_told():
    rows = [{"prompt": "q", "completion": "" if i % 2 else "a"} for i in range(12)]
    error = refused(*rows)
    assert error.message == "The value of 'completion' is empty."
    assert error.where == ("data.jsonl:2 (and 5 more like it: data.jsonl:4, data.jsonl:6, data.jsonl:8 and 2 more)")


@pytest.mark.parametrize(
    ("turns", "message", "found"),
    [
        ("[]", "The value of 'messages' is of the wrong kind.", "str '[]'"),
        ([], "The value of 'messages' is of the wrong kind.", "list []"),
        (["hi"], "The turn is not of this chat's form.", "str 'hi'"),
        ([{"role": "user", "text": "q"}], "The turn is not of this chat's form.", "the keys 'role', 'text'"),
        ([{"role": "tool", "content": "q"}], "The role of the turn is unknown.", "str 'tool'"),
        ([{"role": "asistant", "content": "q"}], "The role of the turn is unknown.", "str 'asistant'"),
        (
            TURNS[:1],
            "The last turn is not the assistant's, so there is no answer to learn.",
            "user",
        ),
        (
            TURNS[1:],
            "The assistant speaks first, so there is no question to its answer.",
            "assistant",
        ),
        (
            [TURNS[0], {**TURNS[1], "weight": 0}],
            "The turn has a key that is not supported.",
            "'weight': int 0",
        ),
        (
            [TURNS[0], {**TURNS[1], "tool_calls": [1]}],
            "The turn has a key that is not supported.",
            "'tool_calls': list [1]",
        ),
    ],
)
def test_broken_chats(turns, message, found):
    error = refused({"messages": turns})
    assert (error.message, error.found) == (message, found)


def test_unknown_role_names_the_nearest():
    assert refused({"messages": [{"role": "asistant", "content": "q"}]}).near == ("assistant",)


def test_absent_tool_calls_are_no_tool_calls():
    assert read({"messages": [TURNS[0], {**TURNS[1], "tool_calls": None}]}) == [PAIR]


@pytest.mark.parametrize(("label", "found"), [(None, "NoneType None"), ("", "str ''"), (float("inf"), "float inf")])
def test_labels_that_are_none(label, found):
    error = refused({"text": "t", "label": label})
    assert (error.found, error.expected) == (found, "a class (a name or an integer) or a number")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("false", "true")),
    ],
)
def test_label_names(labels, names):
    assert label_names(read(*({"text": "t", "label": label} for label in labels))) == names


def test_label_names_of_two_kinds_or_one_class():
    with pytest.raises(DataError) as caught:
        label_names(read({"text": "t", "label": "a"}, {"text": "t", "label": 1}))
    assert caught.value.where == "data.jsonl:1 and data.jsonl:2"
    assert caught.value.found == "'a' and 1"
    with pytest.raises(DataError, match="one class alone"):
        label_names(read({"text": "t", "label": "a"}))
