"""Base models and tokenizers: a directory, a hub name, or the embedded default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import ConfigError, nearest, some
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
            inside = _models_in(path)
            if len(inside) == 1:
                notify(f"the model lies in {inside[0]}")
                return Located(str(inside[0]), str(inside[0]))
            raise ConfigError(
                "this directory holds no model",
                where=f"model: {path}",
                found="no config.json",
                expected="a Hugging Face model directory",
                near=[str(one) for one in inside[:3]],
                fix="give the directory that save_pretrained wrote",
            )
        return Located(str(path), model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or path.exists():
        siblings = [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        raise ConfigError(
            "there is no such model directory",
            where="model",
            found=model,
            expected="a directory with config.json, or a hub name such as org/name",
            near=nearest(model, siblings),
            fix="mend the path, or leave model out for the embedded default",
        )
    return Located(model, model)


def _models_in(path: Path) -> list[Path]:
    """Models directly below a directory, as packages lay them out: with a config, and with weights beside it."""
    weights = ("*.safetensors", "pytorch_model*.bin")
    configs = sorted(path.glob("*/config.json"))
    return [one.parent for one in configs if any(any(one.parent.glob(name)) for name in weights)]


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
    located: Located,
    dtype: torch.dtype,
    labels: Sequence[str],
    pad: int,
    *,
    seed: int = 42,
    pooling: str | None = None,
) -> tuple[Any, list[str]]:
    """A model with a head in `dtype`, and the paths of the modules that its checkpoint did not hold (the head).

    The values of those are drawn from `seed`, whatever was drawn before.

    Args:
        located: where it is.
        dtype: of its weights.
        labels: the names of the classes; none for a head that gives one number.
        pad: the id of the padding token.
        seed: of a new head's values.
        pooling: what the head reads, as `pooling.WORDS` has it; None for what the model's own class reads.
    """
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if pooling is None:
            kind: Any = AutoModelForSequenceClassification
            options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **_head(labels)}
        else:
            from transformers import AutoConfig

            from lorafit.training.pooling import pooled_class

            config = loaded(located, lambda: AutoConfig.from_pretrained(located.path))
            kind = pooled_class(config)
            options = {"dtype": dtype, "output_loading_info": True, "config": headed(config, labels, pad, pooling)}
        try:
            model, info = loaded(located, lambda: kind.from_pretrained(located.path, **options))
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ConfigError(
                "the head that the model's files bring is not one for these labels",
                where=f"model: {located.path}",
                found="weights of other shapes",
                expected=f"{len(labels)} classes: {some(labels, 8)}" if labels else "a head that gives one number",
                fix="take the model without a head, or records with the labels that it was trained on",
            ) from error
    model.config.pad_token_id = pad
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    return model, sorted(missing)


def classifier_shape(config: Any, labels: Sequence[str], pad: int, pooling: str | None, **options: Any) -> Any:
    """The model of `load_classifier` from its config alone, on torch's default device; `config` is changed.

    Raises:
        ValueError: there is no such model for this config.
    """
    from transformers import AutoModelForSequenceClassification

    if pooling is None:
        return AutoModelForSequenceClassification.from_config(headed(config, labels, pad, None), **options)
    from lorafit.training.pooling import pooled_class

    kind: Any = pooled_class(config)
    return kind._from_config(headed(config, labels, pad, pooling), **options)


def headed(config: Any, labels: Sequence[str], pad: int, pooling: str | None) -> Any:
    """A config with these classes, or with one number, which is changed in place."""
    for name, value in _head(labels).items():
        setattr(config, name, value)
    config.pad_token_id = pad
    if pooling is not None:
        from lorafit.training.pooling import KEY

        setattr(config, KEY, pooling)
    return config


def _head(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of a head with these classes; of one number where there are none."""
    names = tuple(labels) or ("number",)
    head = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {label: index for index, label in enumerate(names)},
    }
    return head if labels else {**head, "problem_type": "regression"}


def head_paths(model: Any) -> list[str]:
    """The modules of a classifier that are its head: those beside the bare model that have parameters.

    None of a model that does not say which part of it is the bare one: all of it is no head.
    """
    if model.base_model is model:
        return []
    inside = f"{model.base_model_prefix}."
    keys = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    return sorted({name.rpartition(".")[0] for name in keys})


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
