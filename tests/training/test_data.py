"""From a name to what training takes: splits, leaks, counts and what is said of them."""

from __future__ import annotations

import json

import pytest

from lorafit.errors import ConfigError, DataError
from lorafit.training.data import DataSettings, load_data, load_examples, load_labelled_data
from lorafit.training.encode import IGNORED

ROWS = [{"question": f"question {i}", "answer": f"answer {i}"} for i in range(40)]
FILMS = [{"text": f"very {word} film", "label": word} for word in ("good", "bad", "good", "good")]


def wheres(examples):
    return [example.where.rpartition("/")[2] for example in examples]


def test_data_for_a_causal_model(write, tokenizer):
    data = load_data(DataSettings(write("data.jsonl", ROWS), eval_split=0.1), tokenizer, max_length=200)
    assert (len(data.train), len(data.eval)) == (36, 4)
    assert not set(wheres(data.train)) & set(wheres(data.eval))
    assert data.announcements == (
        "data.jsonl: JSON Lines, 40 records in prompt/completion form (question → answer)",
        "4 of 40 held out by seed 0",
        "written by the tokenizer's chat template",
    )
    everything = data.train + data.eval
    assert data.info == {
        "source": "data.jsonl",
        "format": "JSON Lines",
        "form": "prompt/completion (question → answer)",
        "columns_not_used": [],
        "split": "4 of 40 held out by seed 0",
        "repeated": 0,
        "removed": 0,
        "removed_at": [],
        "encoding": "the tokenizer's chat template",
        "unrolled": 0,
        "truncated": 0,
        "truncated_at": [],
        "dropped": 0,
        "dropped_at": [],
        "train_records": 36,
        "eval_records": 4,
        "train_tokens": sum(len(one.input_ids) for one in data.train),
        "train_supervised_tokens": sum(len(one.labels) - one.labels.count(IGNORED) for one in data.train),
        "eval_supervised_tokens": sum(len(one.labels) - one.labels.count(IGNORED) for one in data.eval),
        "longest": max(len(one) for one in everything),
        "longest_uncut": max(len(one) for one in everything),
        "max_length": 200,
    }
    json.dumps(data.info)
    held = {one.where for one in data.eval}
    assert len(data.samples) == 3 and {sample.where for sample in data.samples} < held
    assert data.samples[0].gold.startswith("answer")


def test_the_split_is_reproducible_and_hardly_moved_by_new_records(write):
    def held(rows, seed=0):
        examples = load_examples(DataSettings(write("data.jsonl", rows), eval_split=8, seed=seed)).eval
        return {example.question() for example in examples}

    first = held(ROWS)
    assert len(first) == 8
    assert held(ROWS) == held(ROWS[::-1]) == first
    assert held(ROWS, seed=1) != first
    more = held([*ROWS, *({"question": f"new {i}", "answer": "a"} for i in range(4))])
    assert len(more & first) >= 5
    # Known values: the split must be the same on every machine and in every version.
    assert sorted(question[0][1] for question in first)[:3] == ["question 10", "question 12", "question 13"]


@pytest.mark.parametrize("amount", [0.0, 1.0, 1.5, -1, 0, True, "0.1"])
def test_split_that_is_neither_share_nor_number(write, amount):
    with pytest.raises(ConfigError, match="neither a share nor a number"):
        load_examples(DataSettings(write("data.jsonl", ROWS), eval_split=amount))


def test_split_of_too_few(write):
    with pytest.raises(DataError, match="too few to hold that many out"):
        load_examples(DataSettings(write("data.jsonl", ROWS), eval_split=40))


