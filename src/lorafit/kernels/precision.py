"""Which precision an operation is to be done in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of this kind."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Within it no autocast changes the type of what is computed."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def wanted(x: Tensor, fallback: torch.dtype) -> torch.dtype:
    """The type in which torch's own layer with a weight of type `fallback` would work on x here."""
    if autocasts(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return fallback


def as_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass in the precision of its forward pass, whatever autocast is around `loss.backward()`."""

    @wraps(backward)
    def plain(ctx: Any, *grads: Tensor | None) -> Any:
        kind = next((grad.device.type for grad in grads if grad is not None), None)
        if kind is not None and autocasts(kind):
            with torch.autocast(kind, enabled=False):
                return backward(ctx, *grads)
        return backward(ctx, *grads)

    return plain
