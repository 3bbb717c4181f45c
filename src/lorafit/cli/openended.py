"""A command that takes, beside the options it declares, options by any other name; it finds them in `ctx.args`.

They are told apart before Typer parses, so that a value stays with its option wherever it stands in the line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperOption


class OpenEnded(TyperCommand):
    """Declared options are parsed as usual; all others are left, with their values, in `ctx.args`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        declared, others = split(args, self._takes_value(ctx))
        super().parse_args(ctx, declared)
        ctx.args = others
        return others

    def _takes_value(self, ctx: Any) -> dict[str, bool]:
        """Each spelling of a declared option → whether a value follows it."""
        known: dict[str, bool] = {}
        for parameter in self.get_params(ctx):
            takes = isinstance(parameter, TyperOption) and not parameter.is_flag
            known.update((name, takes) for name in (*parameter.opts, *parameter.secondary_opts))
        return known


def split(args: Iterable[str], takes_value: dict[str, bool]) -> tuple[list[str], list[str]]:
    """The words that belong to declared options (and arguments), and those of all other options.

    An option by another name takes every word after it up to the next option.

    >>> split(["--bf16", "--r", "8", "--save_steps", "5", "x"], {"--r": True})
    (['--r', '8'], ['--bf16', '--save_steps', '5', 'x'])
    """
    declared: list[str] = []
    others: list[str] = []
    into, values = declared, 0
    for word in args:
        if values:
            into.append(word)
            values -= 1
        elif is_option(word):
            name, equals, _ = word.partition("=")
            name = dashed(name)
            into = declared if name in takes_value or not word.startswith("--") else others
            values = int(takes_value.get(name, False) and not equals)
            into.append(word)
        else:
            into.append(word)
    return declared, others


def dashed(name: str) -> str:
    """An option's name with dashes for underscores, as Typer knows it."""
    return name.replace("_", "-")


def is_option(word: str) -> bool:
    """Whether a word is an option's name rather than a value: a dash, and then no number.

    >>> is_option("--r"), is_option("-h"), is_option("-1e-3"), is_option("-")
    (True, True, False, False)
    """
    return len(word) > 1 and word[0] == "-" and not (word[1].isdigit() or word[1] == ".")
