"""Text of the command line to values.

Types are left to `lorafit.training.config`, which knows them: "5" becomes a number where a number is wanted. Here is
only what text cannot say by itself: nothing, true and false, lists, mappings, and the patterns for modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorafit.cli.openended import is_option
from lorafit.errors import ConfigError
from lorafit.training.aliases import ALIASES

REGULAR = "re:"
PATTERNS = frozenset({"targets", "exclude"})
"""Settings that name modules: a list of suffixes, or one regular expression."""
LISTS = frozenset({"modules_to_save"})
MAPPINGS = frozenset({"columns", "rank_pattern", "alpha_pattern"})
_WORDS: Mapping[str, bool | None] = {"null": None, "~": None, "true": True, "false": False}
_NUMBER = re.compile(r"[-+]?(\d[\d_]*|(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?)")
_SUFFIX = re.compile(r"[\w.-]+")


def canonical(name: str) -> str:
    """A setting's own name: underscores for dashes, and not a neighbour's spelling."""
    plain = name.replace("-", "_")
    return ALIASES.get(plain, plain)


def value_of(name: str, text: str, where: str) -> Any:
    """The value that `text` writes for the setting `name`.

    Raises:
        ConfigError: brackets that do not hold a list or a mapping, or a pattern that could be meant in two ways.
    """
    own = canonical(name)
    if own in PATTERNS:
        return pattern([text], own, where)
    if text in _WORDS:
        return _WORDS[text]
    if text[:1] in ("[", "{"):
        return _bracketed(text, where)
    if own in LISTS:
        return _listed([text])
    if own in MAPPINGS:
        return mapping([text], where)
    return text


def scalar(text: str, where: str) -> Any:
    """The value inside a mapping whose types nobody knows: a number if it looks like one, else text.

    >>> scalar("8", ""), scalar("1e-3", ""), scalar("q_proj", ""), scalar("true", "")
    (8, 0.001, 'q_proj', True)
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[:1] in ("[", "{", '"', "'"):
        return _bracketed(text, where)
    if _NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[-+]?[\d_]+", text) else float(text)
    return text


def pattern(texts: Sequence[str], name: str, where: str) -> str | list[str]:
    """Which modules: "all-linear", a regular expression behind "re:", or suffixes with commas between them.

    >>> pattern(["q_proj,v_proj"], "targets", ""), pattern(["re:.*_proj"], "targets", "")
    (['q_proj', 'v_proj'], '.*_proj')

    Raises:
        ConfigError: a suffix with a character that no module's path has, or two kinds at once.
    """
    if len(texts) == 1:
        if texts[0].startswith(REGULAR):
            return texts[0].removeprefix(REGULAR)
        if texts[0] == "all-linear" and name == "targets":
            return texts[0]
    suffixes = _listed(texts)
    wrong = [one for one in suffixes if one in ("all", "all-linear") or not _SUFFIX.fullmatch(one)]
    if wrong:
        flag = f"--{name}"
        linear = wrong[0] in ("all", "all-linear")
        raise ConfigError(
            f"{name} is not clear",
            where=where,
            found=", ".join(map(repr, texts)),
            expected="all-linear alone, suffixes such as q_proj,v_proj, or one regular expression behind re:",
            fix=f"{flag} all-linear" if linear else f"{flag} '{REGULAR}{','.join(texts).removeprefix(REGULAR)}'",
        )
    return suffixes


def mapping(texts: Iterable[str], where: str) -> dict[str, str]:
    """What `prompt=q` and `completion=a` say together.

    Raises:
        ConfigError: a text without an equals sign, or a key twice.
    """
    made: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value) or key in made:
            raise ConfigError(
                "this is not one key and its value" if key not in made else "a key is given twice",
                where=where,
                found=repr(text),
                expected="KEY=VALUE, as in prompt=question",
                fix=f"{key or 'key'}=..., once",
            )
        made[key] = value
    return made


def loose(words: Sequence[str], where: str) -> dict[str, Any]:
    """The settings that options by undeclared names give: `--save-steps 5`, `--bf16`, `--no-bf16`, `--x a b`.

    As with declared options, the last of several counts; those that hold lists or mappings add up.

    Raises:
        ConfigError: a value as in `value_of`, `pattern` and `mapping`.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if not is_option(word):
            current.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        collects = canonical(key) in PATTERNS | LISTS | MAPPINGS
        current = found[key] if collects and key in found else []
        found[key] = current
        current.extend([value] if equals else [])
    return dict(_meant(key, f"{where}: --{key.replace('_', '-')}", values) for key, values in found.items())


def _meant(key: str, where: str, values: list[str]) -> tuple[str, Any]:
    if not values:
        return (key.removeprefix("no_"), False) if key.startswith("no_") else (key, True)
    if canonical(key) in PATTERNS:
        return key, pattern(values, canonical(key), where)
    if canonical(key) in LISTS:
        return key, _listed(values)
    if canonical(key) in MAPPINGS:
        return key, mapping(values, where)
    parsed = [value_of(key, value, where) for value in values]
    return key, parsed[0] if len(parsed) == 1 else parsed


def _listed(texts: Iterable[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _bracketed(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            "the brackets do not hold a list or a mapping",
            where=where,
            found=repr(text),
            expected="[a, b] or {key: value}, quoted against the shell",
            fix=str(error).partition("\n")[0],
        ) from None
