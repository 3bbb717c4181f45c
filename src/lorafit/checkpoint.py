"""Loading adapters: this library's and PEFT's, strictly. Saving is `Handle.save`; the files are `store`'s business."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lorafit import store
from lorafit.adapted import plain_class
from lorafit.errors import CheckpointError, LorafitWarning, StateError, some
from lorafit.fitting import Fit, copy_into, fit
from lorafit.handle import Handle
from lorafit.inject import check_name, install_all, place
from lorafit.layers import site_class
from lorafit.method import Adapter, Method
from lorafit.peft_config import Parsed, parse
from lorafit.peft_layout import warn_shared
from lorafit.plan import Modules, Planned, check_model, refuse, refuse_copy
from lorafit.store import Stored
from lorafit.targets import lookup, unmatched


def load(model: nn.Module, path: str | Path, *, name: str = "default", trainable: bool = False) -> Handle:
    """Attaches an adapter from its folder; it alone is active then.

    Reads what this library and PEFT write: LoRA and rsLoRA on every layer type that PEFT has for them, rank and alpha
    patterns, modules saved in full. Every key is used, every site filled, every shape right, or nothing happens.

    Args:
        model: the base model that the adapter was trained on.
        path: the folder with adapter_config.json and adapter_model.safetensors, or its parent if the folder has the
            adapter's name.
        name: the name it gets on this model.
        trainable: whether training shall go on; else its tensors are frozen.

    Raises:
        CheckpointError: the files are damaged, of another type, or do not fit; the model is as it was.
        TargetError: the model has a layer that cannot be adapted in place.
    """
    check_model(model)
    stored = store.read(Path(path), name)
    parsed = parse(stored.config, stored.config_path)
    check_name(model, parsed.method, name)
    modules = Modules.of(model)
    found = fit(stored, parsed, modules)
    values = _own(found, modules)
    _report_unknown(parsed, stored, list(found.sites))
    if not stored.ours:
        warn_shared([*values, *found.copies], modules.aliases)
    planned = [_planned(site_path, parsed, stored, modules) for site_path in modules.by_path if site_path in values]
    adapters = [_filled(site, values[site.path]) for site in planned]
    for site_path in found.copies:
        refuse_copy(site_path, modules)
    saved = {path: module for path, module in modules.by_path.items() if path in found.copies}
    handle = install_all(model, parsed.method, planned, adapters, saved, name, trainable=trainable)
    for site_path, tensors in found.copies.items():
        copy_into(handle.copies[site_path], tensors)
    return handle


def reload(handle: Handle, path: str | Path) -> None:
    """Overwrites an attached adapter's values with those of a folder that holds the same adapter, or changes nothing.

    Raises:
        CheckpointError: the folder's adapter is damaged, or has other sites, ranks or scales.
        StateError: a layer was replaced after attaching, or the adapter is merged.
    """
    handle.check_sites("reload")
    if handle.merged:
        raise StateError(f"adapter {handle.name!r} is merged", expected="an unmerged one", fix="unmerge it first")
    stored = store.read(Path(path), handle.name)
    parsed = parse(stored.config, stored.config_path)
    modules = Modules.of(handle.model)
    found = fit(stored, parsed, modules)
    by_path = _own(found, modules)
    if set(by_path) != set(handle.sites) or set(found.copies) != set(handle.saved):
        different = sorted(set(by_path) ^ set(handle.sites)) or sorted(set(found.copies) ^ set(handle.saved))
        raise CheckpointError(
            "the folder's adapter sits in other layers than the attached one",
            where=stored.weights_path,
            found=f"{len(by_path)} sites; different: {some(different, 3)}",
            expected=f"{len(handle.sites)} sites",
            fix="attach with the settings of the saved run, or load it under another name",
        )
    for site_path in handle.sites:
        planned = _planned(site_path, parsed, stored, modules)
        if planned.method.adapter_settings() != handle.method_at(site_path).adapter_settings():
            raise CheckpointError(
                "the folder's adapter has other settings than the attached one",
                where=f"{stored.config_path}: {site_path}",
                found=planned.method,
                expected=handle.method_at(site_path),
                fix="attach with the settings of the saved run",
            )
    with torch.no_grad():
        for site_path, values in by_path.items():
            for attribute, value in values.items():
                handle.adapter(site_path).get_parameter(attribute).copy_(value)
    for site_path, values in found.copies.items():
        copy_into(handle.copies[site_path], values)


def _own(found: Fit, modules: Modules) -> dict[str, dict[str, torch.Tensor]]:
    return {modules.aliases[path]: values for path, values in found.adapters.items()}


def _planned(path: str, parsed: Parsed, stored: Stored, modules: Modules) -> Planned:
    module = modules.by_path[path]
    kind = site_class(plain_class(module))
    assert kind is not None
    refuse(path, module, plain_class(module), kind, modules.parents[path])
    # A file gives every site its alpha: where no pattern says otherwise it is the config's own, whatever the rank.
    method: Method = parsed.method.at(r=lookup(parsed.rank_pattern, path), alpha=lookup(parsed.alpha_pattern, path))
    site = kind(module)
    reason = method.impossible(site.shape)
    if reason is not None:
        raise CheckpointError(
            "the rank does not fit the layer",
            where=f"{stored.config_path}: {path}",
            found=reason,
            fix="load the base model that the adapter was trained on",
        )
    return Planned(path, site, method)


def _filled(planned: Planned, values: Mapping[str, torch.Tensor]) -> Adapter:
    adapter = planned.method.adapter(planned.site.shape, generator=torch.Generator())
    for attribute, value in values.items():
        setattr(adapter, attribute, nn.Parameter(value.clone()))
    return place(planned.site, adapter)


def _report_unknown(parsed: Parsed, stored: Stored, paths: Sequence[str]) -> None:
    patterns = (("rank_pattern", parsed.rank_pattern), ("alpha_pattern", parsed.alpha_pattern))
    idle = [f"{what}[{key!r}]" for what, pattern in patterns for key in unmatched(pattern, paths)]
    for names, what in (
        (parsed.unknown, "settings that are not known here are left out of the mathematics"),
        (idle, "keys of patterns that match no layer have no effect"),
        (stored.edited, "differs from the config that was saved with the weights, and is used as it is"),
    ):
        if names:
            warnings.warn(f"{stored.config_path}: {what}: {some(names)}", LorafitWarning, stacklevel=3)
