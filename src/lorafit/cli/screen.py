"""What a command says, and where: people read stdout (stderr under `--json`), programs read one JSON object."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


@final
class Screen:
    """Where a command writes.

    Args:
        as_json: keep stdout for the one object of `result`; all that is for people goes to stderr then.
        heard: whether anything is shown at all: of several processes of a run one speaks.
    """

    def __init__(self, as_json: bool = False, *, heard: bool = True) -> None:
        self._as_json = as_json and heard
        self.console = Console(stderr=as_json, highlight=False, markup=False, emoji=False, quiet=not heard)

    @property
    def fancy(self) -> bool:
        """Whether people look at a terminal: colours, tables and panels make sense."""
        return self.console.is_terminal

    def say(self, text: str | Text = "", style: str = "", *, whole: bool = False) -> None:
        """One line or several; on a terminal long ones are broken between words.

        Args:
            text: what to say.
            style: of the whole text.
            whole: break nothing, so that a path or a command can be copied.
        """
        self.console.print(text, style=style, soft_wrap=whole or not self.fancy)

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object, under `--json`."""
        if self._as_json:
            # Not by the console, which would break the line.
            sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False) + "\n")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Collection[int] = (),
        whole: Collection[int] = (),
    ) -> None:
        """A table: drawn on a terminal, columns with two spaces between them elsewhere.

        Args:
            header: the names of the columns.
            rows: the cells.
            right: the places of columns to align on the right.
            whole: the places of columns whose cells are not broken, however narrow the terminal is.
        """
        if self.fancy:
            drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
            for place, name in enumerate(header):
                justify: Literal["left", "right"] = "right" if place in right else "left"
                drawn.add_column(name, justify=justify, overflow="fold", no_wrap=place in whole)
            for row in rows:
                drawn.add_row(*(Text(cell) for cell in row))
            self.console.print(drawn)
            return
        lines = [tuple(header), *map(tuple, rows)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
        for line in lines:
            cells = [
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            self.say("  ".join(cells).rstrip(), whole=True)


def _plain(value: object) -> object:
    """`value` as JSON can hold it: None for numbers that are not finite, text for paths."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
