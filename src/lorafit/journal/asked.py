"""What a loop asks of its journal, looked at before an epoch is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError, some
from lorafit.handle import Handle
from lorafit.journal.condition import Stateful
from lorafit.training.record import RESERVED


def check(folder: object, handle: object, optimizer: object, seed: object, say: object) -> None:
    """Raises `ConfigError` for what is none of these."""
    if not isinstance(folder, str | os.PathLike):
        raise _other("folder", folder, "a path", 'Journal("runs/mine", handle, optimizer, epochs=10)')
    if not isinstance(handle, Handle):
        fix = "handle = lf.attach(model, LoRA(r=16))" if isinstance(handle, nn.Module) else "Journal(folder, handle)"
        raise _other("handle", handle, "the handle that attach gave", fix)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        number = isinstance(optimizer, int) and not isinstance(optimizer, bool)
        fix = f"Journal(folder, handle, optimizer, epochs={optimizer})" if number else "optimizer=None"
        raise _other("optimizer", optimizer, "an optimizer of torch, or None", fix)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise _other("seed", seed, "a whole number, or None", "seed=0")
    if not callable(say):
        raise _other("say", say, "a function of a line of text", "say=print")


def along(also: object) -> dict[str, Any]:
    """What goes on with a loop, by name.

    Raises:
        ConfigError: this is no mapping, or something in it has no state.
    """
    fix = 'also={"schedule": scheduler}'
    if also is None:
        return {}
    if not isinstance(also, Mapping):
        raise _other("also", also, "names of your own → what has to go on", fix)
    for name, kept in also.items():
        if not isinstance(name, str) or not name:
            raise _other("also", name, "names of your own as keys", fix)
        if isinstance(kept, type) or not isinstance(kept, Stateful | torch.Generator):
            raise _other(f"also[{name!r}]", kept, "a torch.Generator, or what has state_dict and load_state_dict", fix)
    return dict(also)


def told(data: object) -> dict[str, Any]:
    """What a report says of the data.

    Raises:
        ConfigError: this is no mapping from texts, or has a key that records have already.
    """
    fix = 'data={"source": "digits", "train_records": 900}'
    if data is None:
        return {}
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise _other("data", data, "a mapping from texts", fix)
    taken = [key for key in RESERVED if key in data]
    if taken:
        raise ConfigError(
            "a record has keys of this name already",
            where="Journal.data",
            found=some(taken),
            expected=f"other keys than {', '.join(RESERVED)}",
            fix=fix,
        )
    return dict(data)


def number(what: str, value: object) -> float | Tensor:
    """One number, of a tensor still where it is: asking a GPU for it would make it wait.

    Raises:
        ConfigError: this is none, or several.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(()).float()
    if isinstance(value, Tensor):
        found = f"a tensor of shape {tuple(value.shape)}"
    elif isinstance(value, str):
        found = repr(value)
    else:
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            found = repr(value)
    raise ConfigError(
        f"the {what} of a step must be one number",
        where="Journal.step",
        found=found,
        expected="the scalar that backward was called on" if what == "loss" else "what clip_grad_norm_ gave",
        fix="journal.step(loss.mean())" if what == "loss" else "journal.step(loss, grad_norm=norm)",
    )


def examples(value: object) -> int | None:
    """How many examples a step had.

    Raises:
        ConfigError: this is no number of them.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ConfigError(
        "a step has a whole number of examples",
        where="Journal.step: examples",
        found=repr(value),
        expected="a whole number, or None",
        fix="journal.step(loss, examples=len(labels))",
    )


def _other(what: str, value: object, expected: str, fix: str) -> ConfigError:
    found = f"a {type(value).__name__}" if isinstance(value, nn.Module | list | Mapping) else repr(value)
    return ConfigError(
        f"this is no {what.partition('[')[0]}", where=f"Journal.{what}", found=found, expected=expected, fix=fix
    )
