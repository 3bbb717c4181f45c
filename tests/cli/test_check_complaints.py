"""What people complain about in other tools: `lorafit check` names file, line, field and fix before any weights load.

The model's folder has no weights at all, and what loads weights is forbidden: nothing here could have read any.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

QA = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}"} for n in range(12)]
FILMS = [{"text": f"film {n} is {('bad', 'good')[n % 2]}", "label": ("neg", "pos")[n % 2]} for n in range(12)]
USER, ASSISTANT = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "it is so"}
SYSTEM = {"role": "system", "content": "speak like a pirate"}
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
UNENDED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
UNENDED += "{% if add_generation_prompt %}assistant: {% endif %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
REFUSING += f"{{% for m in messages %}}{TURN}{{% endfor %}}{ASK}"
DEAF = f"{{% for m in messages %}}{{% if m['role'] != 'system' %}}{TURN}{{% endif %}}{{% endfor %}}{ASK}"
STRICT = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
STRICT += "{{ raise_exception('Conversation roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + ASK


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chats(*turns: dict[str, str], column: str = "messages") -> bytes:
    good = {column: [USER, ASSISTANT]}
    return lines(good, {column: [USER, {"role": "assistant", "content": "two"}]}, {column: list(turns)})


@dataclass(frozen=True)
class Complaint:
    """A complaint, and what has to be said: where, about which field, with which fix."""

    files: Mapping[str, bytes]
    where: str
    field: str
    fix: str
    options: str = "data.jsonl --eval-split 0"
    status: int = 1
    template: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    said: str = ""


DATA = {"data.jsonl": lines(*QA)}


def bad(content: bytes, where: str, field: str, fix: str, said: str = "", **more: Any) -> Complaint:
    return Complaint({"data.jsonl": content}, where, field, fix, said=said, **more)


def named(name: str, content: bytes, where: str, field: str, fix: str, said: str = "") -> Complaint:
    return Complaint({name: content}, where, field, fix, f"{name} --eval-split 0", said=said)


def setting(text: str, field: str, fix: str, said: str = "", *, line: int = 2, status: int = 1) -> Complaint:
    run = f"data: data.jsonl\n{text}\n".encode()
    where = f"run.yaml:{line}" if line else "data.jsonl:1"
    return Complaint({**DATA, "run.yaml": run}, where, field, fix, "--config run.yaml", status, said=said)


HELD = "data.jsonl --eval-data held.jsonl"


def held(train: bytes, evaluation: bytes, where: str, field: str, fix: str, said: str = "") -> Complaint:
    return Complaint({"data.jsonl": train, "held.jsonl": evaluation}, where, field, fix, HELD, said=said)


COMPLAINTS = {
    # Settings silently ignored.
    "LF 7577: a key of another tool's description": setting(
        "format: sharegpt", "format", "remove 'format'", "unknown setting", status=2
    ),
    "TRL 1564: a mistyped setting": setting("lerning_rate: 3", "lerning_rate", "write 'learning_rate'", status=2),
    "TRL 3543: a setting that nobody knows": setting("frobnicate: 3", "frobnicate", "remove 'frobnicate'", status=2),
    "sentence-transformers 3842: another algorithm's switch": setting(
        "use_dora: true", "use_dora", "choose the method: --method dora", status=2
    ),
    "a setting of another method": setting("init_r: 9", "init_r", "init_r", "adalora", status=2),
    "one setting twice": setting("lora_r: 4\nrank: 8", "rank", "remove", "twice", line=3, status=2),
    "a setting of the wrong type": setting("learning_rate: fast", "learning_rate", "mend learning_rate", status=2),
    "a method that nobody knows": setting("method: lroa", "method", "lora", "nearest", status=2),
    "a config file that is no YAML": setting("a: [", "", "mend the line", "not YAML", line=3, status=2),
    "early stopping without held-out records": setting(
        "eval_split: 0\nearly_stopping: true", "early_stopping", "set eval_split=0.1", line=3
    ),
    "the best kept without evaluations": setting(
        "eval_strategy: 'no'\nkeep_best: true", "keep_best", "set eval_strategy=epoch or steps", line=3
    ),
    "evaluation without data": setting("eval_split: 0\neval_strategy: epoch", "eval_strategy", "eval_data", line=3),
    "eval_steps that nobody reads": setting("eval_steps: 5", "eval_steps", "set eval_strategy=steps"),
    "more held out than there is": Complaint(
        DATA, "data.jsonl:1", "eval_split", "lower eval_split", "data.jsonl --eval-split 50", said="too few"
    ),
    "a length beyond the model's positions": setting("max_length: 512", "max_length", "--max-length 256"),
    "a rank larger than the layers": setting("eval_split: 2\nr: 64", "r", "a smaller r", "rank 32 at most", line=3),
    "targets that match nothing": setting("targets: [q_porj]", "targets", "write 'q_proj'", "matches no module"),
    "a rank pattern that matches nothing": setting("rank_pattern: {q_porj: 2}", "rank_pattern", "q_proj"),
    "a column of groups that is not there": setting(
        "eval_split: 0.2\ngroup: page", "'page'", "name a column that all records have", line=0
    ),
    # Data errors late and cryptic.
    "LF 40: KeyError, the columns have other names": bad(
        lines({"q": "what?", "a": "so"}), "data.jsonl:1", "'q', 'a'", 'columns={"prompt": "...", "completion": "..."}'
    ),
    "LF 2536: KeyError, a mapped column is not there": Complaint(
        DATA, "data.jsonl:1", "'qestion'", "name a column that is there", "data.jsonl --columns prompt=qestion"
    ),
    "LF 2995: KeyError, a column is missing further down": bad(
        lines(*QA, {"question": "why?"}), "data.jsonl:13", "'answer'", "write all records with the same columns"
    ),
    "LF 3018: KeyError, a turn without its key": bad(
        chats(USER, {"from": "gpt", "value": "x"}), "data.jsonl:3, messages, turn 2", "messages", "all turns"
    ),
    "LF 6924: the description of the data instead of the data": named(
        "dataset_info.json", b'{"mine": {"file_name": "x.json"}}', "dataset_info.json", "'mine'", "list of objects"
    ),
    "two forms in one set of columns": bad(
        lines({"prompt": "a", "response": "b", "answer": "c"}), "data.jsonl:1", "response", "say which"
    ),
    "a line that is no JSON": bad(
        lines(*QA) + b"{'question': 'a'}\n", "data.jsonl:13", "'question'", "double quotes", "not JSON"
    ),
    "a line with a comma after it": bad(b'{"question": "a", "answer": "b"},\n', "data.jsonl:1", '"b"', "comma off"),
    "one key twice": bad(b'{"question": "a", "question": "b"}\n', "data.jsonl:1", "'question'", "keep each key once"),
    "a list where records should be": bad(lines([1, 2]), "data.jsonl:1", "a list", "name the values"),
    "CSV with semicolons": named("d.csv", b"question;answer\na;b\n", "d.csv:1", "question;answer", "semicolons"),
    "CSV with bars": named("d.csv", b"question|answer\na|b\n", "d.csv:1", "question|answer", "semicolons or bars anew"),
    "CSV with ragged rows": named(
        "d.csv", b"question,answer\na,b\nc,d,e\n", "d.csv:3", "question, answer", "in double quotes"
    ),
    "CSV with a lone quote": named("d.csv", b'question,answer\na,"b\n', "d.csv:2", "quote", "with a CSV library"),
    "CSV with a header alone": named("d.csv", b"question,answer\n", "d.csv:1", "question, answer", "add rows"),
    "CSV with an index": named("d.csv", b",question,answer\n0,a,b\n", "d.csv:1", ",question", "index=False"),
    "Parquet that cannot be read": named("d.parquet", b"PAR1 broken", "d.parquet", "Parquet", "write it again"),
    "Parquet under another name": bad(b"PAR1\0\xff\xfe", "data.jsonl", "Parquet", "name it .parquet"),
    "text that is not UTF-8": bad(
        b'{"question": "caf\xe9", "answer": "b"}\n', "data.jsonl:1", "0xe9", "iconv -f WINDOWS-1252"
    ),
    "a number for an answer": bad(
        lines(*QA, {"question": "a", "answer": 5}), "data.jsonl:13", "answer", "in quotes", "field:  answer"
    ),
    "a list for an answer": bad(lines(*QA, {"question": "a", "answer": ["b"]}), "data.jsonl:13", "answer", "in quotes"),
    "null for an answer": bad(
        lines(*QA, {"question": "a", "answer": None}), "data.jsonl:13", "field:  answer", "leave the record out"
    ),
    "empty answers": bad(
        lines(*QA, *[{"question": f"a{n}", "answer": " "} for n in range(7)]),
        "data.jsonl:13, data.jsonl:14, data.jsonl:15, data.jsonl:16, data.jsonl:17 and 2 more",
        "field:  answer",
        "fill it in",
        "7 × The value of 'answer' is empty.",
    ),
    "a conversation that the assistant begins": bad(
        chats(ASSISTANT, USER, ASSISTANT), "data.jsonl:3, messages", "field:  messages", "put the user's turn in front"
    ),
    "a conversation without an answer": bad(
        chats(USER, ASSISTANT, USER), "data.jsonl:3, messages", "field:  messages", "take the last turn off"
    ),
    "a role that nobody knows": bad(
        chats(USER, {"role": "asistant", "content": "x"}), "data.jsonl:3, messages, turn 2", "'asistant'", "rename"
    ),
    "conversations as text": bad(lines({"messages": "[{'role': 'user'}]"}), "data.jsonl:1", "'messages'", "JSON Lines"),
    "an empty file": bad(b"", "data.jsonl", "0 bytes", "name another file"),
    "an empty list": named("d.json", b"[]", "d.json", "no records", "name data that are not empty"),
    "a file that is not there": Complaint(
        DATA, "dta.jsonl", "no such file", "did you mean data.jsonl?", "dta.jsonl", said="nearest:  data.jsonl"
    ),
    "a format that nobody knows": named("d.docx", b"x", "d.docx", "'.docx'", "convert it to JSON Lines"),
    "a split that is not there": Complaint(
        {"set/train.jsonl": lines(*QA), "set/test.jsonl": lines(*QA)},
        "set",
        "train.jsonl",
        "name the file itself",
        "set --data-split validatoin",
        said="nearest:  ",
    ),
    "a split of a file": Complaint(
        DATA, "data.jsonl", "'test'", "leave the split away", "data.jsonl --data-split test"
    ),
    "held-out data of other columns": held(
        lines(*QA), lines({"question": "a", "reply": "b"}), "held.jsonl:1", "'reply'", "columns="
    ),
    "nothing but held-out questions": held(
        lines(*QA), lines(*QA), "data.jsonl:1", "questions", "other evaluation data"
    ),
    # Silent: the loss of nothing, and no end.
    "TRL 6668: all labels masked": bad(
        lines(*QA), "data.jsonl:1", "max_length=6", "raise max_length", options="data.jsonl --max-length 6"
    ),
    "Unsloth 1128: one record without a learnt token": bad(
        lines(*QA, {"question": "why " * 90, "answer": "so"}),
        "data.jsonl:13",
        "field:  answer",
        "shorten the prompts",
        "the answer is cut away entirely",
        options="data.jsonl --max-length 100 --eval-split 0",
    ),
    # Templates.
    "Axolotl's FAQ: no end is learnt": bad(
        lines(*QA), "data.jsonl:1", "field:  chat_template", "ends a turn with a token", template=UNENDED
    ),
    "a template without a system role": bad(
        chats(SYSTEM, USER, ASSISTANT), "data.jsonl:3", "field:  messages", "no system text", template=REFUSING
    ),
    "a template that leaves the system text out": bad(
        chats(SYSTEM, USER, ASSISTANT), "data.jsonl:3", "field:  messages", "into the user's turn", template=DEAF
    ),
    "roles out of order": bad(
        chats(USER, USER, ASSISTANT), "data.jsonl:3", "field:  messages", "user and assistant in turn", template=STRICT
    ),
    "neither template nor end": bad(
        lines(*QA), "", "eos_token=None", "set tokenizer.eos_token", template="", model={"eos_token": None}
    ),
    "LF 2509: conversations, and a base model without a template": bad(
        chats(SYSTEM, USER, ASSISTANT), "data.jsonl:3", "field:  messages", "-Instruct or -it", template=""
    ),
    "a tokenizer of another model": bad(
        lines(*QA), "data.jsonl:1", "field:  model", "belongs to the model", model={"vocab_size": 40}
    ),
    "a folder without a model": Complaint(DATA, "model: .", "config.json", "save_pretrained", "data.jsonl --model ."),
    "a model that is not there": Complaint(
        DATA, "model", "./lama", "mend the path", "data.jsonl --model ./lama", said="no such model"
    ),
    # What a run measures beside its data.
    "a target that is not there": Complaint(
        DATA,
        "away.jsonl",
        "watched",
        "did you mean",
        "data.jsonl --set target=away.jsonl",
        said="There is no such file",
    ),
    "a general text that is learnt from": Complaint(
        DATA,
        "data.jsonl:1",
        "watched",
        "name another file",
        "data.jsonl --eval-split 0 --set general=data.jsonl",
        said="all general records are among the training records",
    ),
    # Labels.
    "one class alone": bad(
        lines(*[{"text": f"a {n}", "label": "x"} for n in range(9)]), "data.jsonl:1", "label 'x'", "column of labels"
    ),
    "a label that is missing": bad(
        lines(*FILMS, {"text": "a", "label": None}), "data.jsonl:13", "field:  label", "label the record"
    ),
    "a label with a fraction": bad(
        lines(*FILMS, {"text": "a", "label": 0.5}), "data.jsonl:13", "found:    0.5", "name the classes"
    ),
    "labels of two kinds": bad(
        lines(*FILMS, {"text": "a", "label": 3}), "data.jsonl:13", "'pos' and 3", "write all labels alike"
    ),
    "a held-out label that training lacks": held(
        lines(*FILMS),
        lines({"text": "a new one", "label": "mixed"}),
        "held.jsonl:1",
        "field:  label",
        "correct the label",
    ),
    "one class in two spellings": bad(
        lines(*FILMS, {"text": "a", "label": "Pos"}), "data.jsonl:13", "field:  label", "write all of them 'pos'"
    ),
    "a label with a space": bad(
        lines(*FILMS, {"text": "a", "label": "pos "}), "data.jsonl:13", "field:  label", "strip"
    ),
    "a classifier without labels": Complaint(
        DATA,
        "data.jsonl:1",
        "question → answer",
        'columns={"text": "...", "label": "..."}',
        "data.jsonl --eval-split 0 --task sequence-classification",
    ),
}


@pytest.fixture(scope="module")
def bare(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads weights fails, and says that it was called."""
    import safetensors
    import safetensors.torch
    import torch
    from transformers import PreTrainedModel

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)
    for owner, name in ((safetensors, "safe_open"), (safetensors.torch, "load_file"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    monkeypatch.setattr("lorafit.training.models.load_causal", forbidden)
    monkeypatch.setattr("lorafit.training.models.load_classifier", forbidden)


def changed(bare: Path, folder: Path, complaint: Complaint) -> Path:
    """The model of a complaint: with another template, or other words in its configs."""
    if complaint.template is None and not complaint.model:
        return bare
    shutil.copytree(bare, folder)
    if complaint.template is not None:
        (folder / "chat_template.jinja").unlink()
        if complaint.template:
            (folder / "chat_template.jinja").write_text(complaint.template)
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**known, **{k: v for k, v in complaint.model.items() if k in known}}))
    return folder