def test_groups_are_not_split(write):
    rows = [{**row, "page": f"page {place // 5}"} for place, row in enumerate(ROWS)]
    path = write("data.jsonl", rows)
    loaded = load_examples(DataSettings(path, eval_split=0.2, group="page"))
    lines = {int(where.rpartition(":")[2]) - 1 for where in wheres(loaded.eval)}
    pages = {rows[line]["page"] for line in lines}
    assert len(lines) == 10 and len(pages) == 2
    assert lines == {place for place, row in enumerate(rows) if row["page"] in pages}
    assert loaded.announcements[-1] == "10 of 40 held out by seed 0, groups of 'page' kept whole"
    assert loaded.info["columns_not_used"] == []
    with pytest.raises(DataError, match="not there") as caught:
        load_examples(DataSettings(path, eval_split=0.2, group="pages"))
    assert caught.value.near == ("page",)
    with pytest.raises(DataError, match="is empty") as caught:
        load_examples(DataSettings(write("e.jsonl", [rows[0], {**rows[1], "page": ""}]), eval_split=1, group="page"))
    assert wheres([caught.value]) == ["e.jsonl:2"]
    with pytest.raises(DataError, match="groups are too few"):
        load_examples(DataSettings(write("one.jsonl", rows[:5]), eval_split=0.2, group="page"))


def test_held_out_questions_are_removed_from_training(write):
    train = [*ROWS, {"question": "question 3", "answer": "another answer"}]
    settings = DataSettings(write("train.jsonl", train), eval_data=write("test.jsonl", ROWS[3:5]))
    loaded = load_examples(settings)
    assert len(loaded.train) == 38 and len(loaded.eval) == 2
    assert loaded.info["removed"] == 3
    assert [where.rpartition("/")[2] for where in loaded.info["removed_at"]] == [
        "train.jsonl:4",
        "train.jsonl:5",
        "train.jsonl:41",
    ]
    assert loaded.announcements[-1].startswith("3 records removed from training: ")
    assert loaded.info["split"] == "evaluation data: test.jsonl"


def test_repeated_questions_are_counted_and_not_split_apart(write):
    rows = ROWS[:10] * 2
    loaded = load_examples(DataSettings(write("data.jsonl", rows), eval_split=4))
    assert not {one.question() for one in loaded.train} & {one.question() for one in loaded.eval}
    assert loaded.info["repeated"] == 8
    assert loaded.info["removed"] == 0


def test_the_same_data_for_both(write):
    settings = DataSettings(write("data.jsonl", ROWS), eval_data=write("copy.jsonl", ROWS))
    with pytest.raises(DataError, match="also held out") as caught:
        load_examples(settings)
    assert "eval_split" in caught.value.fix


def test_directory_with_splits_serves_both(write, tmp_path):
    write("set/train.jsonl", ROWS[:30])
    write("set/valid.jsonl", ROWS[30:])
    loaded = load_examples(DataSettings(str(tmp_path / "set"), eval_data=str(tmp_path / "set")))
    assert (len(loaded.train), len(loaded.eval)) == (30, 10)


def test_settings_that_exclude_each_other():
    with pytest.raises(ConfigError, match="Both eval_data and eval_split"):
        DataSettings("a", eval_data="b", eval_split=0.1)
    with pytest.raises(ConfigError, match="there is no split"):
        DataSettings("a", group="page")


def test_cut_and_dropped_records_are_counted_and_named(write, tokenizer):
    rows = [*ROWS[:3], {"question": "q", "answer": "a" * 99}, {"question": "q" * 99, "answer": "a"}]
    data = load_data(DataSettings(write("data.jsonl", rows)), tokenizer, max_length=80)
    assert (data.info["truncated"], data.info["dropped"], data.info["train_records"]) == (1, 1, 4)
    assert data.info["longest"] == 80 and data.info["longest_uncut"] > 100
    assert [where.rpartition("/")[2] for where in data.info["truncated_at"]] == ["data.jsonl:4"]
    assert [where.rpartition("/")[2] for where in data.info["dropped_at"]] == ["data.jsonl:5"]
    assert "1 record cut to max_length=80 on the right" in data.announcements[-2]
    assert "1 record dropped: no answer left within max_length=80" in data.announcements[-1]
    assert data.info["split"] == "none" and data.eval == []
    assert all(sample.where != rows[4] for sample in data.samples) and len(data.samples) == 3


