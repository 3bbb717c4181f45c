"""Low-rank adaptation of pre-trained PyTorch models.

>>> import lorafit as lf
>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
>>> handle = lf.attach(model, lf.LoRA(r=2), targets="all-linear")
>>> handle.num_trainable
24

Names are imported when they are first used: importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorafit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LorafitError,
    LorafitWarning,
    MergeError,
    MissingExtraError,
    StateError,
    TargetError,
    TrainingError,
)

if TYPE_CHECKING:
    from lorafit.checkpoint import load
    from lorafit.handle import Handle
    from lorafit.inject import attach
    from lorafit.method import Adapter, Method
    from lorafit.methods import METHODS, LoRA

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Handle",
    "LoRA",
    "LorafitError",
    "LorafitWarning",
    "MergeError",
    "Method",
    "MissingExtraError",
    "StateError",
    "TargetError",
    "TrainingError",
    "attach",
    "load",
]

_LAZY = {
    "METHODS": "lorafit.methods",
    "Adapter": "lorafit.method",
    "Handle": "lorafit.handle",
    "LoRA": "lorafit.methods",
    "Method": "lorafit.method",
    "attach": "lorafit.inject",
    "load": "lorafit.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
