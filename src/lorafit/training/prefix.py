"""Layers below all that is trained are computed once for each record, and read from disk from then on.

What enters the lowest adapted layer is the same in every epoch. The first pass writes it to the run's folder; later
passes, and every evaluation but the first, skip the layers below. When this is done: `make_prefix`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers import __version__ as transformers_version

from lorafit.errors import CheckpointError
from lorafit.training.loss import is_half
from lorafit.training.prefix_layers import Output, Stack, below, find_stack
from lorafit.training.prefix_pieces import Piece, pieces
from lorafit.training.prefix_store import STATES, PrefixStore
from lorafit.training.prefix_trial import COARSE, FINE, Form, NotConstantError, Subject, attempt

Batch = Mapping[str, Tensor]
Notify = Callable[[str], object]
Wanted = bool | Literal["auto"]

FOLDER = "prefix"
"""Where the states are, in the run's folder; gone when the run is done."""
LEAST = 0.15
"""The share of the layers that "auto" wants to spare at least."""
MOST = 20 * 10**9
"""Bytes that "auto" takes at most."""
OF_FREE = 0.5
"""The share of the free disk that is taken at most."""


class Prefix(ABC):
    """How a forward pass gets through the lower layers."""

    @abstractmethod
    def over(self, batch: Batch) -> AbstractContextManager[None]:
        """Around a forward pass of this batch."""

    @abstractmethod
    def commit(self) -> None:
        """A checkpoint is being written: what is known now is there for the run that goes on from it."""

    @abstractmethod
    def close(self) -> None:
        """This process needs it no more; another one may go on."""

    @abstractmethod
    def remove(self) -> None:
        """Nobody needs it any more."""


