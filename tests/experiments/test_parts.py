"""Three parts of the data: the same for every seed, and no question in two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.errors import ConfigError, DataError
from lorafit.experiments.parts import part


def questions(path):
    return [json.loads(line)["question"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_parts_share_no_question_even_if_data_repeat_some(settings, tmp_path):
    path = tmp_path / "twice.jsonl"
    rows = [{"question": f"what is {n % 40} plus one?", "answer": f"{n % 40 + 1}", "n": n} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = part(settings(data=str(path), eval_split=10), tmp_path / "run")
    train, validation, test = (set(questions(one)) for one in (parts.train, parts.validation, parts.test))
    assert not (train & validation or train & test or validation & test)
    assert (
        parts.test_records == 10
        and parts.validation_records == 10
        and parts.train_records == len(questions(parts.train))
    )
    assert parts.form == "prompt/completion" and not parts.classifies


def test_parts_are_made_once_and_data_may_not_change(settings, sums, tmp_path):
    first = part(settings(), tmp_path)
    assert part(settings(), tmp_path) == first
    changed = tmp_path / "other.jsonl"
    changed.write_text(sums.read_text().replace("it is 3", "it is three"))
    with pytest.raises(ConfigError, match="begun with"):
        part(settings(data=str(changed)), tmp_path)


def test_evaluation_data_are_the_test_part(settings, sums, tmp_path):
    held = tmp_path / "held.jsonl"
    rows = [{"question": f"what is {n} plus one?", "answer": "who knows"} for n in range(5)]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = part(settings(eval_data=str(held), eval_split=None), tmp_path / "run")
    assert parts.test_records == 5 and parts.train_records + parts.validation_records == 75
    assert not set(questions(parts.test)) & set(questions(parts.train) + questions(parts.validation))


@pytest.mark.parametrize(
    ("given", "held"),
    [({"eval_split": 20, "eval_limit": 5}, (5, 5)), ({"eval_split": 0.25}, (20, 15)), ({"eval_split": None}, (8, 7))],
)
def test_the_held_out_parts_are_as_large_as_asked_for(settings, tmp_path, given, held):
    parts = part(settings(**given), tmp_path)
    assert (parts.test_records, parts.validation_records) == held


def test_only_a_size_that_nobody_asked_for_is_cut(settings, tmp_path):
    path = tmp_path / "many.jsonl"
    rows = [{"question": f"what is {n} plus one?", "answer": f"{n + 1}"} for n in range(3000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unasked = part(settings(data=str(path), eval_split=None), tmp_path / "unasked")
    assert (unasked.test_records, unasked.validation_records) == (200, 100)
    asked = part(settings(data=str(path), eval_split=0.1), tmp_path / "asked")
    assert (asked.test_records, asked.validation_records) == (300, 270)


def test_too_few_records_are_refused(settings, tmp_path):
    with pytest.raises(DataError, match="too few"):
        part(settings(eval_split=79), tmp_path)
    with pytest.raises(ConfigError, match="held-out"):
        part(settings(eval_split=0), tmp_path)
