"""A classifier's head that the model's files bring: which label is which of its outputs, from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorafit.errors import ConfigError
from lorafit.experiments.measuring import bare, measure
from lorafit.training.brought import agreed, ordered
from lorafit.training.config import resolve
from lorafit.training.headed import Headed
from lorafit.training.outcome import Outcome
from lorafit.training.pooling import classes_of, pooling_of
from lorafit.training.run import train
from tests.training.encoders import encoder, tokenizer

Make = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path) -> Make:
    """A classifier that says its first class of everything, and names its classes as it is told to."""
    from transformers import BertForSequenceClassification

    def make(*names: str) -> Path:
        plain, folder = encoder(tmp_path / "plain"), tmp_path / "headed"
        told = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
        headed = BertForSequenceClassification.from_pretrained(plain, **told)
        with torch.no_grad():
            headed.classifier.weight.zero_()
            headed.classifier.bias.copy_(torch.tensor([3.0, -3.0]))
        headed.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def films(tmp_path: Path) -> Callable[..., str]:
    """Forty sentences of which nine tenths have the one label, and the rest the other."""

    def make(often: Any, seldom: Any) -> str:
        rows = [{"text": f"good film n{n}", "label": seldom if n % 10 == 0 else often} for n in range(40)]
        (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "films.jsonl")

    return make


def flat(model: Path, data: str, tmp_path: Path) -> dict[str, Any]:
    run = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "learning_rate": 1e-6, "use_cpu": True}
    return {"model": str(model), "data": data, "eval_split": 20, **run}


def trained(model: Path, data: str, tmp_path: Path) -> tuple[Outcome, str]:
    said: list[str] = []
    settings = resolve([("test", flat(model, data, tmp_path))])
    return train(settings, command="test", notify=said.append, console=Console(quiet=True)), "\n".join(said)


def before(outcome: Outcome) -> float:
    """The accuracy before training."""
    lines = map(json.loads, (outcome.folder.path / "records.jsonl").read_text().splitlines())
    return float(next(one for one in lines if one["event"] == "evaluation")["accuracy"])


def test_the_models_order_is_kept_where_the_names_agree(model: Make, films: Any, tmp_path: Path) -> None:
    headed, data = model("POSITIVE", "NEGATIVE"), films("positive", "negative")
    assert classes_of(str(headed)) == ("POSITIVE", "NEGATIVE")
    outcome, said = trained(headed, data, tmp_path)
    assert before(outcome) > 0.7
    assert "classes in the order of the model's head: 0 positive, 1 negative" in said
    head = Headed.read(outcome.adapter)
    assert head is not None and head.labels == ("positive", "negative")
    settings = resolve([("test", {**flat(headed, data, tmp_path), "eval_split": None})])
    untrained = bare(settings, lambda line: None)
    assert untrained.labels == ("positive", "negative")
    assert sum(measure(untrained, settings, data).correct or ()) == 36


def test_other_names_are_refused_with_both_lists(model: Make, films: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained on other classes") as caught:
        trained(model("positive", "negative"), films("ham", "spam"), tmp_path)
    assert "'ham', 'spam'" in str(caught.value) and "'positive', 'negative'" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "labels", "told"),
    [
        (("LABEL_0", "LABEL_1"), ("bad", "good"), "taken to be in this order: 0 bad, 1 good"),
        (("positive", "negative"), (0, 1), "taken for the places of the head's classes: 0 positive, 1 negative"),
    ],
    ids=["unnamed", "places"],
)
def test_what_is_assumed_is_said(
    model: Make, films: Any, tmp_path: Path, names: tuple[str, str], labels: tuple[Any, Any], told: str
) -> None:
    outcome, said = trained(model(*names), films(*labels), tmp_path)
    assert told in said and before(outcome) > 0.7


def test_a_model_without_a_head_has_no_order(tmp_path: Path, films: Any) -> None:
    folder = encoder(tmp_path / "plain")
    assert classes_of(str(folder)) == ()
    _, said = trained(folder, films("ham", "spam"), tmp_path)
    assert "order" not in said and "new in this model" in said


def test_names_that_differ_in_case_alone_are_not_mixed_up() -> None:
    assert ordered(("No", "no"), ("no", "No")) == ("no", "No")
    assert ordered(("No", "no"), ("NO", "Yes")) == ("No", "no")
    assert ordered(("a", "b"), ("b", "a", "c")) == ("a", "b")
    assert agreed(("a", "b"), ("A", "B"), "x") == ""


@pytest.mark.parametrize("asked", ["mean", "cls"])
def test_a_head_that_was_trained_on_something_else_is_not_used(model: Make, asked: str) -> None:
    folder = model("positive", "negative")
    assert pooling_of(str(folder), "own").kind is None and pooling_of(str(folder), "auto").kind is None
    with pytest.raises(ConfigError, match="trained on something else") as caught:
        pooling_of(str(folder), asked)
    assert "auto, or own" in str(caught.value)
