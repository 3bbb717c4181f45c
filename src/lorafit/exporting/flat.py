"""An adapter as plain factors, beside the adapter itself, so that what is written can be compared with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit import store
from lorafit.bare import bare_model
from lorafit.checkpoint import load
from lorafit.conversion import Pair, Plain, convert, dependent, read_pairs
from lorafit.errors import CheckpointError, some
from lorafit.layouts import parse
from lorafit.methods.dora import DoRA

NAME = "exported"
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""How far a number of Δ may be from what it was, as a share of the largest one there: A and B are rounded each."""


@dataclass(frozen=True)
class Flat:
    """An adapter as A and B of each layer.

    Attributes:
        config: of the plain LoRA (or of a DoRA that is kept as one).
        plain: its factors.
        delta: module path → W' − W of the adapter that is exported, in the weight's own shape.
        paths: the layers.
    """

    config: Mapping[str, Any]
    plain: Plain
    delta: Callable[[str], Tensor]
    paths: tuple[str, ...]

    def scaled(self, path: str) -> tuple[Tensor, Tensor]:
        """B with the scale multiplied in, and A."""
        pair = self.plain.pairs[path]
        return pair.up * pair.scale, pair.down


@dataclass(frozen=True)
class Checked:
    """What was written against what it was made from.

    Attributes:
        difference: the largest difference of a number.
        tolerance: how large it may be.
        what: numbers of what: "ΔW", "logit".
    """

    difference: float
    tolerance: float
    what: str

    @property
    def good(self) -> bool:
        """Whether they agree; a difference that is no number does not."""
        return self.difference <= self.tolerance


def is_plain(path: str | Path) -> bool:
    """Whether an adapter's file says by itself what its plain LoRA is."""
    found = read_pairs(store.read(Path(path)))
    return found is not None and not found.magnitudes


@contextmanager
def flat(path: str | Path, model: nn.Module | None = None, r: int | None = None) -> Iterator[Flat]:
    """An adapter as plain LoRA; exactly, unless a rank is named.

    Args:
        path: its folder.
        model: its base; None where the file says by itself what it changes.
        r: the highest rank; None is exact.

    Raises:
        CheckpointError: the adapter needs its base, or a rank, to become plain LoRA.
    """
    place = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        if r is not None or not is_plain(place):
            place = _converted(place, Path(folder) / "plain", model, r)
        stored = store.read(place)
        plain = read_pairs(stored)
        assert plain is not None
        base = bare_model(place) if model is None else model
        handle = load(base, path if r is None else place, name=NAME)
        try:
            yield Flat(stored.config, plain, handle.delta, tuple(plain.pairs))
        finally:
            handle.detach()


def _converted(path: Path, output: Path, model: nn.Module | None, r: int | None) -> Path:
    try:
        return convert(path, output=output, model=model, r=r)
    except CheckpointError as error:
        fix = "--model DIR|NAME" if model is None else "--r 16 takes the nearest LoRA of that rank; --to hf is exact"
        raise CheckpointError(
            error.message, found=error.found, expected=error.expected, where=error.where, fix=fix
        ) from error


def compared(flat: Flat, other: Callable[[str], Tensor], dtype: str) -> Checked:
    """The changes of an adapter against those of `other`, layer by layer."""
    worst = largest = 0.0
    for path in flat.paths:
        mine = flat.delta(path).float()
        largest = max(largest, float(mine.abs().max()))
        apart = float((mine - other(path).float().reshape(mine.shape)).abs().max())
        worst = apart if not worst >= apart else worst  # what is not a number stays
    return Checked(worst, TOLERANCE[dtype] * largest, "ΔW")


def refuse_copies(flat: Flat, who: str) -> None:
    """Raises `CheckpointError` where an adapter brings modules trained in full."""
    copies = flat.plain.replaced
    if copies:
        raise CheckpointError(
            f"{who} takes no modules that are replaced in full (modules_to_save)",
            where="adapter_model.safetensors",
            found=some(sorted(copies), 3),
            expected="A and B alone",
            fix="--to hf writes the whole model with them in it",
        )


def refuse_dora(adapter: Path, r: int | None, who: str) -> None:
    """Raises `CheckpointError` for DoRA, unless the nearest LoRA of a rank is asked for."""
    stored = store.read(adapter)
    if isinstance(dependent(parse(stored.config, stored.config_path)[1].method), DoRA) and r is None:
        raise CheckpointError(
            f"{who} has no DoRA: it rescales the rows of W + Δ, and W' − W has full rank",
            where=adapter,
            found="magnitudes",
            expected="an update of low rank",
            fix="merge it, which is exact: --to hf; or --r 64 for the nearest LoRA of that rank (how near is said)",
        )


def padded(down: Tensor, up: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A and B at a higher rank, with zeros: the same change."""
    more = r - down.shape[0]
    return torch.nn.functional.pad(down, (0, 0, 0, more)), torch.nn.functional.pad(up, (0, more))


def shaped(pair: Pair, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that a file has them in: with the kernel of a convolution."""
    ones = (1,) * len(pair.kernel)
    return down.reshape(down.shape[0], -1, *pair.kernel), up.reshape(*up.shape, *ones)
