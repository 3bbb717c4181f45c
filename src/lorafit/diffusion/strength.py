"""How strongly adapters act: a factor on top of the scale that they were trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import final

from torch import Tensor

from lorafit.adapted import bank_of
from lorafit.delta import Delta, Dense, LowRank, Update
from lorafit.errors import ConfigError, StateError, some
from lorafit.handle import Handle
from lorafit.method import Adapter
from lorafit.methods import validate
from lorafit.methods.dora import DoRAAdapter


@final
class Stronger(Adapter):
    """An adapter whose change is multiplied by a factor."""

    def __init__(self, inner: Adapter, factor: float) -> None:
        super().__init__()
        self.inner = inner
        self.factor = factor
        self.dropout = inner.dropout
        self.training = inner.training

    def update(self, weight: Callable[[], Tensor]) -> Update:
        found = self.inner.update(weight)
        return Update(_times(found.delta, self.factor), found.gain)

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


def _times(delta: Delta, factor: float) -> Delta:
    if isinstance(delta, LowRank):
        return replace(delta, scale=delta.scale * factor)
    assert isinstance(delta, Dense)
    return Dense(delta.matrix * factor)


def set_strength(handles: Mapping[str, Handle], factor: float) -> None:
    """Has adapters act so strongly from now on; 1 is as they were trained.

    Of DoRA it is the low-rank part that is multiplied, as in diffusers: the magnitudes stay.

    Args:
        handles: name of the part → its adapter.
        factor: any number but 0, which `strength` and `Handle.disabled` have.

    Raises:
        ConfigError: another factor.
        StateError: an adapter is merged.
    """
    validate.number("strength", factor, fix="1.0")
    if factor == 0:
        raise ConfigError(
            "a strength of 0 is no adapter at all",
            where="strength",
            found=factor,
            expected="another number",
            fix="with lorafit.diffusion.strength.strength(handles, 0): ..., or handle.activate(None)",
        )
    for part, handle in handles.items():
        if handle.merged:
            raise StateError(
                "a merged adapter acts as strongly as it was merged",
                where=part,
                found=f"adapter {handle.name!r}, merged",
                expected="an adapter beside the weights",
                fix="handle.unmerge() first",
            )
    for handle in handles.values():
        for path in handle.sites:
            _put(handle, path, float(factor))


def _put(handle: Handle, path: str, factor: float) -> None:
    bank = bank_of(handle.sites[path].module)
    assert bank is not None
    adapter = bank[handle.name]
    if isinstance(adapter, DoRAAdapter):
        adapter.inner = _multiplied(adapter.inner, factor)
    else:
        assert isinstance(adapter, Adapter)
        bank[handle.name] = _multiplied(adapter, factor)


def _multiplied(adapter: Adapter, factor: float) -> Adapter:
    plain = adapter.inner if isinstance(adapter, Stronger) else adapter
    return plain if factor == 1 else Stronger(plain, factor)


def strength_of(handle: Handle) -> float:
    """How strongly an adapter acts now."""
    for path in handle.sites:
        adapter = handle.adapter(path)
        inner = adapter.inner if isinstance(adapter, DoRAAdapter) else adapter
        return inner.factor if isinstance(inner, Stronger) else 1.0
    return 1.0


@contextmanager
def strength(handles: Mapping[str, Handle], factor: float) -> Iterator[None]:
    """Within it adapters act at another strength; at 0 the pipeline is its base, bit for bit.

    Raises:
        ConfigError: as `set_strength`.
        StateError: as `set_strength`; or an adapter does not act at all.
    """
    idle = [part for part, handle in handles.items() if handle.name not in handle.active]
    if idle and factor != 0:
        raise StateError(
            "an adapter that does not act has no strength",
            where=some(idle),
            found=f"adapter {handles[idle[0]].name!r}, which is not active",
            expected="an active one",
            fix="handle.activate(handle.name) first",
        )
    if factor == 0:
        with ExitStack() as stack:
            for handle in handles.values():
                stack.enter_context(handle.disabled())
            yield
        return
    before = {part: strength_of(handle) for part, handle in handles.items()}
    set_strength(handles, factor)
    try:
        yield
    finally:
        for part, handle in handles.items():
            set_strength({part: handle}, before[part])
