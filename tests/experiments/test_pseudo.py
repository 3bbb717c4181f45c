"""Pseudo-labels: what is read, how sure the model is, what is chosen, and whether it helped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.errors import ConfigError, DataError, LorafitError
from lorafit.experiments.pseudo import Wanted, few_labels
from lorafit.experiments.pseudo_calibration import calibrate
from lorafit.experiments.pseudo_choosing import choose, warnings_of
from lorafit.experiments.pseudo_guessing import Closed, Guess, Open
from lorafit.experiments.pseudo_reading import read_unlabelled
from lorafit.experiments.pseudo_verdict import Measure, difference, verdict
from lorafit.experiments.runner import Runner
from lorafit.experiments.trial import run_trial
from lorafit.report.few_labels_page import document
from lorafit.training.choices import Scored
from lorafit.training.config import resolve
from lorafit.training.examples import Labelled
from lorafit.training.forms import recognise
from lorafit.training.sources import read_records

WORDS = {"positive": ["good", "fine", "great"], "negative": ["bad", "poor", "awful"]}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def films(count: int, start: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(start)
    rows = []
    for n in range(start, start + count):
        label = ["positive", "negative"][n % 2]
        rows.append({"text": " ".join([*chance.choices(WORDS[label], k=3), "film", f"n{n}"]), "label": label})
    return rows


# Confidences --------------------------------------------------------------------------------------------------------


def sampled(count: int, sharpened: float) -> tuple[torch.Tensor, list[int]]:
    """Scores of which the softmax is true, and then multiplied."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 3, generator=generator, dtype=torch.float64) * 2
    gold = torch.multinomial(values.softmax(-1), 1, generator=generator)[:, 0]
    return values * sharpened, gold.tolist()


@pytest.mark.parametrize("sharpened", [0.5, 1.0, 3.0])
def test_the_temperature_makes_confidences_true(sharpened):
    values, gold = sampled(4000, sharpened)
    found = calibrate(values, gold, 0.8)
    assert found.temperature == pytest.approx(sharpened, rel=0.1)
    assert found.error < 0.03 and (sharpened == 1 or found.error_before > 3 * found.error)
    assert found.right is not None and found.low is not None and found.high is not None
    assert found.low < found.right < found.high and found.right > 0.85
    assert sum(one.records for one in found.bins) == 4000


