"""The settings of a command: the file below `--set`, `--set` below the flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.cli.exits import usage
from lorafit.cli.values import canonical, loose, mapping, pattern, scalar, value_of
from lorafit.errors import ConfigError

if TYPE_CHECKING:
    from lorafit.training.config import Settings
    from lorafit.training.spelling import Layer

LINE = "the command line"


def gather(
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any],
    extra: Sequence[str] = (),
) -> list[Layer]:
    """The layers that `lorafit.training.config.resolve` takes, weakest first.

    Args:
        config: a YAML file.
        sets: texts `key=value` or `key.inner=value`.
        flags: declared options; those that are None or empty were not given.
        extra: words of undeclared options.

    Raises:
        WrongUsageError: any of them cannot be read.
    """
    from lorafit.cli.yamlfile import read

    with usage():
        file = [] if config is None else read(config)
        layers: list[Layer] = [(where, {name: value}) for where, name, value in file]
        below = {canonical(name): value for _, name, value in file}
        if sets:
            layers.append(("--set", _assigned(sets, below)))
        given = {name: _flag(name, value) for name, value in flags.items() if value not in (None, [], ())}
        layers.append((LINE, {**loose(extra, LINE), **given}))
    return layers


def resolved(layers: Sequence[Layer], say: Callable[[str], None]) -> Settings:
    """The settings, checked as far as they can be without data and model.

    Raises:
        WrongUsageError: an unknown setting, or a value it cannot have.
    """
    from lorafit.training.config import resolve
    from lorafit.training.prepare import training_arguments

    with usage():
        settings = resolve(layers, say)
        training_arguments(settings, settings.folder)
    return settings


def _flag(name: str, value: Any) -> Any:
    where = f"{LINE}: --{name.replace('_', '-')}"
    if name in ("targets", "exclude"):
        return pattern(value, name, where)
    if name == "columns":
        return mapping(value, where)
    return value_of(name, value, where) if name == "eval_split" else value


def _assigned(sets: Sequence[str], below: Mapping[str, Any]) -> dict[str, Any]:
    """What the `--set` options say; a dotted one adds to the mapping that the file has."""
    assigned: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        name, dot, inner = key.strip().partition(".")
        where = f"--set {key}"
        if not equals or not name or (dot and not inner):
            raise ConfigError(
                "--set takes a setting and its value",
                where="--set",
                found=repr(text),
                expected="KEY=VALUE, or KEY.INNER=VALUE for a mapping",
                fix="--set learning_rate=1e-3, --set rank_pattern.q_proj=8",
            )
        if not dot:
            if name in assigned:
                raise _twice(name)
            assigned[name] = value_of(name, value, where)
            continue
        held = assigned.get(name, below.get(canonical(name)) or {})
        if not isinstance(held, dict):
            raise ConfigError(
                "this setting holds no mapping",
                where=where,
                found=f"{name} = {held!r}",
                expected=f"{name}.{inner} alone, or {name} alone",
                fix=f"remove one of the two --set {name}",
            )
        assigned[name] = {**held, inner: scalar(value, where)}
    return assigned


def _twice(name: str) -> ConfigError:
    return ConfigError(
        "one setting is given twice", where="--set", found=name, expected="each setting once", fix="remove one of them"
    )
