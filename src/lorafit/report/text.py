"""Values as a reader wants them, and text that is safe inside of HTML."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

NONE: Final = "–"
"""What stands where a value is not known."""

# Control characters are not allowed in HTML and would be lost; these are their pictures in Unicode.
_CONTROLS: Final = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def escape(value: str) -> str:
    """`value` as HTML text, also inside of quoted attributes.

    Control characters and halves of surrogate pairs, which HTML cannot hold, are made visible.
    """
    seen = value.replace("\r\n", "\n").translate(_CONTROLS)
    return html.escape(seen.encode("utf-8", "backslashreplace").decode("utf-8"), quote=True)


def script_json(value: object) -> str:
    """`value` as JSON that can stand inside of a script element, whatever text it holds."""
    # In ASCII, and without the characters that could end the element or open a comment in it.
    packed = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return packed.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def plain(value: Any) -> str:
    """A value of a settings table: exact, nothing rounded."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value if value else "(empty)"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(part)}" for name, part in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(part) for part in value) or NONE
    return str(value)


def count(value: float | None) -> str:
    """A number of things, with thousands set apart."""
    return NONE if value is None else f"{value:,}"


def loss(value: float | None) -> str:
    """A loss or another number of about one, with three places."""
    return NONE if value is None else f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def rough(value: float | None) -> str:
    """A number with about three figures and thousands set apart."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share of one in percent, with about three figures."""
    if value is None:
        return NONE
    number = value * 100
    sign = "+" if signed and number > 0 else ""
    figures = f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"
    return f"{sign}{figures} %".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """A time span in the two largest units that matter."""
    if seconds is None:
        return NONE
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float | None) -> str:
    """A number of bytes in the binary unit that suits it."""
    if count is None:
        return NONE
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def words(key: str) -> str:
    """A key as a label: `learning_rate` as `learning rate`."""
    return key.replace("_", " ")


def visible(value: str) -> bool:
    """Whether `value` has anything to see."""
    return any(not character.isspace() and unicodedata.category(character) != "Cf" for character in value)
