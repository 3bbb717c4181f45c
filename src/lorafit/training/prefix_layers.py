"""The layers of a model below all that is trained: which they are, what comes out of them, and how to do without.

Nothing here knows a model by its name. The layers are those of its largest `ModuleList`. To skip them, stand-ins
take their places in that list while a forward runs, and hand on the states they were given; embeddings, masks,
positions and all layers above run as always, with the arguments as always. Whether that gives the same loss and the
same gradients in a given model is tried before it is used (`prefix_trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from lorafit.adapted import BANK, bank_of, walk


class UnknownFormError(Exception):
    """A layer returns something else than (batch, tokens, width), alone or as the only part of a tuple."""


class Output(NamedTuple):
    """What a layer returns.

    Attributes:
        states: (batch, tokens, width).
        tupled: whether they come as the only part of a tuple.
    """

    states: Tensor
    tupled: bool


@final
class Stack:
    """The lower layers of a model.

    Args:
        path: of the list of layers.
        layers: the list.
        first: the lowest layer in which something is adapted or trained: those below are the prefix.
    """

    def __init__(self, path: str, layers: nn.ModuleList, first: int) -> None:
        self.path = path
        self.layers = layers
        self.first = first

    @property
    def share(self) -> float:
        """The part of all layers that lies below the first trained one."""
        return self.first / len(self.layers)

    @contextmanager
    def watched(self, see: Callable[[Output], None]) -> Iterator[None]:
        """Within, `see` gets what the prefix puts out. Raises `UnknownFormError` for an output of another form."""
        # Files are not for a compiler, which traces a compiled layer's hooks too.
        seen = torch.compiler.disable(lambda module, args, output: see(_parted(output)))  # type: ignore[no-untyped-call]
        hook = self.layers[self.first - 1].register_forward_hook(seen)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def skipped(self, output: Output) -> Iterator[None]:
        """Within, a forward takes this for the prefix's output, and does not compute it."""
        layers = [self.layers[place] for place in range(self.first)]
        given = (output.states,) if output.tupled else output.states
        try:
            for place, layer in enumerate(layers):
                self.layers[place] = _StandIn(layer, given)
            yield
        finally:
            for place, layer in enumerate(layers):
                self.layers[place] = layer


def _parted(output: Any) -> Output:
    match output:
        case Tensor() as states if states.dim() == 3:
            return Output(states, tupled=False)
        case (Tensor() as states,) if states.dim() == 3:
            return Output(states, tupled=True)
    raise UnknownFormError


class _StandIn(nn.Module):
    """Stands in a list for a layer: it returns what it was given, and has the layer's attributes for who asks."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["stands_for"] = layer  # not as a submodule: its parameters are not part of this forward
        self.__dict__["output"] = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["output"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)


def find_stack(model: nn.Module) -> Stack | None:
    """The model's main list of layers, with the lowest of them that is adapted or trained; None without a list."""
    lists = {path: module for path, module, _ in walk(model) if isinstance(module, nn.ModuleList)}
    if not lists:
        return None
    path = max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
    layers = lists[path]
    touched = (place for place, layer in enumerate(layers) if _touched(layer))
    return Stack(path, layers, next(touched, len(layers)))


def _touched(layer: nn.Module) -> bool:
    adapted = any(bank_of(module) is not None for _, module, _ in walk(layer))
    return adapted or any(parameter.requires_grad for parameter in layer.parameters())


def below(model: nn.Module, stack: Stack) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base model that the prefix may depend on, by name: all but adapters and upper layers."""
    upper = tuple(f"{stack.path}.{place}." for place in range(stack.first, len(stack.layers)))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(upper) and BANK not in name.split("."):
            yield name, tensor
