"""The type of a base model's numbers, where the user names none."""

from __future__ import annotations

import time
from functools import cache

import torch

WORTH = 2.0
"""How many times as fast a processor has to multiply in bfloat16 for it to be taken there."""
SIZE = 512
"""Of the matrices that are multiplied to find out."""


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base model's dtype: as named, or bfloat16 where the hardware is made for it, else float32."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        made = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xpu":
        made = torch.xpu.is_bf16_supported(including_emulation=False)
    else:
        made = device.type == "cpu" and speed_of_bfloat16() >= WORTH
    return torch.bfloat16 if made else torch.float32


@cache
def speed_of_bfloat16() -> float:
    """How many times as fast as in float32 this machine's processor multiplies matrices in bfloat16.

    Measured once, in a few hundredths of a second: processors with units for it (AMX, for one) are 5 to 20 times as
    fast, others slower.
    """
    return _seconds(torch.float32) / _seconds(torch.bfloat16)


def _seconds(dtype: torch.dtype) -> float:
    left = right = torch.ones(SIZE, SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return best
