"""Fitting the tensors of a file to the layers of a model: every key used, every site filled, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorafit.adapted import plain_class, plain_state
from lorafit.errors import CheckpointError, nearest, some
from lorafit.finite import all_finite
from lorafit.layers import Site, site_class, site_of
from lorafit.layouts import FOREIGN_KEYS, Layout, Slot, site_rank
from lorafit.layouts.base import Locator, split
from lorafit.patterns import heads, inside, tails
from lorafit.peft_config import Parsed, expected_sites
from lorafit.peft_layout import BASE, PREFIX, join, saved_as
from lorafit.plan import Modules, all_linear
from lorafit.store import Stored
from lorafit.targets import ALL_LINEAR, has_suffix


@dataclass
class Fit:
    """What a file holds, by place: values of adapters (path → attribute → tensor), of copies (path → key → tensor).

    `shared` are tensors of all sites together, by key.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, tuple[Slot, ...]] = field(default_factory=dict)

    def slots_at(self, path: str, layout: Layout, parsed: Parsed) -> tuple[Slot, ...]:
        """The tensors that a site has in a file of this type; asked of the layout once."""
        if path not in self.slots:
            self.slots[path] = layout.slots(self.sites[path], parsed)
        return self.slots[path]


def fit(stored: Stored, layout: Layout, parsed: Parsed, modules: Modules) -> Fit:
    """Finds a place for every tensor of a file and a tensor for every place.

    Raises:
        CheckpointError: an unexpected key, a missing key, a wrong shape or a name that the model lacks, naming file,
            key, found, expected and a fix.
    """
    found = Fit()
    for path in layout.paths(parsed):
        found.sites[path] = _site(path, f"{stored.config_path}: {path}", modules)
        found.adapters[path] = {}
    locate = layout.locator(parsed)
    for key, tensor in stored.tensors.items():
        _place(key, tensor, found, stored, layout, parsed, modules, locate)
    _check_complete(found, stored, layout, parsed, modules)
    return found


def _place(
    key: str,
    tensor: Tensor,
    found: Fit,
    stored: Stored,
    layout: Layout,
    parsed: Parsed,
    modules: Modules,
    locate: Locator,
) -> None:
    where = f"{stored.weights_path}: {key}"
    if key in layout.shared:
        _check_finite(where, tensor)
        _check_floating(where, tensor)
        found.shared[key] = tensor
        return
    if not key.startswith(PREFIX):
        raise CheckpointError(
            "unexpected key", where=where, found=repr(key), expected=f"keys that start with {PREFIX!r}",
            fix="save it with PEFT or lorafit; this file follows another layout",
        )  # fmt: skip
    rest = key[len(PREFIX) :]
    _check_finite(where, tensor)
    path, own_key = locate(rest)
    if path is not None:
        site = found.sites.get(path)
        if site is None:
            found.sites[path] = site = _site(path, where, modules)
        _fill(path, site, own_key, where, tensor, found, layout, parsed)
        return
    foreign, foreign_key = split(rest, FOREIGN_KEYS)
    if foreign is not None and foreign in modules.aliases:
        raise CheckpointError(
            f"the file holds a tensor of {FOREIGN_KEYS[foreign_key]}, and its config says another type of adapter",
            where=where,
            found=f"{foreign_key} under peft_type = {layout.peft_type!r}, method {parsed.method.name!r}",
            expected=f"tensors of that type: {some(layout.keys(parsed), 8)}",
            fix="copy config and weights again from one and the same adapter",
        )
    if not _copy(rest, tensor, found, parsed, modules) and not _same_as_base(rest, tensor, where, modules):
        raise _unexpected(rest, where, layout, parsed, modules)


def _fill(
    path: str, site: Site, own_key: str, where: str, tensor: Tensor, found: Fit, layout: Layout, parsed: Parsed
) -> None:
    """Notes a tensor of a site under the name by which its layout knows it."""
    slots = found.slots_at(path, layout, parsed)
    slot = next((slot for slot in slots if slot.key == own_key), None)
    if slots and slot is None:
        raise CheckpointError(
            "the adapter was made for a layer of another type",
            where=where,
            found=f"{own_key} for a layer of type {site.kind}",
            expected=some(slot.key for slot in slots),
            fix="load the base model that the adapter was trained on",
        )
    attribute = own_key if slot is None else slot.attribute
    values = found.adapters.setdefault(path, {})
    if attribute in values:
        raise CheckpointError(
            "two keys hold the same tensor of the same layer",
            where=where,
            found=f"{own_key}, beside another spelling of it",
            expected=some(slot.key for slot in slots if slot.attribute == attribute),
            fix="remove the one that is not meant",
        )
    values[attribute] = tensor


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
    return site_of(module)


