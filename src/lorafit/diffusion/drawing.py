"""Drawing with a pipeline: every picture from noise of its own, and sheets of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from lorafit import files
from lorafit.errors import ConfigError, LorafitWarning
from lorafit.rest import at_rest

GAP = 4
"""Pixels between the pictures of a sheet."""
WORDS = 400
"""A sheet of small pictures becomes so many pixels wide at most for the words over its rows."""
GROUND, INK = (255, 255, 255), (70, 70, 70)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 30,
    guidance: float = 7.5,
    size: int | None = None,
    batch: int = 4,
    negative: str = "",
) -> list[Image.Image]:
    """Draws each prompt from each seed: the first prompt from all seeds, then the next.

    Each picture has a generator of its own, on the CPU: which others are drawn with it changes nothing but rounding.
    The pipeline's parts are left as they were, and so is torch's own generator.

    Args:
        pipe: a pipeline.
        prompts: what is to be seen.
        seeds: of the noise.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 and less do without.
        size: pixels of a side; None is the pipeline's own.
        batch: so many pictures at a time.
        negative: what is not to be seen; it takes a guidance above 1.

    Raises:
        ConfigError: no prompts, an empty one, no seeds, a size that the pipeline cannot draw, or what is not to be seen
            without guidance.
    """
    _check(prompts, seeds, steps, size)
    if negative and guidance <= 1:
        raise ConfigError(
            "what is not to be seen means nothing without guidance",
            where="draw.negative",
            found=f"{negative!r}, and guidance {guidance:g}",
            expected="a guidance above 1",
            fix="guidance=7.5, or leave negative out",
        )
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    drawn: list[Image.Image] = []
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(at_rest(part))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for start in range(0, len(jobs), max(1, batch)):
            drawn += _batch(pipe, jobs[start : start + max(1, batch)], steps, guidance, size, negative)
    return drawn


def _batch(
    pipe: Any, jobs: Sequence[tuple[str, int]], steps: int, guidance: float, size: int | None, negative: str
) -> list[Image.Image]:
    options: dict[str, Any] = {} if size is None else {"height": size, "width": size}
    if negative:
        options["negative_prompt"] = [negative] * len(jobs)
    try:
        found = pipe(
            prompt=[prompt for prompt, _ in jobs],
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
            num_inference_steps=steps,
            guidance_scale=float(guidance),
            output_type="pil",
            return_dict=False,
            **options,
        )
    except ValueError as error:
        raise ConfigError(
            "the pipeline cannot draw this",
            where="draw",
            found=str(error).partition("\n")[0],
            expected="a size and a number of steps that it takes",
            fix="look at the message; sides must be multiples of 8",
        ) from error
    flagged = [job for job, black in zip(jobs, found[1] or (), strict=False) if black] if len(found) > 1 else []
    if flagged:
        warnings.warn(
            f"the pipeline's safety checker has blackened {len(flagged)} of {len(jobs)} pictures: {flagged[0][0]!r}, "
            f"seed {flagged[0][1]}",
            LorafitWarning,
            stacklevel=3,
        )
    return [image.convert("RGB") for image in found[0]]


def _check(prompts: Sequence[str], seeds: Sequence[int], steps: int, size: int | None) -> None:
    wrong: tuple[str, object, str] | None = None
    if isinstance(prompts, str) or not prompts or not all(isinstance(each, str) and each.strip() for each in prompts):
        wrong = ("prompts", prompts, "a list of texts")
    elif not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds):
        wrong = ("seeds", list(seeds), "whole numbers, 0 or more")
    elif steps < 1:
        wrong = ("steps", steps, "at least 1")
    elif size is not None and (size < 8 or size % 8):
        wrong = ("size", size, "a multiple of 8")
    if wrong is not None:
        key, found, expected = wrong
        raise ConfigError(
            f"{key} cannot be this", where=f"draw.{key}", found=repr(found), expected=expected, fix=f"give {expected}"
        )


def sheet(
    images: Sequence[Image.Image],
    *,
    columns: int,
    rows_said: Sequence[str] = (),
    columns_said: Sequence[str] = (),
) -> Image.Image:
    """Pictures in rows, the first `columns` of them in the first.

    Args:
        images: pictures; each has a place as large as the largest.
        columns: pictures in a row.
        rows_said: words over each row, or none. A sheet of small pictures is widened for them.
        columns_said: words over each column, or none.

    Raises:
        ConfigError: no pictures, no columns, or words for another number of rows or columns.
    """
    rows = -(-len(images) // columns) if columns > 0 else 0
    if not images or columns < 1:
        raise ConfigError(
            "there is nothing to put on a sheet",
            where="sheet",
            found=f"{len(images)} pictures in {columns} columns",
            expected="at least one of each",
            fix="draw some first",
        )
    for key, said, wanted in (("rows_said", rows_said, rows), ("columns_said", columns_said, columns)):
        if said and len(said) != wanted:
            raise ConfigError(
                f"{key} has words for another sheet", where=f"sheet.{key}", found=len(said), expected=wanted,
                fix=f"give {wanted}",
            )  # fmt: skip
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    font = ImageFont.load_default()
    line = _height(font) + GAP
    top = line if columns_said else 0
    over = line if rows_said else 0
    across = max(
        [columns * (width + GAP), *(min(WORDS, int(font.getlength(_plain(each))) + GAP) for each in rows_said)]
    )
    whole = Image.new("RGB", (GAP + across, top + GAP + rows * (over + height + GAP)), GROUND)
    pen = ImageDraw.Draw(whole)
    for column, words in enumerate(columns_said):
        pen.text((GAP + column * (width + GAP), GAP // 2), _fitting(words, width, font), fill=INK, font=font)
    for row in range(rows):
        y = top + GAP + row * (over + height + GAP)
        if rows_said:
            pen.text((GAP, y), _fitting(rows_said[row], whole.width - 2 * GAP, font), fill=INK, font=font)
        for column, image in enumerate(images[row * columns : (row + 1) * columns]):
            whole.paste(image.convert("RGB"), (GAP + column * (width + GAP), y + over))
    return whole


def _height(font: Any) -> int:
    _, top, _, bottom = font.getbbox("Ágy")
    return int(bottom - min(0, top)) + 1


def _fitting(words: str, width: int, font: Any) -> str:
    """Words that are no wider than so many pixels: what is too long ends in dots."""
    plain = _plain(words)
    if font.getlength(plain) <= width:
        return plain
    while plain and font.getlength(plain + "...") > width:
        plain = plain[:-1]
    return plain + "..." if plain else ""


def _plain(words: str) -> str:
    """Words in the letters that every font here has."""
    return words.encode("latin-1", "replace").decode("latin-1")


def write_png(image: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all."""
    files.commit(files.stage(path, lambda temporary: image.save(temporary, format="PNG")), path)