@pytest.mark.parametrize("complaint", COMPLAINTS.values(), ids=COMPLAINTS)
def test_it_is_named_with_file_line_field_and_fix(
    lorafit: Callable[..., Any], tmp_path: Path, bare: Path, complaint: Complaint
) -> None:
    for name, content in complaint.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    model = changed(bare, tmp_path / "changed", complaint)
    chosen = () if "--model" in complaint.options else ("--model", model)
    result = lorafit("check", *complaint.options.split(), *chosen, "--samples", "0")
    text = result.out + result.err
    assert result.status == complaint.status, text
    assert "Traceback" not in text and "bug or an unexpected" not in text, text
    for word in (complaint.where, complaint.field, complaint.said):
        assert word in text, (word, text)
    last = text[text.index("what to fix:") :] if "what to fix:" in text else text[text.rindex("  fix:") :]
    assert complaint.fix in last or complaint.fix in result.err, (complaint.fix, text)
    assert text.rstrip().splitlines()[-1] in last, "the last lines say what to fix"


def test_a_hub_name_without_a_network(lorafit: Callable[..., Any], bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    result = lorafit("check", "someone/something", "--model", bare)
    assert result.status == 1
    for word in ("someone/something[train]", "ConnectionError: Couldn't reach", "fix:", "check the spelling and the"):
        assert word in result.err, result.err


@pytest.mark.parametrize("name", ["a number for an answer", "an empty file"])
def test_programs_read_the_same(lorafit: Callable[..., Any], tmp_path: Path, bare: Path, name: str) -> None:
    complaint = COMPLAINTS[name]
    (tmp_path / "data.jsonl").write_bytes(complaint.files["data.jsonl"])
    result = lorafit("check", "data.jsonl", "--eval-split", "0", "--model", bare, "--json")
    assert result.status == 1 and result.json["ok"] is False
    first = result.json["findings"][0]
    assert first["level"] == "error" and complaint.where in first["at"][0] and complaint.fix in first["fix"]


def test_nothing_is_wrong_with_good_data(lorafit: Callable[..., Any], tmp_path: Path, bare: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(lines(*QA))
    result = lorafit("check", "data.jsonl", "--model", bare)
    assert result.status == 0 and not result.err and "findings" not in result.out
    assert result.out.splitlines()[-1] == "ok: 11 records to learn from"
