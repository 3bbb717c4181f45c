"""Other people's training loops: the optimizer of a handle is all they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import lorafit as lf

WORDS = ["<pad>", "<bos>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off"]
TEXTS = ["the cat sat on the mat", "a cat ran off", "then it sat on a mat", "it ran and sat"] * 4


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture
def model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


class Watch(transformers.TrainerCallback):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
        "seed": 1,
    }


def check(handle: lf.Handle, before: dict[str, Tensor], start: list[Tensor], watch: Watch, tmp_path: Path) -> None:
    """The adapter changed and nothing else did; what was learned goes through a file."""
    assert len(watch.losses) == 8 and watch.losses[-1] < watch.losses[0]
    for old, new in zip(start, handle.parameters(), strict=True):
        assert not torch.equal(old, new)
    state = handle.model.state_dict()
    for key, value in before.items():
        assert torch.equal(state[key], value), key
    deltas = {path: handle.delta(path) for path in handle.sites}
    handle.save(tmp_path / "adapter")
    handle.detach()
    again = lf.load(handle.model, tmp_path / "adapter")
    for path, delta in deltas.items():
        assert torch.equal(again.delta(path), delta)


def prepared(model: nn.Module) -> tuple[lf.Handle, torch.optim.Optimizer, dict[str, Tensor], list[Tensor]]:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = lf.attach(model, lf.LoRA(r=4, dropout=0.05), seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    return handle, optimizer, before, [parameter.detach().clone() for parameter in handle.parameters()]


def test_transformers_trainer(model, tmp_path):
    handle, optimizer, before, start = prepared(model)
    encoded = tokenizer()(TEXTS, padding="max_length", max_length=8)["input_ids"]
    data = [{"input_ids": ids, "labels": [word if word else -100 for word in ids]} for ids in encoded]
    watch = Watch()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings(tmp_path)),
        train_dataset=data,
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    trainer.train()
    check(handle, before, start, watch, tmp_path)


def test_transformers_trainer_says_when_nothing_would_be_learned(model, tmp_path):
    handle, optimizer, *_ = prepared(model)
    lf.attach(model, lf.LoRA(r=2), name="other")  # active instead
    data = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 8
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings(tmp_path)),
        train_dataset=data,
        optimizers=(optimizer, None),
    )
    with pytest.raises(lf.TrainingError, match="no gradient") as caught:
        trainer.train()
    assert caught.value.fix == "handle.activate('default')"
    assert handle.name == "default"


# TRL turns checkpointing on by the name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
def test_trl_sft_trainer(model, tmp_path):
    from trl import SFTConfig, SFTTrainer

    handle, optimizer, before, start = prepared(model)
    watch = Watch()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(tmp_path), max_length=12, bf16=False),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    trainer.train()
    check(handle, before, start, watch, tmp_path)
