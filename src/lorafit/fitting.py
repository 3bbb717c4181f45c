"""Fitting the tensors of a file to the layers of a model: every key used, every site filled, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorafit.adapted import plain_class, plain_state
from lorafit.errors import CheckpointError, nearest, some
from lorafit.layers import Site, site_class
from lorafit.peft_config import Parsed, expected_sites
from lorafit.peft_layout import FOREIGN_KEYS, PREFIX, SLOT_KEYS, join, saved_as, slots
from lorafit.plan import Modules, all_linear
from lorafit.store import Stored
from lorafit.targets import ALL_LINEAR, has_suffix, lookup


@dataclass
class Fit:
    """What a file holds, by place: values of adapters (path → attribute → tensor), of copies (path → key → tensor)."""

    sites: dict[str, Site] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def fit(stored: Stored, parsed: Parsed, modules: Modules) -> Fit:
    """Finds a place for every tensor of a file and a tensor for every place.

    Raises:
        CheckpointError: an unexpected key, a missing key, a wrong shape or a name that the model lacks, naming file,
            key, found, expected and a fix.
    """
    found = Fit()
    for key, tensor in stored.tensors.items():
        _place(key, tensor, found, stored, parsed, modules)
    _check_complete(found, stored, parsed, modules)
    return found


def _place(key: str, tensor: Tensor, found: Fit, stored: Stored, parsed: Parsed, modules: Modules) -> None:
    where = f"{stored.weights_path}: {key}"
    if not key.startswith(PREFIX):
        raise CheckpointError(
            "unexpected key", where=where, found=repr(key), expected=f"keys that start with {PREFIX!r}",
            fix="save it with PEFT or lorafit; this file follows another layout",
        )  # fmt: skip
    rest = key[len(PREFIX) :]
    _check_finite(where, tensor)
    path, slot_key = _split(rest, SLOT_KEYS)
    if path is not None:
        site = _site(path, where, modules)
        slot = next((slot for slot in slots(site) if slot.key == slot_key), None)
        if slot is None:
            raise CheckpointError(
                "the adapter was made for a layer of another type",
                where=where,
                found=f"{slot_key} for a layer of type {site.kind}",
                expected=some(slot.key for slot in slots(site)),
                fix="load the base model that the adapter was trained on",
            )
        found.sites[path] = site
        found.adapters.setdefault(path, {})[slot.attribute] = tensor
        return
    foreign, foreign_key = _split(rest, FOREIGN_KEYS)
    if foreign is not None and foreign in modules.aliases:
        raise CheckpointError(
            f"the file holds a tensor of {FOREIGN_KEYS[foreign_key]}, which this version does not read",
            where=where,
            expected="LoRA tensors: lora_A.weight and lora_B.weight",
            fix="merge it, or export it as plain LoRA, with the library that wrote it",
        )
    if not _copy(rest, tensor, found, parsed, modules) and not _same_as_base(rest, tensor, where, modules):
        raise _unexpected(rest, where, modules)


def _split(rest: str, keys: Iterable[str]) -> tuple[str | None, str]:
    for key in keys:
        if rest == key:
            return "", key
        if rest.endswith("." + key):
            return rest[: -len(key) - 1], key
    return None, ""


def _site(path: str, where: str, modules: Modules) -> Site:
    module = modules.by_path.get(modules.aliases.get(path, path))
    kind = None if module is None else site_class(plain_class(module))
    if module is None or kind is None:
        known = modules.known()
        raise CheckpointError(
            "the adapter was made for a layer that this model does not have",
            where=where,
            found=path if module is None else f"{path}, a {type(module).__name__}",
            expected="a layer of the model",
            near=nearest(path, known),
            fix="load the base model that the adapter was trained on (base_model_name_or_path)",
        )
    return kind(module)


def _check_finite(where: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(
            "the file holds values that are infinite or not a number",
            where=where,
            found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()}",
            expected="finite values",
            fix="the run that wrote it diverged, or the file is damaged: use an earlier checkpoint",
        )


def _copy(rest: str, tensor: Tensor, found: Fit, parsed: Parsed, modules: Modules) -> bool:
    """Whether the key belongs to a module that the config says is saved in full."""
    for path in modules.by_path:
        if any(saved_as(name, path) for name in parsed.modules_to_save) and rest.startswith(f"{path}."):
            found.copies.setdefault(path, {})[rest[len(path) + 1 :]] = tensor
            return True
    return False


def _same_as_base(rest: str, tensor: Tensor, where: str, modules: Modules) -> bool:
    """Whether the key is a base embedding, as PEFT puts beside an adapter; it must equal the model's own."""
    path, _, attribute = rest.rpartition(".")
    path = path.removesuffix(".base_layer")
    module = modules.by_path.get(modules.aliases.get(path, path))
    own = None if module is None else module._parameters.get(attribute)
    if own is None:
        return False
    if own.shape == tensor.shape and torch.equal(own.detach().to("cpu", tensor.dtype), tensor):
        return True
    raise CheckpointError(
        "the file holds a base weight that differs from the model's",
        where=where,
        found=f"shape {tuple(tensor.shape)}",
        expected=f"the model's own {path}.{attribute}, shape {tuple(own.shape)}",
        fix="load the base model that the adapter was trained on; if its vocabulary was resized, resize this one first",
    )


