"""Adapted layers that read the same input one after the other, such as q, k and v: computed as one operation.

The first that is called computes its own output and those of the layers after it, which then hand theirs out. Each
output is handed out for that very input alone, by a layer that would compute the same now; otherwise a layer computes
its own.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import StateError
from lorafit.kernels.scratch import recorded
from lorafit.kernels.siblings import Member, siblings
from lorafit.layers import Site
from lorafit.rest import at_rest

MemberOf = Callable[[nn.Module, Tensor], Member | None]
MISSES = 3
"""Passes in a row whose outputs nobody came for, after which the layers are no group any more."""


@dataclass
class _Waiting:
    """Outputs that layers will come for, by their places; what they were computed for; whether for all of the group."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    outputs: dict[int, Tensor]
    whole: bool


class _Own(threading.local):
    """What waits in one thread, and how often in a row nobody came."""

    def __init__(self) -> None:
        self.waiting: _Waiting | None = None
        self.misses = 0


class Group:
    """Layers of a model that read the same input, in the order in which they are called."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._own = _Own()

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}  # what waits belongs to a pass of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.modules = state["modules"]
        self._own = _Own()

    def output(self, module: nn.Module, x: Tensor, member: MemberOf) -> Tensor | None:
        """The output of one of the layers for x; None where it has to compute its own.

        Args:
            module: the layer that was called.
            x: (..., in).
            member: what a layer would compute for x now; None for one that has to compute by itself.
        """
        place = next((index for index, each in enumerate(self.modules) if each is module), None)
        if place is None or recorded():  # a replica of the layer; or operations are counted, compiled or replayed
            return None
        own, state = self._own, _state(x)
        waiting = own.waiting
        if waiting is not None and waiting.x() is x and waiting.state == state and place in waiting.outputs:
            if len(waiting.outputs) == 1:
                own.waiting, own.misses = None, 0 if waiting.whole else own.misses
            return waiting.outputs.pop(place)
        if waiting is not None:
            self._missed()
        return self._compute(place, x, state, member)

    def _compute(self, place: int, x: Tensor, state: tuple[object, ...], member: MemberOf) -> Tensor | None:
        found = [(index, member(each, x)) for index, each in enumerate(self.modules) if index >= place]
        members = {index: each for index, each in found if each is not None}
        if place not in members or len(members) < 2:
            return None
        outputs = siblings(x, list(members.values()))
        if outputs is None:
            return None
        made = dict(zip(members, outputs, strict=True))
        result = made.pop(place)
        self._own.waiting = _Waiting(weakref.ref(x), state, made, whole=place == 0)
        return result

    def _missed(self) -> None:
        """Somebody did not come for its output, which then was computed for nothing."""
        own = self._own
        own.waiting = None
        own.misses += 1
        if own.misses >= MISSES:
            self.modules = ()
            warnings.warn(
                "layers that were found to read the same input do not any more; each computes its own output again "
                "(handle.fuse looks anew)",
                stacklevel=2,
            )


def _state(x: Tensor) -> tuple[object, ...]:
    """What else an output depends on."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (0 if x.is_inference() else x._version, torch.is_grad_enabled(), cast)


def find(model: nn.Module, sites: Mapping[str, Site], run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Runs of sites that read the same input in one forward pass, by their paths, in the order of their calls.

    Args:
        model: the model; afterwards it is in the mode in which it was.
        sites: those to look at.
        run: calls the model.

    Raises:
        StateError: no site was called.
    """
    calls: list[tuple[str, Tensor | None, int]] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args and isinstance(args[0], Tensor) else None
            calls.append((path, x, 0 if x is None or x.is_inference() else x._version))

        return seen

    handles = [site.module.register_forward_pre_hook(hook(path)) for path, site in sites.items()]
    try:
        with at_rest(model):
            run()
    finally:
        for each in handles:
            each.remove()
    if sites and not calls:
        raise StateError(
            "no layer of the adapter was called",
            expected="a batch that reaches the adapted layers",
            fix="call it as you call the model in training: handle.fuse(**batch)",
        )
    return [run for run in _runs(calls) if len(run) > 1]


def _runs(calls: Sequence[tuple[str, Tensor | None, int]]) -> list[tuple[str, ...]]:
    """The paths of calls in a row with the same input; a layer that is called twice is in none."""
    counts: dict[str, int] = {}
    for path, _, _ in calls:
        counts[path] = counts.get(path, 0) + 1
    runs: list[list[str]] = []
    last: tuple[Tensor | None, int] = (None, 0)
    for path, x, version in calls:
        if counts[path] > 1:
            last = (None, 0)
            continue
        if x is not None and x is last[0] and version == last[1]:
            runs[-1].append(path)
        else:
            runs.append([path])
        last = (x, version)
    return [tuple(run) for run in runs]
