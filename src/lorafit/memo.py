"""Remembering a value for as long as the tensors that it was computed from are what they were."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

V = TypeVar("V")
_KEYS = torch._C._TorchDispatchModeKey
_TRACING = (_KEYS.PROXY, _KEYS.FAKE, _KEYS.FUNCTIONAL)
"""What torch's own modes that trace are known by."""


class Instant:
    """A moment between two steps, equal to itself alone."""


class Steps:
    """Knows when any optimizer steps: fused ones change parameters without counting up their versions."""

    def __init__(self) -> None:
        self.now = Instant()

    def taken(self, *_: Any) -> None:
        """Runs after each step of any optimizer."""
        # Not a number to count up: traced together with a compiled step, that would compile anew each time.
        self.now = Instant()


STEPS = Steps()
"""One for the whole process, told by torch's own hook for all optimizers."""
register_optimizer_step_post_hook(STEPS.taken)


def state(tensors: Iterable[Tensor], *also: Hashable) -> tuple[Hashable, ...] | None:
    """What changes whenever one of these tensors or of the values in `also` changes, or None if nothing would show it.

    Memory, not address: a weak reference holds the identity of a tensor's memory, so that other memory that happens to
    come to lie at the same address (after `.half()` and `.float()`, say) is not taken for it. What this cannot see is a
    value written through `.data`, or by a fused optimizer: for parameters `STEPS.now` belongs in `also`.
    """
    if _get_current_dispatch_mode() is not None:
        # A mode sees operations: those that record and replay (selective checkpointing) must see the same ones twice.
        return None
    try:
        seen = tuple((_memory(t), t._version, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in tensors)
    except (RuntimeError, NotImplementedError):
        # Tensors made in inference mode have no versions, those inside of torch.func's transforms no memory.
        return None
    return (*seen, *also)


@contextmanager
def unseen(*tensors: Tensor) -> Iterator[None]:
    """Within, modes that count, keep or replay operations see none.

    For values that decide what is computed: the pass that a mode sees and a repetition that it does not see must come
    to the same. Modes that trace are not put aside, for they need to see all; nor is any for tensors with ways of
    their own, such as those without values.
    """
    traced = any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)
    if _get_current_dispatch_mode() is None or traced or any(type(each) is not Tensor for each in tensors):
        yield
        return
    with _disable_current_modes():
        yield


def _memory(tensor: Tensor) -> Hashable:
    reference: Hashable = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return reference


class Memo(Generic[V]):
    """One value and the state for which it holds. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: tuple[tuple[Any, ...], V] | None = None

    def get(self, now: tuple[Hashable, ...] | None, compute: Callable[[], V]) -> V:
        """The value remembered for the state `now`, or else a computed one, remembered unless `now` is None."""
        entry = self._entry
        if now is None:
            return compute()
        if entry is None or entry[0] != now:
            # Made in inference mode it could not be used in training.
            with torch.inference_mode(False):
                entry = (now, compute())
            self._entry = entry
        return entry[1]

    def held(self, tensors: Sequence[Tensor], *also: Hashable) -> V | None:
        """The value if it is remembered for ``state(tensors, *also)``, else None.

        It finds the same as `get` would, for a fraction of what it takes to make a state: this runs in forward passes.
        """
        entry = self._entry  # read once: another thread may forget it
        if entry is None or _get_current_dispatch_mode() is not None:
            return None
        seen, value = entry
        if seen[len(tensors) :] != also:
            return None
        try:
            for each, (memory, version, offset, shape, stride, dtype) in zip(tensors, seen, strict=False):
                # The weak reference in `seen` keeps the number from being given to other memory.
                same = each.untyped_storage()._cdata == memory.cdata and each._version == version
                if not same or each.storage_offset() != offset or each.shape != shape:
                    return None
                if each.stride() != stride or each.dtype != dtype:
                    return None
        except (RuntimeError, NotImplementedError):
            return None
        return value

    def clear(self) -> None:
        """Forgets the value."""
        self._entry = None

    def __reduce__(self) -> tuple[type[Memo[V]], tuple[()]]:
        return Memo, ()
