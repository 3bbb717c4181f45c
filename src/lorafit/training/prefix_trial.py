"""Whether a model's lower layers can be left out: tried on two records of the data, with everything that must hold.

* Nothing below the first adapted layer is trained, and nothing there draws random numbers (dropout).
* What comes out for a record is the same each time, and does not depend on the records beside it or on the padding.
* With stored states for the lower layers, loss and all gradients are those of the whole model: bit for bit, or as near
  as two runs of the whole model are to each other where a device does not repeat itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn

from lorafit.training.prefix_layers import Output, Stack, UnknownFormError
from lorafit.training.prefix_pieces import Piece, pieces

Batch = Mapping[str, Tensor]


FINE, COARSE = 1e-5, 5e-2
"""What float32 comes to in other shapes, and what numbers of 16 bits do."""


class NotConstantError(Exception):
    """What comes out of the lower layers cannot be kept; the text says why, to go on "because …"."""


@final
@dataclass(frozen=True)
class Subject:
    """What is tried.

    Attributes:
        model: with the adapter attached, on its device.
        stack: its lower layers.
        loss: a scalar of a batch, computed as in training.
        batch: makes a batch of records, on the model's device.
        device: of the model.
        rounding: by how much states of one token may differ from batch to batch, as a share of their size.
    """

    model: nn.Module
    stack: Stack
    loss: Callable[[Batch], Tensor]
    batch: Callable[[Sequence[Any]], Batch]
    device: torch.device
    rounding: float = FINE


@final
@dataclass(frozen=True)
class Form:
    """How the states look: numbers of a token, their type, and whether layers return them in a tuple."""

    width: int
    dtype: torch.dtype
    tupled: bool


@final
@dataclass(frozen=True)
class Ran:
    """The loss of a batch, and the gradients of all that is trained."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch) -> Ran:
        """Runs it, the generators seeded; gradients that were there stay as they are."""
        torch.manual_seed(0)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        value = loss(batch)
        return cls(value.detach(), torch.autograd.grad(value, parameters, allow_unused=True))

    def same(self, other: Ran) -> bool:
        """Whether they are equal bit for bit."""
        return all(torch.equal(mine, theirs) for mine, theirs in self._pairs(other))

    def near(self, other: Ran, rounding: float) -> bool:
        """Whether they differ by rounding alone."""
        return all(_near(mine.reshape(1, -1), theirs.reshape(1, -1), rounding) for mine, theirs in self._pairs(other))

    def _pairs(self, other: Ran) -> Iterator[tuple[Tensor, Tensor]]:
        nothing = torch.zeros(())
        yield self.loss, other.loss
        for mine, theirs in zip(self.gradients, other.gradients, strict=True):
            yield nothing if mine is None else mine, nothing if theirs is None else theirs


def attempt(subject: Subject, records: Sequence[Any]) -> Form:
    """Tries it, and leaves model, gradients and random generators as they were.

    Args:
        subject: the model.
        records: of the training data.

    Raises:
        NotConstantError: it cannot be done.
    """
    ordered = sorted(records, key=len)
    short, other, long = ordered[0], ordered[min(len(ordered) - 1, len(ordered) // 8)], ordered[-1]
    with undisturbed(subject.model, subject.device):
        try:
            batch = subject.batch([short, other])
            seen, first = _whole(subject, batch)
            again, second = _whole(subject, batch)
            if not torch.equal(seen.states, again.states):
                raise NotConstantError("what the lower layers put out differs from time to time")
            _check_neighbours(subject, short, long)
            output = _stored(seen, _found(batch))
            with subject.stack.skipped(output):
                replayed = _run(subject, batch)
        except UnknownFormError:
            raise NotConstantError("the layers of this model return more than their states") from None
        except NotConstantError:
            raise
        except Exception as error:  # whatever a model does that was not made for this: it is then not done
            text = (str(error).splitlines() or [""])[0]
            raise NotConstantError(f"the model does not run without them ({type(error).__name__}: {text})") from error
    if not (replayed.same(first) or (not second.same(first) and replayed.near(first, subject.rounding))):
        raise NotConstantError("the model's loss needs more of the lower layers than what comes out of them")
    return Form(output.states.shape[-1], output.states.dtype, output.tupled)


def _whole(subject: Subject, batch: Batch) -> tuple[Output, Ran]:
    """The whole model on a batch; raises where the prefix is trained or random."""
    seen: list[Output] = []

    def see(output: Output) -> None:
        if output.states.requires_grad:
            raise NotConstantError("something below them is trained")
        if not all(map(torch.equal, before, _generators(subject.device))):
            raise NotConstantError("the model has dropout below them")
        seen.append(Output(output.states.detach().clone(), output.tupled))

    torch.manual_seed(0)
    before = _generators(subject.device)
    with subject.stack.watched(see):
        ran = _run(subject, batch)
    if len(seen) != 1:
        raise NotConstantError(f"the lower layers run {len(seen)} times in one forward pass")
    return seen[0], ran


def _run(subject: Subject, batch: Batch) -> Ran:
    return Ran.of(subject.model, subject.loss, batch)


def _check_neighbours(subject: Subject, short: Any, long: Any) -> None:
    """Raises unless a record's states are the same alone and padded beside the longest one, but for rounding."""
    alone, beside = (_prefix(subject, records) for records in ([short], [short, long]))
    digest = next(iter(alone))
    if digest not in beside:
        raise NotConstantError("records do not look the same in every batch")
    if not _near(beside[digest], alone[digest], subject.rounding):
        raise NotConstantError("what they put out for a record depends on the records beside it, or on its padding")


def _prefix(subject: Subject, records: Sequence[Any]) -> dict[str, Tensor]:
    """Digest → states of the records of one batch; nothing above the prefix is computed."""
    batch = subject.batch(records)
    kept: dict[str, Tensor] = {}

    def see(output: Output) -> NoReturn:
        for piece in _found(batch):
            kept[piece.digest] = piece.read(output.states).clone()
        raise _ReachedError

    try:
        with torch.no_grad(), subject.stack.watched(see):
            subject.loss(batch)
    except _ReachedError:
        pass
    return kept


class _ReachedError(Exception):
    """The states are there: the rest of the forward is of no use."""


def _found(batch: Batch) -> list[Piece]:
    found = pieces(batch)
    if found is None:
        raise NotConstantError("the batches are of a form that is not known here")
    return found


def _stored(output: Output, found: Sequence[Piece]) -> Output:
    """The output as it comes back from the disk: nothing where nothing is needed."""
    states = torch.zeros_like(output.states)
    for piece in found:
        piece.write(states, piece.read(output.states))
    return Output(states, output.tupled)


def _near(ours: Tensor, theirs: Tensor, share: float) -> bool:
    """Whether two tensors differ by rounding alone, in each row: states of one token can be much larger than others."""
    ours, theirs = ours.double(), theirs.double()
    return bool(((ours - theirs).norm(dim=-1) <= share * theirs.norm(dim=-1)).all())


def _generators(device: torch.device) -> list[Tensor]:
    own = [] if device.type in ("cpu", "mps") else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, in training mode; afterwards every module and every generator is as it was."""
    modes = {module: module.training for module in model.modules()}
    accelerated = device.type in ("cuda", "xpu")
    model.train()
    try:
        with torch.random.fork_rng(
            devices=[device] if accelerated else [], device_type=device.type if accelerated else "cuda"
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
