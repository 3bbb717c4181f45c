"""Projections of attention that diffusers reads from a copy: `fuse_qkv_projections` puts q, k and v into one layer.

The three stay in the model, and nobody calls them then. A model can hold such a layer only if diffusers is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

COPIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "to_qkv": ("to_q", "to_k", "to_v"),
        "to_kv": ("to_k", "to_v"),
        "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_added_kv": ("add_k_proj", "add_v_proj"),
    }
)
"""The layer that holds copies, as diffusers calls it → those that it holds copies of."""
PROCESSORS = (
    "FusedAttnProcessor2_0",
    "FusedAuraFlowAttnProcessor2_0",
    "FusedCogVideoXAttnProcessor2_0",
    "FusedHunyuanAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
)
"""What in diffusers reads the copies where it is an attention's processor."""


def copy_of(parent: nn.Module, module: nn.Module) -> str | None:
    """The name of the layer that `parent` calls in the place of `module`, one of its own; None if it calls that."""
    if not _fuses(parent):
        return None
    inside = parent._modules
    for name, copied in COPIES.items():
        if name in inside and any(inside.get(each) is module for each in copied):
            return name
    return None


def _fuses(parent: nn.Module) -> bool:
    """Whether a module is an attention of diffusers that reads fused projections."""
    own: Any = parent
    older, newer = (sys.modules.get(f"diffusers.models.{name}") for name in ("attention_processor", "attention"))
    attention = None if older is None else vars(older).get("Attention")
    if attention is not None and isinstance(parent, attention):
        return isinstance(own.processor, tuple(vars(older)[name] for name in PROCESSORS if name in vars(older)))
    mixin = None if newer is None else vars(newer).get("AttentionModuleMixin")
    return mixin is not None and isinstance(parent, mixin) and bool(own.fused_projections)
