"""Pictures for a report: turned the right way up, and small enough for one file that holds all of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorafit.report.pictures import Picture

SHEET = 1600
"""A sheet with a longer side becomes so many pixels long, or one whose file is larger than `BYTES`."""
BYTES = 1_500_000
THUMBNAIL = 320
PLAIN = 128
"""Pictures up to so many pixels long stay as they are to the pixel."""


def sheet(path: Path) -> Picture:
    """A sheet of samples for the report: the file itself where it is small enough.

    Raises:
        DataError: it cannot be read.
    """
    from lorafit.diffusion.subjects import read_picture
    from lorafit.report.pictures import read_png

    whole = read_png(path)
    if max(whole.width, whole.height) <= SHEET and len(whole.data) <= BYTES:
        return whole
    return _packed(_shrunk(read_picture(path).image, SHEET))


def thumbnail(path: Path) -> Picture:
    """A picture of any kind for the report, small.

    Raises:
        DataError: it cannot be read.
    """
    from lorafit.diffusion.subjects import read_picture

    return _packed(_shrunk(read_picture(path).image, THUMBNAIL))


def _shrunk(image: Image, most: int) -> Image:
    from PIL.Image import Resampling

    if max(image.size) > most:
        image.thumbnail((most, most), Resampling.LANCZOS)
    return image


def _packed(image: Image) -> Picture:
    from lorafit.report.pictures import Picture

    file = io.BytesIO()
    if max(image.size) <= PLAIN:
        image.save(file, "PNG")
        return Picture(file.getvalue(), "image/png", *image.size)
    image.save(file, "JPEG", quality=90)
    return Picture(file.getvalue(), "image/jpeg", *image.size)