def test_without_a_mistake_confidences_stay_below_one():
    values = torch.tensor([[3.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    found = calibrate(values, [0, 1, 0, 1], 0.95)
    assert found.accuracy == 1 and float((values / found.temperature).softmax(-1).max()) < 0.95
    assert found.right is None and "none of the 4 validation records" in found.sentence()


def test_few_records_do_not_make_a_model_surer():
    values, gold = sampled(49, 0.3)
    assert calibrate(values, gold, 0.8).temperature == 1.0
    values, gold = sampled(400, 0.3)
    assert calibrate(values, gold, 0.8).temperature < 0.5


def test_an_answer_that_training_did_not_show_is_wrong_and_does_not_cool():
    values, gold = sampled(400, 1.0)
    plain, more = calibrate(values, gold, 0.8), calibrate(torch.cat([values, values[:40]]), [*gold, *[-1] * 40], 0.8)
    assert more.accuracy == pytest.approx(plain.accuracy * 400 / 440)
    assert more.temperature == pytest.approx(plain.temperature, rel=1e-2)


def test_where_no_validation_record_fits_that_is_said():
    held = [Labelled("a long text", None, "a", f"file:{n}") for n in range(3)]
    closed = Closed(("a", "b"), lambda asked: Scored(torch.zeros(0, 2), (), tuple(one.where for one in asked)))
    with pytest.raises(DataError, match="no validation record fits") as error:
        closed.calibrate(held, 0.9)
    assert "file:0" in str(error.value) and error.value.fix == "raise --max-length"


# Choosing -----------------------------------------------------------------------------------------------------------


def texts(count: int) -> list[Labelled]:
    return [Labelled(f"text {n}", None, "?", f"file:{n + 1}") for n in range(count)]


def test_no_class_takes_over():
    guesses = [Guess(n, "a" if n % 10 else "b", 0.95) for n in range(100)] + [Guess(100, "b", 0.5)]
    found = choose(guesses, texts(101), {"a": 10, "b": 10, "c": 5}, confidence=0.9, most=2.0, records=25, seed=0)
    assert Counter(one.answer for one in found.taken) == {"a": 20, "b": 10}
    assert found.sure == 100 and found.apart == pytest.approx(0.5)
    assert [one.place for one in found.taken] == sorted(one.place for one in found.taken)
    calibration = calibrate(*sampled(20, 1.0), 0.9)
    said = " ".join(warnings_of(found, calibration, "seed 0"))
    assert "confirms its own bias" in said and "a 40% → 90%" in said
    assert "no pseudo-label for c" in said


def test_the_lot_is_the_seeds_own_and_not_the_surest_first():
    guesses = [Guess(n, "a", 0.9 + n / 1000) for n in range(50)]
    chosen = [
        choose(guesses, texts(50), {"a": 10}, confidence=0.9, most=1.0, records=10, seed=seed).taken
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert {one.place for one in chosen[0]} != set(range(40, 50))
    open_answers = choose(guesses, texts(50), None, confidence=0.92, most=2.0, records=10, seed=0)
    assert len(open_answers.taken) == 20 and open_answers.sure == 30 and open_answers.shares == {}


# Reading ------------------------------------------------------------------------------------------------------------


def form_of(path: str) -> Any:
    return recognise(read_records(path))


@pytest.mark.parametrize(
    ("labelled", "blank", "made"),
    [
        ({"text": "a", "label": 1}, {"text": "b", "id": 7}, {"text": "b", "label": 1}),
        ({"sentence": "a", "label": "x"}, {"sentence": "b", "label": None}, {"sentence": "b", "label": 1}),
        ({"prompt": "a", "completion": "c"}, {"prompt": "b"}, {"prompt": "b", "completion": 1}),
        ({"instruction": "a", "output": "c"}, {"instruction": "b"}, {"instruction": "b", "output": 1}),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]},
            {"conversations": [{"from": "human", "value": "b"}]},
            {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": 1}]},
        ),
    ],
)
def test_records_without_answers_are_read_as_those_with(tmp_path, labelled, blank, made):
    form = form_of(jsonl(tmp_path / "labelled.jsonl", [labelled, labelled]))
    read = read_unlabelled(jsonl(tmp_path / "more.jsonl", [blank]), form, {})
    assert len(read.examples) == 1 and not read.own
    assert read.answered(0, 1) == made


def test_what_the_labelled_data_ask_is_left_out_and_said(tmp_path):
    form = form_of(jsonl(tmp_path / "labelled.jsonl", [{"text": "a", "label": "x"}]))
    rows = [{"text": "in the test"}, {"text": "new", "label": "x"}, {"text": "new"}, {"text": "other", "label": ""}]
    known = {"the test part": [Labelled("in the test", None, "x", "t:1")]}
    read = read_unlabelled(jsonl(tmp_path / "more.jsonl", rows), form, known)
    assert [one.fields["text"] for one in read.records] == ["new", "other"]
    assert read.leaks == {"the test part": (f"{tmp_path}/more.jsonl:1",)} and read.own == {0: "x"}
    said = " ".join(read.said)
    assert "come twice" in said and "more.jsonl:3" in said
    with pytest.raises(DataError, match="No unlabelled record is left"):
        read_unlabelled(jsonl(tmp_path / "none.jsonl", rows[:1]), form, known)
    with pytest.raises(DataError) as error:
        read_unlabelled(jsonl(tmp_path / "wrong.jsonl", [{"txt": "a"}]), form, {})
    assert error.value.where.endswith("wrong.jsonl:1") and error.value.near == ("txt",)
    with pytest.raises(DataError, match="no answers that a model could give"):
        read_unlabelled(str(tmp_path / "more.jsonl"), form_of(jsonl(tmp_path / "t.jsonl", [{"text": "a"}])), {})


# The verdict --------------------------------------------------------------------------------------------------------


def measures(gain: float, seeds: int = 3, records: int = 200) -> list[Measure]:
    chance = random.Random(1)
    found = []
    for _ in range(seeds):
        before = tuple(float(chance.random() < 0.6) for _ in range(records))
        after = tuple(max(one, float(chance.random() < gain)) for one in before)
        found.append(Measure(before, after, (1.0,) * records))
    return found


def test_a_clear_gain_is_told_from_none():
    found = difference("accuracy", measures(0.5))
    assert found.helped and not found.harmed and found.low > 0.05
    assert found.sentence().startswith("pseudo-labels helped")
    turned = [Measure(one.after, one.before, one.counts) for one in measures(0.5)]
    assert difference("accuracy", turned).harmed and difference("loss", turned).helped
    none = difference("accuracy", [Measure(one.before, one.before[::-1], one.counts) for one in measures(0)])
    assert not none.helped and not none.harmed and "did not help, as far as can be told" in none.sentence()


def result(trial: str, correct: list[float], validation: float) -> dict[str, Any]:
    ones = [1.0] * len(correct)
    losses = [1.0 - one / 2 for one in correct]
    return {
        **{"trial": trial, "validation": validation, "losses": losses, "counts": ones, "correct": correct},
        **{"steps": 9, "tokens": 90, "failed": None},
    }


def test_the_better_adapter_is_kept_only_if_it_is_better_beyond_chance(tmp_path):
    def pairs(gain: float) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [
            (result(f"supervised/{n}", list(one.before), 0.5 - n / 10), result(f"pseudo/{n}", list(one.after), n))
            for n, one in enumerate(measures(gain))
        ]

    better = verdict(pairs(0.5), tmp_path)
    assert better["kept"] == "with pseudo-labels" and better["adapter"].endswith("trials/pseudo/0/adapter")
    assert [one["metric"] for one in better["metrics"]] == ["accuracy", "loss"]
    same = verdict([(one, one) for one, _ in pairs(0)], tmp_path)
    assert same["kept"] == "supervised" and same["adapter"].endswith("trials/supervised/2/adapter")
    assert "did not help" in same["sentence"] and verdict([], tmp_path)["adapter"] is None


# The whole ----------------------------------------------------------------------------------------------------------


class Here(Runner):
    """Runs trials in this process, which has torch loaded already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []

    def run(self, trials):
        for trial in trials:
            self.ran.append(trial.name)
            yield run_trial(trial, self.folder, lambda _: None)


class Stopped(Runner):
    """Stops where the first trial would begin."""

    def run(self, trials):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a classifier's head."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", *WORDS["positive"], *WORDS["negative"]]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(
        BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.3, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Files: few with labels, more without (two of which are in the test file), and a test file; chats of the same."""
    folder = tmp_path_factory.mktemp("reviews")
    few, more, test = films(32), films(60, 100), films(40, 300)
    parts = {"few": few, "test": test, "more": [{"text": one["text"]} for one in [*more, *test[:2]]]}
    for name, rows in parts.items():
        jsonl(folder / f"{name}.jsonl", rows)
        asked = [{"question": one["text"], **({"answer": one["label"]} if "label" in one else {})} for one in rows]
        jsonl(folder / f"asked-{name}.jsonl", asked)
    return lambda name: str(folder / f"{name}.jsonl")


def flat(model: Path, data: str, test: str, folder: Path, **given: Any) -> Any:
    settings = {
        **{"model": str(model), "data": data, "eval_data": test, "output_dir": str(folder)},
        **{"max_steps": 24, "save_steps": 12, "r": 4, "learning_rate": 1e-2, "eval_split": 0.25, "seed": 0},
    }
    return resolve([("the test", {**settings, **given})])


def test_a_classifier_with_few_labels(bert, reviews, tmp_path):
    said: list[str] = []
    runner = Here(tmp_path / "run")
    settings = flat(bert, reviews("few"), reviews("test"), tmp_path / "run", max_steps=40, eval_steps=20, save_steps=40)
    wanted = Wanted(reviews("more"), confidence=0.6, ratio=1.0)
    found = few_labels(settings, wanted, runner, command="here", notify=said.append)
    assert found == json.loads((tmp_path / "run" / "few-labels.json").read_text())
    assert runner.ran == [f"{kind}/seed-{n}" for kind in ("supervised", "round-1") for n in range(3)]
    told = " | ".join(said)
    assert "2 unlabelled records left out: the test part asks the same" in told
    assert any("the test part" in one for one in found["warnings"])
    assert any("8 validation records are few to calibrate" in one for one in found["warnings"])
    for seed in found["seeds"]:
        (one,) = seed["rounds"]
        assert seed["supervised"]["steps"] == one["result"]["steps"] == 40, "a fair comparison takes equal steps"
        assert [step for step, _ in seed["supervised"]["curve"]] == [step for step, _ in one["result"]["curve"]]
        assert 0 < one["taken"] <= found["data"]["train_records"] and one["answered"] == 60
        mixed = (tmp_path / "run" / "labels" / "round-1" / f"seed-{seed['seed']}.jsonl").read_text().splitlines()
        labelled = (tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()
        assert mixed[: len(labelled)] == labelled and len(mixed) == len(labelled) + one["taken"]
        asked = {json.loads(line)["text"] for line in Path(reviews("test")).read_text().splitlines()}
        assert not asked & {json.loads(line)["text"] for line in mixed}, "the test part is never trained on"
    accuracy = found["verdict"]["metrics"][0]
    assert accuracy["metric"] == "accuracy" and accuracy["seeds"] == 3 and accuracy["records"] == 40
    assert accuracy["before"] > 0.6, "the task is one that can be learnt"
    assert Path(found["verdict"]["adapter"], "adapter_model.safetensors").is_file()
    plots = {plot.key: plot for section in document(found, "here").sections for plot in section.plots}
    assert set(plots) == {"paired", "reliability"}
    for line, seed in zip(plots["paired"].figure.data, found["seeds"], strict=True):
        runs = (seed["supervised"], seed["rounds"][0]["result"])
        assert line.x == ("supervised", "round 1")
        assert line.y == pytest.approx([sum(one["correct"]) / 40 for one in runs])
    for line, seed in zip(plots["reliability"].figure.data, found["seeds"], strict=True):
        bins = seed["rounds"][0]["calibration"]["bins"]
        assert line.y == tuple(one["right"] for one in bins) and sum(line.customdata) == 8
    again = Here(tmp_path / "run")
    assert few_labels(settings, wanted, again, command="here", notify=lambda _: None) == found
    with pytest.raises(ConfigError, match="another experiment") as error:
        few_labels(settings, Wanted(reviews("more"), confidence=0.7), again, command="here", notify=lambda _: None)
    assert "confidence was 0.6" in str(error.value)


def test_what_could_not_begin_can_be_mended_in_the_same_folder(bert, reviews, tmp_path):
    wanted = Wanted(reviews("more"))
    for wrong in ({"eval_data": "nowhere.jsonl"}, {"columns": {"text": "txt"}}, {"eval_split": 0}):
        settings = flat(bert, reviews("few"), reviews("test"), tmp_path / "run", **wrong)
        with pytest.raises(LorafitError):
            few_labels(settings, wanted, Stopped(), command="here", notify=lambda _: None)
    settings = flat(bert, reviews("few"), reviews("test"), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):  # the first trial begins
        few_labels(settings, wanted, Stopped(), command="here", notify=lambda _: None)


@pytest.mark.slow
def test_a_language_model_with_a_closed_set_of_answers_and_two_rounds(llama, reviews, tmp_path):
    settings = flat(llama, reviews("asked-few"), reviews("asked-test"), tmp_path / "run", max_steps=4, eval_steps=4)
    wanted = Wanted(reviews("asked-more"), confidence=0.5, rounds=2)
    found = few_labels(settings, wanted, Here(tmp_path / "run"), command="here", notify=lambda _: None)
    assert found["classes"] is not None and set(found["classes"]) == {"positive", "negative"}
    for seed in found["seeds"]:
        assert [one["round"] for one in seed["rounds"]] == [1, 2]
        assert seed["rounds"][0]["labelled_by"] == seed["supervised"]["trial"]
        assert seed["rounds"][1]["labelled_by"] == seed["rounds"][0]["result"]["trial"]
        assert seed["rounds"][0]["sure"] == 60, "of two answers one is at least as probable as the other"
        assert len(seed["supervised"]["correct"]) == 40
    assert [one["metric"] for one in found["verdict"]["metrics"]] == ["accuracy", "loss"]


def test_no_confident_answer_leaves_the_supervised_adapter(llama, reviews, tmp_path):
    settings = flat(llama, reviews("asked-few"), reviews("asked-test"), tmp_path / "run", max_steps=2)
    runner = Here(tmp_path / "run")
    wanted = Wanted(reviews("asked-more"), confidence=0.9999)
    found = few_labels(settings, wanted, runner, command="here", notify=lambda _: None)
    assert len(runner.ran) == 3 and found["verdict"]["kept"] == "supervised"
    assert found["classes"] is not None and set(found["classes"]) == {"positive", "negative"}
    assert [one["metric"] for one in found["verdict"]["metrics"]] == ["accuracy", "loss"]
    assert "no answer was sure enough to be trained on" in found["verdict"]["sentence"]


def test_open_answers_are_written_and_their_tokens_tell_how_sure_they_are(llama, sums, tmp_path):
    rows = [{"question": f"what is {n} plus one?"} for n in range(100, 112)]
    settings = flat(llama, str(sums), str(sums), tmp_path / "run", max_steps=2, max_new_tokens=6)
    settings = settings.model_copy(update={"eval_data": None})
    wanted = Wanted(jsonl(tmp_path / "more.jsonl", rows), confidence=0.5)
    found = few_labels(settings, wanted, Here(tmp_path / "run"), command="here", notify=lambda _: None)
    assert found["classes"] is None and [one["metric"] for one in found["verdict"]["metrics"]] == ["loss"]
    one = found["seeds"][0]["rounds"][0]
    assert one["answered"] + one["left"] == 12


def test_confidence_of_a_written_answer_is_the_mean_probability_of_its_tokens(llama):
    from lorafit.experiments.measuring import Model
    from lorafit.training.examples import Conversation, Turn
    from lorafit.training.loss import SupervisedLoss
    from lorafit.training.models import Located, load_causal, load_tokenizer
    from lorafit.training.objectives import NextToken

    located = Located(str(llama), "tiny")
    model, tokenizer = load_causal(located, torch.float32).eval(), load_tokenizer(located)
    settings = resolve([("the test", {"max_new_tokens": 12})])
    torch.manual_seed(0)
    with torch.no_grad():  # an untrained model repeats its input: so that it writes letters, and another one each time
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    loaded = Model(model, tokenizer, NextToken(SupervisedLoss.prepare(model)), None)
    written = Open(loaded, settings)
    written._end = lambda ids: 4  # an untrained model does not end its answers
    asked = [Conversation((Turn("user", f"{'x' * n}?"), Turn("assistant", "y")), f"f:{n}") for n in (1, 7, 3)]
    found = written.guess(asked, 2.0)
    assert [one.place for one in found.items] == [0, 1, 2]
    for one, example in zip(found.items, asked, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.turns[0].content}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ids, sure = torch.tensor([prompt]), []
        for _ in range(5):
            logits = model(ids).logits[0, -1].detach()
            sure.append(float((logits / 2).softmax(-1).max()))
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        assert one.confidence == pytest.approx(sum(sure) / 5, rel=1e-4)
        assert one.answer == tokenizer.decode(ids[0, len(prompt) : -1], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("name", "value"), [("confidence", 1.0), ("ratio", 0), ("rounds", 0), ("seeds", 2)])
def test_what_cannot_be_asked(name, value):
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        Wanted("more.jsonl", **{name: value})


# The command --------------------------------------------------------------------------------------------------------


def command(bert: Path, reviews: Callable[[str], str], folder: Path) -> list[str]:
    options = "--confidence 0.6 --max-steps 16 --r 4 --learning-rate 1e-2 --save-steps 4 --seed 0 --json"
    named = {"--model": bert, "--data": reviews("few"), "--unlabelled": reviews("more"), "--eval-data": reviews("test")}
    pairs = [str(word) for pair in named.items() for word in pair]
    return [sys.executable, "-m", "lorafit", "few-labels", *pairs, "--output-dir", str(folder), *options.split()]


def timeless(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run came to, without its times and its place."""
    text = json.dumps({key: value for key, value in found.items() if key not in ("command", "report")})
    made = json.loads(text.replace(str(folder), "HERE"))
    del made["settings"]["output_dir"]
    for seed in made["seeds"]:
        for result in (seed["supervised"], *(one["result"] for one in seed["rounds"])):
            del result["seconds"]
    return dict(made)


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_it_was_not(bert, reviews, tmp_path):
    smooth = subprocess.run(command(bert, reviews, tmp_path / "smooth"), capture_output=True, text=True, timeout=300)
    assert smooth.returncode == 0, smooth.stderr
    page = (tmp_path / "smooth" / "report.html").read_text()
    assert "Did pseudo-labels help?" in page and "What confidences are worth" in page
    rough = tmp_path / "rough"
    waits = [
        lambda: any(rough.glob("trials/supervised/seed-1/checkpoint-*")),
        lambda: any(rough.glob("labels/round-1/seed-1.jsonl")),
        lambda: any(rough.glob("trials/round-1/seed-0/trial.json")),
    ]
    for wait in waits:
        process = subprocess.Popen(
            command(bert, reviews, rough), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + 300
        while not wait() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in rough.glob("trials/*/*/trial.json")}
    assert len(finished) >= 4
    last = subprocess.run(command(bert, reviews, rough), capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items()), "no finished trial is run again"
    found = timeless(json.loads(last.stdout), rough)
    assert found == timeless(json.loads(smooth.stdout), tmp_path / "smooth")
    assert "did not help" in found["verdict"]["sentence"] or found["verdict"]["helped"] or found["verdict"]["harmed"]
