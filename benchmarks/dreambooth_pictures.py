"""The pictures of the section on DreamBooth: samples beside each other, small enough to be committed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.dreambooth_measure import OTHER_SEEDS, jobs, opened, others, places
from benchmarks.dreambooth_trials import Pretrained
from benchmarks.stored import ResultsError
from lorafit import files

if TYPE_CHECKING:
    from PIL import Image

LARGEST = 150_000
"""Bytes of a picture that is committed."""
COLOURS = (256, 128, 64, 32)
"""A picture that is larger gets by with so many colours."""
ENLARGED = 2
COLUMNS = 6


def drawn(
    pretrained: str,
    word: str,
    samples: Mapping[str, str],
    shown: Sequence[str],
    strengths: Mapping[str, Any],
    strips: str,
    folder: str,
    threads: int,
) -> dict[str, Any]:
    """Writes the pictures; gives their names and sizes in bytes.

    Args:
        pretrained: folder of the pre-training.
        word: the subject's.
        samples: "before", and each candidate → the folder of its samples.
        shown: candidates whose other prompts are shown.
        strengths: what `dreambooth_measure.strengths` gave.
        strips: the folder of its samples.
        folder: where the pictures go.
        threads: taken as every function of a process of its own is given it.
    """
    from lorafit.diffusion.drawing import sheet

    started = Pretrained(Path(pretrained))
    subject, learnt = started.subject(word), started.learnt()
    listed = jobs(subject, others(learnt))
    rows: list[tuple[str, list[Image.Image]]] = [
        ("learnt from", opened(sorted(subject.seen.glob("*.png")))),
        ("never shown", opened(sorted(subject.unseen.glob("*.png")))),
    ]
    for name, place in samples.items():
        rows.append((f"{name}: {subject.instance_prompt}", own(Path(place), listed, "subject")[:COLUMNS]))
    pictures, said = placed(rows, COLUMNS)
    made = {f"dreambooth-{word}-subject.png": sheet(pictures, columns=COLUMNS, rows_said=said)}
    prompts = others(learnt)
    rest = [(name, own(Path(samples[name]), listed, "other")[::OTHER_SEEDS]) for name in ("before", *shown)]
    pictures, said = placed(rest, len(prompts))
    made[f"dreambooth-{word}-prior.png"] = sheet(pictures, columns=len(prompts), rows_said=said)
    scales = [f"{one['scale']:g}" for one in strengths["rows"][0]["scales"]]
    strip = [(told(row), opened([Path(strips) / one["sample"] for one in row["scales"]])) for row in strengths["rows"]]
    pictures, said = placed(strip, len(scales))
    made[f"dreambooth-{word}-strengths.png"] = sheet(pictures, columns=len(scales), rows_said=said, columns_said=scales)
    return {name: write(image, Path(folder) / name) for name, image in made.items()}


def told(row: Mapping[str, Any]) -> str:
    """What a row of the grid shows.

    >>> told({"adapters": "cat", "prompt": "cat"}), told({"adapters": "together", "prompt": "cat"})
    ('cat alone, its prompt', 'together, the prompt of cat')
    """
    alone = row["adapters"] == row["prompt"]
    return f"{row['prompt']} alone, its prompt" if alone else f"together, the prompt of {row['prompt']}"


def placed(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures of rows that are filled up with white, enlarged, and the rows' words."""
    from PIL import Image

    pictures: list[Image.Image] = []
    for _, images in rows:
        some = list(images)[:columns]
        size = some[0].size if some else (8, 8)
        some += [Image.new("RGB", size, "white")] * (columns - len(some))
        large = (size[0] * ENLARGED, size[1] * ENLARGED)
        pictures += [image.resize(large, Image.Resampling.NEAREST) for image in some]
    return pictures, [said for said, _ in rows]


def own(folder: Path, listed: Sequence[tuple[str, str, int]], what: str) -> list[Image.Image]:
    """The samples of one purpose out of their folder."""
    return opened([place for place, job in zip(places(folder, listed), listed, strict=True) if job[0] == what])


def encoded(image: Image.Image) -> Iterator[bytes]:
    """A picture as a PNG file, in all its colours first, then in fewer and fewer."""
    for colours in (None, *COLOURS):
        into = io.BytesIO()
        (image if colours is None else image.quantize(colours)).save(into, format="PNG", optimize=True)
        yield into.getvalue()


def write(image: Image.Image, path: Path) -> int:
    """Writes a picture that is small enough to be committed, with as many colours as that allows; gives its size.

    Raises:
        ResultsError: it is too large in the fewest colours, too.
    """
    for raw in encoded(image):
        if len(raw) <= LARGEST:
            files.commit(files.stage(path, lambda temporary, found=raw: temporary.write_bytes(found)), path)
            return len(raw)
    raise ResultsError(f"{path.name}: {len(raw):,} bytes in {COLOURS[-1]} colours, and {LARGEST:,} are allowed")
