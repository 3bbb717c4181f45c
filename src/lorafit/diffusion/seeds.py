"""Random numbers that depend on a seed and on what they are for, and on nothing that was drawn before.

A run that goes on from a checkpoint draws what it would have drawn, whatever was drawn in between for samples.
"""

from __future__ import annotations

import hashlib

import torch


def derived(seed: int, *what: object) -> int:
    """A seed for one purpose, from 0 to 2⁶³ − 1.

    >>> derived(0, "order", 1) == derived(0, "order", 1) != derived(0, "order", 2)
    True
    """
    text = "\0".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *what: object) -> torch.Generator:
    """A generator of its own for one purpose, on the CPU: it gives the same numbers for every device."""
    return torch.Generator().manual_seed(derived(seed, *what))
