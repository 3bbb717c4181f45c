"""All weights trained: the reference, with the same data, order, objective and evaluation as adapters have."""

from __future__ import annotations

import json
import math

import pytest

from lorafit.errors import ConfigError
from lorafit.experiments.full import newest, train_full
from lorafit.experiments.trial import Kind, Trial, run_trial


def quiet(line: str) -> None:
    """Nobody listens."""


def full(name, settings, **given):
    return Trial(name, settings(method="lora", learning_rate=1e-2, **given), kind=Kind.FULL)


def test_all_weights_learn_and_are_measured(settings, sums, tmp_path):
    trial = Trial("full", settings(), measured=str(sums), kind=Kind.FULL, forget=True)
    result = run_trial(trial, tmp_path, quiet)
    assert result.failed is None and result.steps == 6
    assert result.trainable > 10_000 and result.adapter_bytes > 4 * result.trainable
    assert result.measured.mean < 0.8 * math.log(258) and result.curve[0][0] == 0
    assert result.validation == pytest.approx(result.measured.mean, rel=0.2)
    assert not (trial.folder(tmp_path) / "model").exists()


def test_a_run_of_all_weights_goes_on_where_it_was_killed(settings, sums, tmp_path, monkeypatch):
    wanted = settings(max_steps=8, save_steps=2, eval_strategy="steps", eval_steps=4)
    whole = run_trial(Trial("full", wanted, str(sums), Kind.FULL), tmp_path / "whole", quiet)

    def stop(line):
        """Nothing."""

    from transformers import Trainer

    saved = Trainer._save_checkpoint

    def once(self, model, trial):
        saved(self, model, trial)
        if self.state.global_step == 4:
            raise RuntimeError("killed")

    trial = Trial("full", wanted, str(sums), Kind.FULL)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", once)
        with pytest.raises(RuntimeError, match="killed"):
            run_trial(trial, tmp_path / "killed", stop)
    assert newest(trial.folder(tmp_path / "killed")).name == "checkpoint-2"
    again = run_trial(trial, tmp_path / "killed", quiet)
    records = (trial.folder(tmp_path / "killed") / "records.jsonl").read_text().splitlines()
    assert [json.loads(one).get("resumed_from_step") for one in records if '"run"' in one] == [0, 2]
    assert again.measured == whole.measured and again.curve == whole.curve and again.tokens == whole.tokens


def test_a_quantised_base_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="quantised"):
        train_full(settings(quantise="int8", output_dir=str(tmp_path / "run")), quiet)
