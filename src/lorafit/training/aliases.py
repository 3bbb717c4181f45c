"""The neighbours' spellings of a setting, each with the name that it has here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "adapter_path": "output_dir",
        "base_model": "model",
        "batch_size": "per_device_train_batch_size",
        "cutoff_len": "max_length",
        "dataset": "data",
        "dataset_name": "data",
        "epochs": "num_train_epochs",
        "exclude_modules": "exclude",
        "grad_accumulation_steps": "gradient_accumulation_steps",
        "init_lora_weights": "init",
        "iters": "max_steps",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "lora_r": "r",
        "lora_rank": "r",
        "lora_target": "targets",
        "lora_target_modules": "targets",
        "lr": "learning_rate",
        "max_seq_len": "max_length",
        "max_seq_length": "max_length",
        "micro_batch_size": "per_device_train_batch_size",
        "model_name_or_path": "model",
        "num_epochs": "num_train_epochs",
        "out_dir": "output_dir",
        "rank": "r",
        "sequence_len": "max_length",
        "target_modules": "targets",
        "use_rslora": "rslora",
    }
)
"""Spelling of PEFT, TRL, LLaMA-Factory, Axolotl, Unsloth, litgpt, torchtune or mlx-lm → name here."""
