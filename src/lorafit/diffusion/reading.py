"""Reading adapters of a pipeline: diffusers' file of today and of older releases, kohya's, folders of this library.

Every key is used and every layer filled, or nothing happens: the file is brought into the adapter layout of the core,
part by part, and read by its strict loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafit import activation, checkpoint
from lorafit.adapted import banks
from lorafit.combining import combine
from lorafit.diffusion import sources
from lorafit.diffusion.family import Family
from lorafit.diffusion.pipelines import family
from lorafit.diffusion.strength import set_strength, strength
from lorafit.errors import ConfigError, MergeError
from lorafit.handle import Handle
from lorafit.methods import validate

__all__ = ["detach", "load", "strength"]

Path_ = str | Path


def load(
    pipe: Any,
    path: Path_ | Mapping[str, Path_],
    *,
    name: str = "default",
    scale: float = 1.0,
    trainable: bool = False,
    weights: Mapping[str, float] | None = None,
    how: str = "exact",
    r: int | None = None,
) -> dict[str, Handle]:
    """Attaches an adapter to the parts of a pipeline, or the weighted sum of several; it alone is active then.

    Those that other parts have are left where they are, and do not act.

    Args:
        pipe: the pipeline that it was trained on, or one with the same layers.
        path: diffusers' file; or a folder with it, with an adapter of the core's layout (which is then the denoiser's),
            or with a run. Or several: a name for each → where it is.
        name: the name that the adapter gets.
        scale: how strongly it acts, times what it was trained with.
        trainable: whether training shall go on; else its tensors are frozen. Not for sums.
        weights: of several, name → factor; 1 where there is none.
        how: of several, as for `lorafit.combine`; "svd" is for DoRA, of which there is no exact sum.
        r: the rank of the sum, for "svd".

    Returns:
        Name of the part ("unet", "transformer", "text_encoder", …) → its adapter.

    Raises:
        CheckpointError: the files are damaged, of another kind, or do not fit; the pipeline is as it was.
        ConfigError: a value out of range, or a pipeline of a kind that is not known.
        MergeError: adapters that cannot be summed up like this.
        StateError: another adapter is merged into a part, and so would act as well.
    """
    validate.number("load.scale", scale, fix="scale=1.0")
    kind = family(pipe)
    if not isinstance(path, Mapping) and weights is not None:
        raise ConfigError(
            "one adapter has a scale, and no weights",
            where="load.weights",
            found=repr(weights),
            expected="None",
            fix=f"load(pipe, {str(path)!r}, scale=...)",
        )
    with _as_it_was(kind) as made:
        if isinstance(path, Mapping):
            made |= _sum(kind, path, dict(weights or {}), name, how, r, trainable)
        else:
            made |= _attach(kind, Path(path), name, trainable)
        for part in kind.components:
            if part not in made:
                activation.activate(kind.component(part), (), None)
    if scale == 0:
        for handle in made.values():
            handle.activate(None)
    elif scale != 1:
        set_strength(made, scale)
    return made


def detach(handles: Mapping[str, Handle]) -> None:
    """Takes adapters out: the pipeline is then what it was."""
    for handle in handles.values():
        handle.detach()


@contextmanager
def _as_it_was(kind: Family) -> Iterator[dict[str, Handle]]:
    """Gives room for the handles that are made within; on an error they are taken out, and what acted acts again."""
    acted: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for part in kind.components:
        known = tuple(dict.fromkeys(name for bank in banks(kind.component(part)) for name in bank))
        acted[part] = known, activation.active_names(kind.component(part), known)
    made: dict[str, Handle] = {}
    try:
        yield made
    except BaseException:
        detach(made)
        for part, (known, active) in acted.items():
            activation.activate(kind.component(part), known, active)
        raise


def _attach(kind: Family, path: Path, name: str, trainable: bool) -> dict[str, Handle]:
    made: dict[str, Handle] = {}
    try:
        for source in sources.find(path, kind):
            model = kind.component(source.part)
            with source.opened() as folder:
                made[source.part] = checkpoint.load(model, folder, name=name, trainable=trainable)
    except BaseException:
        detach(made)
        raise
    return made


def _sum(
    kind: Family,
    paths: Mapping[str, Path_],
    weights: dict[str, float],
    name: str,
    how: str,
    r: int | None,
    trainable: bool,
) -> dict[str, Handle]:
    strange = [each for each in weights if each not in paths]
    if not paths or strange or trainable:
        raise ConfigError(
            "these adapters cannot be summed up",
            where="load",
            found="trainable=True" if trainable else f"weights for {strange}" if strange else "no adapters",
            expected="names with paths, weights for some of these names, and trainable=False",
            fix='load(pipe, {"cat": path, "dog": path}, weights={"dog": 0.7})',
        )
    factors = {each: float(weights.get(each, 1.0)) for each in paths}
    for each, factor in factors.items():
        validate.number(f"load.weights[{each!r}]", factor, fix=f"{{{each!r}: 1.0}}")
    acting = {each: factor for each, factor in factors.items() if factor != 0}
    if not acting:
        raise ConfigError(
            "all weights are zero",
            where="load.weights",
            found=repr(factors),
            expected="one that is not",
            fix="draw with the pipeline alone",
        )
    if len(acting) == 1:
        ((only, factor),) = acting.items()
        handles = _attach(kind, Path(paths[only]), name, trainable=False)
        set_strength(handles, factor)
        return handles
    loaded: list[tuple[float, dict[str, Handle]]] = []
    made: dict[str, Handle] = {}
    try:
        for number, (each, factor) in enumerate(acting.items()):
            loaded.append((factor, _attach(kind, Path(paths[each]), f"subject-{number}", trainable=False)))
        for part in kind.components:
            summands = {one[part].name: factor for factor, one in loaded if part in one}
            if summands:
                handle = next(one[part] for _, one in loaded if part in one)
                try:
                    made[part] = combine(handle, summands, name=name, how=how, r=r)
                except MergeError as error:
                    raise _named(error, list(acting)) from None
    except BaseException:
        detach(made)
        raise
    finally:
        for _, one in loaded:
            detach(one)
    for handle in made.values():
        handle.activate(handle.name)
    return made


def _named(error: MergeError, names: list[str]) -> MergeError:
    """An error on the sum, with the names that the caller knows its summands by."""

    def text(value: object) -> str | None:
        if value is None:
            return None
        return re.sub(r"'subject-(\d+)'", lambda match: repr(names[int(match[1])]), str(value))

    return MergeError(
        text(error.message) or "",
        found=text(error.found),
        expected=error.expected,
        where=error.where,
        near=error.near,
        fix=error.fix,
    )
