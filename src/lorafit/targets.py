"""Which modules a pattern names: pure string matching, with an error for every pattern that names nothing.

A target is "all-linear", a regular expression that must match a whole module path, or a list of suffixes that must
match whole components at the end of it, as in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from lorafit.errors import TargetError, nearest, some

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]
Value = TypeVar("Value")


def has_suffix(path: str, suffix: str) -> bool:
    """Whether `suffix` is `path` or its last components."""
    return path == suffix or path.endswith("." + suffix)


def pattern_list(patterns: Targets, what: str) -> list[tuple[str, Callable[[str], bool]]]:
    """Each pattern with its test. A string is one regular expression, a sequence holds suffixes.

    Raises:
        TargetError: an empty pattern, one that is no string, or a regular expression that does not compile.
    """
    if isinstance(patterns, str):
        try:
            whole = re.compile(patterns)
        except re.error as error:
            raise TargetError(
                f"{what} is not a regular expression: {error}",
                found=repr(patterns),
                expected="a regular expression for whole module paths, or a list of suffixes",
                fix=f"{what}=[{patterns!r}] if it is meant as a suffix",
            ) from None
        return [(patterns, lambda path: whole.fullmatch(path) is not None)]
    if not isinstance(patterns, Iterable):
        raise TargetError(
            f"{what} is neither a string nor a list",
            found=repr(patterns),
            expected="a regular expression for whole module paths, or a list of suffixes",
            fix=f'{what}="all-linear"' if what == "targets" else f"{what}=()",
        )
    tests: list[tuple[str, Callable[[str], bool]]] = []
    for suffix in patterns:
        if not isinstance(suffix, str) or not suffix:
            raise TargetError(
                f"{what} holds something that is no module suffix",
                found=repr(suffix),
                expected="non-empty strings such as 'q_proj' or 'layers.0.mlp.up_proj'",
                fix=f"remove it from {what}",
            )
        tests.append((suffix, lambda path, suffix=suffix: has_suffix(path, suffix)))  # type: ignore[misc]
    return tests


def match(patterns: Targets, paths: Iterable[str], known: Collection[str], what: str) -> list[str]:
    """The paths that any pattern names, in their own order.

    Args:
        patterns: a regular expression or a list of suffixes.
        paths: module paths to choose from.
        known: module paths that an error may suggest.
        what: the argument's name, for errors.

    Raises:
        TargetError: naming each pattern that matches nothing, with near names.
    """
    listed = list(paths)
    tests = pattern_list(patterns, what)
    chosen = [path for path in listed if any(test(path) for _, test in tests)]
    missed = [pattern for pattern, test in tests if not any(test(path) for path in listed)]
    if missed:
        raise _no_match(missed, isinstance(patterns, str), known, what)
    return chosen


def _no_match(missed: list[str], regular: bool, known: Collection[str], what: str) -> TargetError:
    tails = sorted({path.rpartition(".")[2] for path in known})
    near = dict.fromkeys(name for pattern in missed for name in nearest(pattern, [*tails, *known]))
    if regular and any(has_suffix(path, missed[0]) for path in known):
        fix = f"a string is a regular expression for the whole path; for a suffix write {what}=[{missed[0]!r}]"
    elif near:
        fix = f"write {next(iter(near))!r}, or remove the pattern"
    else:
        fix = f"remove the pattern; the model has modules named {some(tails, 8) or '(none that can be adapted)'}"
    return TargetError(
        f"{what} matches no module",
        found=", ".join(repr(pattern) for pattern in missed),
        expected=f"names among {some(tails, 8)}" if tails else "a model with layers that can be adapted",
        where=what,
        near=list(near)[:3],
        fix=fix,
    )


def lookup(pattern: Mapping[str, Value], path: str) -> Value | None:
    """The value of the first key that matches the whole path or its last components, as PEFT matches."""
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return None


def unmatched(pattern: Mapping[str, object], paths: Sequence[str]) -> list[str]:
    """The keys of a rank or alpha pattern that match none of the paths."""
    return [key for key in pattern if not any(re.fullmatch(rf"(.*\.)?({key})", path) for path in paths)]


def check_keys(pattern: Mapping[str, object], paths: Sequence[str], what: str) -> None:
    """Raises `TargetError` for keys of a rank or alpha pattern that match no site, or do not compile."""
    for key in pattern:
        try:
            missed = unmatched({key: None}, paths)
        except re.error as error:
            raise TargetError(
                f"a key of {what} is not a regular expression: {error}",
                where=what,
                found=repr(key),
                fix="mend the key",
            ) from None
        if missed:
            raise _no_match(missed, False, paths, what)


def suffixes_for(sites: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest target list that names exactly `sites` among `modules`, for a file that others read.

    Last components where they are exact, else whole paths, else (where a whole path is also another's suffix) a regular
    expression.
    """
    wanted = set(sites)
    tails = sorted({site.rpartition(".")[2] for site in sites})
    if "" in wanted:  # the model itself is the layer: a list cannot say so
        return "|".join(re.escape(site) for site in sorted(sites))
    if {module for module in modules if any(has_suffix(module, tail) for tail in tails)} == wanted:
        return tails
    if {module for module in modules if any(has_suffix(module, site) for site in sites)} == wanted:
        return sorted(sites)
    return "|".join(re.escape(site) for site in sorted(sites))
