"""Pictures in three parts, to learn from, to choose rates by and to report on, made of packages once and then read.

Fashion-MNIST has its own test part. Noto's emoji are split here: pictures of one emoji that differ in skin tone, gender
or direction alone are a family, and a family is in one part. Of the tones of an emoji one is taken beside the plain
one, since with all of them two pictures of three would be people. Flags and single tones ("Component") are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import struct
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import vision_packages as packages
from benchmarks.stored import ResultsError, say
from lorafit import files

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
PARTS = ("train", "validation", "test")
SEED = 0
"""Of the parts: they are the same in every run."""
FASHION_SIZES = {"train": 4096, "validation": 512, "test": 2000}
FASHION_CLASSES = (
    *("T-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FASHION_INSIDE = "./usr/share/datasets/fashion-mnist/{}.gz"
SHARES = {"test": 0.25, "validation": 0.15}
"""Of the families of each category; the rest is to learn from."""
LEFT_OUT = ("Flags", "Component")
EMOJI_INSIDE = "package/img/google/64/"
EMOJI_PIXELS = 64
TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
IGNORED = TONES | {"FE0F", "2640", "2642", "27A1"}
"""Code points that make no other family: tones, the form of the picture, genders, and facing right."""
JOINER = "200D"
ALIKE = {
    **{"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"},
    **{"1F478": "1FAC5", "1F934": "1FAC5", "1F930": "1FAC4", "1FAC3": "1FAC4", "1F936": "1F385", "1F57A": "1F483"},
}
"""Man, woman → person; boy, girl → child; old man, old woman → older person; princess, prince → person with crown;
pregnant woman, man → person; Mrs Claus → Santa Claus; man dancing → dancer."""
PEOPLE = {
    "1F9D1-200D-1F384": "1F385",
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F9D1-200D-1F91D-200D-1F9D1"),
    "1F491": "1F9D1-200D-2764-200D-1F9D1",
    "1F48F": "1F9D1-200D-2764-200D-1F48B-200D-1F9D1",
    "1F46A": "1F9D1-200D-1F9D1-200D-1F9D2",
}
"""The same for people whom one code point, or a sequence, stands for: Mx Claus, holding hands, couple, kiss, family."""


@dataclass(frozen=True)
class Part:
    """Some pictures.

    Attributes:
        pixels: (n, channels, height, width), uint8; one channel is grey.
        labels: (n), int64.
        families: (n), int64, from 0 on without gaps: pictures of one family are one record of the test.
    """

    pixels: Tensor
    labels: Tensor
    families: Tensor


@dataclass(frozen=True)
class Pictures:
    """One set.

    Attributes:
        classes: their names, in the order of the labels.
        facts: what there is to say of it, in JSON's types.
        parts: by the names of `PARTS`.
    """

    classes: tuple[str, ...]
    facts: Mapping[str, Any]
    parts: Mapping[str, Part]


def pictures(name: str, folder: Path) -> Pictures:
    """A set, from the folder's file of it; its package is fetched and the file made where there is none.

    Raises:
        ResultsError: the package cannot be fetched, or is not what it was.
    """
    from safetensors import safe_open

    path = folder / "prepared" / f"{name}-{FORMAT}.safetensors"
    if not path.is_file():
        _write(MAKERS[name](folder), path)
        say(f"{path}: written")
    with safe_open(path, "pt") as opened:
        about = json.loads(opened.metadata()["about"])
        parts = {
            part: Part(*(opened.get_tensor(f"{part}.{key}") for key in ("pixels", "labels", "families")))
            for part in PARTS
        }
    return Pictures(tuple(about["classes"]), about["facts"], parts)


def _write(made: Pictures, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.{key}": value for name, part in made.parts.items() for key, value in vars(part).items()}
    about = {"about": json.dumps({"classes": made.classes, "facts": made.facts})}
    files.commit(files.stage(path, lambda temporary: save_file(tensors, temporary, about)), path)


# Fashion-MNIST ---------------------------------------------------------------------


def fashion(folder: Path) -> Pictures:
    """Fashion-MNIST: a part of its 60,000 pictures to train on, and of its 10,000 to test on."""
    import torch

    package = packages.fetched(packages.FASHION, folder)
    found = _unpacked(package)
    sets = {
        side: (idx(found[f"{side}-images-idx3-ubyte"]), idx(found[f"{side}-labels-idx1-ubyte"]).long())
        for side in ("train", "t10k")
    }
    generator = torch.Generator().manual_seed(SEED)
    places = torch.randperm(len(sets["train"][1]), generator=generator)
    train, validation = FASHION_SIZES["train"], FASHION_SIZES["validation"]
    chosen = {
        "train": ("train", places[:train]),
        "validation": ("train", places[train : train + validation]),
        "test": ("t10k", torch.randperm(len(sets["t10k"][1]), generator=generator)[: FASHION_SIZES["test"]]),
    }
    parts = {
        name: Part(sets[side][0][rows][:, None].contiguous(), sets[side][1][rows], torch.arange(len(rows)))
        for name, (side, rows) in chosen.items()
    }
    return Pictures(FASHION_CLASSES, _facts(parts, package, packages.FASHION), parts)


def _unpacked(package: Path) -> dict[str, bytes]:
    """The four files of the package, by their names without .gz."""
    try:
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ResultsError(f"{package}: cannot be unpacked ({error}); Debian's dpkg-deb does that") from None
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for side in ("train", "t10k"):
            for name in (f"{side}-images-idx3-ubyte", f"{side}-labels-idx1-ubyte"):
                try:
                    inside = archive.extractfile(FASHION_INSIDE.format(name))
                except KeyError:
                    inside = None
                if inside is None:
                    raise ResultsError(f"{package}: {FASHION_INSIDE.format(name)} is not in it")
                found[name] = gzip.decompress(inside.read())
    return found


def idx(raw: bytes) -> Tensor:
    """What an IDX file of bytes holds.

    >>> idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
    [[7, 8, 9]]
    """
    import torch

    if raw[:3] != b"\x00\x00\x08":
        raise ResultsError("this is no IDX file of unsigned bytes")
    axes = raw[3]
    sizes = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return torch.frombuffer(bytearray(raw[4 + 4 * axes :]), dtype=torch.uint8).view(*sizes)


# Emoji -----------------------------------------------------------------------------


def emoji(folder: Path) -> Pictures:
    """Noto's emoji with their categories, in parts by family."""
    package = packages.fetched(packages.EMOJI, folder)
    drawn: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    with tarfile.open(package) as archive:
        for member in archive:
            wanted = member.name.startswith(EMOJI_INSIDE) and member.name.endswith(".png")
            if wanted or member.name == "package/emoji.json":
                opened = archive.extractfile(member)
                assert opened is not None
                if wanted:
                    drawn[member.name.removeprefix(EMOJI_INSIDE)] = opened.read()
                else:
                    listed = json.loads(opened.read())
    if not listed or not drawn:
        raise ResultsError(f"{package}: {len(listed)} emoji and {len(drawn)} pictures in it, and both were expected")
    taken, twice = _distinct(chosen(listed), drawn)
    sides = split([one[1] for one in taken], [one[2] for one in taken], SEED)
    classes = tuple(sorted({category for _, _, category in taken}))
    parts = {name: _part([one for one, side in zip(taken, sides, strict=True) if side == name], classes, drawn)
             for name in PARTS}  # fmt: skip
    facts = _facts(parts, package, packages.EMOJI)
    return Pictures(classes, {**facts, "twice": twice}, parts)