def _check_finite(where: str, tensor: Tensor) -> None:
    if not all_finite(tensor):
        raise CheckpointError(
            "the file holds values that are infinite or not a number",
            where=where,
            found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()}",
            expected="finite values",
            fix="the run that wrote it diverged, or the file is damaged: use an earlier checkpoint",
        )


def _check_floating(where: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise CheckpointError(
            "wrong type",
            where=where,
            found=tensor.dtype,
            expected="a floating-point tensor",
            fix="save it again without quantising it",
        )


def _copy(rest: str, tensor: Tensor, found: Fit, parsed: Parsed, modules: Modules) -> bool:
    """Whether the key belongs to a module that the config says is saved in full."""
    for path in heads(rest):
        module = path != rest and path in modules.by_path
        if module and any(saved_as(name, path) for name in parsed.modules_to_save):
            found.copies.setdefault(path, {})[rest[len(path) + 1 :]] = tensor
            return True
    return False


def _same_as_base(rest: str, tensor: Tensor, where: str, modules: Modules) -> bool:
    """Whether the key is a base embedding, as PEFT puts beside an adapter; it must equal the model's own."""
    path, _, attribute = rest.rpartition(".")
    path = path.removesuffix(BASE)
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


def _unexpected(rest: str, where: str, layout: Layout, parsed: Parsed, modules: Modules) -> CheckpointError:
    known = [(path, _site(path, where, modules)) for path in modules.known()]
    possible = [f"{path}.{slot.key}" for path, site in known for slot in layout.slots(site, parsed)]
    return CheckpointError(
        "unexpected key",
        where=where,
        found=repr(rest),
        expected="tensors of the layers that the config names",
        near=nearest(rest, possible),
        fix="the file is of another model or another library; if the key is a mistake, rename or remove it",
    )


def _check_complete(found: Fit, stored: Stored, layout: Layout, parsed: Parsed, modules: Modules) -> None:
    known = set(modules.known())
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
            slots = layout.slots(_site(path, "", modules), parsed)
            raise _missing(join(path, slots[0].key if slots else ""), stored)
    if not found.adapters:
        raise CheckpointError(
            "missing key: the file holds no tensor of an adapter",
            where=stored.weights_path,
            found=f"{len(stored.tensors)} tensors",
            expected=f"keys that end with {some(layout.keys(parsed), 8)}",
            fix="the file is incomplete: save or copy it again",
        )
    for path, values in found.adapters.items():
        site = found.sites[path]
        slots = found.slots_at(path, layout, parsed)
        for slot in slots:
            if slot.attribute not in values:
                raise _missing(join(path, slot.key), stored)
        _shape(path, site, values, stored, slots, site_rank(parsed, path))
    _check_copies(found, stored, layout, parsed, modules)


def _under(parsed: Parsed, modules: Modules) -> set[str]:
    names = set(parsed.modules_to_save)
    roots = {path for path in modules.by_path if any(tail in names for tail in tails(path))}
    return {path for path in modules.by_path if inside(path, roots)} if roots else set()


def _missing(key: str, stored: Stored) -> CheckpointError:
    return CheckpointError(
        "missing key",
        where=f"{stored.weights_path}: {key}",
        found=f"{len(stored.tensors)} tensors, not this one",
        expected=repr(key),
        near=nearest(key, stored.tensors),
        fix="the file is incomplete: save or copy it again",
    )


def _shape(path: str, site: Site, values: dict[str, Tensor], stored: Stored, slots: Sequence[Slot], r: int) -> None:
    """Brings the tensors of one site into the site's own shape, or says what is wrong with them."""
    done: set[str] = set()
    for slot in slots:
        if slot.attribute in done:  # another spelling of the same
            continue
        done.add(slot.attribute)
        tensor = values[slot.attribute]
        key = f"{stored.weights_path}: {join(path, slot.key)}"
        _check_floating(key, tensor)
        if slot.ranked and tensor.dim() > 0 and tensor.shape[0] != r:
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


def _check_copies(found: Fit, stored: Stored, layout: Layout, parsed: Parsed, modules: Modules) -> None:
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
                where = f"{stored.weights_path}: {join(path, key)}"
                raise _unexpected(f"{path}.{key}", where, layout, parsed, modules)


def _absent(name: str, found: Fit, parsed: Parsed, modules: Modules) -> bool:
    """Whether the file lacks a module that this entry of modules_to_save names."""
    named = [path for path in modules.by_path if has_suffix(path, name)]
    if not named:
        return name not in parsed.heads and not any(saved_as(name, path) for path in found.copies)
    return any(not inside(path, found.copies) and plain_state(modules.by_path[path]) for path in named)


def copy_into(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Overwrites a trained copy's tensors; shapes are known to fit."""
    with torch.no_grad():
        own = module.state_dict()
        for key, value in values.items():
            own[key].copy_(value)
