"""Every method in other people's training loops: they step, save and resume the optimizer, and call nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import lorafit as lf

WORDS = ["<pad>", "<bos>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off"]
TEXTS = ["the cat sat on the mat", "a cat ran off", "then it sat on a mat", "it ran and sat"] * 8
STEPS = 12
METHODS = {
    "lora": lambda: lf.LoRA(r=2),
    "lora-plus": lambda: lf.LoRAPlus(r=2),
    "lora-fa": lambda: lf.LoRAFA(r=2),
    "vera": lambda: lf.VeRA(r=8, d_init=0.5),
    "lora-drop": lambda: lf.LoRADrop(lf.LoRA(r=2), keep=("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")),
    "adalora": lambda: lf.AdaLoRA(init_r=3, target_r=2, interval=2),
    "dora": lambda: lf.DoRA(lf.LoRA(r=2)),
    "dora-adalora": lambda: lf.DoRA(lf.AdaLoRA(init_r=3, target_r=2, interval=2)),
    "delta-lora": lambda: lf.DeltaLoRA(r=2, start=3),
    "intrinsic": lambda: lf.IntrinsicDimension(d=40),
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def model() -> nn.Module:
    torch.manual_seed(4)
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


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
        "seed": 1,
        **more,
    }


def prepared(method: lf.Method, seed: int) -> tuple[lf.Handle, torch.optim.Optimizer]:
    handle = lf.attach(model(), method, seed=seed)
    return handle, handle.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=STEPS)


def trainer(handle: lf.Handle, optimizer: torch.optim.Optimizer, folder: Path, **more: Any) -> transformers.Trainer:
    encoded = tokenizer()(TEXTS, padding="max_length", max_length=8)["input_ids"]
    return transformers.Trainer(
        model=handle.model,
        args=transformers.TrainingArguments(**settings(folder, **more)),
        train_dataset=[{"input_ids": ids, "labels": [word if word else -100 for word in ids]} for ids in encoded],
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_transformers_trainer_resumes_bit_for_bit(make, tmp_path):
    whole, optimizer = prepared(make(), seed=0)
    first = trainer(whole, optimizer, tmp_path, save_strategy="steps", save_steps=5)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    for step in (5, 10):
        handle, optimizer = prepared(make(), seed=99)  # other first values: the checkpoint holds what counts
        trainer(handle, optimizer, tmp_path / "again").train(
            resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")
        )
        for (key, expected), (_, found) in zip(whole.named_parameters(), handle.named_parameters(), strict=True):
            assert torch.equal(expected, found), (step, key)


# TRL turns checkpointing on by the name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_trl_sft_trainer(make, tmp_path):
    from trl import SFTConfig, SFTTrainer

    handle, optimizer = prepared(make(), seed=0)
    before = {key: value.clone() for key, value in handle.model.state_dict().items() if ".adapters." not in key}
    start = [parameter.detach().clone() for parameter in handle.parameters()]
    loop = SFTTrainer(
        model=handle.model,
        args=SFTConfig(**settings(tmp_path), max_length=12, bf16=False),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )
    loop.train()
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    assert min(losses[-4:]) < losses[0]
    for old, new in zip(start, handle.parameters(), strict=True):
        assert old.shape != new.shape or not torch.equal(old, new)
    for key, value in before.items():
        assert torch.equal(handle.model.state_dict()[key], value), key


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_gradient_scaler_changes_no_step_and_skips_overflows(make, fused):
    """float16 scaling: schedules see unscaled gradients, and do not see the steps that are left out."""
    results = []
    for scaled in (False, True):
        handle = lf.attach(model(), make(), seed=0)
        optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=STEPS, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for step in range(STEPS + (2 if scaled else 0)):
            optimizer.zero_grad()
            ids = torch.randint(3, 14, (4, 8), generator=torch.Generator().manual_seed(max(0, step - 2 * scaled)))
            loss = handle.model(input_ids=ids, labels=ids).loss
            if scaled and step < 2:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([parameter.detach().clone() for parameter in handle.parameters()])
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)
