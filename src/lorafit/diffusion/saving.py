"""Adapters of a pipeline in diffusers' file, checked after it was written, and in folders where they need one.

LoRA and DoRA are in the file, with the scale s multiplied into B, which is rounded there once where s is no power of
two. What is low-rank in another form
(VeRA, AdaLoRA, Delta-LoRA, LoRA-drop, LoRA-FA) stands there as the LoRA that it equals, and in a folder of the part's
name in the adapter layout of this library, from which training can go on by the same method. What no LoRA equals
(intrinsic dimension, DoRA around VeRA or AdaLoRA) is in the folder alone, and that is said.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from lorafit import files, store
from lorafit.compress import TruncationWarning
from lorafit.conversion import Plain, convert
from lorafit.diffusion import sources
from lorafit.diffusion.strength import strength_of
from lorafit.errors import CheckpointError, ConfigError, LorafitWarning, StateError, some
from lorafit.exporting import diffusers
from lorafit.handle import Handle
from lorafit.layouts.own import OWN
from lorafit.method import Method
from lorafit.methods.dora import DoRA
from lorafit.methods.lora import LoRA

DTYPE = "float32"
CARD = "README.md"


def save(
    handles: Mapping[str, Handle], folder: str | Path, *, base: str | None = None, prompt: str | None = None
) -> Path:
    """Writes the adapters of a pipeline's parts.

    Args:
        handles: name of the part ("unet", "transformer", "text_encoder", …) → its adapter.
        folder: where `pytorch_lora_weights.safetensors` comes to be, and a folder for each part that needs one. It is
            what `pipe.load_lora_weights(folder)` and `lorafit.diffusion.reading.load(pipe, folder)` take.
        base: the pipeline's name, for the card.
        prompt: what was learnt, for the card.

    Returns:
        The folder.

    Raises:
        CheckpointError: it cannot be written, or holds something else than the adapters once it is.
        ConfigError: no adapters, or another one is in the folder, of which something would be left beside the new one.
        StateError: an adapter acts at another strength, and its method has no setting that could say so.

    A `LorafitWarning` names the parts that diffusers' file cannot hold, and what PEFT makes of one that it does hold.
    """
    if not handles:
        raise ConfigError(
            "there is nothing to save", where="save.handles", found="no adapters", expected="at least one",
            fix="attach one first",
        )  # fmt: skip
    _check_strength(handles)
    place = Path(folder)
    plain: dict[str, Plain] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part, handle in handles.items():
            beside = Path(scratch) / part
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                handle.save(beside, base_model=base)
            written = beside if handle.name == "default" else beside / handle.name
            try:
                plain[part] = _plain(handle, written, Path(scratch) / f"{part}-plain")
            except CheckpointError as error:
                left_out[part] = error.message
            # What PEFT makes of a form that nobody but this library has to read is no news: LoRA is in the file.
            if part in left_out or store.read(written).config.get("peft_type") == "LORA":
                for each in said:
                    warnings.warn(each.message, each.category, stacklevel=2)
    own = {part: handle for part, handle in handles.items() if part in left_out or not _told(handle.method)}
    _check_alone(place, own, in_file=bool(plain))
    for part, handle in own.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LorafitWarning)  # said above
            handle.save(place / part, base_model=base)
    if plain:
        files.commit(
            files.stage(place / diffusers.WEIGHTS, lambda path: _write(plain, path)), place / diffusers.WEIGHTS
        )
        _check(plain, place)
    files.write_text(place / CARD, _card(handles, sorted(plain), base, prompt))
    if left_out:
        part, reason = next(iter(left_out.items()))
        warnings.warn(
            f"diffusers' file cannot hold the adapter of {some(sorted(left_out))}, which is in {place / part} alone "
            f"(lorafit reads it): {reason}",
            LorafitWarning,
            stacklevel=2,
        )
    return place


def _check_alone(place: Path, own: Mapping[str, Handle], *, in_file: bool) -> None:
    """Raises `ConfigError` where a part of another adapter would be left, and be read together with the new one."""
    new = {place / part if handle.name == "default" else place / part / handle.name for part, handle in own.items()}
    old = [folder for part in diffusers.COMPONENTS for folder in sources.adapters_in(place / part)]
    left = [str(folder.relative_to(place)) for folder in old if folder not in new]
    if not in_file and (place / diffusers.WEIGHTS).is_file():
        left.append(diffusers.WEIGHTS)
    if left:
        raise ConfigError(
            "this folder holds parts of another adapter, which would be read together with the new one",
            where=place,
            found=some(left, 4),
            expected="an empty folder, or one that held an adapter of the same kind for the same parts",
            fix="save into another folder, or delete this one first",
        )


def _check_strength(handles: Mapping[str, Handle]) -> None:
    """A strength is a part of the scale of LoRA and DoRA, and of nothing that others save."""
    for part, handle in handles.items():
        factor = strength_of(handle)
        if factor != 1 and not _told(handle.method):
            raise StateError(
                f"an adapter of {handle.method.name} is saved as it was trained, and acts at another strength now",
                where=part,
                found=f"{factor:g} times",
                expected="1",
                fix="with lorafit.diffusion.strength.strength(handles, 1): save(handles, folder)",
            )


def _plain(handle: Handle, written: Path, scratch: Path) -> Plain:
    """The LoRA or DoRA that an adapter equals. Raises `CheckpointError` where it equals none."""
    try:
        return diffusers.opened(written, scratch)
    except CheckpointError as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # what is not exact is not taken
            near = convert(written, output=scratch / "near", model=handle.model)
        if OWN in store.read(near).config:
            raise error
        return diffusers.opened(near, scratch)


def _told(method: Method) -> bool:
    """Whether diffusers' file says all of a method: LoRA that starts at B A = 0, or DoRA around it."""
    inner = method.within if isinstance(method, DoRA) else method
    return type(inner) is LoRA and inner.init == "default"


def _write(plain: Mapping[str, Plain], path: Path) -> None:
    diffusers.write_parts(plain, path, dtype=DTYPE)


def _check(plain: Mapping[str, Plain], place: Path) -> None:
    for part, each in plain.items():
        found = diffusers.check(each, place, component=part, dtype=DTYPE)
        if not found.good:
            raise CheckpointError(
                "what was written is not the adapter",
                where=f"{place / diffusers.WEIGHTS}: {part}",
                found=f"a difference of {found.difference:.3g}",
                expected=f"at most {found.tolerance:.3g}",
                fix="look for a failing disk, and save again",
            )


def _card(handles: Mapping[str, Handle], in_file: list[str], base: str | None, prompt: str | None) -> str:
    rows = [f"| {part} | {handle.summary()} |" for part, handle in handles.items()]
    front = ["---", "library_name: diffusers", *([f"base_model: {json.dumps(base)}"] if base else [])]
    lines = [
        *front,
        "tags:",
        "- lora",
        "- lorafit",
        "---",
        "",
        "# Adapter of a diffusion pipeline",
        "",
        f"Base: {base or 'unknown'}. " + (f"Prompt: `{prompt}`." if prompt else ""),
        "",
        "| part | adapter |",
        "|---|---|",
        *rows,
        "",
        f"In diffusers: `pipe.load_lora_weights(folder)` reads {', '.join(in_file)}."
        if in_file
        else "diffusers has no form for this adapter.",
        "In lorafit: `lorafit.diffusion.reading.load(pipe, folder)`.",
        "",
    ]
    return "\n".join(lines)
