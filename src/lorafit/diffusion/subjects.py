"""Pictures of a folder as training takes them: turned as they were shot, on white, cut to squares, with captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lorafit.diffusion.seeds import generator
from lorafit.errors import DataError, nearest, some

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION = ".txt"
DRAWN = "drawn-"
"""How the names of pictures begin that a pipeline drew into a folder of class pictures."""
SMALLEST = 4
"""A picture whose shorter side has less than 1 / 4 of the pixels that are asked for is refused."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a folder.

    Attributes:
        path: its file.
        image: RGB, as it is looked at.
        caption: what it shows, by the text file beside it; None where there is none.
    """

    path: Path
    image: Image.Image
    caption: str | None

    @property
    def side(self) -> int:
        """Pixels of its shorter side."""
        return min(self.image.size)

    @property
    def digest(self) -> str:
        """Of its pixels: two pictures that look the same have the same."""
        return hashlib.sha256(f"{self.image.size}\0".encode() + self.image.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Gallery:
    """The pictures of a folder, in the order of `paths_of`.

    Attributes:
        pictures: all of them.
        left_out: names of other files there, which are not read.
    """

    pictures: tuple[Picture, ...]
    left_out: tuple[str, ...]

    def captions(self, usual: str) -> list[str]:
        """What each shows; `usual` where it has no text of its own."""
        return [usual if each.caption is None else each.caption for each in self.pictures]

    def told(self, what: str, size: int) -> list[str]:
        """What there is to say of them: how many, which have captions, which were small, what was not read."""
        own = sum(each.caption is not None for each in self.pictures)
        captions = f", {own} with a caption of {'its' if own == 1 else 'their'} own" if own else ""
        lines = [f"{what}: {len(self.pictures)} picture{'' if len(self.pictures) == 1 else 's'}{captions}"]
        small = [f"{each.path.name} ({each.side})" for each in self.pictures if each.side < size]
        if small:
            lines.append(f"smaller than {size} pixels, and enlarged: {some(small, 3)}")
        if self.left_out:
            lines.append(f"not read: {some(self.left_out, 3)}")
        return lines


def paths_of(folder: Path) -> list[Path]:
    """The pictures of a folder by their names, unopened; hidden files are none.

    Those that a pipeline drew come last: of the first so many, more of them change nothing.
    """
    found = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = (path for path in found if path.suffix.lower() in SUFFIXES)
    return sorted(pictures, key=lambda path: (path.name.startswith(DRAWN), path.name))


def read_gallery(folder: str | Path, what: str = "pictures", *, size: int = 0, most: int | None = None) -> Gallery:
    """Reads the pictures of a folder.

    Args:
        folder: holds png, jpg and webp files; a text file of the same name has a picture's caption.
        what: whose they are, for errors.
        size: pixels of the squares that are to be made of them; 0 for any.
        most: the first so many alone; None for all.

    Raises:
        DataError: no such folder, no picture, one that cannot be read or is far too small, an empty caption.
    """
    place = Path(folder)
    if not place.is_dir():
        near = nearest(place.name, (child.name for child in place.parent.iterdir())) if place.parent.is_dir() else ()
        raise DataError(
            f"there is no folder of {what}",
            where=place,
            found="a file" if place.is_file() else "nothing",
            expected="a folder with png, jpg or webp files",
            near=near,
            fix="give the folder that holds them",
        )
    paths = paths_of(place)
    if not paths:
        others = sorted(child.name for child in place.iterdir())
        raise DataError(
            f"there are no {what} here",
            where=place,
            found=some(others, 3) or "an empty folder",
            expected=f"files that end in {', '.join(SUFFIXES)}",
            fix="convert them to png",
        )
    stems = {path.stem for path in paths}
    read = {path.name for path in paths} | {f"{stem}{CAPTION}" for stem in stems}
    rest = sorted(child.name for child in place.iterdir() if child.name not in read and not child.name.startswith("."))
    return Gallery(tuple(read_picture(path, size=size) for path in paths[:most]), tuple(rest))


def read_picture(path: Path, *, size: int = 0) -> Picture:
    """Reads one picture and its caption. Raises `DataError` for one that cannot be read or is far too small."""
    try:
        with Image.open(path) as opened:
            turned = ImageOps.exif_transpose(opened)
            image = _on_white(_eight_bits(turned, path, opened.format))
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            "a picture cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected="a whole png, jpg or webp file",
            fix="save it again as png, or take it out of the folder",
        ) from error
    if min(image.size) * SMALLEST < size or min(image.size) < 1:
        raise DataError(
            "a picture is far too small",
            where=path,
            found=f"{image.width} × {image.height} pixels",
            expected=f"at least {-(-size // SMALLEST)} on the shorter side, for squares of {size}",
            fix="take a larger one, or --resolution with a smaller number",
        )
    return Picture(path, image, _caption(path.with_suffix(CAPTION)))


def _eight_bits(image: Image.Image, path: Path, kind: str | None) -> Image.Image:
    """Grey with more than 8 bits as grey with 8: Pillow's own way to RGB cuts what is above 255, all is white then.

    Args:
        image: as it was opened.
        path: its file.
        kind: the file's format.

    Raises:
        DataError: what is black and what is white there is not known.
    """
    # A PNG file's 16 bits are in 32 by older releases of Pillow.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        numbers = numpy.asarray(image).astype(numpy.int64)
        grey = Image.fromarray(((numbers + 128) // 257).astype(numpy.uint8))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(numpy.where(numbers == clear, 0, 255).astype(numpy.uint8)))
        return grey
    if image.mode.startswith(("I", "F")):
        raise DataError(
            "a picture's numbers have no known black and white",
            where=path,
            found=f"32 bits for each pixel (Pillow's mode {image.mode})",
            expected="8 or 16 bits",
            fix="save it with 8 bits, or take it out of the folder",
        )
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent is white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        ground = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, clear).convert("RGB")
    return image.convert("RGB")


def _caption(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())  # editors may begin it with a mark
    except UnicodeDecodeError as error:
        raise DataError(
            "a caption is no text", where=path, found=error, expected="UTF-8", fix="save it again as UTF-8"
        ) from None
    if not text:
        raise DataError(
            "a caption is empty",
            where=path,
            found="no words",
            expected="what the picture shows",
            fix="write it, or remove the file: the prompt is used then",
        )
    return text


def views(picture: Picture, size: int, *, crop: str, count: int, flip: bool, seed: int) -> Tensor:
    """The squares that training sees of a picture, (views, 3, size, size) from −1 to 1.

    The shorter side is brought to `size`, and the longer one cut.

    Args:
        picture: the picture.
        size: pixels of a side.
        crop: "centre", or "random": `count` places, drawn once.
        count: how many, where they are random.
        flip: each of them mirrored, too.
        seed: of the places, with the picture's pixels: a file may be renamed while a run stands still.
    """
    scale = size / picture.side
    width, height = (max(size, round(side * scale)) for side in picture.image.size)
    resized = picture.image.resize((width, height), Image.Resampling.LANCZOS)
    if crop == "random":
        drawn = torch.rand(count, 2, generator=generator(seed, "crop", picture.digest)).tolist()
        corners = {(int(x * (width - size + 1)), int(y * (height - size + 1))): None for x, y in drawn}
    else:
        corners = {((width - size) // 2, (height - size) // 2): None}
    made = [tensor_of(resized.crop((x, y, x + size, y + size))) for x, y in corners]
    if flip:
        made += [each.flip(2) for each in made]
    return torch.stack(made)


def tensor_of(image: Image.Image) -> Tensor:
    """An RGB picture as numbers, (3, height, width) from −1 to 1."""
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def fingerprint(galleries: Sequence[tuple[Gallery, Sequence[str]]]) -> str:
    """Of all pixels and captions, so that a run does not go on with others."""
    digest = hashlib.sha256()
    for gallery, captions in galleries:
        digest.update(f"{len(gallery.pictures)}\0".encode())
        for picture, caption in zip(gallery.pictures, captions, strict=True):
            digest.update(f"{picture.image.size}\0{caption}\0".encode())
            digest.update(picture.image.tobytes())
    return digest.hexdigest()
