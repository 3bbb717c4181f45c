"""A sheet of pictures, small enough to be kept beside the figures that were measured on them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.vision_data import Pictures

COLUMNS = 8
EDGE = 48
GAP = 4
COLOURS = 64


def sheet(pictures: Pictures) -> dict[str, Any]:
    """The first test pictures of each class, a row each, as a PNG in base64; and how many there are in a row."""
    from PIL import Image

    part = pictures.parts["test"]
    wide, high = (count * (EDGE + GAP) + GAP for count in (COLUMNS, len(pictures.classes)))
    whole = Image.new("RGB", (wide, high), (255, 255, 255))
    for row in range(len(pictures.classes)):
        for column, place in enumerate((part.labels == row).nonzero()[:COLUMNS, 0].tolist()):
            dots = part.pixels[place].expand(3, -1, -1).permute(1, 2, 0).contiguous()
            one = Image.frombytes("RGB", (dots.shape[1], dots.shape[0]), dots.numpy().tobytes())
            at = (GAP + column * (EDGE + GAP), GAP + row * (EDGE + GAP))
            whole.paste(one.resize((EDGE, EDGE), Image.Resampling.LANCZOS), at)
    written = io.BytesIO()
    whole.quantize(COLOURS).save(written, "PNG", optimize=True)
    return {"columns": COLUMNS, "png": base64.b64encode(written.getvalue()).decode("ascii")}
