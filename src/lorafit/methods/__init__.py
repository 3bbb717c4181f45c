"""The household: one file, one paper. `METHODS` is the only place where a name stands for a method."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorafit.errors import ConfigError, nearest
from lorafit.method import Method
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.delta_lora import DeltaLoRA
from lorafit.methods.dora import DoRA
from lorafit.methods.intrinsic import IntrinsicDimension
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_drop import LoRADrop
from lorafit.methods.lora_fa import LoRAFA
from lorafit.methods.lora_plus import LoRAPlus
from lorafit.methods.vera import VeRA

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {kind.name: kind for kind in (LoRA, LoRAPlus, LoRAFA, VeRA, LoRADrop, AdaLoRA, DoRA, DeltaLoRA, IntrinsicDimension)}
)
"""Name on the command line and in files → method class."""

INNER = "inner"
"""The field of a method that holds another one."""

__all__ = [
    "METHODS",
    "AdaLoRA",
    "DeltaLoRA",
    "DoRA",
    "IntrinsicDimension",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "LoRAPlus",
    "VeRA",
    "accepts",
    "build",
    "describe",
    "fields_of",
    "revive",
]


def fields_of(kind: type[Method]) -> dict[str, Any]:
    """The fields of a method and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def method_class(name: object, where: str = "method") -> type[Method]:
    """The class behind a name, with dashes or underscores, in any case. Raises `ConfigError` for any other name."""
    canonical = str(name).replace("_", "-").lower()
    if canonical not in METHODS:
        near = nearest(canonical, METHODS)
        raise ConfigError(
            "unknown method",
            where=where,
            found=repr(name),
            expected=f"one of {', '.join(METHODS)}",
            near=near,
            fix=f"write {next(iter(near), 'lora')}",
        )
    return METHODS[canonical]


def inner_class(kind: type[Method], given: object = None) -> type[Method] | None:
    """The class of the method inside of a `kind`, as `given` names it or by default; None for one without."""
    if INNER not in fields_of(kind):
        return None
    where = f"{kind.name}: {INNER}"
    if not isinstance(given, Mapping):
        return LoRA if given is None else method_class(given, where)
    if given.get("method") is None:
        raise ConfigError(
            "the method inside has settings, and no name: method is missing",
            where=where,
            found=repr(dict(given)),
            expected="method, and settings of that method",
            fix=f"{INNER}: {{method: {LoRA.name}, ...}}",
        )
    return method_class(given["method"], where)


def accepts(name: str, inner: object = None) -> dict[str, Any]:
    """The settings that `build` takes for a method, its own and those that it passes on to the method inside."""
    kind = method_class(name)
    within = inner_class(kind, inner)
    return {**({} if within is None else accepts(within.name, _nested(inner))), **fields_of(kind)}


def _nested(given: object) -> object:
    """What a mapping for the method inside says of the one inside of that."""
    return given.get(INNER) if isinstance(given, Mapping) else None


def build(name: str, options: Mapping[str, Any]) -> Method:
    """A method from flat settings: what is no field of the method goes to the one inside of it.

    Args:
        name: one of `METHODS`.
        options: settings by name; ``inner`` is a method's name, or a mapping with ``method`` and settings of its own.
            If it is given, settings that both methods have are the inner one's.

    Raises:
        ConfigError: an unknown method or setting, one that is given flat and in ``inner``, or a value out of range.

    >>> build("lora-plus", {"r": 8, "ratio": 2.0}).ratio
    2.0
    >>> build("dora", {"inner": "vera", "r": 64})
    DoRA(inner=VeRA(r=64, d_init=0.1, save_projection=True, dropout=0.0))
    """
    kind = method_class(name)
    own, rest, given = fields_of(kind), dict(options), options.get(INNER)
    within = inner_class(kind, given)
    if within is None:
        _check_known(kind, options, own)
        return kind(**_frozen(rest))
    rest.pop(INNER, None)
    passed = accepts(within.name, _nested(given))
    _check_known(kind, rest, {**passed, **own})
    if isinstance(given, Mapping):
        named = {key: value for key, value in given.items() if key != "method"}
        _check_known(within, named, passed, f"{kind.name}: {INNER}")
        _check_once(kind, rest, named)
        rest.update(named)
    inside = {key: value for key, value in rest.items() if key in passed and (key not in own or given is not None)}
    mine = {key: value for key, value in rest.items() if key not in inside}
    if inside or given is not None:
        mine[INNER] = build(within.name, inside)
    return kind(**_frozen(mine))


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples for lists: files have no others."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check_once(kind: type[Method], flat: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    for key in flat:
        if key in named:
            raise ConfigError(
                "a setting of the method inside is given twice",
                where=f"{kind.name}: {INNER}",
                found=f"{key}={flat[key]!r} and {INNER}.{key}={named[key]!r}",
                expected=f"{key}, once",
                fix=f"remove one of {key} and {INNER}.{key}",
            )


def _check_known(
    kind: type[Method], options: Mapping[str, Any], known: Mapping[str, Any], where: str | None = None
) -> None:
    for key in options:
        if key not in known:
            raise ConfigError(
                f"{kind.name} has no such setting",
                where=where or kind.__name__,
                found=repr(key),
                expected=f"one of {', '.join(known)}",
                near=nearest(key, known),
                fix=f"remove {key!r}",
            )


def describe(method: Method) -> dict[str, Any]:
    """A method in JSON's types; `revive` makes it again.

    >>> describe(LoRA(r=4))["r"]
    4
    """
    plain: dict[str, Any] = {"method": method.name}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        plain[field.name] = describe(value) if isinstance(value, Method) else _listed(value)
    return plain


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def revive(plain: Mapping[str, Any]) -> Method:
    """The method that `describe` described. Raises `ConfigError` for a method or field that is not known."""
    kind = method_class(plain.get("method"))
    values = {key: value for key, value in plain.items() if key != "method"}
    _check_known(kind, values, fields_of(kind))
    made = {key: revive(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return kind(**_frozen(made))
