"""Which layers a model calls for an example, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from lorafit.errors import ConfigError
from lorafit.method import Batch
from lorafit.plan import Modules
from lorafit.rest import at_rest


def called(model: nn.Module, modules: Modules, example: Batch) -> list[str]:
    """The layers of known types that a forward pass calls, in the order of their last call."""
    seen: dict[str, None] = {}
    devices = {each.device for each in (*model.parameters(), *model.buffers()) if each.device.type == "cuda"}
    with ExitStack() as hooks, at_rest(model), torch.random.fork_rng(devices=list(devices)):
        for path in modules.known():
            hooks.callback(modules.by_path[path].register_forward_hook(_noting(seen, path)).remove)
        try:
            _forward(model, example)()
        except Exception as error:
            raise ConfigError(
                "the model does not run on the example",
                where="suggest.example",
                found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                expected="a mapping of keyword arguments, a tuple of arguments, or one tensor",
                fix="example=(x,) for a model that is called as model(x)",
            ) from error
    return list(seen)


def _noting(seen: dict[str, None], path: str) -> Callable[..., None]:
    def note(module: nn.Module, args: object, output: object) -> None:
        seen.pop(path, None)
        seen[path] = None

    return note


def _forward(model: nn.Module, example: Batch) -> Callable[[], Any]:
    if isinstance(example, Mapping):
        return partial(model, **example)
    return partial(model, *example) if isinstance(example, tuple | list) else partial(model, example)
