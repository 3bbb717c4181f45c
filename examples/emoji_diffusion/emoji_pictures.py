"""Captions and pictures out of npm's emoji-datasource-google: what is learnt from, and what is held out for later.

The Noto pictures are 64 pixels wide and under the Apache licence. They are fetched, never shipped. Nothing here needs
torch.

Two subjects are held out, with everything that has their word in its name: cats (twelve emoji) and monkeys (five). Ten
of the cats are one and the same face in ten moods, which is what DreamBooth asks for: several different pictures of one
subject. Five are to be learnt from, and the other five are never shown to anything: how near samples come to those
tells a learnt subject from five pictures learnt by heart. Their class, animals' faces, is well known to the pipeline:
sixteen other faces are in the pre-training. The choice is fair in that no picture of a cat, no word for one and no
relative of the same drawing (the moods of the yellow round face have neither ears nor whiskers) is left in it. The
monkeys are five pictures in all, so that all of them are to be learnt from.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lorafit import files
from lorafit.errors import DataError

PACKAGE = "emoji-datasource-google@16.0.0"
FILE = "emoji-datasource-google-16.0.0.tgz"
LISTED = "package/emoji.json"
INSIDE = "package/img/google/64/"
DROPPED = ("Flags", "Component", "Symbols")
"""Categories that are left out: flags and signs are all letters and patterns, single skin tones are no pictures."""
PICTURE = "a picture of"
FORMS = {"full": 0.5, "head": 0.2, "name": 0.2, "empty": 0.1}
"""Form of a caption → how often it is taken; the empty one is what guidance without a classifier needs."""
HEAD = re.compile(
    r":.*| (?:with|of|in|on|at|behind|and|for|to|from|without|under|between|the)\b.*| (?:symbol|sign)\b.*"
)
"""What comes after the noun that says of what class something is."""


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        file: of its picture, without ".png".
        name: in small letters, without signs: "dog face".
        head: the noun that names its class: "face".
        kind: the subcategory: "animal mammal".
        category: "Animals & Nature".
    """

    file: str
    name: str
    head: str
    kind: str
    category: str

    def caption(self, form: str) -> str:
        """What stands under the picture, in one of `FORMS`.

        >>> Emoji("1f436", "dog face", "face", "animal mammal", "Animals & Nature").caption("head")
        'a picture of face, animal mammal'
        """
        return {
            "full": f"{PICTURE} {self.name}, {self.kind}",
            "head": f"{PICTURE} {self.head}, {self.kind}",
            "name": f"{PICTURE} {self.name}",
            "empty": "",
        }[form]


@dataclass(frozen=True)
class Subject:
    """What a pipeline is taught later on.

    Attributes:
        word: every emoji with this word in its name is held out.
        identifier: a rare word that stands for the subject in prompts.
        seen: files of the pictures to learn it from.
        unseen: files of further pictures of the same, to measure by.
    """

    word: str
    identifier: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def instance_prompt(self) -> str:
        """The subject's prompt: that of its class, and the identifier."""
        return f"{PICTURE} {self.identifier} face, animal mammal"

    @property
    def class_prompt(self) -> str:
        """The prompt of its class; the pre-training has pictures with just this caption."""
        return f"{PICTURE} face, animal mammal"


SUBJECTS = (
    Subject(
        "cat",
        "sks",
        seen=("1f63a", "1f638", "1f63c", "1f63f", "1f63d"),  # open mouth, grinning, wry, crying, kissing
        unseen=("1f431", "1f639", "1f63b", "1f640", "1f63e"),  # plain, tears of joy, heart eyes, weary, pouting
    ),
    Subject("monkey", "zwx", seen=("1f648", "1f649", "1f64a", "1f435", "1f412"), unseen=()),
)


def cleaned(text: str) -> str:
    """Small letters, digits and single blanks; a colon stays, since the head ends before it.

    >>> cleaned("RESCUE WORKER’S HELMET"), cleaned("Man: Red Hair"), cleaned("sky & weather")
    ('rescue workers helmet', 'man: red hair', 'sky weather')
    """
    return " ".join(re.sub(r"[^a-z0-9:]+", " ", text.lower().replace("’s", "s").replace("'s", "s")).split())


def head(name: str) -> str:
    """The noun of a name.

    >>> head("dog face"), head("man: red hair"), head("face with tears of joy"), head("new moon symbol")
    ('face', 'man', 'face', 'moon')
    """
    words = HEAD.sub("", name).split()
    return words[-1] if words else name.split()[0]


