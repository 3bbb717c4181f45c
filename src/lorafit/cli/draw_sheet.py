"""The drawing of `lorafit draw`: every picture once, each adapter loaded once, and the pipeline left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorafit.cli.draw_asked import ALONE, Asked, Row
from lorafit.errors import MergeError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorafit.handle import Handle


def drawn(asked: Asked, say: Callable[[str], None]) -> Image:
    """The sheet.

    Raises:
        LorafitError: the pipeline or an adapter cannot be loaded, or they do not fit.
    """
    from lorafit.diffusion.drawing import sheet
    from lorafit.diffusion.pipelines import default_device, family, open_pipeline
    from lorafit.training.models import choose_dtype

    device = default_device()
    pipe = open_pipeline(asked.pipeline, dtype=choose_dtype(asked.dtype, device), device=device)
    kind = family(pipe)  # one that reads no prompt is refused by its name
    for prompt in kind.cut([*asked.prompts, asked.sampler.negative]):
        say(f"longer than the text encoder reads, and cut: {prompt!r}")
    made: dict[tuple[Row, float], list[Image]] = {}
    # Sums come first: of some adapters there is none, and nothing should have been drawn by then.
    for row, scales in sorted(_acting(asked).items(), key=lambda each: len(each[0].subjects) < 2):
        for scale, images in _pictures(pipe, asked, row, scales):
            made[row, scale] = images
            who = f"{row.said} at {scale:g}" if row.subjects else "the pipeline alone"
            say(f"{who}: {len(images):,} {'picture' if len(images) == 1 else 'pictures'}")
    images = [
        made[_key(row, scale)][prompt * len(asked.seeds) + asked.seeds.index(seed)]
        for prompt in range(len(asked.prompts))
        for row in asked.rows
        for seed, scale in asked.columns
    ]
    return sheet(images, columns=len(asked.columns), rows_said=asked.rows_said(), columns_said=asked.columns_said())


def _key(row: Row, scale: float) -> tuple[Row, float]:
    """What a place of the sheet shows: without any strength it is the pipeline alone, which is drawn once."""
    return (row, scale) if row.subjects and scale else (ALONE, 0.0)


def _acting(asked: Asked) -> dict[Row, list[float]]:
    """Everything that has to be drawn, each once: what acts, and how strongly."""
    found: dict[Row, list[float]] = {}
    for row in asked.rows:
        for scale in asked.scales:
            acts, strength = _key(row, scale)
            if strength not in found.setdefault(acts, []):
                found[acts].append(strength)
    return found


def _pictures(pipe: Any, asked: Asked, row: Row, scales: Sequence[float]) -> Iterator[tuple[float, list[Image]]]:
    """Scale and pictures, all prompts one after the other with all seeds each; the pipeline is left as it was."""
    from lorafit.diffusion.strength import strength

    if not row.subjects:
        yield 0.0, _draw(pipe, asked)
    elif asked.merge:
        for scale in scales:
            handles = _load(pipe, row, _times(row) * scale, asked.r)
            for handle in handles.values():
                handle.merge()
            yield scale, _draw(pipe, asked)
            for handle in handles.values():
                handle.unmerge()
                handle.detach()
    else:
        handles = _load(pipe, row, 1.0, asked.r)
        for scale in scales:
            with strength(handles, _times(row) * scale):
                yield scale, _draw(pipe, asked)
        for handle in handles.values():
            handle.detach()


def _times(row: Row) -> float:
    """What the strength of a row is multiplied with: an adapter's own weight; those of several are in their sum."""
    return row.subjects[0].weight if len(row.subjects) == 1 else 1.0


def _load(pipe: Any, row: Row, scale: float, r: int | None) -> dict[str, Handle]:
    """What acts in a row, at a scale; of several the exact sum, or the nearest one of rank `r`."""
    from lorafit.diffusion.reading import load

    if len(row.subjects) == 1:
        return load(pipe, row.subjects[0].path, scale=scale)
    paths = {one.name: one.path for one in row.subjects}
    weights = {one.name: one.weight * scale for one in row.subjects}
    try:
        return load(pipe, paths, weights=weights, how="exact" if r is None else "svd", r=r)
    except MergeError as error:
        if r is not None:
            raise
        raise MergeError(
            error.message,
            where=error.where,
            found=" + ".join(paths),
            expected="adapters that have an exact sum: LoRA and what is low-rank like it",
            fix="--r 16: the nearest LoRA of that rank; or --rows each, without the sum",
        ) from None


def _draw(pipe: Any, asked: Asked) -> list[Image]:
    from lorafit.diffusion.drawing import draw

    one = asked.sampler
    return draw(
        pipe,
        asked.prompts,
        seeds=asked.seeds,
        steps=one.steps,
        guidance=one.guidance,
        size=one.size,
        negative=one.negative,
    )
