"""Packages come whole or not at all, and no picture of what is tested is among those that are learnt from."""

from __future__ import annotations

import doctest
import gzip
import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import vision_data, vision_packages
from benchmarks.stored import ResultsError
from benchmarks.vision_candidates import ready


def listed(name: str, category: str, tones: int = 0, drawn: bool = True) -> dict[str, Any]:
    """An emoji as the package lists it."""
    one: dict[str, Any] = {
        "unified": name,
        "image": f"{name.lower()}.png",
        "category": category,
        "has_img_google": drawn,
    }
    if tones:
        each = [f"{name}-1F3F{'BCDEF'[number]}" for number in range(tones)]
        one["skin_variations"] = {
            tone[-5:]: {"unified": tone, "image": f"{tone.lower()}.png", "has_img_google": True} for tone in each
        }
    return one


def test_one_tone_of_an_emoji_is_taken_beside_the_plain_one() -> None:
    rows = vision_data.chosen(
        [
            listed("1F44B", "People", tones=5),
            listed("1F431", "Animals"),
            listed("1F1E6", "Flags"),
            listed("1F3FB", "Component"),
            listed("1F436", "Animals", drawn=False),
        ]
    )
    assert [(own, category) for _, own, category in rows] == [
        ("1F44B", "People"),
        ("1F44B", "People"),
        ("1F431", "Animals"),
    ]
    assert rows[0][0] == "1f44b.png" and rows[1][0].startswith("1f44b-1f3f")


def test_a_family_is_in_one_part_and_each_category_in_all() -> None:
    families = [f"{place // 2}" for place in range(200)]
    categories = ["cats" if place < 120 else "dogs" for place in range(200)]
    sides = vision_data.split(families, categories, 0)
    assert all(sides[place] == sides[place + 1] for place in range(0, 200, 2))
    for category, count in (("cats", 120), ("dogs", 80)):
        own = [side for side, its in zip(sides, categories, strict=True) if its == category]
        assert own.count("test") == count // 4 and own.count("validation") == round(0.15 * count / 2) * 2
    assert sides == vision_data.split(families, categories, 0) != vision_data.split(families, categories, 1)


def drawing(colour: tuple[int, int, int, int]) -> bytes:
    from PIL import Image

    whole = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    whole.paste(colour, (0, 0, 32, 32))
    written = io.BytesIO()
    whole.save(written, "PNG")
    return written.getvalue()


def packed(folder: Path, emoji: list[dict[str, Any]], pictures: dict[str, bytes]) -> None:
    contents = {f"package/img/google/64/{name}": raw for name, raw in pictures.items()}
    contents["package/emoji.json"] = json.dumps(emoji).encode()
    with tarfile.open(folder / "emoji-datasource-google-16.0.0.tgz", "w:gz") as archive:
        for name, raw in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def test_emoji_are_read_out_of_their_package_once(tmp_path: Path) -> None:
    emoji = [listed(f"1F4{number:02X}", "ab"[number % 2]) for number in range(40)]
    pictures = {one["image"]: drawing((number * 6, 0, 0, 255)) for number, one in enumerate(emoji)}
    pictures[emoji[39]["image"]] = pictures[emoji[38]["image"]]  # dot for dot the same
    packed(tmp_path, emoji, pictures)
    made = vision_data.pictures("emoji", tmp_path)
    assert made.classes == ("a", "b") and made.facts["twice"] == 1
    assert sum(len(one.labels) for one in made.parts.values()) == 39
    test = made.parts["test"]
    assert test.pixels.shape[1:] == (3, 64, 64) and test.pixels.dtype == torch.uint8
    assert (test.pixels[:, :, 40:, 40:] == 255).all(), "what is transparent is white"
    assert (test.pixels[:, 1, 0, 0] == 0).all()
    assert test.families.tolist() == list(range(len(test.labels))) and made.facts["test_records"] == len(test.labels)
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").unlink()
    again = vision_data.pictures("emoji", tmp_path)
    assert torch.equal(again.parts["test"].pixels, test.pixels) and again.facts == made.facts


def test_fashion_mnist_has_parts_without_a_picture_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(count: int, start: int) -> bytes:
        dots = torch.arange(start, start + count).repeat_interleave(4).to(torch.uint8)
        return struct.pack(">4B3I", 0, 0, 8, 3, count, 2, 2) + bytes(dots.tolist())

    def labels(count: int) -> bytes:
        return struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(place % 10 for place in range(count))

    contents = {
        "train-images-idx3-ubyte": images(60, 0),
        "train-labels-idx1-ubyte": labels(60),
        "t10k-images-idx3-ubyte": images(30, 100),
        "t10k-labels-idx1-ubyte": labels(30),
    }
    monkeypatch.setattr(vision_data, "_unpacked", lambda package: contents)
    monkeypatch.setattr(vision_data, "FASHION_SIZES", {"train": 30, "validation": 20, "test": 10})
    (tmp_path / "dataset-fashion-mnist_1_all.deb").write_bytes(b"a package")
    made = vision_data.pictures("fashion-mnist", tmp_path)
    dots = {name: one.pixels[:, 0, 0, 0].tolist() for name, one in made.parts.items()}
    assert {name: len(each) for name, each in dots.items()} == {"train": 30, "validation": 20, "test": 10}
    assert not set(dots["train"]) & set(dots["validation"]) and min(dots["test"]) >= 100
    for one in made.parts.values():
        assert one.labels.tolist() == [int(dot) % 10 for dot in one.pixels[:, 0, 0, 0]]


def test_what_debian_packs_is_unpacked_by_name(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="cannot be unpacked"):
        vision_data._unpacked(tmp_path / "nothing.deb")
    with pytest.raises(ResultsError, match="no IDX file"):
        vision_data.idx(gzip.compress(b"text"))


def test_a_package_is_fetched_once_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writes = (sys.executable, "-c", "open('thing-1.whl', 'w').write('thing')")
    package = vision_packages.Package("thing 1", "thing-*.whl", writes)
    assert vision_packages.fetched(package, tmp_path / "new").read_text() == "thing"
    (tmp_path / "new" / "thing-1.whl").write_text("mine")
    assert vision_packages.fetched(package, tmp_path / "new").read_text() == "mine"
    assert capsys.readouterr().err.count("fetches") == 1
    broken = vision_packages.Package("other 1", "other-*.whl", (sys.executable, "-c", "raise SystemExit('no network')"))
    with pytest.raises(ResultsError, match=r"other 1 cannot be fetched \(no network\); run `python -c"):
        vision_packages.fetched(broken, tmp_path)
    absent = vision_packages.Package("absent 1", "absent-*.whl", ("no-such-client", "absent"))
    with pytest.raises(ResultsError, match="run `no-such-client absent`"):
        vision_packages.fetched(absent, tmp_path)
    assert not list(tmp_path.glob(".fetch-*"))


def test_pictures_are_what_the_network_was_trained_on() -> None:
    grey = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    x = ready(grey, 64)
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.float32
    torch.testing.assert_close(x[0], -torch.ones(3, 64, 64))
    torch.testing.assert_close(x[1], torch.ones(3, 64, 64))
    assert ready(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 64).unique().tolist() == [-1.0]


def test_doctests() -> None:
    found = doctest.testmod(vision_data)
    assert found.attempted and not found.failed