def emoji(listed: Iterable[Mapping[str, Any]]) -> list[Emoji]:
    """The emoji of `emoji.json` that have a picture and are of no category in `DROPPED`, in the order of the list."""
    found = []
    for one in listed:
        if one["category"] in DROPPED or not one["has_img_google"]:
            continue
        name = cleaned(one["name"])
        plain = " ".join(name.replace(":", " ").split())
        file = one["image"].removesuffix(".png")
        found.append(Emoji(file, plain, head(name), cleaned(one["subcategory"]), one["category"]))
    return sorted(found, key=lambda one: one.file)


def held_out(one: Emoji, subjects: Sequence[Subject] = SUBJECTS) -> bool:
    """Whether an emoji is one of a subject, or has its word in its name or kind.

    >>> [held_out(Emoji("1f408", name, "", "animal mammal", "")) for name in ("black cat", "cattle")]
    [True, False]
    """
    words = {*one.name.split(), *one.kind.split()}
    return any(each.word in words or one.file in (*each.seen, *each.unseen) for each in subjects)


def fetched(folder: Path) -> Path:
    """The package's file in a folder; npm fetches it if it is not there.

    Raises:
        DataError: it cannot be fetched; says what to do by hand.
    """
    path = folder / FILE
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as inside:
        try:
            done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=inside, capture_output=True, text=True)
            why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        except OSError as error:
            why = str(error)
        made = Path(inside) / FILE
        if why or not made.is_file():
            raise DataError(
                f"{PACKAGE} cannot be fetched",
                where=folder,
                found=why or "no file",
                expected=FILE,
                fix=f"run `npm pack {PACKAGE}` in that folder, or name the file by --emoji",
            )
        return made.replace(path)


def read(archive: Path) -> tuple[list[Emoji], dict[str, bytes]]:
    """The emoji of a package's file, and every picture's bytes by its file's name without ".png".

    Raises:
        DataError: it is no such file, or lacks a picture that it lists.
    """
    drawn: dict[str, bytes] = {}
    listed: list[Mapping[str, Any]] = []
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                wanted = member.name.startswith(INSIDE) and member.name.endswith(".png")
                inside = opened.extractfile(member) if wanted or member.name == LISTED else None
                if inside is not None and wanted:
                    drawn[member.name.removeprefix(INSIDE).removesuffix(".png")] = inside.read()
                elif inside is not None:
                    listed = json.loads(inside.read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise _wrong(archive, str(error)) from error
    found = emoji(listed)
    if not found or (missing := [one.file for one in found if one.file not in drawn]):
        raise _wrong(archive, f"no picture {missing[0]}.png" if found else f"no {LISTED}")
    return found, drawn


def _wrong(archive: Path, found: str) -> DataError:
    return DataError(
        "this is not the package of the emoji",
        where=archive,
        found=found,
        expected=f"the file that `npm pack {PACKAGE}` writes",
        fix="remove it: it is fetched again",
    )


def on_white(raw: bytes, pixels: int) -> Image.Image:
    """A picture with transparent parts on white, `pixels` wide and high."""
    with Image.open(io.BytesIO(raw)) as opened:
        picture = opened.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")
    return flat if flat.size == (pixels, pixels) else flat.resize((pixels, pixels), Image.Resampling.LANCZOS)


def write(archive: Path, folder: Path, pixels: int) -> None:
    """Writes what is learnt from, and apart from it what is held out; all of it comes to be at once.

    `pictures/*.png` with `captions.jsonl`, a line for each; `subjects/WORD/seen` and `unseen` with `subjects.json`.

    Raises:
        DataError: the package lacks a subject's pictures.
    """
    found, drawn = read(archive)
    kept = [one for one in found if not held_out(one)]
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    lines = []
    for one in kept:
        on_white(drawn[one.file], pixels).save(partial / "pictures" / f"{one.file}.png")
        lines.append(json.dumps({**vars(one), "caption": one.caption("full")}))
    about = {}
    for subject in SUBJECTS:
        for part, names in (("seen", subject.seen), ("unseen", subject.unseen)):
            place = partial / "subjects" / subject.word / part
            place.mkdir(parents=True)
            for name in names:
                if name not in drawn:
                    raise _wrong(archive, f"no picture {name}.png")
                on_white(drawn[name], pixels).save(place / f"{name}.png")
        about[subject.word] = {
            **vars(subject),
            "instance_prompt": subject.instance_prompt,
            "class_prompt": subject.class_prompt,
            "held_out": [one.name for one in found if held_out(one, (subject,))],
        }
    files.write_text(partial / "subjects.json", json.dumps(about, indent=1) + "\n")
    files.write_text(partial / "captions.jsonl", "".join(f"{line}\n" for line in lines))
    partial.replace(folder)


def listed(folder: Path) -> list[Emoji]:
    """The emoji that `write` left to learn from, in the order of the file."""
    text = (folder / "captions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [Emoji(**{key: row[key] for key in ("file", "name", "head", "kind", "category")}) for row in rows]
