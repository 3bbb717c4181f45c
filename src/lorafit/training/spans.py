"""Lengths of time, said and read."""

from __future__ import annotations

import math

from lorafit.errors import ConfigError


def duration(seconds: float) -> str:
    """A length of time as one says it.

    >>> duration(42), duration(150), duration(7300)
    ('42 s', '2 min 30 s', '2 h 01 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def read_duration(text: str) -> float:
    """Seconds of a length of time as one writes it.

    Raises:
        ConfigError: it is none.

    >>> read_duration("20min"), read_duration("1.5h"), read_duration("90")
    (1200.0, 5400.0, 90.0)
    """
    units = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(number) :].strip()
    try:
        seconds = float(number) * units[unit]
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(text)
    except (ValueError, KeyError):
        raise ConfigError(
            "this is no length of time",
            where="--budget",
            found=repr(text),
            expected="20min, 2h, 90s",
            fix="--budget 20min",
        ) from None
    return seconds
