"""Layers without numbers of their own, of the sizes that the factors of an update tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""Dimensions of A → type of layer."""


def hollow_layer(down: Tensor, up: Tensor) -> nn.Module | None:
    """The layer of A (r, in) or (r, in, *kernel) and B (out, r, …), its weight zero; None for other shapes."""
    if down.dim() == 2:
        return _hollow(nn.Linear(down.shape[1], up.shape[0], bias=False, device="meta"))
    if down.dim() not in CONVOLUTIONS:
        return None
    kind = CONVOLUTIONS[down.dim()]
    return _hollow(kind(down.shape[1], up.shape[0], tuple(down.shape[2:]), bias=False, device="meta"))


def hollow_table(down: Tensor, up: Tensor) -> nn.Module:
    """The embedding of A (r, num) and B (dim, r), its weight zero."""
    return _hollow(nn.Embedding(down.shape[1], up.shape[0], device="meta"))


def _hollow(module: nn.Module) -> nn.Module:
    """Gives a layer a weight of zeros that takes no memory."""
    shape = module.weight.shape
    assert isinstance(shape, torch.Size)
    module.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    return module
