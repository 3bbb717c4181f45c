"""Which modules a pattern names: pure string matching, with an error for every pattern that names nothing.

A target is "all-linear", a regular expression that must match a whole module path, or a list of suffixes that must
match whole components at the end of it, as in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lorafit.errors import TargetError, nearest, some
from lorafit.patterns import Patterns, expression, tails

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]


def has_suffix(path: str, suffix: str) -> bool:
    """Whether `suffix` is `path` or its last components."""
    return path == suffix or path.endswith("." + suffix)


Test = Callable[[str], Collection[str]]


def pattern_test(patterns: Targets, what: str) -> tuple[list[str], Test]:
    """The patterns, and which of them name a path. A string is one regular expression, a sequence holds suffixes.

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
        return [patterns], lambda path: (patterns,) if whole.fullmatch(path) is not None else ()
    if not isinstance(patterns, Iterable):
        raise TargetError(
            f"{what} is neither a string nor a list",
            found=repr(patterns),
            expected="a regular expression for whole module paths, or a list of suffixes",
            fix=f'{what}="all-linear"' if what == "targets" else f"{what}=()",
        )
    suffixes = list(patterns)
    for suffix in suffixes:
        if not isinstance(suffix, str) or not suffix:
            raise TargetError(
                f"{what} holds something that is no module suffix",
                found=repr(suffix),
                expected="non-empty strings such as 'q_proj' or 'layers.0.mlp.up_proj'",
                fix=f"remove it from {what}",
            )
    wanted = set(suffixes)
    return suffixes, lambda path: [tail for tail in tails(path) if tail in wanted]


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
    every, test = pattern_test(patterns, what)
    named = {path: test(path) for path in listed}
    chosen = [path for path in listed if named[path]]
    used = {pattern for matched in named.values() for pattern in matched}
    missed = [pattern for pattern in every if pattern not in used]
    if missed:
        raise _no_match(missed, isinstance(patterns, str), known, what)
    return chosen


def _no_match(missed: list[str], regular: bool, known: Collection[str], what: str) -> TargetError:
    last = sorted({path.rpartition(".")[2] for path in known})
    near = dict.fromkeys(name for pattern in missed for name in nearest(pattern, [*last, *known]))
    if regular and any(has_suffix(path, missed[0]) for path in known):
        fix = f"a string is a regular expression for the whole path; for a suffix write {what}=[{missed[0]!r}]"
    elif near:
        fix = f"write {next(iter(near))!r}, or remove the pattern"
    else:
        fix = f"remove the pattern; the model has modules named {some(last, 8) or '(none that can be adapted)'}"
    return TargetError(
        f"{what} matches no module",
        found=", ".join(repr(pattern) for pattern in missed),
        expected=f"names among {some(last, 8)}" if last else "a model with layers that can be adapted",
        where=what,
        near=list(near)[:3],
        fix=fix,
    )


def check_keys(pattern: Mapping[str, object], paths: Sequence[str], what: str) -> None:
    """Raises `TargetError` for keys of a rank or alpha pattern that match no site, or do not compile."""
    for key in pattern:
        try:
            expression(key)
        except re.error as error:
            raise TargetError(
                f"a key of {what} is not a regular expression: {error}",
                where=what,
                found=repr(key),
                fix="mend the key",
            ) from None
    missed = Patterns(pattern).idle(paths)
    if missed:
        raise _no_match(missed, False, paths, what)


def suffixes_for(sites: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest target list that names exactly `sites` among `modules`, for a file that others read.

    Last components where they are exact, else whole paths, else (where a whole path is also another's suffix) a regular
    expression.
    """
    wanted = set(sites)
    last = sorted({site.rpartition(".")[2] for site in sites})
    if "" in wanted:  # the model itself is the layer: a list cannot say so
        return "|".join(re.escape(site) for site in sorted(sites))
    for names in (last, sorted(sites)):
        known = set(names)
        if {module for module in modules if any(tail in known for tail in tails(module))} == wanted:
            return names
    return "|".join(re.escape(site) for site in sorted(sites))
