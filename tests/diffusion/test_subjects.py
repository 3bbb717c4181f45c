"""Pictures of a folder: turned, on white, cut, captioned; and each that cannot be is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import lorafit as lf
from lorafit.diffusion.subjects import fingerprint, paths_of, read_gallery, read_picture, tensor_of, views


def test_turned_as_they_were_shot(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    found = read_picture(tmp_path / "a.png").image
    assert found.size == (4, 8) and found.getpixel((3, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    if mode == "P":
        ground = Image.new("P", (8, 8), 0)
        ground.putpalette([0, 0, 0] * 256)
        ground.save(tmp_path / "a.png", transparency=0)
    else:
        clear.convert(mode).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").image.getpixel((4, 4)) == (255, 255, 255)


def test_captions_and_what_is_not_read(subject: Path) -> None:
    (subject / "0.txt").write_text(" a red\n disc ", encoding="utf-8")
    (subject / "notes.md").write_text("x", encoding="utf-8")
    (subject / ".hidden.png").write_bytes(b"")
    gallery = read_gallery(subject)
    assert gallery.captions("a sks disc") == ["a red disc", "a sks disc", "a sks disc"]
    assert gallery.left_out == ("notes.md",)
    said = gallery.told("subject", 30)
    assert said[0] == "subject: 3 pictures, 1 with a caption of its own"
    assert "0.png (20)" in said[1] and "notes.md" in said[2]
    assert [path.name for path in paths_of(subject)] == ["0.png", "1.png", "2.png"]


def test_centre_and_random_crops(subject: Path) -> None:
    picture = read_gallery(subject).pictures[2]  # 28 × 20
    centre = views(picture, 20, crop="centre", count=8, flip=False, seed=0)
    assert torch.equal(centre[0], tensor_of(picture.image.crop((4, 0, 24, 20)))) and len(centre) == 1
    first, again = (views(picture, 10, crop="random", count=8, flip=True, seed=0) for _ in range(2))
    other = views(picture, 10, crop="random", count=8, flip=True, seed=1)
    assert torch.equal(first, again) and first.shape[1:] == (3, 10, 10) and len(first) % 2 == 0
    assert torch.equal(first[len(first) // 2 :], first[: len(first) // 2].flip(3))
    assert first.shape != other.shape or not torch.equal(first, other)
    assert float(first.min()) >= -1 and float(first.max()) <= 1


def test_small_ones_are_enlarged(subject: Path) -> None:
    found = views(read_gallery(subject).pictures[0], 64, crop="centre", count=1, flip=False, seed=0)
    assert found.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "1.png").write_bytes(b"no picture"), ["1.png", "cannot be read"]),
        (lambda folder: (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60]), ["1.png"]),
        (lambda folder: Image.new("RGB", (3, 90)).save(folder / "1.png"), ["1.png", "far too small", "3 × 90"]),
        (lambda folder: (folder / "2.txt").write_text("  "), ["2.txt", "empty"]),
        (lambda folder: (folder / "2.txt").write_bytes(b"\xff\xfe\xff"), ["2.txt", "UTF-8"]),
        (
            lambda folder: [path.unlink() for path in folder.iterdir()],
            ["no pictures of the subject", "an empty folder"],
        ),
    ],
    ids=["no-picture", "cut", "small", "empty-caption", "no-text", "empty"],
)
def test_what_cannot_be_is_named(subject: Path, spoil: Any, words: list[str]) -> None:
    spoil(subject)
    with pytest.raises(lf.DataError) as error:
        read_gallery(subject, "pictures of the subject", size=64)
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_folder_names_near_ones(subject: Path) -> None:
    with pytest.raises(lf.DataError, match="subject"):
        read_gallery(subject.with_name("subjetc"))


def test_the_fingerprint_is_of_pixels_and_captions(subject: Path) -> None:
    gallery = read_gallery(subject)
    first = fingerprint([(gallery, ["x"] * 3)])
    assert first == fingerprint([(read_gallery(subject), ["x"] * 3)]) != fingerprint([(gallery, ["y"] * 3)])
    Image.new("RGB", (20, 20), "black").save(subject / "1.png")
    assert fingerprint([(read_gallery(subject), ["x"] * 3)]) != first


@pytest.mark.parametrize("turned", [False, True])
def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path: Path, turned: bool) -> None:
    shades = (numpy.arange(64, dtype=numpy.uint16).reshape(8, 8) * 1040).astype(numpy.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3 if turned else 1  # upside down
    Image.fromarray(shades).save(tmp_path / "a.png", exif=exif)
    found = numpy.asarray(read_picture(tmp_path / "a.png").image)
    wanted = numpy.round(shades / 257)[::-1, ::-1] if turned else numpy.round(shades / 257)
    assert (found == wanted[:, :, None]).all() and found.max() == 255


def test_what_is_transparent_in_sixteen_bits_is_white(tmp_path: Path) -> None:
    shades = numpy.full((8, 8), 1000, dtype=numpy.uint16)
    shades[0, 0] = 20000
    Image.fromarray(shades).save(tmp_path / "a.png", transparency=1000)
    found = read_picture(tmp_path / "a.png").image
    assert found.getpixel((4, 4)) == (255, 255, 255) and found.getpixel((0, 0)) == (78, 78, 78)


@pytest.mark.parametrize("kind", [numpy.int32, numpy.float32], ids=["I", "F"])
def test_shades_of_an_unknown_range_are_refused(tmp_path: Path, kind: Any) -> None:
    Image.fromarray(numpy.ones((8, 8), dtype=kind)).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a.png")
    with pytest.raises(lf.DataError, match="save it with 8 bits"):
        read_picture(tmp_path / "a.png")


def test_a_caption_may_begin_with_a_mark(subject: Path) -> None:
    (subject / "0.txt").write_text("a red disc", encoding="utf-8-sig")
    assert read_gallery(subject).pictures[0].caption == "a red disc"


def test_random_crops_do_not_depend_on_the_files_name(subject: Path) -> None:
    picture = read_gallery(subject).pictures[2]
    first = views(picture, 10, crop="random", count=4, flip=False, seed=0)
    picture.path.rename(subject / "renamed.png")
    (renamed,) = (one for one in read_gallery(subject).pictures if one.path.name == "renamed.png")
    assert torch.equal(views(renamed, 10, crop="random", count=4, flip=False, seed=0), first)
    other = read_gallery(subject).pictures[1]
    assert picture.digest == renamed.digest != other.digest
