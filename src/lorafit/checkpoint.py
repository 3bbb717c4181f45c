"""Loading adapters: this library's and PEFT's, strictly. Saving is `Handle.save`; the files are `store`'s business."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorafit import store
from lorafit.adapted import plain_class
from lorafit.delta import LowRank
from lorafit.errors import CheckpointError, ConfigError, LorafitWarning, some
from lorafit.fitting import Fit, copy_into, fit
from lorafit.handle import Handle
from lorafit.inject import check_name, install_all
from lorafit.layers import site_class, site_of
from lorafit.layouts import LORAFIT, ContradictionError, Layout, Ours, Place, check_transposed, parse
from lorafit.layouts.base import anchored
from lorafit.method import Adapter, Method
from lorafit.methods.lora import LoRA
from lorafit.peft_config import Parsed
from lorafit.peft_layout import warn_shared
from lorafit.plan import Modules, Planned, check_model, refuse, refuse_copy
from lorafit.store import Stored


def load(model: nn.Module, path: str | Path, *, name: str = "default", trainable: bool = False) -> Handle:
    """Attaches an adapter from its folder; it alone is active then.

    Reads what this library writes, and of PEFT: LoRA, rsLoRA, DoRA, AdaLoRA and VeRA on every layer type that PEFT has
    for them, rank and alpha patterns, modules saved in full. Every key is used, every site filled, every shape right,
    or nothing happens.

    Args:
        model: the base model that the adapter was trained on.
        path: the folder with adapter_config.json and adapter_model.safetensors, or its parent if the folder has the
            adapter's name.
        name: the name it gets on this model.
        trainable: whether training shall go on, by the method that the adapter was trained with; else its tensors are
            frozen.

    Raises:
        CheckpointError: the files are damaged, of another type, or do not fit; the model is as it was.
        TargetError: the model has a layer that cannot be adapted in place.
    """
    check_model(model)
    with torch.inference_mode(False):  # what inference mode makes could never be trained
        made = fitted(model, path, name)
    check_name(model, made.method, name)
    for note in made.notes:
        warnings.warn(note, LorafitWarning, stacklevel=2)
    for site_path in made.found.copies:
        refuse_copy(site_path, made.modules)
    saved = {path: module for path, module in made.modules.by_path.items() if path in made.found.copies}
    handle = install_all(model, made.method, made.planned, made.adapters, saved, name, trainable=trainable)
    for site_path, tensors in made.found.copies.items():
        copy_into(handle.copies[site_path], tensors)
    return handle


Made = tuple[list[Planned], dict[str, Adapter]]


@dataclass(frozen=True)
class Ready:
    """An adapter of a folder, made for a model and not attached yet; `notes` are to be said to the caller."""

    stored: Stored
    parsed: Parsed
    layout: Layout
    found: Fit
    modules: Modules
    method: Method
    planned: list[Planned]
    adapters: dict[str, Adapter]
    notes: list[str]


@dataclass(frozen=True)
class Fitting:
    """An adapter of a folder whose every tensor has its place in a model; nothing is made of it yet."""

    stored: Stored
    parsed: Parsed
    layout: Layout
    own: Ours | str | None
    found: Fit
    modules: Modules
    notes: list[str]

    def plain(self) -> dict[str, LowRank] | None:
        """Module path → what the file says is added there; None where that takes more than the file."""
        told = {
            self.modules.aliases[path]: self.layout.plain(self.parsed, path, self.found.sites[path], values)
            for path, values in self.found.adapters.items()
        }
        return {path: delta for path, delta in told.items() if delta is not None} if all(told.values()) else None


def fitting(modules: Modules, path: str | Path, name: str = "default") -> Fitting:
    """Reads an adapter's folder and finds each tensor's place among a model's modules.

    Raises:
        CheckpointError: the files are damaged, of another type, or do not fit.
    """
    stored = store.read(Path(path), name)
    layout, parsed, own = parse(stored.config, stored.config_path)
    found = fit(stored, layout, parsed, modules)
    check_transposed(stored.config, layout, found.sites, stored.config_path)
    if not stored.ours:
        warn_shared([*(modules.aliases[each] for each in found.adapters), *found.copies], modules.aliases)
    return Fitting(stored, parsed, layout, own, found, modules, _notes(parsed, stored, list(found.sites)))


def fitted(model: nn.Module, path: str | Path, name: str = "default") -> Ready:
    """Reads an adapter's folder and makes its adapters for `model`, which stays as it is.

    Raises:
        CheckpointError: the files are damaged, of another type, or do not fit.
        TargetError: the model has a layer that cannot be adapted in place.
    """
    return ready(fitting(Modules.of(model), path, name))


def ready(fitting: Fitting) -> Ready:
    """Makes the adapters of what was read. Raises as `fitted`."""
    stored, parsed, layout, own = fitting.stored, fitting.parsed, fitting.layout, fitting.own
    found, modules, notes = fitting.found, fitting.modules, list(fitting.notes)
    values = {modules.aliases[path]: tensors for path, tensors in found.adapters.items()}

    def make(method: Method, at: Callable[[str], Method], ours: Ours | None) -> Made:
        planned = [_planned(path, at(path), stored, modules, ours) for path in modules.by_path if path in values]
        places = [Place(each.path, each.site, each.spot, values[each.path]) for each in planned]
        record = {} if ours is None else ours.record
        return planned, layout.adapters(method, places, found.shared, parsed, record)

    reason = own if isinstance(own, str) else None
    if isinstance(own, Ours):
        try:
            planned, adapters = make(own.method, own.at, own)
            return Ready(stored, parsed, layout, found, modules, own.method, planned, adapters, notes)
        except (ContradictionError, ConfigError) as error:
            reason = str(error).replace("\n", ";")
    if reason is not None and layout is LORAFIT:
        raise CheckpointError(
            'the file does not hold what its key "lorafit" says',
            where=f"{stored.config_path}: lorafit",
            found=reason,
            expected="the tensors and the method of one adapter",
            fix="copy config and weights again from where the adapter was saved",
        )
    if reason is not None and not (stored.edited and isinstance(own, Ours) and _plain(own.method)):
        notes.append(
            f'{stored.config_path}: what its key "lorafit" says is set aside, and the adapter is used as PEFT reads '
            f"it, as {parsed.method}: {reason}"
        )
    try:
        planned, adapters = make(parsed.method, lambda path: layout.at(parsed, path), None)
    except ContradictionError as error:
        raise CheckpointError(
            "weights and config do not belong together",
            where=stored.weights_path,
            found=str(error),
            expected=str(parsed.method),
            fix="copy config and weights again from one and the same adapter",
        ) from None
    return Ready(stored, parsed, layout, found, modules, parsed.method, planned, adapters, notes)


def _plain(method: Method) -> bool:
    """Whether a method is no more than PEFT's own settings say: an edit of them takes nothing else away."""
    return isinstance(method, LoRA) and not anchored(method)


