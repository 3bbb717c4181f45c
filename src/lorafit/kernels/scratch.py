"""Memory that is used for a moment: on a CPU one buffer for all, elsewhere what the device's allocator hands out.

On a CPU a new buffer of some MB costs more than what is written into it: the system hands it out page by page, and
clears each. A device with an allocator of its own keeps what was freed, and its work is in order: there a new tensor is
as cheap as an old one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

PIECE = {"cpu": 2**17}
"""Numbers that are worked on at a time, by device type, as measured: float32 and a copy of them stay in a cache."""
LEAST = 32
"""Rows of a piece at least: products of fewer are slow."""


class _Buffers(threading.local):
    """The buffers of one thread: two models may be trained in two."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, torch.dtype], Tensor] = {}


_BUFFERS = _Buffers()


def transformed() -> bool:
    """Whether derivatives or batches are made of each operation: by a transform of torch.func, or in forward mode.

    The operations written here, whose backward pass is written by hand, are not for that: their plain twins are.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether operations are recorded, to be compiled, replayed or counted: then each must happen, in the same way."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or transformed()


def reusable(device: torch.device) -> bool:
    """Whether memory may be written to twice."""
    return device.type == "cpu" and not recorded()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor that nobody needs after the next call for the same purpose; its values are arbitrary.

    Args:
        purpose: what for; different purposes do not share.
        shape: of the tensor.
        dtype: of the tensor.
        device: where.
    """
    if not reusable(device):
        return torch.empty(shape, dtype=dtype, device=device)
    size, key = math.prod(shape), (purpose, dtype)
    buffer = _BUFFERS.by_kind.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = _BUFFERS.by_kind[key] = torch.empty(size, dtype=dtype, device="cpu")
    return buffer[:size].view(shape)


def beside(purpose: str, matrix: Tensor) -> Tensor:
    """Scratch memory of a matrix's shape and type, by columns where the matrix lies so.

    A layer that keeps its weight as (in, out) multiplies by it as it lies, and a product's last bit depends on that.
    """
    first, second = matrix.shape
    if matrix.stride(0) < matrix.stride(1):
        return scratch(purpose, (second, first), matrix.dtype, matrix.device).t()
    return scratch(purpose, (first, second), matrix.dtype, matrix.device)


def pieces(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows that are best worked on together; one run of all where nothing is gained by less."""
    step = max(LEAST, PIECE[device.type] // max(1, width)) if reusable(device) else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def shaped(x: Tensor, y: Tensor) -> Tensor:
    """Rows y in the shape of x. No view, as which autograd would not let anybody change it in place afterwards."""
    if x.dim() == 2:
        return y
    result: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return result
