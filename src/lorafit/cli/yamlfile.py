"""A YAML file of settings, each with the line it stands on, so that every error can name it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lorafit.cli.values import PATTERNS, REGULAR, canonical
from lorafit.errors import ConfigError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and 1e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path) -> list[tuple[str, str, Any]]:
    """The settings of a file: (where, name, value), in the order of the file.

    Raises:
        ConfigError: the file is not there, is not YAML, is no mapping, or gives one setting twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the config file cannot be read",
            where=path,
            found=error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8 text",
            near=nearest(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else (),
            fix="--config names a YAML file",
        ) from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return _settings(loader, root, path)
    except yaml.YAMLError as error:
        raise _broken(error, path) from None
    finally:
        loader.dispose()


def _settings(loader: _Loader, root: Any, path: Path) -> list[tuple[str, str, Any]]:
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(
            "the config file holds no settings",
            where=path if root is None else f"{path}:{root.start_mark.line + 1}",
            found="nothing" if root is None or not root.value else f"a {root.id}",
            expected="lines such as learning_rate: 1e-3",
            fix="write `name: value` lines",
        )
    _check_unique(root, path, top=True)
    settings = []
    for key, value in root.value:
        name = str(loader.construct_object(key))
        settings.append((f"{path}:{key.start_mark.line + 1}", name, _plain(name, loader.construct_object(value, True))))
    return settings


def _plain(name: str, value: Any) -> Any:
    """As in Python: a string is "all-linear" or a regular expression, a list holds suffixes; `re:` may be written."""
    if canonical(name) in PATTERNS and isinstance(value, str):
        return value.removeprefix(REGULAR)
    return value


def _check_unique(node: Any, path: Path, *, top: bool) -> None:
    """PyYAML keeps the last of two equal keys without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_unique(item, path, top=False)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, Any] = {}
    for key, value in node.value:
        name = canonical(str(key.value)) if top else str(key.value)
        if name in seen:
            raise ConfigError(
                "one setting is given twice",
                where=f"{path}:{key.start_mark.line + 1}",
                found=f"{key.value}, after {seen[name].value} in line {seen[name].start_mark.line + 1}",
                expected=f"{name}, once",
                fix="remove one of the lines",
            )
        seen[name] = key
        _check_unique(value, path, top=False)


def _broken(error: yaml.YAMLError, path: Path) -> ConfigError:
    line, problem = "", str(error).partition("\n")[0]
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(
        "the config file is not YAML",
        where=f"{path}{line}",
        found=problem,
        expected="lines such as learning_rate: 1e-3",
        fix="mend the line: a missing quote, bracket or space after a colon",
    )