def chosen(listed: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(file of the picture, family, category) of each emoji that is taken, and of one of its tones."""
    rows, drawing = [], random.Random(SEED)
    for one in listed:
        if one["category"] in LEFT_OUT or not one["has_img_google"]:
            continue
        own = family(one["unified"])
        rows.append((one["image"], own, one["category"]))
        tones = [each["image"] for each in one.get("skin_variations", {}).values() if each["has_img_google"]]
        if tones:
            rows.append((drawing.choice(sorted(tones)), own, one["category"]))
    return rows


def family(unified: str) -> str:
    """What emoji have in common that differ in skin tone, gender or direction alone.

    >>> family("1F469-1F3FD-200D-1F4BB") == family("1F468-200D-1F4BB") == "1F9D1-200D-1F4BB"
    True
    >>> family("1F3C3-200D-2640-FE0F-200D-27A1-FE0F"), family("2640-FE0F")
    ('1F3C3', '2640-FE0F')
    >>> family("1F46B") == family("1F9D1-200D-1F91D-200D-1F9D1"), family("1F936") == family("1F9D1-200D-1F384")
    (True, True)
    """
    points = [ALIKE.get(point, point) for point in unified.split("-") if point not in IGNORED]
    while points and points[-1] == JOINER:
        points.pop()
    own = "-".join(points) or unified
    return PEOPLE.get(own, own)


def _distinct(
    rows: Sequence[tuple[str, str, str]], drawn: Mapping[str, bytes]
) -> tuple[list[tuple[str, str, str]], int]:
    """The rows without those whose picture is another one's, dot for dot, and how many those are."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        if row[0] not in drawn:
            raise ResultsError(f"the picture {row[0]} is listed, and not in the package")
        own = hashlib.sha256(on_white(drawn[row[0]]).numpy().tobytes()).hexdigest()
        if own not in seen:
            seen.add(own)
            kept.append(row)
    return kept, len(rows) - len(kept)


def split(families: Sequence[str], categories: Sequence[str], seed: int) -> list[str]:
    """The part of each picture: of each category the same shares of families, a family whole.

    >>> split(["a", "a", "b", "c", "d", "e"], ["x"] * 6, 0).count("test") in (1, 2)
    True
    """
    of: dict[str, str] = {}
    for each, category in zip(families, categories, strict=True):
        of.setdefault(each, category)
    part: dict[str, str] = {}
    for category in dict.fromkeys(of.values()):
        own = [each for each, its in of.items() if its == category]
        random.Random(f"{seed} {category}").shuffle(own)
        test = round(SHARES["test"] * len(own))
        validation = round(SHARES["validation"] * len(own))
        for place, each in enumerate(own):
            part[each] = "test" if place < test else "validation" if place < test + validation else "train"
    return [part[each] for each in families]


def _part(rows: Sequence[tuple[str, str, str]], classes: Sequence[str], drawn: Mapping[str, bytes]) -> Part:
    import torch

    numbers = {name: place for place, name in enumerate(dict.fromkeys(own for _, own, _ in rows))}
    return Part(
        torch.stack([on_white(drawn[image]) for image, _, _ in rows]),
        torch.tensor([classes.index(category) for _, _, category in rows]),
        torch.tensor([numbers[own] for _, own, _ in rows]),
    )


def on_white(raw: bytes) -> Tensor:
    """A picture with transparent parts as (3, height, width) on white, uint8."""
    import torch
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as opened:
        picture = opened.convert("RGBA")
    if picture.size != (EMOJI_PIXELS, EMOJI_PIXELS):
        raise ResultsError(f"a picture of {picture.size} pixels, and all have {EMOJI_PIXELS} each way")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")
    rows = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
    return rows.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _facts(parts: Mapping[str, Part], package: Path, source: packages.Package) -> dict[str, Any]:
    test = parts["test"]
    return {
        "source": source.about,
        "package": package.name,
        "sha256": packages.digest(package),
        "train_records": len(parts["train"].labels),
        "validation_records": len(parts["validation"].labels),
        "test_records": int(test.families.max()) + 1,
        "test_pictures": len(test.labels),
        "majority": float(test.labels.bincount().max()) / len(test.labels),
    }


MAKERS: Mapping[str, Callable[[Path], Pictures]] = {"fashion-mnist": fashion, "emoji": emoji}
"""Name of a set → what makes it."""
