"""The exact state of an adapter for training checkpoints: every tensor as it is, whatever its file would hold.

An adapter's file says what the adapter computes, so that others can read it; this says all that a run needs to go on
bit for bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafit import files
from lorafit.activation import check_apart
from lorafit.errors import CheckpointError, nearest, some
from lorafit.handle import Handle
from lorafit.method import Adapter
from lorafit.sharded import by_one, in_parts, put, whole

STATE = "lorafit_state.safetensors"
SETTINGS = "settings"
MARK = "|"
"""Stands between a module's path and the name of a tensor there."""


def save_state(handle: Handle, folder: str | Path) -> Path:
    """Writes every tensor of an adapter into `folder`, whole or not at all.

    Of a sharded adapter it is to be called in every process, as `Handle.save` is.

    Raises:
        CheckpointError: the file cannot be written.
        StateError: a layer was replaced after attaching.
    """
    handle.check_sites("save")
    entries = handle.entries()
    with whole(entries.values()):
        tensors = {
            f"{path}{MARK}{key}": value.detach().to("cpu").contiguous().clone()
            for path, entry in entries.items()
            for key, value in _tensors(entry).items()
        }
    path = Path(folder) / STATE
    metadata = {"format": "pt", SETTINGS: json.dumps(_settings(handle))}
    write = partial(_write, path, tensors, metadata)
    return by_one(write) if in_parts(handle.model) else write()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    files.commit(files.stage(path, lambda temporary: _fill(temporary, tensors, metadata)), path)
    return path


def load_state(handle: Handle, folder: str | Path) -> None:
    """Overwrites an attached adapter's tensors with those that `save_state` wrote, or changes nothing.

    Raises:
        CheckpointError: the file is damaged, or of an adapter with other sites, ranks or scales.
        StateError: a layer was replaced after attaching, or the adapter is merged.
    """
    handle.check_sites("reload")
    check_apart(handle.name, merged=handle.merged)
    path = Path(folder) / STATE
    saved, settings = _read(path)
    _check_settings(settings, _settings(handle), path)
    values = _by_entry(saved, handle, path)
    resized = [_check_entry(entry, values.get(key, {}), f"{path}: {key}") for key, entry in handle.entries().items()]
    for (key, entry), shapes in zip(handle.entries().items(), resized, strict=True):
        if shapes:
            assert isinstance(entry, Adapter)
            entry.resize(shapes)
        own = _tensors(entry)
        for name, value in values.get(key, {}).items():
            if own[name].shape == value.shape:
                put(own[name], value)
            else:
                _renew(entry, name, value.to(own[name].device))


def _tensors(entry: nn.Module) -> dict[str, Tensor]:
    """All that an adapter or a full copy holds: of a copy also what its state dict leaves out, which may move too."""
    found: dict[str, Tensor] = entry.state_dict()
    return found if isinstance(entry, Adapter) else {**_passing(entry), **found}


def _passing(entry: nn.Module) -> dict[str, Tensor]:
    """The buffers of a full copy that its state dict leaves out."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in entry.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def _renew(entry: nn.Module, name: str, value: Tensor) -> None:
    """Gives a full copy a buffer of another shape: one that a forward pass makes anew."""
    path, _, last = name.rpartition(".")
    entry.get_submodule(path)._buffers[last] = value


def _settings(handle: Handle) -> dict[str, list[object]]:
    found = {path: list(handle.method_at(path).adapter_settings()) for path in handle.sites}
    plain: dict[str, list[object]] = json.loads(json.dumps(found))
    return plain


def _fill(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # its way of passing on what the system said: disk full, quota, file too large
        raise OSError(str(error)) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, list[object]]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
        settings: dict[str, list[object]] = json.loads(metadata[SETTINGS])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the state of the adapter is missing or damaged",
            where=path,
            found=str(error),
            expected="the file that a training checkpoint has",
            fix="go on from an earlier checkpoint",
        ) from None
    return tensors, settings


def _check_settings(saved: Mapping[str, object], own: Mapping[str, object], path: Path) -> None:
    if saved.keys() != own.keys():
        different = sorted(saved.keys() ^ own.keys())
        raise CheckpointError(
            "the folder's adapter sits in other layers than the attached one",
            where=path,
            found=f"{len(saved)} sites; different: {some(different, 3)}",
            expected=f"{len(own)} sites",
            fix="attach with the settings of the saved run",
        )
    for key, value in own.items():
        if saved[key] != value:
            raise CheckpointError(
                "the folder's adapter has other settings than the attached one",
                where=f"{path}: {key}",
                found=saved[key],
                expected=value,
                fix="attach with the settings of the saved run",
            )


def _by_entry(saved: Mapping[str, Tensor], handle: Handle, path: Path) -> dict[str, dict[str, Tensor]]:
    entries = handle.entries()
    values: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        place, _, name = key.rpartition(MARK)
        if place not in entries:
            raise CheckpointError(
                "the folder's adapter sits in other layers than the attached one",
                where=f"{path}: {key}",
                found=place,
                expected="a layer of the attached adapter",
                near=nearest(place, entries),
                fix="attach with the settings of the saved run",
            )
        values.setdefault(place, {})[name] = value
    return values


def _check_entry(entry: nn.Module, values: Mapping[str, Tensor], where: str) -> dict[str, torch.Size]:
    """The shapes that an entry must take on before these values fit; empty where they fit already."""
    own = _tensors(entry)
    free = () if isinstance(entry, Adapter) else _passing(entry).keys()
    if own.keys() != values.keys():
        different = sorted(own.keys() ^ values.keys())
        raise CheckpointError(
            "the folder's adapter has other tensors than the attached one",
            where=where,
            found=some(sorted(values)) or "none",
            expected=some(sorted(own)),
            fix=f"attach with the settings of the saved run (different: {some(different, 3)})",
        )
    if all(own[key].shape == value.shape or key in free for key, value in values.items()):
        return {}
    if in_parts(entry):
        raise CheckpointError(
            "a sharded adapter cannot take another shape",
            where=where,
            found={key: tuple(value.shape) for key, value in values.items()},
            expected={key: tuple(value.shape) for key, value in own.items()},
            fix="load the state before the model is sharded",
        )
    shapes = {key: value.shape for key, value in values.items()}
    try:
        if not isinstance(entry, Adapter):
            raise ValueError("a module of this size was not attached")
        copy.deepcopy(entry).resize(shapes)
    except ValueError as error:
        raise CheckpointError(
            "the folder's adapter has tensors of other shapes than the attached one",
            where=where,
            found={key: tuple(shape) for key, shape in shapes.items()},
            expected={key: tuple(value.shape) for key, value in own.items()},
            fix=f"attach with the settings of the saved run ({error})",
        ) from None
    return shapes
