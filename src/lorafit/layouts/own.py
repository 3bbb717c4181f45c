"""Type LORAFIT: this library's own, for what no type of PEFT's can hold. The tensors are the adapters' state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from lorafit.errors import CheckpointError, nearest
from lorafit.layers import Site
from lorafit.layouts.base import Layout, Locator, Place, Record, Slot, blank, put
from lorafit.method import Adapter, Around, Method
from lorafit.methods.subspace import Subspace
from lorafit.methods.vera import Projection, VeRA
from lorafit.patterns import heads
from lorafit.peft_config import Parsed, Reader
from lorafit.peft_layout import Description, join

OWN = "lorafit"
"""The key of a config under which this library keeps what PEFT has no name for."""


class OwnLayout(Layout):
    """This library's own type; the settings are those under the key "lorafit"."""

    peft_type = "LORAFIT"
    mathematics = frozenset({OWN})
    must_be: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({"bias": ("none",)})
    ignored = frozenset[str]()

    def tensors(self, description: Description) -> dict[str, Tensor]:
        drawn = not _saves_projection(description.method)
        found: dict[str, Tensor] = {}
        for path, placed in description.sites.items():
            left_out = _redrawn(placed.adapter) if drawn else ()
            for key, value in placed.adapter.state_dict().items():
                if key not in left_out:
                    found[join(path, key)] = value
        return found

    def config(self, description: Description) -> dict[str, Any]:
        return {"exclude_modules": None}

    def record(self, description: Description) -> dict[str, Any]:
        return {"paths": list(description.sites)}

    def method(self, reader: Reader) -> Method:
        raise reader.error(
            OWN,
            "a file of this type is nothing without its method",
            reader.config.get(OWN),
            'an object with "method" and "paths"',
            fix="copy the config again from where the adapter was saved",
        )

    def rank(self, reader: Reader) -> int:
        return 0

    def slots(self, site: Site, parsed: Parsed) -> tuple[Slot, ...]:
        return ()

    def keys(self, parsed: Parsed) -> tuple[str, ...]:
        return ()

    def locator(self, parsed: Parsed) -> Locator:
        paths = set(self.paths(parsed))

        def locate(rest: str) -> tuple[str | None, str]:
            inner = [path for path in heads(rest) if path in paths and path != rest]
            if inner:  # the innermost of two, one inside the other
                return inner[-1], rest[len(inner[-1]) + 1 :]
            return ("", rest) if "" in paths else (None, "")

        return locate

    def paths(self, parsed: Parsed) -> Sequence[str]:
        paths = parsed.config[OWN].get("paths")
        if isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths):
            return paths
        raise Reader(parsed.config, parsed.where).error(
            f"{OWN}.paths", "these are no module paths", paths, "a list of the paths of the adapted layers"
        )

    def adapters(
        self, method: Method, places: Sequence[Place], shared: Mapping[str, Tensor], parsed: Parsed, record: Record
    ) -> dict[str, Adapter]:
        made = blank(method, places)
        for place in places:
            _fill(made[place.path], place, parsed, drawn=not _saves_projection(method))
        return made


def _fill(adapter: Adapter, place: Place, parsed: Parsed, *, drawn: bool) -> None:
    own = adapter.state_dict()
    left_out = _redrawn(adapter) if drawn else ()
    for key in own:
        if key not in place.values and key not in left_out:
            raise _key("missing key", join(place.path, key), parsed, place.values)
    for key in place.values:
        if key not in own:
            raise _key("unexpected key", join(place.path, key), parsed, own)
    different = {key: value.shape for key, value in place.values.items() if value.shape != own[key].shape}
    if different:
        try:
            adapter.resize({key: value.shape for key, value in place.values.items()})
        except ValueError as error:
            key = next(iter(different))
            raise CheckpointError(
                "wrong shape",
                where=f"{parsed.where.parent}: {join(place.path, key)}",
                found=tuple(different[key]),
                expected=f"{tuple(own[key].shape)} ({error})",
                fix="load the base model that the adapter was trained on",
            ) from None
    for key, value in place.values.items():
        path, _, name = key.rpartition(".")
        put(adapter.get_submodule(path), name, value)
    for name, module in adapter.named_modules():
        if isinstance(module, Subspace):
            module.operator()  # drawn now, for a graph that is compiled before the first pass
        if isinstance(module, Projection) and f"{name}.A" not in place.values:
            _draw(module, join(place.path, "seed"), parsed)


def _draw(module: Projection, where: str, parsed: Parsed) -> None:
    if module.key is None:
        raise CheckpointError(
            "neither the projections nor their seed are in the file",
            where=f"{parsed.where.parent}: {where}",
            expected="one of the two",
            fix="copy the file again",
        )
    pair = Projection.draw(module.key, module.A.shape[0], module.B.shape[0], module.A.shape[1])
    put(module, "A", pair.A)
    put(module, "B", pair.B)


def _key(message: str, key: str, parsed: Parsed, near: Mapping[str, Tensor]) -> CheckpointError:
    return CheckpointError(
        message,
        where=f"{parsed.where.parent}: {key}",
        found=f"{len(near)} tensors for this layer" if message == "missing key" else repr(key),
        expected=repr(key) if message == "missing key" else f"the tensors of {parsed.method.name}",
        near=nearest(key.rpartition(".")[2], near),
        fix="copy the file again; if the key is a mistake, rename or remove it",
    )


def _saves_projection(method: Method) -> bool:
    while isinstance(method, Around):
        method = method.within
    return not isinstance(method, VeRA) or method.save_projection


def _redrawn(adapter: Adapter) -> tuple[str, ...]:
    """Keys of tensors that their seed gives again."""
    found: list[str] = []
    for path, module in adapter.named_modules():
        if isinstance(module, Projection) and module.key is not None:
            found += [f"{path}.A", f"{path}.B"]
    return tuple(found)