def _unexpected(rest: str, where: str, modules: Modules) -> CheckpointError:
    possible = [f"{path}.{slot.key}" for path in modules.known() for slot in slots(_site(path, where, modules))]
    return CheckpointError(
        "unexpected key",
        where=where,
        found=repr(rest),
        expected="tensors of the layers that the config names",
        near=nearest(rest, possible),
        fix="the file is of another model or another library; if the key is a mistake, rename or remove it",
    )


def _check_complete(found: Fit, stored: Stored, parsed: Parsed, modules: Modules) -> None:
    known = modules.known()
    if isinstance(parsed.targets, str) and parsed.targets.lower() == ALL_LINEAR:
        parsed = replace(parsed, targets=all_linear(modules))
    expected = expected_sites(
        parsed, [path for path in modules.aliases if modules.aliases[path] in known], stored.config_path
    )
    if expected is not None:
        wanted = {modules.aliases[path] for path in expected} - _under(parsed, modules)
        for path in sorted({modules.aliases[path] for path in found.sites} - wanted):
            raise CheckpointError(
                "the file holds a layer that its config does not name",
                where=f"{stored.weights_path}: {path}",
                found=path,
                expected=f"layers that match target_modules = {parsed.targets!r}",
                fix=f"mend target_modules in {stored.config_path.name}",
            )
        for path in sorted(wanted - {modules.aliases[path] for path in found.sites}):
            raise _missing(join(path, slots(_site(path, "", modules))[0].key), stored)
    for path, values in found.adapters.items():
        site = found.sites[path]
        for slot in slots(site):
            if slot.attribute not in values:
                raise _missing(join(path, slot.key), stored)
        _shape(path, site, values, stored, parsed)
    _check_copies(found, stored, parsed, modules)


def _under(parsed: Parsed, modules: Modules) -> set[str]:
    roots = [path for path in modules.by_path if any(has_suffix(path, name) for name in parsed.modules_to_save)]
    return {path for path in modules.by_path if any(path == root or path.startswith(f"{root}.") for root in roots)}


def _missing(key: str, stored: Stored) -> CheckpointError:
    return CheckpointError(
        "missing key",
        where=f"{stored.weights_path}: {key}",
        found=f"{len(stored.tensors)} tensors, not this one",
        expected=repr(key),
        near=nearest(key, stored.tensors),
        fix="the file is incomplete: save or copy it again",
    )


def _shape(path: str, site: Site, values: dict[str, Tensor], stored: Stored, parsed: Parsed) -> None:
    """Brings the tensors of one site into the site's own shape, or says what is wrong with them."""
    r = lookup(parsed.rank_pattern, path) or parsed.method.r
    for slot in slots(site):
        tensor = values[slot.attribute]
        key = f"{stored.weights_path}: {join(path, slot.key)}"
        if not tensor.is_floating_point():
            raise CheckpointError(
                "wrong type",
                where=key,
                found=tensor.dtype,
                expected="a floating-point tensor",
                fix="save it again without quantising it",
            )
        if slot.attribute == "A" and tensor.dim() > 0 and tensor.shape[0] != r:
            raise CheckpointError(
                "the rank in the file is not the rank in its config",
                where=key,
                found=f"shape {tuple(tensor.shape)}, so r = {tensor.shape[0]}",
                expected=f"r = {r}",
                fix=f"mend r or rank_pattern in {stored.config_path.name}",
            )
        try:
            values[slot.attribute] = slot.from_file(site, tensor, r).contiguous()
        except ValueError as error:
            raise CheckpointError(
                "wrong shape",
                where=key,
                found=tuple(tensor.shape),
                expected=str(error),
                fix="load the base model that the adapter was trained on",
            ) from None


def _check_copies(found: Fit, stored: Stored, parsed: Parsed, modules: Modules) -> None:
    for name in parsed.modules_to_save:
        if _absent(name, found, parsed, modules):
            raise CheckpointError(
                "a module that was saved in full is missing",
                where=f"{stored.config_path}: modules_to_save",
                found=repr(name),
                expected=f"tensors of a module of that name in {stored.weights_path.name}",
                near=nearest(name, {path.rpartition(".")[2] for path in modules.by_path}),
                fix="load the base model that the adapter was trained on",
            )
    for path, values in found.copies.items():
        own = plain_state(modules.by_path[path])
        for key, value in own.items():
            if key not in values:
                raise _missing(join(path, key), stored)
            if values[key].shape != value.shape:
                raise CheckpointError(
                    "wrong shape",
                    where=f"{stored.weights_path}: {join(path, key)}",
                    found=tuple(values[key].shape),
                    expected=tuple(value.shape),
                    fix="give the base model a module of that size (such as num_labels) first",
                )
        for key in values:
            if key not in own:
                raise _unexpected(f"{path}.{key}", f"{stored.weights_path}: {join(path, key)}", modules)


def _absent(name: str, found: Fit, parsed: Parsed, modules: Modules) -> bool:
    """Whether the file lacks a module that this entry of modules_to_save names."""
    named = [path for path in modules.by_path if has_suffix(path, name)]
    if not named:
        return name not in parsed.heads and not any(saved_as(name, path) for path in found.copies)
    within = tuple(f"{root}." for root in found.copies)
    return any(
        path not in found.copies and not path.startswith(within) and plain_state(modules.by_path[path])
        for path in named
    )


def copy_into(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Overwrites a trained copy's tensors; shapes are known to fit."""
    with torch.no_grad():
        own = module.state_dict()
        for key, value in values.items():
            own[key].copy_(value)