def test_nothing_to_learn(write, tokenizer):
    settings = DataSettings(write("data.jsonl", [{"prompt": "q" * 99, "completion": "a"}] * 3))
    with pytest.raises(DataError, match="not one token of the data is supervised") as caught:
        load_data(settings, tokenizer, max_length=80)
    assert caught.value.fix.startswith("raise max_length (the longest record has ")
    held = write("eval.jsonl", [{"prompt": "p" * 99, "completion": "a"}])
    with pytest.raises(DataError, match=r"eval\.jsonl:1"):
        load_data(DataSettings(write("d.jsonl", ROWS), eval_data=held), tokenizer, max_length=80)


def test_unrolled_conversations_are_told(write, make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ '!' if loop.last and loop.index > 1 }}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(4)]
    loaded = load_examples(DataSettings(write("data.jsonl", [{"messages": turns}])))
    assert len(loaded.train) == 1
    tokenizer = make_tokenizer(template.replace("loop.index > 1", "m['role'] == 'assistant'"))
    data = load_data(DataSettings(write("data.jsonl", [{"messages": turns}])), tokenizer, max_length=200)
    assert (data.info["unrolled"], data.info["train_records"]) == (1, 2)
    assert any("one sequence for each answer" in said for said in data.announcements)


def test_columns_and_samples(write, tokenizer):
    path = write("data.csv", "q,a,n\nwhy,so,1\nhow,thus,2\n")
    settings = DataSettings(path, columns={"prompt": "q", "completion": "a"})
    data = load_data(settings, tokenizer, max_length=99, samples=9)
    assert [(sample.prompt, sample.gold) for sample in data.samples] == [("why", "so"), ("how", "thus")]
    assert data.info["columns_not_used"] == ["n"]
    assert load_data(settings, tokenizer, max_length=99, samples=0).samples == []


def test_documents(write, tokenizer):
    data = load_data(DataSettings(write("book.txt", "One.\n\nTwo two.\n")), tokenizer, max_length=99)
    assert [tokenizer.decode(one.input_ids) for one in data.train] == ["One.<|im_end|>", "Two two.<|im_end|>"]
    assert data.announcements[0] == (
        "book.txt: text (paragraphs between blank lines), 2 records in text form (text, every token is learnt)"
    )


def test_labelled_data(write, encoder_tokenizer):
    settings = DataSettings(
        write("train.jsonl", FILMS), eval_data=write("test.jsonl", [{"text": "it is bad", "label": "bad"}])
    )
    data = load_labelled_data(settings, encoder_tokenizer, max_length=8)
    assert data.labels == ("bad", "good")
    assert [one.label for one in data.train] == [1, 0, 1, 1]
    assert [one.input_ids for one in data.eval] == [[2, 8, 9, 5, 3]]
    assert data.announcements[-1] == "2 classes, with their training records: bad (1), good (3)"
    assert data.info["labels"] == ["bad", "good"] and data.info["label_counts"] == [1, 3]
    assert (data.info["train_supervised_tokens"], data.info["eval_supervised_tokens"]) == (4, 1)
    assert data.info["repeated"] == 2
    json.dumps(data.info)


def test_labels_given_in_an_order(write, encoder_tokenizer):
    settings = DataSettings(write("train.jsonl", FILMS))
    data = load_labelled_data(settings, encoder_tokenizer, max_length=8, labels=("good", "bad"))
    assert [one.label for one in data.train] == [0, 1, 0, 0]
    with pytest.raises(DataError, match="not one of the classes"):
        load_labelled_data(settings, encoder_tokenizer, max_length=8, labels=("good", "poor"))


def test_one_class_to_train_on(write, encoder_tokenizer):
    settings = DataSettings(write("train.jsonl", FILMS[2:]), eval_data=write("test.jsonl", FILMS[1:2]))
    with pytest.raises(DataError, match="one class alone"):
        load_labelled_data(settings, encoder_tokenizer, max_length=8)


def test_data_of_the_other_task(write, tokenizer):
    with pytest.raises(DataError, match="have no labels") as caught:
        load_labelled_data(DataSettings(write("data.jsonl", ROWS)), tokenizer, max_length=9)
    assert caught.value.found == "prompt/completion form (question → answer)"
    with pytest.raises(DataError, match="for classification"):
        load_data(DataSettings(write("films.jsonl", FILMS)), tokenizer, max_length=9)
