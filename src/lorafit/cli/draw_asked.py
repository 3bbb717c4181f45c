"""What `lorafit draw` is asked for, checked before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import CheckpointError, ConfigError, nearest

ROWS = ("all", "each", "together")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SEEDS = 4
SIDE = 8
"""Pixels that pictures of the pipelines come in multiples of."""
LARGEST = 2**63
MOST = 1000
"""A row has so many seeds at most, where they are not listed: a sheet is one picture."""


@dataclass(frozen=True)
class Subject:
    """An adapter.

    Attributes:
        name: what it is called on the sheet.
        path: where it is.
        weight: times the scale, how strongly it acts.
    """

    name: str
    path: Path
    weight: float


@dataclass(frozen=True)
class Row:
    """What acts in a row of the sheet: nothing, an adapter, or the weighted sum of several."""

    said: str
    subjects: tuple[Subject, ...]


ALONE = Row("", ())
"""The pipeline without any adapter."""


@dataclass(frozen=True)
class Sampler:
    """How a picture is drawn."""

    steps: int
    guidance: float
    negative: str
    size: int | None


@dataclass(frozen=True)
class Asked:
    """A sheet that can be drawn, as far as can be told without the pipeline.

    Attributes:
        pipeline: a directory or a hub name.
        dtype: of the pipeline.
        prompts: from above; each has all of `rows`.
        rows: what acts.
        scales: how strongly.
        seeds: the noise that pictures begin with.
        sampler: how they are drawn.
        r: the rank of sums of adapters; None for exact ones.
        merge: whether adapters are folded into the weights.
        output: the PNG file.
        said: what was decided without being asked for.
    """

    pipeline: str
    dtype: str
    prompts: tuple[str, ...]
    rows: tuple[Row, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    sampler: Sampler
    r: int | None
    merge: bool
    output: Path
    said: tuple[str, ...]

    @property
    def columns(self) -> list[tuple[int, float]]:
        """Seed and scale of each column: the strengths of one seed stand beside each other."""
        return [(seed, scale) for seed in self.seeds for scale in self.scales]

    @property
    def count(self) -> int:
        """Pictures on the sheet."""
        return len(self.prompts) * len(self.rows) * len(self.columns)

    def rows_said(self) -> list[str]:
        """What stands above the rows of the sheet."""
        if len(self.rows) == 1:
            return list(self.prompts)
        return [f"{row.said}: {prompt}" for prompt in self.prompts for row in self.rows]

    def columns_said(self) -> list[str]:
        """What stands above its columns."""
        if len(self.scales) == 1:
            return [f"seed {seed}" for seed in self.seeds]
        if len(self.seeds) == 1:
            return [f"{scale:g}" for scale in self.scales]
        return [f"seed {seed}, {scale:g}" for seed, scale in self.columns]


def ask(
    *,
    pipeline: str | None,
    adapters: Sequence[str],
    dtype: str,
    prompts: Sequence[str],
    rows: str,
    scale: str,
    seeds: str | None,
    sampler: Sampler,
    r: int | None,
    merge: bool,
    output: Path,
) -> Asked:
    """What the options of the command say, once checked.

    Raises:
        ConfigError: one of them cannot be.
        CheckpointError: the settings of an adapter's run are damaged.
    """
    _one_of("--dtype", dtype, DTYPES)
    _one_of("--rows", rows, ROWS)
    _check_output(output)
    _check_sampler(sampler)
    subjects = _subjects(adapters)
    scales = _scales(scale)
    if not subjects:
        _refuse_without("an adapter", "--adapter PATH", ("--scale", scales != (1.0,)), ("--merge", merge))
    if len(subjects) < 2:
        _refuse_without("a second adapter", "--adapter PATH", ("--rows", rows != ROWS[0]), ("--r", r is not None))
    if rows == "each":
        _refuse_without("a row for the sum", "--rows all", ("--r", r is not None))
    if not any(scales):
        _refuse_without("a strength other than 0", "--scale 0,1", ("--merge", merge), ("--r", r is not None))
    said: list[str] = []
    runs = [] if pipeline and prompts else [found for one in subjects if (found := _run(one.path)) is not None]
    if pipeline is None:
        pipeline = _pipeline(runs)
        said.append(f"pipeline: {pipeline}, as the adapter's run had it")
    if not prompts:
        prompts = list(dict.fromkeys(str(run["instance_prompt"]) for run in runs))
        said += [f"prompt: {prompt}, as the adapter's run had it" for prompt in prompts]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise _odd("--prompt", list(prompts), "what to draw", '--prompt "a photo of a dog"')
    return Asked(
        pipeline=pipeline,
        dtype=dtype,
        prompts=tuple(prompts),
        rows=_rows(subjects, rows),
        scales=scales,
        seeds=_seeds(seeds, SEEDS if len(scales) == 1 else 1),
        sampler=sampler,
        r=r,
        merge=merge,
        output=output,
        said=tuple(said),
    )


# Words


def _odd(where: str, found: object, expected: str, fix: str, near: Sequence[str] = ()) -> ConfigError:
    return ConfigError(
        "an option has a value it cannot have", where=where, found=repr(found), expected=expected, near=near, fix=fix
    )


def _one_of(option: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise _odd(option, word, ", ".join(known), f"{option} {known[0]}", nearest(word, known))


def _refuse_without(what: str, way: str, *given: tuple[str, bool]) -> None:
    """Raises `ConfigError` for options that mean nothing without what is not there, and `way` would bring."""
    for option, there in given:
        if there:
            raise ConfigError(
                f"{option} means nothing without {what}",
                found=option,
                expected=f"{what} with it",
                fix=f"{way}, or leave {option} out",
            )


def _check_sampler(sampler: Sampler) -> None:
    if not math.isfinite(sampler.guidance):
        raise _odd("--guidance", sampler.guidance, "a finite number", "--guidance 7.5")
    if sampler.guidance <= 1:
        _refuse_without("a guidance above 1", "--guidance 7.5", ("--negative", bool(sampler.negative)))
    if sampler.size is not None and sampler.size % SIDE:
        near = max(SIDE, round(sampler.size / SIDE) * SIDE)
        raise _odd("--size", sampler.size, f"a multiple of {SIDE}", f"--size {near}")


def _check_output(output: Path) -> None:
    if output.is_dir() or output.name == "..":
        raise _odd("--output", f"{output}: a directory", "the name of a PNG file", f"--output {output / 'sheet.png'}")
    if output.suffix.lower() != ".png":
        raise _odd("--output", str(output), "the name of a PNG file", f"--output {output.with_suffix('.png')}")


def _numbers(option: str, text: str, fix: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)) or len(set(found)) < len(found):
        raise _odd(option, text, "different numbers with commas between them", fix)
    return found


def _scales(text: str) -> tuple[float, ...]:
    return tuple(_numbers("--scale", text, "--scale 0,0.5,1"))


def _seeds(text: str | None, usual: int) -> tuple[int, ...]:
    """The first seeds, as many as `text` says; or those that it lists with commas."""
    if text is None:
        return tuple(range(usual))
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if "," in text:
        least, above, expected = 0, LARGEST, "different whole seeds from 0 with commas between them"
    else:
        least, above, expected = 1, MOST + 1, f"a number of pictures from 1 to {MOST:,}, or seeds with commas"
    if not found or len(set(found)) < len(found) or not all(least <= each < above for each in found):
        raise _odd("--seeds", text, expected, "--seeds 4, or --seeds 3,7")
    return tuple(found) if "," in text else tuple(range(found[0]))


# Adapters


def _subjects(texts: Sequence[str]) -> list[Subject]:
    found: list[Subject] = []
    for text in texts:
        path, weight = _weighed(text)
        if not path.exists():
            near = nearest(path.name, [each.name for each in path.parent.iterdir()]) if path.parent.is_dir() else ()
            raise ConfigError(
                "there is no such adapter",
                where="--adapter",
                found=str(path),
                expected="a run of lorafit dreambooth, a folder with pytorch_lora_weights.safetensors, or such a file",
                near=near,
                fix="--adapter runs/cat, or --adapter runs/cat=0.7 to weigh it",
            )
        name = _name(path)
        taken = {one.name for one in found}
        number = next(number for number in range(1, len(texts) + 2) if _numbered(name, number) not in taken)
        found.append(Subject(_numbered(name, number), path, weight))
    return found


def _weighed(text: str) -> tuple[Path, float]:
    """The path and the weight of `PATH=WEIGHT`; a path may have an equals sign of its own."""
    path, equals, number = text.rpartition("=")
    if equals and path and not Path(text).exists():
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight == 0:
            raise _odd("--adapter", text, "PATH, or PATH=WEIGHT with a number that is not 0", f"--adapter {path}=1")
        return Path(path), weight
    return Path(text), 1.0


def _name(path: Path) -> str:
    """What people call an adapter: the name of its run."""
    place = path.absolute()
    folder = place.parent if place.is_file() else place
    return folder.parent.name if folder.name == "adapter" else folder.name


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _rows(subjects: Sequence[Subject], which: str) -> tuple[Row, ...]:
    if not subjects:
        return (ALONE,)
    each = [Row(_called(one), (one,)) for one in subjects]
    if len(subjects) == 1 or which == "each":
        return tuple(each)
    together = Row(" + ".join(map(_called, subjects)), tuple(subjects))
    return (*each, together) if which == "all" else (together,)


def _called(subject: Subject) -> str:
    return subject.name if subject.weight == 1 else f"{subject.weight:g} {subject.name}"


def _run(path: Path) -> Mapping[str, Any] | None:
    """The settings of the DreamBooth run that an adapter came from; None where there is none.

    Raises:
        CheckpointError: they are damaged.
    """
    for folder in (path, *path.absolute().parents[:2]):
        file = folder / "settings.json"
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                "the settings of the adapter's run are damaged",
                where=file,
                found=error,
                expected="the JSON that lorafit dreambooth wrote",
                fix="--pipeline and --prompt say it instead",
            ) from None
        if isinstance(found, dict) and {"pipeline", "instance_prompt"} <= found.keys():
            return found
    return None


def _pipeline(runs: Sequence[Mapping[str, Any]]) -> str:
    known = list(dict.fromkeys(_place(run) for run in runs))
    if len(known) == 1:
        return known[0]
    raise ConfigError(
        "it is not said which pipeline shall draw" if not known else "the adapters come from different pipelines",
        where="--pipeline",
        found=", ".join(known) or "none, and no adapter whose run tells",
        expected="one pipeline",
        fix=f"--pipeline {known[0] if known else 'DIR|NAME'}",
    )


def _place(run: Mapping[str, Any]) -> str:
    """The pipeline of a run: a hub name, or its directory, wherever the run was started.

    Raises:
        ConfigError: the directory is not there any more; its name must not be asked of the hub.
    """
    name, kept = str(run["pipeline"]), run.get("pipeline_folder")
    for folder in (kept, name):  # the second where a project was moved as a whole
        if folder is not None and Path(str(folder)).is_dir():
            return str(Path(str(folder)).resolve())
    if kept is None and not _looks_like_a_path(name):
        return name
    raise ConfigError(
        "the pipeline of the adapter's run is not where it was",
        where="--pipeline",
        found=f"no directory {name if kept is None else kept}",
        expected="the directory that the run was trained with",
        fix="--pipeline DIR",
    )


def _looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be one on the hub; runs of before do not say whether it was."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name
