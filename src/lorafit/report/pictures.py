"""Pictures on a page: part of the file like everything else on it, with words for those who do not see them.

The report knows no library for pictures. It puts the bytes of a PNG file into the page as they are; whoever wants them
smaller gives a `Reader` that makes them so.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from lorafit.errors import DataError
from lorafit.report.lines import Line
from lorafit.report.text import escape

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
WIDE: Final = 480
"""Pictures narrower than half of this are shown enlarged, by a whole number, so that single pixels can be seen."""


@dataclass(frozen=True)
class Sheet:
    """Samples that a run drew on its way, on one picture.

    Attributes:
        step: optimizer steps so far.
        path: of the PNG file, from the folder of the records.
        prompts: what was asked for: a row each, or several, from above.
        seeds: of the noise that each prompt was drawn from.
        columns: pictures in a row.
    """

    event: ClassVar[str] = "sheet"

    step: int
    path: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: int | None

    @classmethod
    def read(cls, line: Line) -> Sheet:
        """The sheet that `line` records."""
        return cls(
            step=line.needed("step", line.count),
            path=line.needed("path", line.text),
            prompts=line.texts("prompts"),
            seeds=line.integers("seeds"),
            columns=line.count("columns"),
        )


@dataclass(frozen=True)
class Picture:
    """One picture, as it stands in the page.

    Attributes:
        data: the bytes of its file.
        kind: what they are, such as image/png.
        width: in pixels.
        height: in pixels.
    """

    data: bytes
    kind: str
    width: int
    height: int


Reader = Callable[[Path], Picture]
"""Reads a picture for a page; raises `DataError` for one that is not there or damaged."""


def read_png(path: Path) -> Picture:
    """A PNG file as it is.

    Raises:
        DataError: it cannot be read, or is no PNG file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            "a picture of the report cannot be read",
            where=path,
            found=error.strerror or error,
            expected="a PNG file",
            fix="put the file back, or draw the report without it",
        ) from error
    # The first part of every PNG file: its length, the word IHDR, width and height.
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        raise DataError(
            "a picture of the report is damaged",
            where=path,
            found=f"{len(data):,} bytes that begin with {data[:8]!r}",
            expected="a PNG file",
            fix="put the file back, or draw the report without it",
        )
    width, height = struct.unpack(">II", data[16:24])
    return Picture(data, "image/png", width, height)


def shown(picture: Picture, caption: str, alt: str) -> str:
    """A picture with what stands below it, as HTML.

    Args:
        picture: the picture.
        caption: what stands below it, plain text.
        alt: what is to be seen on it, plain text, for those who do not see it.
    """
    times = max(1, WIDE // max(1, picture.width))
    kind = ' class="enlarged"' if times > 1 else ""
    source = f"data:{picture.kind};base64,{base64.b64encode(picture.data).decode()}"
    size = f'width="{picture.width * times}" height="{picture.height * times}"'
    return (
        f'<figure class="picture"><img{kind} src="{source}" {size} alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def beside(pictures: Iterable[str]) -> str:
    """What `shown` gave, side by side where there is room."""
    return f'<div class="pictures">{"".join(pictures)}</div>'


def strip(pictures: Iterable[str], label: str) -> str:
    """What `shown` gave, in a row that scrolls; on paper below each other.

    Args:
        pictures: the figures.
        label: what the row is, plain text.
    """
    return f'<div class="strip" tabindex="0" role="group" aria-label="{escape(label)}">{"".join(pictures)}</div>'


def thumbnails(pictures: Iterable[str], label: str) -> str:
    """What `shown` gave, small, as many in a row as fit."""
    return f'<div class="thumbnails" role="group" aria-label="{escape(label)}">{"".join(pictures)}</div>'


def lost(caption: str, why: str) -> str:
    """What stands in the place of a picture that cannot be shown, as HTML; both are plain text."""
    return (
        f'<figure class="picture"><p class="fine gone">{escape(why)}</p>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
