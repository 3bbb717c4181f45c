"""A whole run of a regression: it learns, says what it learns, goes on as if it had not been stopped, and is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.errors import ConfigError, DataError
from lorafit.training.callbacks import Interrupt
from lorafit.training.config import resolve
from lorafit.training.headed import Headed
from lorafit.training.models import Located, load_classifier
from lorafit.training.outcome import Outcome
from lorafit.training.run import train
from tests.training.encoders import MEAN, encoder, ratings

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("model"), MEAN)


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """Runs with these settings, others put over them; `run.said` is what was said."""
    said: list[str] = []
    flat = {
        "model": str(model),
        "data": str(ratings(tmp_path / "rated.jsonl")),
        "eval_split": 30,
        "output_dir": str(tmp_path / "run"),
        "num_train_epochs": 8,
        "learning_rate": 1e-2,
        "r": 4,
        "save_steps": 10,
        "use_cpu": True,
    }

    def started(**changes: Any) -> Outcome:
        given = {name: value for name, value in {**flat, **changes}.items() if value is not None}
        resolved = resolve([("test", given)])
        return train(resolved, command="test", notify=said.append, console=Console(quiet=True))

    started.said = said  # type: ignore[attr-defined]
    return started


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == event]


def test_it_learns_and_says_what(run: Run, tmp_path: Path) -> None:
    outcome = run()
    said = "\n".join(run.said)  # type: ignore[attr-defined]
    assert "predicted as such (task=regression)" in said and "labels are numbers from" in said
    assert "the head reads the mean of the last hidden states" in said
    assert "new in this model, and trained in full: classifier" in said
    assert "a regression predicts no text" in said and "mean squared error in float32" in said
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < 0.5 < outcome.eval_before
    assert outcome.unit == "of the labels' variance" and outcome.verdict is not None
    first, *_, last = records(outcome.folder.path, "evaluation")
    assert "perplexity" not in first and first["step"] == 0
    assert last["pearson"] > 0.7 and last["pearson_low"] < last["pearson"] < last["pearson_high"]
    assert last["mean_absolute_error"] < first["mean_absolute_error"] and "spearman" in last
    assert records(outcome.folder.path, "data")[0]["label_spread"] > 0
    assert records(outcome.folder.path, "config")[0]["resolved"]["task"] == "regression"
    result = json.loads((outcome.folder.path / "result.json").read_text())
    assert result["unit"] == outcome.unit and result["agreement"]["pearson"] > 0.7
    assert Outcome.read(result, outcome.folder).unit == outcome.unit


def test_the_adapter_says_how_its_output_becomes_a_label(run: Run, model: Path) -> None:
    outcome = run(max_steps=12)
    head = Headed.read(outcome.adapter)
    assert head is not None and head.scale is not None and head.pooling == "mean" and head.labels == ()
    assert not (outcome.adapter / "labels.json").exists()
    config = json.loads((outcome.adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    base, fresh = load_classifier(Located(str(model), "x"), torch.float32, (), 0, pooling=head.pooling)
    handle = lf.load(base, outcome.adapter)
    assert fresh == ["classifier"] and list(handle.copies) == ["classifier"]
    ids = torch.tensor([[2, 10, 10, 10, 4, 3], [2, 5, 5, 5, 4, 3]])  # great great great, awful awful awful
    with torch.no_grad():
        good, bad = head.scale.label(base.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).flatten()
    assert good > bad


def test_the_card_says_what_peft_would_get_wrong(run: Run, tmp_path: Path) -> None:
    outcome = run(max_steps=2)
    card = (outcome.adapter / "README.md").read_text(encoding="utf-8")
    lines = card.splitlines()
    wrong = [line for line in lines if "PEFT over AutoModelForSequenceClassification" in line]
    assert len(wrong) == 1 and "`mean` pooling" in wrong[0] and "something else" in wrong[0]
    assert sum("output is no label yet" in line for line in lines) == 1
    head = Headed.read(outcome.adapter)
    assert head is not None and head.scale is not None
    head.warn(outcome.adapter)
    assert (outcome.adapter / "README.md").read_text(encoding="utf-8") == card, "it is said once"
    own = run(max_steps=2, pooling="own", output_dir=str(tmp_path / "own"))
    assert "AutoModelForSequenceClassification" not in (own.adapter / "README.md").read_text(encoding="utf-8")
    assert Headed(labels=("bad", "good")).warnings() == [] and Headed(("a", "b"), None, "cls").warnings() != []


def test_a_stopped_run_goes_on_as_if_it_had_not_been(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(output_dir=str(tmp_path / "whole"), max_steps=20, dropout=0.1)
    with monkeypatch.context() as patch:
        original = Interrupt.on_step_end

        def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == 10:
                raise RuntimeError("killed")
            return original(self, args, state, control, **kwargs)

        patch.setattr(Interrupt, "on_step_end", stop)
        with pytest.raises(RuntimeError, match="killed"):
            run(output_dir=str(tmp_path / "cut"), max_steps=20, dropout=0.1, save_steps=5)
    again = run(output_dir=str(tmp_path / "cut"), max_steps=20, dropout=0.1, save_steps=5)
    assert again.resumed_from == 5 or again.resumed_from == 10
    one, other = (load_file(each.adapter / "adapter_model.safetensors") for each in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert again.eval_after == whole.eval_after
    assert Headed.read(again.adapter) == Headed.read(whole.adapter)


def test_large_labels_want_the_same_rate(run: Run, tmp_path: Path) -> None:
    """The losses of labels and of the same labels times a thousand and shifted are alike."""
    one = run(max_steps=20, output_dir=str(tmp_path / "one"))
    rows = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    far = tmp_path / "far.jsonl"
    far.write_text("".join(json.dumps({**row, "label": 1000 * row["label"] + 5000.5}) + "\n" for row in rows))
    other = run(max_steps=20, output_dir=str(tmp_path / "other"), data=str(far))
    assert one.eval_after == pytest.approx(other.eval_after, rel=1e-2)


def test_a_head_that_the_files_bring_gives_labels(run: Run, model: Path, tmp_path: Path) -> None:
    whole, _ = load_classifier(Located(str(model), "x"), torch.float32, (), 0, pooling="mean")
    from tests.training.encoders import tokenizer

    whole.save_pretrained(tmp_path / "headed")
    tokenizer().save_pretrained(tmp_path / "headed")
    outcome = run(model=str(tmp_path / "headed"), max_steps=2)
    head = Headed.read(outcome.adapter)
    assert head is not None and head.scale is not None and (head.scale.offset, head.scale.factor) == (0.0, 1.0)
    said = "\n".join(run.said)  # type: ignore[attr-defined]
    assert "files bring is trained on, in full: classifier" in said and "new in this model" not in said


@pytest.mark.parametrize("method", ["dora", "lora-plus", "vera", "adalora"])
def test_other_methods_learn_numbers_too(run: Run, method: str) -> None:
    options: dict[str, Any] = {"vera": {"r": 16}, "adalora": {"r": None, "init_r": 4, "target_r": 2, "final": 2}}
    outcome = run(method=method, max_steps=6, **options.get(method, {}))
    assert outcome.status == "done" and outcome.eval_after is not None


def test_the_models_own_class(run: Run) -> None:
    outcome = run(pooling="own", max_steps=4)
    assert "its own class reads it" in "\n".join(run.said)  # type: ignore[attr-defined]
    head = Headed.read(outcome.adapter)
    assert head is not None and head.pooling is None


def test_what_cannot_be(run: Run, tmp_path: Path) -> None:
    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps({"text": f"film n{n}", "label": "good"}) + "\n" for n in range(9)))
    with pytest.raises(DataError, match="no number"):
        run(data=str(named), task="regression", eval_split=2)
    flat = tmp_path / "flat.jsonl"
    flat.write_text("".join(json.dumps({"text": f"film n{n}", "label": 1.5}) + "\n" for n in range(9)))
    with pytest.raises(DataError, match="same number"):
        run(data=str(flat), eval_split=2)
    with pytest.raises(ConfigError, match="several records in a row"):
        run(packing=True)