@final
class Computed(Prefix):
    """By computing them."""

    def over(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def commit(self) -> None:
        pass

    def close(self) -> None:
        pass

    def remove(self) -> None:
        pass


@final
class Cached(Prefix):
    """By reading what they put out, where it is known; by computing and writing it, where it is not.

    Args:
        stack: the layers.
        store: what is known.
        form: how it looks.
        device: where batches are.
        notify: is told when the disk is full.

    Attributes:
        read: forward passes that skipped the lower layers, of `passes` in all.
    """

    def __init__(self, stack: Stack, store: PrefixStore, form: Form, device: torch.device, notify: Notify) -> None:
        self._stack = stack
        self._store = store
        self._form = form
        self._device = device
        self._notify = notify
        self._broken = False
        self.read = 0
        self.passes = 0

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        found = None if self._broken else pieces(batch)
        self.passes += 1
        known = found is not None and all(piece.digest in self._store for piece in found)
        loaded = self._loaded(batch, found) if known and found is not None else None
        if found is None or (known and loaded is None):
            yield
        elif loaded is not None:
            with self._stack.skipped(loaded):
                yield
            self.read += 1
        else:
            with self._stack.watched(lambda output: self._keep(output, found)):
                yield

    def _loaded(self, batch: Batch, found: Sequence[Piece]) -> Output | None:
        """What the lower layers would put out; None where the file does not give it any more."""
        states = torch.zeros(*batch["input_ids"].shape, self._form.width, dtype=self._form.dtype)
        try:
            for piece in found:
                piece.write(states, self._store.read(piece.digest))
        except (OSError, EOFError) as error:  # a disk that is full says so when it is read from, too
            self._give_up(error)
            return None
        return Output(states.to(self._device), self._form.tupled)

    def _keep(self, output: Output, found: Sequence[Piece]) -> None:
        if output.states.dtype != self._form.dtype or output.states.requires_grad or self._broken:
            return
        try:
            for piece in found:
                if piece.digest not in self._store:
                    self._store.write(piece.digest, piece.read(output.states))
        except OSError as error:
            self._give_up(error)

    def commit(self) -> None:
        try:
            if not self._broken:
                self._store.commit()
        except (OSError, CheckpointError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """A cache that cannot be written or read is given up; the run is not."""
        self._broken = True
        self._store.remove()
        self._notify(f"the lower layers are computed from here on: {str(error).splitlines()[0]}")

    def close(self) -> None:
        self._store.close()

    def remove(self) -> None:
        self._broken = True
        self._store.remove()


@final
@dataclass(frozen=True)
class Run:
    """What a run says of itself to `make_prefix`.

    Attributes:
        wanted: the setting.
        model: with the adapter attached, on its device.
        arguments: of the trainer.
        passes: how often the training data are gone through in all.
        train, held: the records.
        loss: of a batch, as in training.
        batch: makes a batch of records, on the model's device.
        folder: the run's.
    """

    wanted: Wanted
    model: nn.Module
    arguments: TrainingArguments
    passes: float
    train: Sequence[Any]
    held: Sequence[Any]
    loss: Callable[[Batch], Tensor]
    batch: Callable[[Sequence[Any]], Batch]
    folder: Path


def make_prefix(run: Run, notify: Notify) -> Prefix:
    """Decides how this run gets through the layers below all that is trained.

    They are kept if the setting is True, or "auto" and there is more than one pass, at least 15 % of the layers can be
    spared, and all of it takes less than 20 GB; in both cases only if that is at most half of the free disk, there is
    one process, and the trial of `prefix_trial` finds the same loss and gradients. What stands against it is said.
    """
    stack = find_stack(run.model)
    forced = run.wanted is True
    if run.wanted is False or (not forced and run.passes <= 1):
        return _computed(run.folder)
    if stack is None or stack.first == 0 or (not forced and stack.share < LEAST):
        if forced:
            notify("prefix_cache has no effect: no layer lies below the lowest adapted one")
        return _computed(run.folder)
    layers = f"layers 0 to {stack.first - 1} of {len(stack.layers)} are not trained"
    try:
        _check_run(run)
        rounding = COARSE if run.arguments.bf16 or run.arguments.fp16 or is_half(run.model) else FINE
        form = attempt(Subject(run.model, stack, run.loss, run.batch, run.arguments.device, rounding), run.train)
        size = sum(map(len, [*run.train, *run.held])) * form.width * form.dtype.itemsize
        _check_space(size, run.folder, forced=forced)
        key = _key(run, stack, form)
        store = PrefixStore(run.folder / FOLDER, key, form.width, form.dtype)
    except (NotConstantError, OSError) as error:
        notify(f"{layers}, and computed in every pass all the same: {error}")
        return _computed(run.folder)
    known = f" ({len(store):,} records are there)" if len(store) else ""
    notify(
        f"{layers}: what they put out is computed in the first pass and read from disk in later ones, "
        f"{_amount(size)} in {store.folder}{known}; --no-prefix-cache computes it each time"
    )
    return Cached(stack, store, form, run.arguments.device, notify)


def _computed(folder: Path) -> Computed:
    """No cache; nor one that is left from before."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return Computed()


def _check_run(run: Run) -> None:
    if run.arguments.world_size > 1 or run.arguments.n_gpu > 1:
        raise NotConstantError("the run has several processes or devices")
    if run.arguments.neftune_noise_alpha is not None:
        raise NotConstantError("neftune_noise_alpha adds noise below them")


def _check_space(size: int, folder: Path, *, forced: bool) -> None:
    there = folder / FOLDER / STATES  # of a run that goes on
    free = shutil.disk_usage(folder).free + (there.stat().st_size if there.is_file() else 0)
    if size > OF_FREE * free:
        raise NotConstantError(
            f"it takes {_amount(size)}, more than half of the {_amount(free)} that are free in {folder}"
        )
    if size > MOST and not forced:
        raise NotConstantError(
            f"it takes {_amount(size)}, more than {_amount(MOST)}; --prefix-cache does it all the same"
        )


def _amount(size: int) -> str:
    return f"{size / 10**9:.1f} GB" if size >= 10**9 else f"{size / 10**6:.0f} MB"


def _key(run: Run, stack: Stack, form: Form) -> str:
    """Of all that the states depend on beside their tokens: weights, layer, types, versions."""
    about = {
        "config": run.model.config.to_dict() if isinstance(run.model, PreTrainedModel) else None,
        "path": stack.path,
        "first": stack.first,
        "form": {**asdict(form), "dtype": str(form.dtype)},
        "mixed": [run.arguments.bf16, run.arguments.fp16, run.arguments.device.type],
        "versions": [torch.__version__, transformers_version],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in below(run.model, stack):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
