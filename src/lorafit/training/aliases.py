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
        "load_in_4bit": "quantise",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "lora_r": "r",
        "lora_rank": "r",
        "lora_target": "targets",
        "lora_target_modules": "targets",
        "loraplus_lr_ratio": "ratio",
        "lr": "learning_rate",
        "max_seq_len": "max_length",
        "max_seq_length": "max_length",
        "micro_batch_size": "per_device_train_batch_size",
        "model_name_or_path": "model",
        "num_epochs": "num_train_epochs",
        "out_dir": "output_dir",
        "quantize": "quantise",
        "rank": "r",
        "sequence_len": "max_length",
        "source": "data",
        "target_modules": "targets",
        "torch_compile": "compile",
        "use_rslora": "rslora",
    }
)
"""Spelling of PEFT, TRL, LLaMA-Factory, Axolotl, Unsloth, litgpt, torchtune or mlx-lm → name here."""

NEIGHBOURS: Mapping[str, tuple[tuple[str | None, str], ...]] = MappingProxyType(
    {
        "alpha": (("d_init", "remove it: VeRA has no alpha"), ("layerwise", "remove it: intrinsic has no alpha")),
        "deltaT": (("interval", "write interval"),),
        "inner": ((None, "choose a method that goes around another one: --method dora, or --method lora-plus"),),
        "load_in_8bit": (
            (None, "write quantise: int8 (rows of our own; bitsandbytes rounds the layers' inputs, too)"),
        ),
        "orth_reg_weight": (
            ("orthogonality", "write orthogonality, half of it: PEFT averages over P and Q, two a layer"),
        ),
        "quantization_bit": ((None, "write quantise: int8 or nf4"),),
        "r": (
            (
                "init_r",
                "write init_r and target_r: the rank of each layer at the start, and of all on average at the end",
            ),
            ("layerwise", "write d: how many numbers are trained in all layers together"),
        ),
        "ratio": ((None, "it is LoRA+'s: --method lora-plus, with inner for another method than LoRA"),),
        "tfinal": (("final", "write final: whole steps, or a fraction of the run"),),
        "tinit": (("warmup", "write warmup: whole steps, or a fraction of the run"),),
        "total_step": (("init_r", "leave it out: it is the run's length"),),
        "use_dora": ((None, "choose the method: --method dora"),),
    }
)
"""Settings that are something else here: what to do instead, if the method has this field (None: anyway)."""

VALUES: Mapping[tuple[str, object], object] = MappingProxyType(
    {
        ("general", False): "none",
        ("init_lora_weights", True): "default",
        ("init_lora_weights", "true"): "default",
        ("load_in_4bit", False): "none",
        ("load_in_4bit", True): "nf4",
        ("quantize", "bnb.nf4"): "nf4",
        ("task", "classification"): "sequence-classification",
    }
)
"""A neighbour's spelling and value → the value here."""
