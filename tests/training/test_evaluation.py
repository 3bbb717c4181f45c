"""Held-out data on which nothing can be measured: an error, and never a number that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import lorafit as lf
from lorafit.errors import DataError
from lorafit.training.batches import Collator
from lorafit.training.loss import SupervisedLoss
from lorafit.training.objectives import NextToken, mean_loss
from lorafit.training.sequences import Encoded
from lorafit.training.trainer import AdapterTrainer


def test_a_mean_over_nothing() -> None:
    assert mean_loss(6.0, 4) == 1.5
    with pytest.raises(DataError, match="nothing to measure") as caught:
        mean_loss(0.0, 0)
    assert caught.value.found and caught.value.expected and caught.value.fix


def test_a_trainer_that_is_given_records_without_answers(model_dir: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    handle = lf.attach(model, lf.LoRA(r=2))
    learnt, empty = Encoded([5, 6, 7], [-100, 6, 7], "a:1"), Encoded([5, 6, 7], [-100, -100, -100], "a:2")
    trainer = AdapterTrainer(
        handle=handle,
        objective=NextToken(SupervisedLoss.prepare(model)),
        lengths=[3],
        base_model="test",
        model=model,
        args=transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False),
        train_dataset=[learnt],
        data_collator=Collator(0),
    )
    assert trainer.evaluate([empty, learnt])["eval_supervised_tokens"] == 2
    with pytest.raises(DataError, match="nothing to measure"):
        trainer.evaluate([empty, empty])
