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
    from lorafit.combining import combine
    from lorafit.conversion import convert
    from lorafit.handle import Handle
    from lorafit.inject import attach
    from lorafit.journal import Journal
    from lorafit.method import Adapter, Method, Sample
    from lorafit.methods import (
        METHODS,
        AdaLoRA,
        DeltaLoRA,
        DoRA,
        IntrinsicDimension,
        LoRA,
        LoRADrop,
        LoRAFA,
        LoRAPlus,
        VeRA,
    )
    from lorafit.quant.convert import Quantised, dequantise, quantise
    from lorafit.quant.loading import load_quantised
    from lorafit.suggesting import suggest
    from lorafit.suggestion import Suggestion

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AdaLoRA",
    "Adapter",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeltaLoRA",
    "DoRA",
    "Handle",
    "IntrinsicDimension",
    "Journal",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "LoRAPlus",
    "LorafitError",
    "LorafitWarning",
    "MergeError",
    "Method",
    "MissingExtraError",
    "Quantised",
    "Sample",
    "StateError",
    "Suggestion",
    "TargetError",
    "TrainingError",
    "VeRA",
    "attach",
    "combine",
    "convert",
    "dequantise",
    "load",
    "load_quantised",
    "quantise",
    "suggest",
]

_LAZY = {
    "METHODS": "lorafit.methods",
    "AdaLoRA": "lorafit.methods",
    "Adapter": "lorafit.method",
    "DeltaLoRA": "lorafit.methods",
    "DoRA": "lorafit.methods",
    "Handle": "lorafit.handle",
    "IntrinsicDimension": "lorafit.methods",
    "Journal": "lorafit.journal",
    "LoRA": "lorafit.methods",
    "LoRADrop": "lorafit.methods",
    "LoRAFA": "lorafit.methods",
    "LoRAPlus": "lorafit.methods",
    "Method": "lorafit.method",
    "Quantised": "lorafit.quant.convert",
    "Sample": "lorafit.method",
    "Suggestion": "lorafit.suggestion",
    "VeRA": "lorafit.methods",
    "attach": "lorafit.inject",
    "combine": "lorafit.combining",
    "convert": "lorafit.conversion",
    "dequantise": "lorafit.quant.convert",
    "load": "lorafit.checkpoint",
    "load_quantised": "lorafit.quant.loading",
    "quantise": "lorafit.quant.convert",
    "suggest": "lorafit.suggesting",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
