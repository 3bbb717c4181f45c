"""Settings as they are written: spellings of other tools, values of the wrong type, names that nobody knows.

What is here knows no setting by name: each command's schema brings its own tables.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lorafit.errors import ConfigError, nearest

Layer = tuple[str, Mapping[str, Any]]
"""Where settings come from, for errors ("run.yaml", "--set"), and the settings."""
Merged = Mapping[str, tuple[Any, str]]
"""Setting → its value, and where that comes from."""
Advice = Mapping[str, tuple[tuple[str | None, str], ...]]
"""Setting of another tool → what to do instead, if the method has this field (None: anyway)."""

SPELT = 4
"""Letters of a name that can be a slip of the pen; of shorter ones everything is near (lr, r)."""
SLIP = 0.8
"""Similarity from which on one name is written for another."""


@final
@dataclass(frozen=True)
class Spelling:
    """How other tools spell the settings of a command.

    Attributes:
        aliases: their name → the name here.
        values: their name and value → the value here.
        advice: what is something else here → what to do instead.
    """

    aliases: Mapping[str, str]
    values: Mapping[tuple[str, object], object]
    advice: Advice

    def merged(self, layers: Iterable[Layer], notify: Callable[[str], None]) -> dict[str, tuple[Any, str]]:
        """The settings of several sources by their names here, later ones before earlier ones.

        Args:
            layers: (origin, flat settings), weakest first.
            notify: is told once for each setting that came under a neighbour's name.

        Raises:
            ConfigError: two spellings of one setting in the same source.
        """
        found: dict[str, tuple[Any, str]] = {}
        for origin, values in layers:
            found.update(self._renamed(origin, values, notify))
        return found

    def _renamed(
        self, origin: str, values: Mapping[str, Any], notify: Callable[[str], None]
    ) -> dict[str, tuple[Any, str]]:
        from lorafit.methods import INNER

        seen: dict[str, str] = {}
        renamed: dict[str, tuple[Any, str]] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            canonical = self.aliases.get(name, name)
            if canonical in seen:
                raise ConfigError(
                    "one setting is given under two names",
                    where=origin,
                    found=f"{seen[canonical]} and {key}",
                    expected=f"{canonical}, once",
                    fix=f"remove {key}",
                )
            seen[canonical] = str(key)
            if canonical != name:
                notify(f"{key} is called {canonical} here")
            value = self.values.get((name, value), value) if isinstance(value, bool | str) else value
            if canonical == INNER and isinstance(value, Mapping):
                within = self._renamed(f"{origin}: {INNER}", value, notify)
                value = {name: part for name, (part, _) in within.items()}
            renamed[canonical] = (value, origin)
        return renamed

    def option(self, method: str, name: str, value: Any, kind: Any, origin: str) -> Any:
        """The value of a method's field, with the type that it wants.

        Raises:
            ConfigError: it has another type, or a method inside of this one has no such setting.
        """
        from lorafit.methods import INNER

        return self._within(method, value, origin) if name == INNER else coerced(name, value, kind, origin)

    def _within(self, outer: str, given: Any, origin: str) -> Any:
        """The settings of the method inside of `outer`, with the types that it wants."""
        from lorafit.methods import INNER, accepts, inner_class, method_class

        within = inner_class(method_class(outer), given)
        if not isinstance(given, Mapping) or within is None:
            return given
        types = accepts(within.name, given.get(INNER))
        origin = f"{origin}: {INNER}"
        made: dict[str, Any] = {"method": within.name}
        for name, value in given.items():
            if name in types:
                made[name] = self.option(within.name, name, value, types[name], origin)
            elif name != "method":
                expected = f"a setting of {within.name}: {', '.join(types)}"
                raise self.unknown(name, origin, within.name, types, expected)
        return made

    def unknown(self, name: str, origin: str, method: str, known: Iterable[str], expected: str) -> ConfigError:
        """The error for a setting that is none of `known`, with what to do instead: never what is unknown as well."""
        from lorafit.methods import METHODS, fields_of

        names = set(known)
        advice = next((text for field, text in self.advice.get(name, ()) if field is None or field in names), None)
        owners = [other for other, kind in METHODS.items() if name in fields_of(kind)]
        near: tuple[str, ...] = ()
        if advice is None and owners:
            expected = f"a setting of {method}; {name} is one of {', '.join(owners)}"
        elif advice is None and name not in self.advice and len(name) >= SPELT:
            spellings = names | {alias for alias, canonical in self.aliases.items() if canonical in names}
            near = nearest(name, spellings)
            if name.startswith("use_"):  # the switch of another algorithm looks like this one's, and is not it
                near = tuple(one for one in near if _slip(name, one))
        return ConfigError(
            "unknown setting",
            where=f"{origin}: {name}",
            found=repr(name),
            expected=expected,
            near=near,
            fix=advice or (f"write {near[0]!r}" if near and _slip(name, near[0]) else f"remove {name!r}"),
        )


def _slip(name: str, meant: str) -> bool:
    """Whether a name is so near to another that no more than a letter or two went wrong."""
    return difflib.SequenceMatcher(None, name, meant).ratio() >= SLIP


def either(kind: Any) -> bool:
    """Whether whole numbers and fractions mean different things to a setting (steps, or a share)."""
    return {int, float} <= set(typing.get_args(kind))


def _number(text: str) -> int | float | str:
    """The number that a text is, as YAML reads it: "1.0" is a fraction and "1" is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def coerced(name: str, value: Any, kind: Any, origin: str) -> Any:
    """A value with the type that its setting wants; raises `ConfigError` for one of another type."""
    several = either(kind)
    if several and isinstance(value, str):
        value = _number(value)
    try:
        adapter = TypeAdapter[Any](kind, config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_python(value, strict=several)
    except ValidationError as error:
        raise ConfigError(
            "a setting has a value of the wrong type",
            where=f"{origin}: {name}",
            found=repr(value),
            expected="a whole number, or a fraction" if several else error.errors()[0]["msg"],
            fix=f"mend {name}",
        ) from None


def schema_error(error: ValidationError, merged: Merged) -> ConfigError:
    """What a schema found wrong first, as an error that says where it was written."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        lacking = [str(one["loc"][0]) for one in error.errors() if one["type"] == "missing"]
        return ConfigError(
            f"{name} is missing",
            where="the settings",
            expected=" and ".join(lacking),
            fix=f"--{name.replace('_', '-')} ...",
        )
    # A setting of several types has an error for each: all of them together say what it may be.
    same = [one for one in error.errors() if one["loc"][0] == name and one["input"] == first["input"]]
    place = first["loc"] if len(same) == 1 else first["loc"][:1]
    origin = merged[name][1] if name in merged else "the settings"
    return ConfigError(
        "a setting has a value it cannot have",
        where=f"{origin}: {'.'.join(map(str, place))}",
        found=repr(first["input"]),
        expected="; or: ".join(one["msg"] for one in same),
        fix=f"mend {name}",
    )
