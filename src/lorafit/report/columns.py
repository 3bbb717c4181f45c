"""Tables of columns under their names, which the page's script sorts on a click: numbers by what they are worth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from lorafit.report.text import NONE, escape

Key: TypeAlias = float | str | None
"""What a cell is sorted by; None stands last, whichever way the column is sorted."""
Cell: TypeAlias = str | tuple[str, Key]
"""What a cell shows, and what it is sorted by where that is not to be read from what it shows."""

_NUMBER: Final = re.compile(r"[+-]?(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?\s?%?", re.IGNORECASE)


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str = "", sortable: bool = True) -> str:
    """A table as HTML, in a frame of its own, in which it scrolls where the screen is narrow.

    Columns of numbers stand on the right. A cell that is a number, also one with its thousands apart or in percent,
    is sorted as one; an empty cell and a dash come last.

    Args:
        header: the names of the columns, as plain text.
        rows: their cells, as plain text, as many as there are names.
        caption: what the table is of, as plain text.
        sortable: whether a click on a column's name sorts the table.

    >>> table(["site", "loss"], [["a", "1.5"], ["b", ("little", 0.1)]]).count("data-key")
    1
    """
    lines = [list(row) for row in rows]
    words = [not _are_numbers(column) for _, *column in zip(header, *lines, strict=True)]
    head = [f"<th{_column(is_words)}>{escape(name)}</th>" for name, is_words in zip(header, words, strict=True)]
    body = [[_cell(cell, is_words) for cell, is_words in zip(line, words, strict=True)] for line in lines]
    return _framed(head, body, escape(caption), sortable)


def of_html(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """The same of cells that are HTML already; all columns but the first stand on the right."""
    body = [[f"<td>{cell}</td>" for cell in row] for row in rows]
    return _framed([f"<th{_column(False)}>{name}</th>" for name in header], body, "", True)


LONG: Final = 40
"""From so many rows on, a table scrolls in its frame below its head."""


def _framed(head: Iterable[str], body: Sequence[Iterable[str]], caption: str, sortable: bool) -> str:
    told = f"<caption>{caption}</caption>" if caption else ""
    mark = " data-sortable" if sortable and len(body) > 1 else ""
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in body)
    kind = "wide long" if len(body) >= LONG else "wide"
    return (
        f'<div class="{kind}" tabindex="0"><table class="numbers"{mark}>{told}<thead><tr>{"".join(head)}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _column(is_words: bool) -> str:
    return ' scope="col" class="words"' if is_words else ' scope="col"'


def _cell(cell: Cell, is_words: bool) -> str:
    kind = ' class="words"' if is_words else ""
    if isinstance(cell, str):
        return f"<td{kind}>{_breakable(cell)}</td>"
    shown, key = cell
    return f'<td{kind} data-key="{_written(key)}">{_breakable(shown)}</td>'


def _breakable(shown: str) -> str:
    """Text as HTML; the lines of a module's path may end after a dot."""
    is_path = " " not in shown and shown.count(".") > 1
    return escape(shown).replace(".", ".<wbr>") if is_path else escape(shown)


def _written(key: Key) -> str:
    """A key as the page's script reads it."""
    if isinstance(key, str):
        return escape(key)
    if key is None or math.isnan(key):
        return ""
    return repr(float(key)).replace("inf", "Infinity")


def _are_numbers(cells: Iterable[Cell]) -> bool:
    """Whether there is a number among them, and nothing else but gaps."""
    keys = [cell if isinstance(cell, str) else cell[1] for cell in cells]
    known = [key for key in keys if key is not None and key not in ("", NONE)]
    return bool(known) and all(not isinstance(key, str) or _is_number(key) for key in known)


def _is_number(shown: str) -> bool:
    return _NUMBER.fullmatch(shown.strip().replace("\N{MINUS SIGN}", "-")) is not None
