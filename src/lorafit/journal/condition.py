"""What a loop needs to go on as if it had never been stopped, beside the adapter's own tensors."""

from __future__ import annotations

import importlib
import pickle
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from lorafit import files
from lorafit.errors import CheckpointError


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and go on: optimizers, learning rate schedulers, gradient scalers, averages of weights."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Goes on from that."""


Kept = Stateful | torch.Generator


def state_of(kept: Kept) -> Any:
    """The state of what goes on with a loop."""
    return kept.get_state() if isinstance(kept, torch.Generator) else kept.state_dict()


def restore(kept: Kept, state: Any) -> None:
    """Puts a state back."""
    if isinstance(kept, torch.Generator):
        kept.set_state(state)
    else:
        kept.load_state_dict(state)


def random_state() -> dict[str, Any]:
    """The states of the random generators of torch, Python and NumPy, in types that torch reads without pickle."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, place, has, value = importlib.import_module("numpy").random.get_state()
        found["numpy"] = (str(kind), keys.tolist(), int(place), int(has), float(value))
    return found


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the random generators back."""
    torch.set_rng_state(state["torch"])
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(numbers), rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        numpy = importlib.import_module("numpy")
        kind, keys, *others = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *others))


@contextmanager
def random_apart() -> Iterator[None]:
    """What is drawn within leaves the random numbers after it as they would have been."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes tensors, numbers and texts, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        files.commit(files.stage(path, lambda temporary: torch.save(dict(value), temporary)), path)
    except (RuntimeError, pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} cannot be written",
            where=path,
            found=_first(error),
            expected="free space, and states of tensors, numbers and texts",
            fix="free some space; the same program then goes on from the last checkpoint",
        ) from error


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        CheckpointError: the file is missing or damaged, or holds what only pickle could read.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "a file of the checkpoint is missing or damaged, or holds more than tensors, numbers and texts",
            where=path,
            found=_first(error),
            expected="what this loop wrote; what is kept along must have a state of tensors, numbers and texts",
            fix=f"remove {path.parent.name}: the same program then goes on from the checkpoint before it",
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError("a file of the checkpoint is damaged", where=path, found=type(found).__name__)
    return found


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
