"""Pictures of the class, for prior preservation: those that are there, and the rest drawn by the pipeline itself.

Each drawn picture is written whole or not at all under a number, with what it was drawn from in the file: a run that is
stopped goes on with the ones that are missing, and pictures of another pipeline or prompt are not taken for these. A
safety checker is not asked: it would hand out black pictures, and training would learn these for the class. The
number alone chooses the noise, not the run's seed: runs of any seed share a folder, and the pictures in it. It also
chooses the prompt, where others than the class's are to be kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorafit import files
from lorafit.diffusion.drawing import draw
from lorafit.diffusion.families import family
from lorafit.diffusion.seeds import derived
from lorafit.diffusion.settings import Settings
from lorafit.diffusion.subjects import DRAWN, Gallery, Picture, paths_of, read_gallery
from lorafit.errors import ConfigError, DataError, some
from lorafit.training.spans import duration

Notify = Callable[[str], object]

PNG = ".png"
ORIGIN = "lorafit"
"""The key in a PNG file under which it says what it was drawn from."""
LATER = frozenset({"dtype", "scheduler"})
"""What pictures do not say that were drawn before it was noted; the rest is compared."""


def gather(pipe: Any, settings: Settings, notify: Notify) -> Gallery:
    """The pictures of the class that a run uses; those that are missing are drawn, and kept.

    One that was drawn for a prompt to keep has that as its caption.

    Args:
        pipe: the pipeline, without adapters.
        settings: of the run; they have a class prompt.
        notify: is told what is drawn, and what is left out.

    Raises:
        ConfigError: the folder's drawn pictures are of other settings, or too few for all prompts to keep.
        DataError: a picture cannot be read, or has the name of a drawn one and does not say what it was drawn from.
    """
    folder = settings.prior_folder
    if folder.exists() and not folder.is_dir():
        raise DataError(
            "the class pictures have no folder", where=folder, found="a file", expected="a folder", fix="--class-images"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = settings.num_class_images
    there = paths_of(folder)
    drawn = {number: path for path in there if (number := _number(path)) is not None}
    own = len(there) - len(drawn)
    _check_kept(settings, own)
    _check_drawn(pipe, drawn, settings, notify)
    if own > wanted:
        notify(f"class: uses the first {wanted} of {own} pictures in {folder}; --num-class-images {own} uses all")
    if len(there) < wanted:
        _draw_missing(pipe, settings, set(drawn), there, notify)
    gallery = read_gallery(folder, "class pictures", size=settings.resolution, most=wanted)
    return replace(gallery, pictures=tuple(_captioned(each, settings) for each in gallery.pictures))


def _check_kept(settings: Settings, own: int) -> None:
    """Raises `ConfigError` where some prompt to keep would have no picture.

    Args:
        settings: of the run.
        own: pictures in the folder that were not drawn here, which are used first.
    """
    needed = own + 2 * len(settings.keep_prompts)
    if settings.keep_prompts and settings.num_class_images < needed:
        beside = f" beside {own} in {settings.prior_folder}" if own else ""
        raise ConfigError(
            "there are too few class pictures for all prompts to keep, of which every other one is",
            where="num_class_images",
            found=f"{settings.num_class_images}, and {len(settings.keep_prompts)} keep_prompts{beside}",
            expected=f"at least {needed}",
            fix=f"--num-class-images {needed}, or fewer --keep-prompt",
        )


def _captioned(picture: Picture, settings: Settings) -> Picture:
    """With what it was drawn for, where that is not the class and no file says otherwise."""
    number = _number(picture.path)
    if number is None or picture.caption is not None or _prompt(settings, number) == settings.class_prompt:
        return picture
    return replace(picture, caption=_prompt(settings, number))


def _number(path: Path) -> int | None:
    """The number of a picture that was drawn here."""
    middle = path.name.removeprefix(DRAWN).removesuffix(PNG)
    known = path.name == f"{DRAWN}{middle}{PNG}" and len(middle) == 6 and middle.isascii() and middle.isdigit()
    return int(middle) if known else None


def _draw_missing(pipe: Any, settings: Settings, drawn: set[int], there: list[Path], notify: Notify) -> None:
    missing = settings.num_class_images - len(there)
    numbers: list[int] = []
    candidate = 0
    while len(numbers) < missing:
        if candidate not in drawn:
            numbers.append(candidate)
        candidate += 1
    what = "1 picture" if missing == 1 else f"{missing} pictures"
    kept = len(settings.keep_prompts)
    also = f" and of {kept} other prompt{'' if kept == 1 else 's'}" if kept else ""
    notify(f"draws {what} of the class: {settings.class_prompt!r}{also}, into {settings.prior_folder}")
    started = time.perf_counter()
    with _unchecked(pipe, notify):
        for done, number in enumerate(numbers):  # one by one: a picture that is drawn again is the same to the bit
            if done == 1:
                seconds = (time.perf_counter() - started) * (missing - 1)
                notify(f"the others will take about {duration(seconds)}; after Ctrl-C those that are drawn stay")
            (image,) = draw(
                pipe,
                [_prompt(settings, number)],
                seeds=[_seed(number)],
                steps=settings.sample_steps,
                guidance=settings.guidance,
                size=settings.resolution,
            )
            _write(image, settings.prior_folder / f"{DRAWN}{number:06d}{PNG}", _origin(pipe, settings, number))


@contextmanager
def _unchecked(pipe: Any, notify: Notify) -> Iterator[None]:
    """Within it a pipeline's safety checker is not asked; the pipeline is left as it was."""
    checker = pipe.components.get("safety_checker")
    if checker is None:
        yield
        return
    notify("the safety checker is not asked for these: they are only trained on, and black ones would be learnt")
    pipe.safety_checker = None
    try:
        yield
    finally:
        pipe.register_modules(safety_checker=checker)  # which mends its config, too


