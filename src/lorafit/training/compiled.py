"""`torch.compile` for each layer of the model's main list by itself.

A layer compiles in a part of the time that a whole model takes, layers that look alike share what was compiled, and
what is between and around them (loss, prefix cache, generation) stays as it is. The layers stay the objects they are:
names, `state_dict` and checkpoints do not change.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lorafit.errors import ConfigError
from lorafit.training.prefix_layers import find_stack

GRAPHS = 64
"""How many graphs there may be for layers of one kind: lowest and others, training and evaluation, short and long
batches, batches of one record. Torch's own limit is 8, beyond which a layer would be run as it is."""


def compile_layers(model: nn.Module, device: torch.device, **options: Any) -> str:
    """Has each layer of the model's main list compiled when it first runs.

    Sizes of batches are left open: lengths that differ from batch to batch do not compile anew.

    Args:
        model: with the adapter attached.
        device: where it runs.
        options: more for `torch.compile`.

    Returns:
        A sentence for the user.

    Raises:
        ConfigError: there is no compiler, or nothing to compile.
    """
    stack = find_stack(model)
    if stack is None:
        raise ConfigError(
            "this model has no list of layers to compile",
            where="compile",
            found=type(model).__name__,
            expected="a model whose layers stand in an nn.ModuleList",
            fix="leave compile out",
        )
    _check_compiler(device, options)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": GRAPHS, **options}
    for layer in stack.layers:
        layer.compile(dynamic=True, **options)
    return f"{len(stack.layers)} layers are compiled as they first run, which takes a few minutes"


def _check_compiler(device: torch.device, options: dict[str, Any]) -> None:
    """Compiles next to nothing, before minutes of work depend on it."""
    try:
        torch.compile(_plus_one, **options)(torch.zeros(64, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # torch wraps whatever fails in a RuntimeError
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            "torch cannot compile here",
            where="compile",
            found=f"{type(error).__name__}: {lines[0] if lines else ''}",
            expected="a C++ compiler for the CPU (g++, clang++ or MSVC), Triton for a GPU",
            fix="install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), or leave compile out",
        ) from error


def _plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1
