"""Checks of hyperparameters that several methods have; each raises `ConfigError` with the field's name and one fix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

import torch

from lorafit.errors import ConfigError, nearest
from lorafit.method import Method


def whole(where: str, value: object, *, least: int = 1, fix: str | None = None) -> None:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{_field(where)} is out of range",
            where=where,
            found=repr(value),
            expected=f"a whole number of at least {least}",
            fix=fix or f"{_field(where)}={least}",
        )


def rank(where: str, value: object) -> None:
    """A rank: a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            "the rank is out of range",
            where=where,
            found=repr(value),
            expected="a whole number of at least 1",
            fix=f"{_field(where)}=8 is a common small rank",
        )


def alpha(where: str, value: object) -> None:
    """α: a finite number greater than 0, or None."""
    if value is not None and not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(
            "alpha is out of range",
            where=where,
            found=repr(value),
            expected="a finite number greater than 0, or None for twice the rank",
            fix="alpha=None",
        )


def number(
    where: str, value: object, *, least: float = -math.inf, below: float = math.inf, open_: bool = False, fix: str
) -> None:
    """A finite number in [least, below), or in (least, below) if `open_`."""
    if not is_number(value) or not least <= value < below or (open_ and value == least) or math.isinf(value):
        bounds = [] if math.isinf(least) else [f"{'greater than' if open_ else 'at least'} {least:g}"]
        bounds += [] if math.isinf(below) else [f"less than {below:g}"]
        raise ConfigError(
            f"{_field(where)} is out of range",
            where=where,
            found=repr(value),
            expected=" and ".join(["a finite number", *bounds]).replace("number and", "number", 1),
            fix=fix,
        )


def dropout(where: str, value: object) -> None:
    """A probability of at least 0 and less than 1."""
    if not (is_number(value) and 0 <= value < 1):
        raise ConfigError(
            "dropout is out of range",
            where=where,
            found=repr(value),
            expected="a probability of at least 0 and less than 1",
            fix="dropout=0.0",
        )


def generator(where: str, seed: object) -> torch.Generator | None:
    """A generator on the CPU of a seed that is a whole number from 0 to 2⁶⁴ − 1; None for None."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ConfigError(
            f"{_field(where)} is no seed",
            where=where,
            found=repr(seed),
            expected="a whole number from 0 to 2**64 - 1, or None",
            fix=f"{_field(where)}=0",
        )
    return torch.Generator().manual_seed(seed)


def flag(where: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(
            f"{_field(where)} must be true or false", where=where, found=repr(value), fix=f"{_field(where)}=False"
        )


def choice(where: str, value: object, allowed: Iterable[str], message: str) -> None:
    """One of some names."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise ConfigError(
            message,
            where=where,
            found=repr(value),
            expected=f"one of {', '.join(names)}",
            near=nearest(str(value), names),
            fix=f'{_field(where)}="{names[0]}"',
        )


def inner(where: str, value: object, allowed: tuple[type[Method], ...], refusals: dict[type[Method], str]) -> None:
    """A method that this one can be put around; `refusals` says of the others why not."""
    if isinstance(value, allowed):
        return
    names = ", ".join(kind.__name__ for kind in allowed)
    reason = next((reason for kind, reason in refusals.items() if isinstance(value, kind)), None)
    outer = where.partition(".")[0]
    raise ConfigError(
        f"{outer} cannot be put around {type(value).__name__}" + (f": {reason}" if reason else ""),
        where=where,
        found=repr(value),
        expected=f"a method of type {names}",
        fix=f"{outer}(inner={allowed[0].__name__}(...))",
    )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is a number and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _field(where: str) -> str:
    return where.rpartition(".")[2]
