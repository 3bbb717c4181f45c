"""Reading PEFT's adapter_config.json strictly: typed values, or an error that names file and key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafit.errors import CheckpointError, ConfigError, nearest, some
from lorafit.method import Method
from lorafit.patterns import Patterns, tails

AnyMethod = TypeVar("AnyMethod", bound=Method)

COMMON = frozenset(
    {
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "target_modules",
    }
)
"""Settings of every type that say where an adapter is, or how."""

NOT_MATHEMATICS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lorafit",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Settings of every type that do not enter the function an adapter computes."""


@dataclass(frozen=True)
class Parsed:
    """What a config says of the mathematics.

    `heads` are the entries of `modules_to_save` that PEFT adds for the task type, whether the model has them or not.
    """

    method: Method
    rank: int
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    targets: list[str] | str | None
    exclude: list[str] | str
    modules_to_save: list[str]
    heads: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    unknown: tuple[str, ...]
    config: Mapping[str, Any]
    where: Path


class Reader:
    """Takes typed values out of a config, with errors that name file and key."""

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self.config = config
        self.where = where

    def error(
        self,
        key: str,
        message: str,
        found: object,
        expected: str,
        *,
        near: Sequence[str] = (),
        fix: str | None = None,
    ) -> CheckpointError:
        return CheckpointError(
            message,
            where=f"{self.where}: {key}",
            found=repr(found),
            expected=expected,
            near=near,
            fix=fix or f"mend {key!r} in the file",
        )

    def check(self, allowed: Mapping[str, tuple[object, ...]]) -> None:
        """Refuses settings that change what an adapter computes, at values other than those that do not."""
        for key, values in allowed.items():
            if key in self.config and self.config[key] not in values:
                raise self.error(
                    key,
                    "this setting changes what the adapter computes, in a way that this version does not read",
                    self.config[key],
                    f"{values[0]!r}",
                    fix="merge the adapter with the library that wrote it, or export it as plain LoRA there",
                )

    def made(self, make: Callable[[], AnyMethod], keys: Mapping[str, str]) -> AnyMethod:
        """What `make` makes of values in this config; `keys` maps the fields of its errors to the config's keys."""
        try:
            return make()
        except ConfigError as error:
            field = str(error.where).rpartition(".")[2]
            key = keys.get(field, field)
            expected = str(error.expected or "true or false")
            raise self.error(key, error.message, self.config.get(key), expected) from None

    def present(self, key: str, default: object, expected: str = "a number greater than 0") -> Any:
        """A value that may be absent, but not null."""
        value = self.config.get(key, default)
        if value is None:
            raise self.error(key, "a value is missing", None, expected)
        return value

    def pattern(self, key: str, kind: type[int] | type[float]) -> dict[str, Any]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(key, "a pattern must map names to numbers", value, "an object")
        for name, number in value.items():
            number_ok = isinstance(number, int) or (kind is float and isinstance(number, float))
            if isinstance(number, bool) or not number_ok or not 0 < number < math.inf:
                raise self.error(
                    f"{key}[{name!r}]", "a value is out of range", number, f"a {kind.__name__} greater than 0"
                )
            self._compile(key, name)
        return value

    def names(self, key: str) -> list[str] | str | None:
        value = self.config.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
            return value
        raise self.error(key, "these are no module names", value, "a list of names, or a regular expression")

    def expression(self, key: str) -> list[str] | str | None:
        value = self.names(key)
        if isinstance(value, str):
            self._compile(key, value)
        return value

    def _compile(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise self.error(key, f"a name is not a regular expression: {error}", pattern, "a pattern") from None

    def saved(self) -> list[str]:
        value = self.names("modules_to_save")
        if isinstance(value, str):
            raise self.error("modules_to_save", "these are no module names", value, "a list of names")
        return value or []

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.names("layers_pattern") or []
        patterns = (value,) if isinstance(value, str) else tuple(value)
        for pattern in patterns:
            self._compile("layers_pattern", pattern)
        return patterns

    def layers(self) -> tuple[int, ...] | None:
        value = self.config.get("layers_to_transform")
        listed = value if isinstance(value, list) else [value]
        if value is None or value == []:
            return None
        if all(isinstance(index, int) and not isinstance(index, bool) for index in listed):
            return tuple(listed)
        raise self.error("layers_to_transform", "these are no layer numbers", value, "a whole number or a list of them")


def expected_sites(parsed: Parsed, paths: Sequence[str], where: Path) -> list[str] | None:
    """The paths among `paths` that a config names, as PEFT matches them; None where it does not name any.

    Raises:
        CheckpointError: a name in the config that matches nothing.
    """
    if parsed.targets is None:
        return None
    tests = [parsed.targets] if isinstance(parsed.targets, str) else parsed.targets
    named, excluded = _peft_test(parsed.targets), _peft_test(parsed.exclude)
    chosen = []
    hit: set[str] = set()
    for path in paths:
        matched = named(path)
        hit.update(matched)
        # A name that is the whole path is meant as it stands; PEFT looks at layers for suffixes only.
        wanted = path in matched or _layer_wanted(parsed, path)
        if matched and wanted and not excluded(path):
            chosen.append(path)
    unmatched = [test for test in tests if test not in hit]
    if unmatched:
        last = sorted({path.rpartition(".")[2] for path in paths})
        raise CheckpointError(
            "the adapter was made for modules that this model does not have",
            where=f"{where}: target_modules",
            found=some(map(repr, unmatched)),
            expected=f"names among {some(last, 8)}",
            near=nearest(unmatched[0], last),
            fix="load the base model that the adapter was trained on (base_model_name_or_path)",
        )
    return chosen


def _peft_test(names: list[str] | str) -> Callable[[str], Collection[str]]:
    """Which of the names fit a path: one regular expression for all of it, or ends of it from a dot on."""
    if isinstance(names, str):
        whole = re.compile(names)
        return lambda path: (names,) if whole.fullmatch(path) is not None else ()
    wanted = set(names)
    return lambda path: [tail for tail in tails(path) if tail in wanted]


def _layer_wanted(parsed: Parsed, path: str) -> bool:
    if parsed.layers is None:
        return True
    # The first number counts: a later one is that of an expert or another list inside the layer.
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in parsed.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(pattern, path) for pattern in patterns) if match), None)
    return found is not None and int(found.group(1)) in parsed.layers
