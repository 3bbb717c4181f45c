"""The head trained alone: what is trained, what is left alone, and that it is kept, measured and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafit.errors import CheckpointError, ConfigError
from lorafit.experiments.full import train_full
from lorafit.experiments.measuring import bare, measure, probed
from lorafit.experiments.trained import Everything, Probe, head_weights, load_head
from lorafit.experiments.trial import Kind, Trial, run_trial
from lorafit.training.config import resolve
from lorafit.training.headed import Headed
from lorafit.training.models import Located, load_classifier
from tests.training.encoders import MEAN, encoder, ratings


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("sentences"), MEAN)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ratings(tmp_path_factory.mktemp("rated") / "rated.jsonl")


@pytest.fixture
def regression(sentences, rated):
    def make(**given):
        flat = {
            "model": str(sentences),
            "data": str(rated),
            "eval_split": 30,
            "max_steps": 40,
            "save_steps": 10,
            "learning_rate": 3e-2,
            "general": "none",
        }
        return resolve([("the test", {**flat, **given})])

    return make


def test_the_head_learns_and_nothing_else_changes(regression, rated, sentences, tmp_path):
    trial = Trial("probe", regression(), measured=str(rated), kind=Kind.PROBE, forget=True)
    result = run_trial(trial, tmp_path, quiet)
    assert result.failed is None and result.steps == 40 and result.trainable == 33
    assert result.validation is not None and result.curve[0][0] == 0 and result.validation < result.curve[0][1]
    assert result.measured is not None and result.measured.pairs is not None and len(result.measured.pairs) == 120
    folder = trial.folder(tmp_path)
    assert not (folder / "model").exists() and not list(folder.glob("checkpoint-*")) and not (folder / "best").exists()
    saved = load_file(folder / "head" / "head.safetensors")
    assert {name: tuple(one.shape) for name, one in saved.items()} == {
        "classifier.bias": (1,),
        "classifier.weight": (1, 32),
    }
    assert result.adapter_bytes == (folder / "head" / "head.safetensors").stat().st_size
    head = Headed.read(folder / "head")
    assert head is not None and head.pooling == "mean" and head.scale is not None
    again = probed(regression(), folder / "head", quiet)
    assert measure(again, regression(), str(rated)) == result.measured
    base, _ = load_classifier(Located(str(sentences), "x"), torch.float32, (), 0, pooling="mean")
    for name, value in base.base_model.state_dict().items():
        assert torch.equal(value, again.model.base_model.state_dict()[name]), name


def test_its_model_is_at_rest_while_the_head_learns(sentences):
    model, _ = load_classifier(Located(str(sentences), "x"), torch.float32, ("a", "b"), 0, pooling="mean")
    probe = Probe()
    probe.choose(model)
    model.train()
    probe.settle(model)
    assert model.classifier.training and not model.base_model.training and not model.base_model.encoder.training
    assert [name for name, one in model.named_parameters() if one.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_a_probe_goes_on_where_it_was_killed(regression, rated, tmp_path, monkeypatch):
    wanted = regression(max_steps=8, save_steps=2, eval_strategy="steps", eval_steps=4)
    whole = run_trial(Trial("probe", wanted, str(rated), Kind.PROBE), tmp_path / "whole", quiet)
    from transformers import Trainer

    saved = Trainer._save_checkpoint

    def once(self, model, trial):
        saved(self, model, trial)
        if self.state.global_step == 4:
            raise RuntimeError("killed")

    trial = Trial("probe", wanted, str(rated), Kind.PROBE)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", once)
        with pytest.raises(RuntimeError, match="killed"):
            run_trial(trial, tmp_path / "killed", quiet)
    again = run_trial(trial, tmp_path / "killed", quiet)
    assert again.measured == whole.measured and again.curve == whole.curve


def test_all_weights_of_a_regression_are_measured_with_their_own_scale(regression, rated, tmp_path):
    wanted = regression(learning_rate=3e-3)
    result = run_trial(Trial("full", wanted, str(rated), Kind.FULL), tmp_path, quiet)
    assert result.failed is None and result.measured is not None and result.measured.mean < 1
    assert result.validation is not None and 0.2 < result.validation / result.measured.mean < 5  # of one scale
    head = Headed.read(tmp_path / "trials" / "full" / "model")
    assert head is not None and head.scale is not None and head.scale.factor == head.scale.spread


def test_the_base_is_measured_with_the_head_that_runs_begin_with(regression, rated, tmp_path):
    wanted = regression(max_steps=1)
    base = measure(bare(wanted.model_copy(update={"eval_split": None}), quiet), wanted, str(rated))
    result = run_trial(
        Trial("base", wanted.model_copy(update={"eval_split": None}), str(rated), Kind.BASE), tmp_path, quiet
    )
    assert result.measured == base and result.trainable == 0


def test_a_classifiers_probe(sentences, tmp_path):
    rows = ratings(tmp_path / "rated.jsonl").read_text().splitlines()
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(one.replace('"label": ', '"label": "x').replace("}", '"}') for one in rows[:8]) + "\n")
    wanted = resolve([("test", {"model": str(sentences), "data": str(named), "eval_split": 2, "max_steps": 2})])
    result = run_trial(Trial("probe", wanted, str(named), Kind.PROBE), tmp_path, quiet)
    assert result.failed is None and result.measured is not None and result.measured.correct is not None


def test_what_is_refused(settings, regression, sentences, tmp_path):
    with pytest.raises(ConfigError, match="no head that could be trained alone"):
        train_full(settings(output_dir=str(tmp_path / "lm")), quiet, Probe())
    with pytest.raises(ConfigError, match="quantised"):
        train_full(regression(quantise="int8", output_dir=str(tmp_path / "int8")), quiet, Probe())
    model, _ = load_classifier(Located(str(sentences), "x"), torch.float32, ("a", "b"), 0, pooling="mean")
    (tmp_path / "head").mkdir()
    with pytest.raises(CheckpointError, match="no head of this model") as caught:
        load_head(model, tmp_path / "head")
    assert "no such file" in str(caught.value) and set(head_weights(model)) == {"classifier.weight", "classifier.bias"}
    assert Everything().name == "full" and Probe.times > Everything.times
