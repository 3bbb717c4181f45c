"""What a run says beside its held-out loss: of a general text, of slices, of another domain."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.errors import ConfigError, DataError
from lorafit.training.config import resolve
from lorafit.training.data import DataSettings, load_examples
from lorafit.training.findings import Findings
from lorafit.training.formats import Record
from lorafit.training.measuring import TOKENS, batches
from lorafit.training.outcome import Outcome
from lorafit.training.prepare import data_settings, encode
from lorafit.training.run import train
from lorafit.training.shift import Doing, Reading, forgetting, shifted
from lorafit.training.slices import sliced, slicing
from lorafit.training.verdict import Evaluation
from lorafit.training.watching import FEWEST, SHARE, gather

Run = Callable[..., Outcome]
DOING = Doing(24, 1e-3, 16)


@pytest.fixture
def settings(model_dir: Path, data: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model_dir),
        "data": data,
        "eval_split": 12,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "r": 4,
        "save_steps": 2,
        "samples": 0,
        "use_cpu": True,
    }


@pytest.fixture
def run(settings: dict[str, Any]) -> Run:
    said: list[str] = []

    def run(**changes: Any) -> Outcome:
        made = resolve([("test", {**settings, **changes})])
        return train(made, command="test", notify=said.append, console=Console(quiet=True))

    run.said = said  # type: ignore[attr-defined]
    return run


@pytest.fixture
def text(write: Callable[[str, Any], str]) -> str:
    """A general text of six paragraphs."""
    return write("text.txt", "\n\n".join(f"Paragraph {n} is about {'rain ' * (n + 1)}and wind." for n in range(6)))


@pytest.fixture
def domains(write: Callable[[str, Any], str]) -> str:
    """Sums, and words turned around, which a column tells apart."""
    rows = [
        {"question": f"what is {n} plus one?", "answer": f"it is {n + 1}", "domain": "sums"}
        if n % 3
        else {"question": f"turn w{n}ord around", "answer": f"dro{n}w", "domain": "words"}
        for n in range(90)
    ]
    return write("domains.jsonl", rows)


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def evaluation(losses: list[float], step: int = 0) -> Evaluation:
    return Evaluation(step, tuple(losses), (1.0,) * len(losses))


def noisy(mean: float, count: int = 40, seed: int = 0, spread: float = 1.0) -> list[float]:
    chance = random.Random(seed)
    return [mean + spread * chance.gauss(0, 1) for _ in range(count)]


# What is said of numbers -------------------------------------------------------


def test_forgetting_is_said_with_its_interval_and_what_led_to_it() -> None:
    before = noisy(3.2)
    after = [one + 0.19 + 0.05 * shake for one, shake in zip(before, noisy(0, seed=1), strict=True)]
    found = forgetting("general text", evaluation(before), evaluation(after), DOING)
    assert found.loss.change == pytest.approx(0.19, abs=0.03)
    assert found.loss.margin is not None and 0.01 < found.loss.margin < 0.02  # though the losses spread by 1
    assert found.sentence.startswith("forgot: general text 3.") and "nats/token (+0." in found.sentence
    (hint,) = found.hints
    assert "24 steps at a learning rate of 0.001, r 16" in hint and "general records" in hint


@pytest.mark.parametrize(("moved", "spread"), [(0.0, 0.05), (-0.2, 0.05), (0.02, 1.0)])
def test_no_forgetting_is_said_where_none_can_be_told(moved: float, spread: float) -> None:
    before = noisy(3.2)
    after = [one + moved + spread * shake for one, shake in zip(before, noisy(0, seed=4), strict=True)]
    found = forgetting("general text", evaluation(before), evaluation(after), DOING)
    assert found.sentence.startswith("no measurable forgetting: general text") and not found.hints


def test_a_slice_that_got_worse_is_named() -> None:
    names = ["books"] * 20 + ["films"] * 20 + ["rare"] * 3
    before = noisy(2.0, 43)
    shakes = noisy(0, 43, seed=1, spread=0.05)
    moves = {"books": -0.5, "films": 0.3, "rare": 5.0}
    after = [one + moves[name] + shake for one, name, shake in zip(before, names, shakes, strict=True)]
    found = sliced("domain", names, evaluation(before), evaluation(after))
    assert found is not None and [part.name for part in found.parts] == ["rare", "films", "books"]
    assert [part.worse for part in found.parts] == [False, True, False]  # three records tell nothing
    assert [part.better for part in found.parts] == [False, False, True]
    assert [part.loss.records for part in found.parts] == [3, 20, 20]
    assert "of 3 slices 1 fell and 1 rose: films (+0.3" in found.sentence
    (hint,) = found.hints
    assert hint.startswith("worse on domain films (20 records): ")
    total = sum(part.loss.change * part.loss.records for part in found.parts)
    assert total == pytest.approx(sum(after) - sum(before))
    assert sliced("domain", ["books"] * 43, evaluation(before), evaluation(after)) is None


def test_many_slices_do_not_make_one_worse_by_luck() -> None:
    wrong = 0
    for seed in range(40):
        before, after = (noisy(2.0, 400, seed=2 * seed + side) for side in (0, 1))
        found = sliced("domain", [str(n % 20) for n in range(400)], evaluation(before), evaluation(after))
        wrong += found is not None and any(part.worse for part in found.parts)
    assert wrong <= 6  # 5 % of the runs, and not of the slices, which would be 26 of the runs


def reading(losses: list[float], correct: list[float] | None = None) -> Reading:
    return Reading(evaluation(losses), None if correct is None else tuple(correct))


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [(-0.8, -0.4, "what was learnt carries over: "), (-0.8, 0.4, "does not carry over"), (-0.8, 0, "not measurably")],
)
def test_whether_it_carries_over(here: float, there: float, said: str) -> None:
    held, target = noisy(2.0, 50), noisy(2.5, 30, seed=3)
    shakes = noisy(0, 50, seed=5, spread=0.05)

    def moved(losses: list[float], by: float) -> list[float]:
        return [one + by + shake for one, shake in zip(losses, shakes, strict=False)]

    pairs = (reading(held), reading(moved(held, here))), (reading(target), reading(moved(target, there)))
    found = shifted("films.jsonl", "books.jsonl", *pairs, None, "nats/token")
    assert said in found.sentence and "books.jsonl" in found.sentence and "films.jsonl" in found.sentence
    assert ("% as much as on" in found.sentence) == (there < 0)
    gap = found.loss.gap
    assert gap is not None and gap.change == pytest.approx(there - here, abs=0.05)
    assert gap.change == pytest.approx(gap.after - gap.before)
    assert gap.change_margin is not None and gap.before_margin is not None
    assert gap.change_margin < 0.05 < gap.before_margin  # of the same records, and of different ones
    assert found.hints and "books.jsonl" in found.hints[0]
    assert Findings.read(json.loads(json.dumps(Findings(shift=found).as_json()))) == Findings(shift=found)


def test_accuracies_have_intervals_where_they_can() -> None:
    losses, right = [0.5] * 40, [1.0] * 30 + [0.0] * 10
    there = reading(losses, [1.0] * 20 + [0.0] * 20), reading(losses, right)
    found = shifted("a", "b", (reading(losses), reading(losses)), there, (0.5, 0.9), "nats/record").accuracy
    assert found is not None and found.on_source is not None and found.gap is not None
    assert (found.on_target.before, found.on_target.after, found.on_source.after) == (0.5, 0.75, 0.9)
    expected = 1.9947 * math.sqrt(0.75 * 0.25 / 39 + 0.9 * 0.1 / 39)  # Student's t with Welch's 69 degrees
    assert found.gap.after == pytest.approx(-0.15) and found.gap.after_margin == pytest.approx(expected, rel=1e-3)


def test_right_answers_can_carry_over_without_the_loss() -> None:
    losses, wrong = noisy(0.7, 60), [1.0] * 30 + [0.0] * 30
    changed = [one + shake for one, shake in zip(losses, noisy(0, 60, seed=4, spread=0.3), strict=True)]
    better = reading(losses, wrong), reading(changed, [1.0] * 50 + [0.0] * 10)
    part = "carries over in part: more answers are right, and the wrong ones are given too surely: b"
    assert part in shifted("a", "b", None, better, None, "nats/record").sentence
    fewer = reading(losses, [1.0] * 50 + [0.0] * 10), reading([one - 0.4 for one in losses], wrong)
    assert "in part: fewer answers are right" in shifted("a", "b", None, fewer, None, "nats/record").sentence


# Slices of data ----------------------------------------------------------------


def made(**columns: list[Any]) -> list[Record]:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [Record(row, f"f:{n}") for n, row in enumerate(rows)]


def test_a_column_is_taken_for_slices_if_it_tells_records_apart() -> None:
    found = slicing(made(text=list("abcd"), domain=["x", "y", "x", "y"]), ["text"], None)
    assert found is not None and (found.column, found.values["f:1"]) == ("domain", "y")
    assert slicing(made(text=list("abcd"), domain=["x"] * 4), ["text"], None) is None
    assert slicing(made(text=list("abcd"), domain=["x", "y", None, "y"]), ["text"], None) is None
    assert slicing(made(source=[f"page {n}" for n in range(30)]), [], None) is None
    assert slicing(made(topic=["x", "y"]), ["topic"], None) is None
    named = slicing(made(text=list("ab"), kind=[3, True]), ["text"], "kind")
    assert named is not None and list(named.values.values()) == ["3", "True"]


def test_a_named_column_has_to_be_there(domains: str) -> None:
    with pytest.raises(DataError, match="is not there") as raised:
        load_examples(DataSettings(domains, eval_split=30, slice="domains"))
    assert "domain" in raised.value.near
    with pytest.raises(DataError, match="no text or whole number"):
        slicing(made(kind=["a", None]), [], "kind")
    with pytest.raises(DataError, match="too many values"):
        slicing(made(kind=list(range(101))), [], "kind")
    with pytest.raises(ConfigError, match="nothing is held out"):
        DataSettings(domains, slice="domain")


def test_the_slices_of_the_held_out_records_are_announced(domains: str, write: Callable[[str, Any], str]) -> None:
    loaded = load_examples(DataSettings(domains, eval_split=30))
    assert any(line.startswith("held-out loss for each domain: sums (") for line in loaded.announcements)
    assert "columns not used" not in loaded.announcements[0]
    other = write("held.jsonl", [{"question": f"{n}?", "answer": "a", "source": "ab"[n % 2]} for n in range(8)])
    loaded = load_examples(DataSettings(domains, eval_data=other))
    assert loaded.slicing is not None and loaded.slicing.column == "source"
    assert "held-out loss for each source: a (4), b (4)" in loaded.announcements


# Runs --------------------------------------------------------------------------


def test_the_embedded_text_is_watched_unless_it_is_not_wanted(run: Run, tmp_path: Path) -> None:
    outcome = run()
    found = outcome.findings.forgetting
    assert found is not None and found.text == "general text" and found.loss.records == FEWEST
    assert f"{FEWEST} of 42 paragraphs of the general text, as the run is short, evenly chosen" in run.said  # type: ignore[attr-defined]
    assert any(line.startswith("general text before training: ") for line in run.said)  # type: ignore[attr-defined]
    assert found.sentence in outcome.findings.lines()
    again = run()
    assert again.status == "already done" and again.findings == outcome.findings
    off = run(general="none", output_dir=str(tmp_path / "off"))
    assert off.findings == Findings() and not records(off.folder.path, "watched")
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (outcome, off))
    assert all(torch.equal(first[key], second[key]) for key in first)  # watching changes nothing


def test_a_long_run_measures_more_of_the_embedded_text(settings: dict[str, Any], tokenizer: Any) -> None:
    made = resolve([("test", settings)])
    loaded = load_examples(data_settings(made))
    data = encode(made, tokenizer, loaded)
    each = sum(map(len, data.train)) / len(data.train)

    def watched(records: int) -> Any:
        return gather(made, tokenizer, loaded, data, records)

    whole = watched(10**7)
    assert whole.general is not None and len(whole.general.records) == 42 and not whole.told
    tokens = sum(map(len, whole.general.records))
    half = watched(round(tokens / 2 / SHARE / each)).general
    assert half is not None and len(half.records) == 21
    assert half.digest == watched(round(tokens / 2 / SHARE / each)).general.digest != whole.general.digest


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_a_general_text_is_that_of_its_paragraphs(
    run: Run, text: str, settings: dict[str, Any], packing: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = run(general=text, packing=packing)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    plain = AutoModelForCausalLM.from_pretrained(settings["model"])
    tuned = AutoModelForCausalLM.from_pretrained(settings["model"])
    lf.load(tuned, outcome.adapter)
    paragraphs = Path(text).read_text().split("\n\n")
    for model, record in zip((plain, tuned), records(outcome.folder.path, "watched"), strict=True):
        for paragraph, loss, count in zip(paragraphs, record["losses"], record["counts"], strict=True):
            ids = tokenizer(paragraph, return_tensors="pt").input_ids
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
            assert count == ids.shape[1] - 1
            with torch.no_grad():
                assert loss == pytest.approx(model(ids, labels=ids).loss.item() * count, rel=1e-4)


def test_slices_add_up_to_the_held_out_loss(run: Run, domains: str) -> None:
    outcome = run(data=domains, eval_split=30, general="none")
    found = outcome.findings.slices
    assert found is not None and {part.name for part in found.parts} == {"sums", "words"}
    first, *_, last = records(outcome.folder.path, "held_out")
    counts, names = last["counts"], [part.name for part in found.parts]
    assert sum(part.loss.records for part in found.parts) == 30 == len(counts)
    rows = {row["question"]: row["domain"] for row in map(json.loads, Path(domains).read_text().splitlines())}
    held = load_examples(DataSettings(domains, eval_split=30, seed=42)).eval
    for part in found.parts:
        at = [place for place, one in enumerate(held) if rows[one.question()[0][1]] == part.name]  # type: ignore[index]
        for record, mean in ((first, part.loss.before), (last, part.loss.after)):
            assert mean == pytest.approx(sum(record["losses"][n] for n in at) / sum(counts[n] for n in at))
    (event,) = records(outcome.folder.path, "slices")
    assert [one["name"] for one in event["parts"]] == names and event["column"] == "domain"
    assert outcome.verdict is not None and set(found.hints) <= set(outcome.verdict.hints)


def test_a_target_is_measured_and_not_learnt(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"turn w{n}ord around", "answer": f"dro{n}w"} for n in range(20)]
    known = json.loads(Path(settings["data"]).read_text().splitlines()[3])
    target = tmp_path / "words.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in [*rows, known]))
    changes = {"general": "none", "eval_limit": None, "source": settings.pop("data")}
    outcome = run(**changes, target=str(target))
    found = outcome.findings.shift
    assert found is not None and (found.source, found.target) == ("sums.jsonl", "words.jsonl")
    assert found.loss.on_source is not None and outcome.eval_before is not None
    assert found.loss.on_source.before == pytest.approx(outcome.eval_before, rel=1e-5)
    held = {one.question() for one in load_examples(DataSettings(changes["source"], eval_split=12, seed=42)).eval}
    leaked = (("user", known["question"]),) not in held
    assert found.loss.on_target.records == 21 - leaked
    assert any("target records left out" in line for line in run.said) == leaked  # type: ignore[attr-defined]
    plain = run(**changes, output_dir=str(tmp_path / "plain"))
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (outcome, plain))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert plain.findings.shift is None


def test_a_classifier_has_accuracies_and_no_general_text(run: Run, tmp_path: Path) -> None:
    def films(name: str, words: list[str], count: int) -> str:
        rows = [{"text": f"{words[n % 2]} film n{n}", "label": ["bad", "good"][n % 2]} for n in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    data, target = films("films.jsonl", ["awful", "great"], 48), films("books.jsonl", ["poor", "fine"], 20)
    outcome = run(data=data, target=target)
    assert outcome.findings.forgetting is None
    assert any(line.startswith("a classifier predicts no text") for line in run.said)  # type: ignore[attr-defined]
    shift = outcome.findings.shift
    assert shift is not None and shift.accuracy is not None and "accuracy on books.jsonl" in shift.sentence
    last = records(outcome.folder.path, "evaluation")[-1]
    assert shift.accuracy.on_source is not None and shift.accuracy.on_source.after == last["accuracy"]
    assert 0 <= shift.accuracy.on_target.after <= 1 and shift.accuracy.gap is not None
    assert Findings.read(json.loads(json.dumps(outcome.findings.as_json()))) == outcome.findings


class Killed(BaseException):
    """Stands for a kill."""


def test_a_run_that_goes_on_does_not_measure_again(
    run: Run, text: str, domains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training.trainer import AdapterTrainer

    changes = {"data": domains, "general": text, "target": domains.replace("domains", "target"), "dropout": 0.1}
    rows = [{"question": f"turn w{n}ord around", "answer": f"dro{n}w"} for n in range(100, 120)]
    Path(changes["target"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = run(**changes, output_dir=str(tmp_path / "whole"))
    steps, original = 0, AdapterTrainer.training_step

    def step_then_kill(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_then_kill)
    with pytest.raises(Killed):
        run(**changes, output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    resumed = run(**changes, output_dir=str(tmp_path / "cut"))
    assert resumed.resumed_from == 2 and resumed.findings == whole.findings
    phases = [(one["what"], one["phase"]) for one in records(resumed.folder.path, "watched")]
    assert phases == [("general", "before"), ("target", "before"), ("general", "after"), ("target", "after")]
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_of_an_older_release_goes_on(run: Run, tmp_path: Path, text: str) -> None:
    """Its settings have none of these names, and its records nothing that was measured before."""
    run(general=text, output_dir=str(tmp_path / "run"))
    folder = tmp_path / "run"
    (folder / "result.json").unlink()
    kept = json.loads((folder / "settings.json").read_text())
    old = {key: value for key, value in kept.items() if key not in ("general", "slice", "target")}
    (folder / "settings.json").write_text(json.dumps(old))
    lines = [line for line in (folder / "records.jsonl").read_text().splitlines() if "watched" not in line]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    outcome = run(general=text)
    assert outcome.status == "done" and outcome.resumed_from == 4
    assert outcome.findings.forgetting is not None


def test_what_is_wrong_with_them_shows_before_the_model_is_loaded(
    run: Run, settings: dict[str, Any], write: Callable[[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("lorafit.training.prepare.load_base", load)
    with pytest.raises(DataError, match="no such file"):
        run(general="nowhere.txt")
    with pytest.raises(DataError, match="no such file"):
        run(target="nowhere.jsonl")
    held = write("held.jsonl", [{"question": "another?", "answer": "yes"}])
    with pytest.raises(DataError, match="all target records are among the training records"):
        run(target=settings["data"], eval_data=held, eval_split=None)


def test_batches_hold_so_many_records_and_tokens() -> None:
    rows = [[0] * length for length in (10, 10, 10, 400, 400, 400, 3000, 5)]
    made = list(batches(rows, 2))
    assert [row for batch in made for row in batch] == rows
    assert [len(batch) for batch in made] == [2, 2, 2, 1, 1]
    assert all(len(batch) == 1 or max(map(len, batch)) * len(batch) <= TOKENS for batch in made)


def test_the_command_takes_them_and_prints_them(
    model_dir: Path, domains: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafit.cli.main import main

    target = tmp_path / "other.jsonl"
    target.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": f"{n}w"}) + "\n" for n in range(9)))
    flags = ["--source", domains, "--target", str(target), "--slice", "domain", "--general", text]
    more = ["--model", str(model_dir), "--max-steps", "2", "--samples", "0", "--use-cpu", "--eval-split", "30"]
    assert main(["train", *flags, *more, "--output-dir", str(tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed["forgetting"]["text"] == "text.txt" and printed["forgetting"]["loss"]["records"] == 6
    assert {one["name"] for one in printed["slices"]["parts"]} == {"sums", "words"}
    assert printed["shift"]["target"] == "other.jsonl" and printed["shift"]["loss"]["gap"] is not None
    assert "source is called data here" in err
    assert re.search(r"^domain +records +loss before +after +change$", err, re.MULTILINE)
    assert re.search(r"^sums +\d+ +\d", err, re.MULTILINE)
    for event in ("forgetting", "slices", "shift"):
        assert printed[event]["sentence"] in err
        (record,) = records(tmp_path / "run", event)
        assert record["sentence"] == printed[event]["sentence"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["findings"]["shift"] == printed["shift"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Forgetting</h2>" in page and "<h2>Another domain</h2>" in page
