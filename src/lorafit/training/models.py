"""Base models and tokenizers: a directory, a hub name, or the embedded default."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import ConfigError, nearest
from lorafit.training.embedded import embedded_model_path

Notify = Callable[[str], object]

EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded model is called where an adapter names its base."""

WIDTH, RATE, POWER = 2000, 5e-4, 0.781
"""The rule of `default_rate`: Schulman and Thinking Machines Lab, "LoRA Without Regret" (2025), for Llama types."""


@dataclass(frozen=True)
class Located:
    """Where a model is, and what it is called."""

    path: str
    name: str


def locate(model: str | None, notify: Notify) -> Located:
    """Finds a model; nothing is loaded yet.

    Args:
        model: a directory, a hub name, or None for the embedded default.
        notify: is told when the embedded model has to be prepared first.

    Raises:
        ConfigError: a path that does not exist.
    """
    if model is None or model == EMBEDDED_NAME:
        return Located(str(embedded_model_path(notify)), EMBEDDED_NAME)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                "this directory holds no model",
                where=f"model: {path}",
                found="no config.json",
                expected="a Hugging Face model directory",
                fix="give the directory that save_pretrained wrote",
            )
        return Located(str(path), model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or path.exists():
        siblings = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            "there is no such model directory",
            where="model",
            found=model,
            expected="a directory with config.json, or a hub name such as org/name",
            near=nearest(model, siblings),
            fix="mend the path, or leave model out for the embedded default",
        )
    return Located(model, model)


def load_tokenizer(located: Located) -> Any:
    """The tokenizer of a model, with a padding token. Raises `ConfigError` where there is none."""
    from transformers import AutoTokenizer

    tokenizer = loaded(located, lambda: AutoTokenizer.from_pretrained(located.path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal(located: Located, dtype: torch.dtype) -> Any:
    """A causal language model in `dtype`."""
    from transformers import AutoModelForCausalLM

    return loaded(located, lambda: AutoModelForCausalLM.from_pretrained(located.path, dtype=dtype))


def load_classifier(
    located: Located, dtype: torch.dtype, labels: tuple[str, ...], pad: int, *, seed: int = 42
) -> tuple[Any, list[str]]:
    """A sequence classifier in `dtype`, and the paths of the modules that its checkpoint did not hold (the head).

    The values of those are drawn from `seed`, whatever was drawn before.
    """
    from transformers import AutoModelForSequenceClassification

    options = {
        "dtype": dtype,
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "output_loading_info": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = loaded(
            located, lambda: AutoModelForSequenceClassification.from_pretrained(located.path, **options)
        )
    model.config.pad_token_id = pad
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    return model, sorted(missing)


def loaded(located: Located, load: Callable[[], Any]) -> Any:
    """What `load` gives of a model. Raises `ConfigError` where its files cannot be read."""
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=f"model: {located.path}",
            expected="a model directory, or a hub name that can be reached",
            fix="mend the name, download the model first, or leave model out for the embedded default",
        ) from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base model's dtype: as named, or bfloat16 where the hardware has it, else float32.

    On a CPU it is float32: even where products are many times as fast in bfloat16 (AMX), a step of a small model was
    measured to be a tenth faster only, since all that is not a product is slower.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "xpu" and torch.xpu.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def default_rate(hidden_size: int) -> float:
    """A learning rate for a model of this width, where the user names none.

    >>> f"{default_rate(576):.1e}"
    '1.3e-03'
    """
    return RATE * math.pow(WIDTH / hidden_size, POWER)