def check_room(path: str, modules: Modules) -> None:
    """Raises `TargetError` for a layer that cannot be adapted in place."""
    module = modules.by_path[path]
    kind = site_class(plain_class(module))
    assert kind is not None
    refuse(path, module, plain_class(module), kind, modules.parents[path])


def _planned(path: str, method: Method, stored: Stored, modules: Modules, ours: Ours | None) -> Planned:
    check_room(path, modules)
    planned = Planned(path, site_of(modules.by_path[path]), method)
    reason = method.impossible(planned.spot)
    if reason is None:
        return planned
    if ours is not None:
        raise ContradictionError(f"{path}: {reason}")
    raise CheckpointError(
        "the rank does not fit the layer",
        where=f"{stored.config_path}: {path}",
        found=reason,
        fix="load the base model that the adapter was trained on",
    )


def _notes(parsed: Parsed, stored: Stored, paths: Sequence[str]) -> list[str]:
    idle = [f"rank_pattern[{key!r}]" for key in parsed.rank_pattern.idle(paths)]
    idle += [f"alpha_pattern[{key!r}]" for key in parsed.alpha_pattern.idle(paths)]
    return [
        f"{stored.config_path}: {what}: {some(names)}"
        for names, what in (
            (parsed.unknown, "settings that are not known here are left out of the mathematics"),
            (idle, "keys of patterns that match no layer have no effect"),
            (stored.edited, "differs from the config that was saved with the weights, and is used as it is"),
        )
        if names
    ]
