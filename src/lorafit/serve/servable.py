"""Which adapters can share a batch with others, as their config and the header of their file tell it."""

from __future__ import annotations

from pathlib import Path

from lorafit import store
from lorafit.errors import CheckpointError, some
from lorafit.layouts import parse
from lorafit.layouts.ours import Ours
from lorafit.method import Around, Method


def check_servable(folder: Path) -> None:
    """Refuses an adapter that cannot share a batch with others; reads its config and the header of its file.

    Raises:
        CheckpointError: no adapter there, a damaged one, or one that replaces modules or changes whole weights.
    """
    stored = store.peek(folder)
    _, parsed, own = parse(stored.config, stored.config_path)
    method = own.method if isinstance(own, Ours) else parsed.method
    if not _inmost(method).in_rows:
        raise unservable(folder, method)
    if parsed.modules_to_save:
        raise CheckpointError(
            "an adapter with modules that replace the base's in full cannot share a batch with others",
            where=stored.config_path,
            found=f"modules_to_save: {some(parsed.modules_to_save)}",
            expected="changes of layers alone",
            fix=f"lorafit merge {folder}, and serve the model that it gives",
        )


def _inmost(method: Method) -> Method:
    while isinstance(method, Around):
        method = method.within
    return method


def unservable(folder: Path, method: Method) -> CheckpointError:
    """The error for an adapter whose change is a whole matrix for each layer."""
    return CheckpointError(
        f"an adapter of the method {method.name!r} changes whole weights, and cannot share a batch with others",
        where=folder,
        found=method,
        expected="a change of low rank",
        fix=f"lorafit merge {folder}, and serve the model that it gives; lorafit export --r 64 has the nearest LoRA",
    )
