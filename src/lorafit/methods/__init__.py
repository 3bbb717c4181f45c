"""The household: one file, one paper. `METHODS` is the only place where a name stands for a method."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorafit.method import Method
from lorafit.methods.lora import LoRA

METHODS: Mapping[str, type[Method]] = MappingProxyType({kind.name: kind for kind in (LoRA,)})
"""Name on the command line and in files → method class."""

__all__ = ["METHODS", "LoRA"]
