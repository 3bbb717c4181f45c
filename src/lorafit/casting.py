"""Tensors of one type as another, wherever in a module's arguments or results they are."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor


def cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Tensors of type `before` as `after`, in tuples, lists, mappings and data classes too; all else as it is.

    >>> cast({"scores": [torch.ones(1), "kept"]}, torch.float32, torch.bfloat16)
    {'scores': [tensor([1.], dtype=torch.bfloat16), 'kept']}
    """
    if isinstance(value, Tensor):
        return value.to(after) if value.dtype == before else value
    kind = type(value)
    if kind in (tuple, list) or (isinstance(value, tuple) and kind.__module__ == "torch.return_types"):
        return kind(cast(each, before, after) for each in value)
    if kind is dict:
        return {key: cast(each, before, after) for key, each in value.items()}
    if isinstance(value, tuple) and any("_fields" in vars(base) for base in kind.__mro__):
        # A named one, or of a class that extends one and may be made of something else, as a PackedSequence may be.
        return kind._make(cast(each, before, after) for each in value)
    if isinstance(value, OrderedDict):  # and what transformers returns, which keeps its attributes in step
        changed = copy.copy(value)
        for key, each in value.items():
            changed[key] = cast(each, before, after)
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _data(value, before, after)
    return value


def _data(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """A data class with its fields cast, past its own way of being made; itself where none changes."""
    held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    new = {name: cast(each, before, after) for name, each in held.items()}
    if all(_same(new[name], each) for name, each in held.items()):
        return value  # a cache that the module writes to shall stay the caller's own
    changed = copy.copy(value)
    for name, each in new.items():
        object.__setattr__(changed, name, each)  # a frozen one, too
    return changed


def _same(one: Any, other: Any) -> bool:
    """Whether nothing was cast: containers are made anew in any case."""
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    if type(one) is dict:
        return all(_same(each, other[key]) for key, each in one.items())
    return one is other
