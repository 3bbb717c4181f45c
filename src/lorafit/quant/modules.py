"""Layers whose weight is int8 rows: the module stays the object it was, of a generated subclass of its own class.

`weight` is then an int8 parameter in the layer's own layout, and a buffer `weight_scale` beside it holds one float32
number for each output: both are in the `state_dict`. A state dict with floating-point weights is packed as it loads.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from lorafit.kernels.precision import wanted
from lorafit.quant.linear import frozen_linear
from lorafit.quant.rows import Int8Rows, pack

SCALE = "weight_scale"
ORIGIN = "_lorafit_rows_of"
ModuleClass = type[nn.Module]


class Int8Layer(ABC):  # noqa: B024 (a mark: classes are registered with it)
    """What every layer with int8 rows is an instance of, whatever layer type it is."""


class Int8OutIn(ABC):  # noqa: B024 (a mark)
    """A layer with int8 rows whose weight is (out, in)."""


class Int8InOut(ABC):  # noqa: B024 (a mark)
    """A layer with int8 rows whose weight is (in, out)."""


def origin(kind: ModuleClass) -> ModuleClass:
    """The class that a layer with int8 rows had before, given its class now."""
    base: ModuleClass = next(vars(each)[ORIGIN] for each in kind.__mro__ if ORIGIN in vars(each))
    return base


def install(module: nn.Module, values: Tensor, scale: Tensor, *, transposed: bool) -> None:
    """Gives a plain module int8 rows for its weight, values and scale in the layer's own layout."""
    make: Callable[..., ModuleClass] = packed
    kind = make(type(module), transposed)
    module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    module.register_buffer(SCALE, scale)
    module.__class__ = kind


@cache
def packed(base: ModuleClass, transposed: bool) -> ModuleClass:
    """The subclass of `base`, a class of linear layers, whose weight is int8 rows."""

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name for it)
        dtype = wanted(input, input.dtype)
        rows = Int8Rows(self.weight, self.weight_scale, dtype, transposed)
        return frozen_linear(input, rows, self.bias, dtype)

    def apply_(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What converts a model to bfloat16 means its numbers, and these say what the integers are.
        before = self._buffers[SCALE]
        base._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers[SCALE]
        if after.dtype != before.dtype:
            self._buffers[SCALE] = before.to(after.device)
        return self

    def load(self: Any, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.shape == self.weight.shape:
            if f"{prefix}{SCALE}" in state_dict:
                rest[-1].append(f"{prefix}weight: {unscaled(weight)}")
                return
            rows = pack(weight.t() if transposed else weight)
            # Contiguous: with assign=True these become the layer's own.
            state_dict[f"{prefix}weight"] = (rows.values.t() if transposed else rows.values).contiguous()
            state_dict[f"{prefix}{SCALE}"] = (rows.scale.t() if transposed else rows.scale).contiguous()
        base._load_from_state_dict(self, state_dict, prefix, metadata, strict, *rest)

    def extra_repr(self: Any) -> str:
        return f"{base.extra_repr(self)}, int8 rows".removeprefix(", ")

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # A generated class cannot be imported by name: rebuild it from its base instead.
        state = base.__reduce_ex__(self, protocol)
        assert isinstance(state, tuple)
        return (_revive, (base, transposed), *state[2:])

    name = f"Int8[{base.__name__}]"
    namespace = {
        "forward": forward,
        "extra_repr": extra_repr,
        "_apply": apply_,
        "_load_from_state_dict": load,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": name,
        "__doc__": f"`{base.__qualname__}` with int8 rows for its weight.",
        ORIGIN: base,
    }
    kind = type(name, (base,), namespace)
    for mark in (Int8Layer, Int8InOut if transposed else Int8OutIn):
        mark.register(kind)
    return kind


def unscaled(weight: Tensor) -> str:
    """What to say of a floating-point weight that has a scale beside it."""
    return (
        f"a weight of {weight.dtype} with a {SCALE} beside it is not int8 rows, and not the plain weight either. "
        f"Give int8 rows as they were saved (never cast them), or plain weights alone, multiplied by their scale"
    )


def _revive(base: ModuleClass, transposed: bool) -> nn.Module:
    make: Callable[..., ModuleClass] = packed
    kind = make(base, transposed)
    return kind.__new__(kind)
