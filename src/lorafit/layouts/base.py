"""What a type of adapter file is: the abstract class, and what all types have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorafit.delta import LowRank
from lorafit.layers import Site
from lorafit.method import Adapter, Around, Method, Spot
from lorafit.methods.initialisers import INITIALISERS
from lorafit.peft_config import Parsed, Reader
from lorafit.peft_layout import Description

Record = Mapping[str, Any]
"""What a file of this library keeps for itself, under the key "lorafit" of its config."""


Locator = Callable[[str], tuple[str | None, str]]


class ContradictionError(Exception):
    """The tensors and settings of a file are not those of the method that its key "lorafit" names."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter and its place in a file.

    Attributes:
        attribute: the name under which its value is kept while loading.
        key: the tensor's own key in the file.
        from_file: (site, tensor, rank) → the value as the site uses it. Raises ValueError with the shape it wants.
        ranked: whether its first dimension is the rank.
    """

    attribute: str
    key: str
    from_file: Callable[[Site, Tensor, int], Tensor]
    ranked: bool = False


@dataclass(frozen=True)
class Place:
    """A site for which a file has values.

    Attributes:
        path: the module's path.
        site: the layer.
        spot: it, as a method sees it; `spot.method` is the method there.
        values: the tensors of the file, by `Slot.attribute`.
    """

    path: str
    site: Site
    spot: Spot
    values: Mapping[str, Tensor]


class Layout(ABC):
    """One type of adapter file (`peft_type`): what is written, and how what is read becomes adapters.

    Attributes:
        mathematics: settings of this type that say what is computed.
        must_be: settings that are read only at the values that change nothing.
        ignored: settings of this type that do not enter the function.
        shared: keys of tensors that belong to all sites together.
    """

    peft_type: ClassVar[str]
    mathematics: ClassVar[frozenset[str]]
    must_be: ClassVar[Mapping[str, tuple[object, ...]]]
    ignored: ClassVar[frozenset[str]]
    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def tensors(self, description: Description) -> dict[str, Tensor]:
        """Every tensor of the adapters under its key."""

    @abstractmethod
    def config(self, description: Description) -> dict[str, Any]:
        """The settings of this type."""

    def record(self, description: Description) -> dict[str, Any]:
        """What this type keeps under the key "lorafit", beside the method."""
        return {}

    @abstractmethod
    def method(self, reader: Reader) -> Method:
        """The method as the settings of this type name it. Raises `CheckpointError`."""

    @abstractmethod
    def rank(self, reader: Reader) -> int:
        """The rank where no pattern says otherwise."""

    def ranks(self, reader: Reader) -> dict[str, int]:
        """Pattern of paths → rank."""
        return {}

    def alphas(self, reader: Reader) -> dict[str, float]:
        """Pattern of paths → alpha."""
        return {}

    @abstractmethod
    def slots(self, site: Site, parsed: Parsed) -> tuple[Slot, ...]:
        """The tensors of one site; two slots of one attribute are two spellings, the usual one first."""

    @abstractmethod
    def keys(self, parsed: Parsed) -> tuple[str, ...]:
        """The keys of `slots` of all kinds of sites."""

    def locator(self, parsed: Parsed) -> Locator:
        """Gives module path and own key of a tensor, from its key without the prefix; no path for a key of no site."""
        keys = self.keys(parsed)
        return lambda rest: split(rest, keys)

    def paths(self, parsed: Parsed) -> Sequence[str]:
        """Sites that may have no tensor of their own."""
        return ()

    def at(self, parsed: Parsed, path: str) -> Method:
        """The method of one site, as the settings of this type name it."""
        return parsed.method

    def plain(self, parsed: Parsed, path: str, site: Site, values: Mapping[str, Tensor]) -> LowRank | None:
        """The change that a site's values are by themselves; None where it depends on W or on other tensors."""
        return None

    @abstractmethod
    def adapters(
        self, method: Method, places: Sequence[Place], shared: Mapping[str, Tensor], parsed: Parsed, record: Record
    ) -> dict[str, Adapter]:
        """Adapters of `method` that hold the values.

        Args:
            method: the method; `place.spot.method` is it at each site.
            places: the sites and their values, in model order.
            shared: the tensors of all sites together, by key.
            parsed: the settings.
            record: what `record` gave when the file was written; empty if PEFT wrote it.

        Raises:
            ContradictionError: the values are not those of such a method.
            CheckpointError: they fit no method.
        """


def split(rest: str, keys: Iterable[str]) -> tuple[str | None, str]:
    """A key as module path and the one of `keys` that it ends with; no path where it ends with none."""
    for key in keys:
        if rest == key:
            return "", key
        if rest.endswith("." + key):
            return rest[: -len(key) - 1], key
    return None, ""


def site_rank(parsed: Parsed, path: str) -> int:
    """The rank that a config gives a site."""
    found = parsed.rank_pattern.find(path)
    return parsed.rank if found is None else found


class Undrawn(TorchFunctionMode):
    """Within it nothing is drawn at random: for adapters of which a file has every tensor."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.uniform_ or function is Tensor.normal_:
            return args[0]
        return function(*args, **(kwargs or {}))


def blank(method: Method, places: Sequence[Place]) -> dict[str, Adapter]:
    """New adapters of the right kind whose values are about to be replaced: nothing is learnt from weights or data.

    Where weights would be read they have no columns: what is computed from them takes no time.
    """
    plain: dict[Method, Method] = {}
    spots = []
    for spot in (place.spot for place in places):
        own = plain[spot.method] if spot.method in plain else plain.setdefault(spot.method, _plain(spot.method))
        spots.append(replace(spot, method=own, weight=partial(torch.empty, spot.shape.out, 0, device=spot.device)))
    made = _plain(method).adapters(spots, generator=torch.Generator())
    absent = [place.path for place in places if place.path not in made]
    if absent:
        raise ContradictionError(f"{method.name} puts no adapter on {absent[0]}")
    return {place.path: made[place.path].to(device=place.spot.device, dtype=place.spot.dtype) for place in places}


def _plain(method: Method) -> Method:
    """The method with the default initialiser."""
    if isinstance(method, Around):
        return method.around(_plain(method.within))
    named = {field.name for field in fields(method)}
    return replace(method, **{"init": "default"}) if "init" in named else method


def anchored(method: Method) -> bool:
    """Whether a method's adapters start at B A ≠ 0 and take that off."""
    while isinstance(method, Around):
        method = method.within
    if "init" not in {field.name for field in fields(method)}:
        return False
    start: Any = vars(method)["init"]
    return INITIALISERS[start].anchored


def put(adapter: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a parameter or buffer of an adapter; its device, precision and kind stay."""
    own = adapter._parameters.get(name)
    if own is not None:
        adapter._parameters[name] = nn.Parameter(value.to(own, copy=True), own.requires_grad)
        return
    buffer = adapter._buffers[name]
    assert buffer is not None
    adapter._buffers[name] = value.to(buffer, copy=True)


def exactly(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`stored`. Raises ValueError for another shape."""
    if tuple(stored.shape) != shape:
        raise ValueError(str(shape))
    return stored