def _prompt(settings: Settings, number: int) -> str:
    """What a drawn picture shows: the class, or with prompts to keep every other time one of those, in turn."""
    assert settings.class_prompt is not None
    if number % 2 == 0 or not settings.keep_prompts:
        return settings.class_prompt
    return settings.keep_prompts[number // 2 % len(settings.keep_prompts)]


def _seed(number: int) -> int:
    return derived(0, "class picture", number)


def _origin(pipe: Any, settings: Settings, number: int) -> dict[str, Any]:
    """What a picture is drawn from."""
    place = Path(settings.pipeline)
    return {
        "pipeline": str(place.resolve()) if place.is_dir() else settings.pipeline,
        "prompt": _prompt(settings, number),
        "seed": _seed(number),
        "steps": settings.sample_steps,
        "guidance": settings.guidance,
        "size": settings.resolution,
        "dtype": str(family(pipe).dtype).removeprefix("torch."),
        "scheduler": type(pipe.scheduler).__name__,
    }


def _write(image: Image.Image, path: Path, origin: dict[str, Any]) -> None:
    note = PngInfo()
    note.add_text(ORIGIN, json.dumps(origin))
    files.commit(files.stage(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=note)), path)


def _check_drawn(pipe: Any, drawn: dict[int, Path], settings: Settings, notify: Notify) -> None:
    """Raises for drawn pictures that are not what would be drawn now; says which are black all over."""
    black: list[str] = []
    for number, path in drawn.items():
        found, dark = _noted(path)
        if dark:
            black.append(path.name)
        wanted = _origin(pipe, settings, number)
        wrong = [key for key in wanted if found.get(key) != wanted[key] and (key in found or key not in LATER)]
        if wrong:
            raise ConfigError(
                "the class pictures in this folder were drawn from something else",
                where=path,
                found=f"{wrong[0]} {found.get(wrong[0])!r}",
                expected=f"{wrong[0]} {wanted[wrong[0]]!r}",
                fix="choose another --class-images, or remove the folder's drawn pictures",
            )
    if black:
        told = some(black, 3)
        notify(f"black all over, as a safety checker leaves them: {told}; remove them, and they are drawn again")


def _noted(path: Path) -> tuple[dict[str, Any], bool]:
    """What a drawn picture says that it was drawn from, and whether it is black all over."""
    try:
        with Image.open(path) as opened:
            dark = opened.convert("L").getextrema() == (0, 0)
            note = json.loads(str(opened.info.get(ORIGIN, "null")))  # which may stand behind the pixels
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            "a class picture cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected="the picture that was drawn here",
            fix="remove it: it is drawn again",
        ) from error
    if not isinstance(note, dict):
        raise DataError(
            "a class picture has the name of a drawn one, and does not say what it was drawn from",
            where=path,
            found="no note in the file, which other programs leave out when they write it again",
            expected=f"the PNG file as it was drawn, with the text {ORIGIN!r}",
            fix="remove it: it is drawn again; or rename it, if it is a picture of your own",
        )
    return note, dark
