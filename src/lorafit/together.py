"""Adapted layers that read the same input one after the other, such as q, k and v: computed as one operation.

The first that is called computes its own output and those of the layers after it, which then hand theirs out. Each
output is handed out for that very input alone, by a layer that is in the same state as when it was computed; otherwise
a layer computes its own. As in `lorafit.memo`, what is written through `.data` is not seen.
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
from lorafit.kernels.precision import autocasts
from lorafit.kernels.scratch import recorded
from lorafit.kernels.siblings import Member, siblings, spent
from lorafit.layers import Site
from lorafit.rest import at_rest

MemberOf = Callable[[nn.Module, Tensor], Member | None]
StateOf = Callable[[nn.Module], tuple[object, ...]]
MISSES = 3
"""Passes in a row whose outputs nobody came for, after which the layers are no group any more."""


@dataclass
class _Waiting:
    """Outputs that layers of a group will come for, by their places, and what they were computed for and from.

    Attributes:
        group: whose.
        x: the input.
        around: in which modes.
        states: place → the state of its layer.
        outputs: place → its output.
        whole: whether all layers of the group were computed.
    """

    group: Group
    x: weakref.ref[Tensor]
    around: tuple[object, ...]
    states: dict[int, tuple[object, ...]]
    outputs: dict[int, Tensor]
    whole: bool


class _Own(threading.local):
    """What waits in one thread: for one group at a time, so that no more is held where a pass ends in an error."""

    def __init__(self) -> None:
        self.waiting: _Waiting | None = None


_OWN = _Own()


class Group:
    """Layers of a model that read the same input, in the order in which they are called."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.misses = 0

    def output(self, module: nn.Module, x: Tensor, member: MemberOf, state: StateOf) -> Tensor | None:
        """The output of one of the layers for x; None where it has to compute its own.

        Args:
            module: the layer that was called.
            x: (..., in).
            member: what a layer would compute for x now; None for one that has to compute by itself.
            state: what a layer's output depends on besides x.
        """
        place = next((index for index, each in enumerate(self.modules) if each is module), None)
        if place is None or recorded() or torch._C._get_tracing_state() is not None:
            return None  # a replica of the layer; or operations are counted, compiled, replayed or traced
        if x.is_inference():  # no versions
            return None
        around = _around(x)
        found = self._waiting_for(place, x, around, state(module))
        return self._compute(place, x, around, member, state) if found is None else found

    def _waiting_for(
        self, place: int, x: Tensor, around: tuple[object, ...], state: tuple[object, ...]
    ) -> Tensor | None:
        waiting = _OWN.waiting
        if waiting is None or waiting.group is not self:
            return None
        output = waiting.outputs.pop(place, None)
        right = waiting.x() is x and waiting.around == around and waiting.states.get(place) == state
        if output is None or not right or spent(output):
            self._missed()
            return None
        if not waiting.outputs:
            _OWN.waiting = None
            self.misses = 0 if waiting.whole else self.misses
        return output

    def _compute(
        self, place: int, x: Tensor, around: tuple[object, ...], member: MemberOf, state: StateOf
    ) -> Tensor | None:
        first = member(self.modules[place], x) if self.modules else None
        if first is None:
            return None
        others = {index: member(self.modules[index], x) for index in range(place + 1, len(self.modules))}
        members = {place: first, **{index: each for index, each in others.items() if each is not None}}
        outputs = siblings(x, list(members.values())) if len(members) > 1 else None
        if outputs is None:
            return None
        made = dict(zip(members, outputs, strict=True))
        result = made.pop(place)
        states = {index: state(self.modules[index]) for index in made}
        if _OWN.waiting is not None:
            _OWN.waiting.group._missed()
        _OWN.waiting = _Waiting(self, weakref.ref(x), around, states, made, whole=place == 0)
        return result

    def _missed(self) -> None:
        """Somebody did not come for its output, or could not use it: it was computed for nothing."""
        _OWN.waiting = None
        self.misses += 1
        if self.misses >= MISSES:
            self.modules = ()
            warnings.warn(
                "layers that were found to read the same input do not any more, or are not trained together; each "
                "computes its own output again (handle.fuse looks anew)",
                stacklevel=2,
            )


def _around(x: Tensor) -> tuple[object, ...]:
    """What else an output depends on."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if autocasts(kind) else None
    return (x._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast)


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
            calls.append((path, x, 0 if x is None else x._version))

        return seen

    handles = [site.module.register_forward_pre_hook(hook(path)) for path, site in sites.items()]
    try:
        with torch.inference_mode(False), at_rest(model):
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
    """The paths of calls in a row with the same input, by layers of one module; who is called twice is in none.

    Of one module: layers of several may lie in parts that are recomputed, sharded or offloaded each for itself.
    """
    counts: dict[str, int] = {}
    for path, _, _ in calls:
        counts[path] = counts.get(path, 0) + 1
    runs: list[list[str]] = []
    last: tuple[Tensor | None, int, str] = (None, 0, "")
    for path, x, version in calls:
        if counts[path] > 1:
            last = (None, 0, "")
            continue
        parent = path.rpartition(".")[0]
        if x is not None and x is last[0] and (version, parent) == last[1:]:
            runs[-1].append(path)
        else:
            runs.append([path])
        last = (x, version, parent)
    return [tuple(run) for run in runs]
