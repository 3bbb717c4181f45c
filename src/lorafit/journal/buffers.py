"""The model's own buffers in a loop: training moves some of them, though nobody trains them and no adapter holds them.

Running statistics of norms are such, and the vectors of a spectral norm, codebooks that follow an average, counters.
Nothing tells them from constants but that they move: so all are looked at, and those that moved are kept.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from lorafit.adapted import plain_class, walk
from lorafit.errors import CheckpointError, some
from lorafit.layers import site_class

MARK = "|"
"""Stands between a module's path and the name of a tensor there."""
SMALL = 1 << 24
"""Bytes up to which what a buffer was at first is kept in memory, so that it can be put back."""


@final
class Buffers:
    """The buffers of a model, and what they were at first.

    Args:
        model: the model; what adapters hold is not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first = {key: _mark(value) for key, value in self._now()}
        self._began: Mapping[str, list[Any]] = self._first
        self._copies = {key: _copy(value) for key, value in self._now() if _size(value) <= SMALL}

    def _now(self) -> Iterator[tuple[str, Tensor | None]]:
        for path, module in self._modules():
            for name, buffer in module._buffers.items():
                yield f"{path}{MARK}{name}", buffer

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        seen = set()
        for path, module, _ in walk(self._model):
            kind = site_class(plain_class(module))
            stored = kind is not None and kind.packed  # a weight of integers does not move, and is large
            if id(module) not in seen and not stored:
                seen.add(id(module))
                yield path, module

    def state(self) -> dict[str, Any]:
        """What has moved since the loop began, and what all were then."""
        values = {key: _copy(value) for key, value in self._now() if _mark(value) != self._began.get(key)}
        return {"values": values, "began": dict(self._began)}

    def put(self, state: Mapping[str, Any], say: Callable[[str], object]) -> None:
        """Makes the buffers what they were when `state` was asked for.

        Raises:
            CheckpointError: they are not of this model.
        """
        if not {"values", "began"} <= state.keys():
            raise CheckpointError("the buffers of the checkpoint are damaged", found=some(state) or "nothing")
        values, began = dict(state["values"]), state["began"]
        modules = dict(self._modules())
        for key, value in values.items():
            self._check(key, value, began, modules)
        left = []
        for key, buffer in self._now():
            if key in values or _mark(buffer) == began.get(key):
                continue
            if key in self._copies and self._first[key] == began.get(key):
                values[key] = self._copies[key]
            else:
                left.append(key.replace(MARK, "."))
        for key, value in values.items():
            path, _, name = key.rpartition(MARK)
            _set(modules[path], name, value)
        self._began = began
        if left:
            say(
                f"{len(left):,} buffers of the model are not what they were when the loop began ({some(left, 3)}), "
                "and stay as they are: the loop goes on exactly beside a model that is made as it was made then"
            )

    def _check(
        self, key: str, value: Tensor | None, began: Mapping[str, Any], modules: Mapping[str, nn.Module]
    ) -> None:
        path, _, name = key.rpartition(MARK)
        here = path in modules and name in modules[path]._buffers
        mine = modules[path]._buffers[name] if here else None
        same = mine is None or value is None or mine.shape == value.shape
        alike = key not in began or self._first.get(key, began[key])[1] == began[key][1]  # made anew in a forward pass
        if path not in modules or not (here or key not in began) or not (same or alike):
            raise CheckpointError(
                "the checkpoint has buffers that the model has not",
                where=f"{path}.{name}",
                found=None if value is None else tuple(value.shape),
                expected="none" if mine is None else tuple(mine.shape),
                fix="make the model as it was made when the loop began",
            )

    def told(self) -> str | None:
        """What there is to say of layers whose buffers are not what they were."""
        layers = self._moved()
        if not layers:
            return None
        return (
            f"running statistics or other buffers of {len(layers):,} layers changed in training ({layers[0]!r} "
            "is one), and the adapter's file does not hold them: save the model's own state too, or keep these layers "
            "in evaluation mode (Suggestion.train does so with norms that torch has)"
        )

    def _moved(self) -> list[str]:
        found = (key for key, value in self._now() if _mark(value) != self._began.get(key))
        return list(dict.fromkeys(key.rpartition(MARK)[0] for key in found))


def _set(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Gives a module this value for a buffer: in place where that can be, since others may hold the same tensor."""
    mine = module._buffers.get(name)
    if value is not None and mine is not None and mine.shape == value.shape and not mine.is_inference():
        with torch.no_grad():
            mine.copy_(value)
    elif name in module._buffers:  # one that is made anew in a forward pass, as caches of positions are
        module._buffers[name] = None if value is None else value.to(_device(module, mine), copy=True)
    else:
        module.register_buffer(name, None if value is None else value.to(_device(module, None), copy=True))


def _device(module: nn.Module, mine: Tensor | None) -> torch.device:
    """Where a module's buffer is, or its other tensors."""
    held = (each.device for each in (mine, *module.parameters(), *module.buffers()) if each is not None)
    return next(held, torch.device("cpu"))


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None or value.is_meta else value.detach().to("cpu", copy=True)


def _size(value: Tensor | None) -> int:
    return 0 if value is None else value.numel() * value.element_size()


def _mark(value: Tensor | None) -> list[Any]:
    """What tells a buffer from what it was: a digest of its bytes, and its shape."""
    if value is None:
        return ["", None]
    shape = list(value.shape)
    if value.is_meta:
        return ["meta", shape]
    plain = value.detach()
    plain = plain if plain.layout is torch.strided else plain.to_dense()
    plain = plain.int_repr() if plain.is_quantized else plain.resolve_conj().resolve_neg()
    data = plain.to("cpu").contiguous()
    size = _size(data)
    content = (ctypes.c_ubyte * size).from_address(data.data_ptr()) if size else b""
    return [hashlib.blake2b(content, digest_size=16).hexdigest(), shape]
