"""Which layers of a model an adapter will sit in, checked in full before the first one changes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from lorafit.adapted import BANK, bank_of, banks, plain_class, walk
from lorafit.errors import ConfigError, StateError, TargetError, nearest, some
from lorafit.layers import KINDS, Site, bypass, packed, site_class, site_of, unfollowed
from lorafit.method import Adapter, Method, Spot
from lorafit.patterns import Patterns, heads, inside
from lorafit.shared import shared_memory
from lorafit.targets import ALL_LINEAR, Targets, check_keys, match


@runtime_checkable
class HasOutputEmbeddings(Protocol):
    """A language model that names its output layer, as those of transformers do."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that makes logits, or None."""


@dataclass(frozen=True)
class Modules:
    """The modules of a model by path, the model's own only, each shared module under its first path."""

    by_path: dict[str, nn.Module]
    parents: dict[str, nn.Module | None]
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Modules:
        """Reads a model."""
        first: dict[int, str] = {}
        modules = cls({}, {}, {})
        for path, module, parent in walk(model):
            modules.aliases[path] = first.setdefault(id(module), path)
            if modules.aliases[path] == path:
                modules.by_path[path] = module
                modules.parents[path] = parent
        return modules

    def sites(self, paths: Iterable[str]) -> list[Site]:
        """The sites at these paths, each of a layer of a known type."""
        return [site_of(self.by_path[path]) for path in paths]

    def known(self) -> list[str]:
        """The paths of layers of a known type."""
        return [path for path, module in self.by_path.items() if site_class(plain_class(module)) is not None]


@dataclass(frozen=True)
class Planned:
    """One site to be, with the method as it will be there."""

    path: str
    site: Site
    method: Method
    shared: tuple[str, ...] = ()

    @property
    def spot(self) -> Spot:
        """The place as a method sees it."""
        weight = self.site.raw_weight
        return Spot(
            path=self.path,
            shape=self.site.shape,
            weight=self.site.weight,
            method=self.method,
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            shared=self.shared,
        )


_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "attach, then compile"),
    ("torch.nn.parallel", "DataParallel", "attach to the plain model, then wrap it"),
    ("torch.nn.parallel", "DistributedDataParallel", "attach to the plain model, then wrap it"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "attach to the plain model, then wrap it"),
    ("torch.distributed.fsdp", "FSDPModule", "attach first, then call fully_shard"),
)
"""Where torch keeps a wrapper class, its name there, and what to do instead. Looked up only if already imported:
a model can hold such a module only then."""


def check_model(model: nn.Module, *, shaped: bool = True) -> None:
    """Refuses a model on which layers cannot be adapted in place any more, or not yet.

    Args:
        model: the model.
        shaped: whether all its tensors must have a shape.

    Raises:
        TargetError: a compiled, sharded or distributed model. The order is quantise → attach → shard → compile. Or one
            with layers without a shape.
        StateError: an adapter is merged into the weights, which are then not the base's.
    """
    if not isinstance(model, nn.Module):
        raise TargetError("this is no model", found=type(model).__name__, expected="a torch.nn.Module")
    wrappers = [(vars(sys.modules[home]).get(name), fix) for home, name, fix in _WRAPPERS if home in sys.modules]
    for path, module, _ in walk(model):
        for wrapper, fix in wrappers:
            if wrapper is not None and isinstance(module, wrapper):
                raise TargetError(
                    "the model is compiled, sharded or wrapped already",
                    where=path or "(the model itself)",
                    found=wrapper.__name__,
                    expected="a plain model: the order is quantise, attach, shard, compile",
                    fix=fix,
                )
        if shaped:
            _check_shaped(path, module)
    for bank in banks(model):
        if bank.mixing is not None:
            raise StateError(
                "the rows of a batch have their adapters now, and others would not act",
                fix="leave the with block of rows first, or close() the AdapterBank",
            )
        if bank.merged:
            raise StateError(
                "another adapter is merged into the weights now, so a new one would build on it",
                found=f"adapter {bank.merged[0]!r}, merged",
                expected="the base model's own weights",
                fix="unmerge it first, or merge_and_detach() to keep it in the weights for good",
            )


def _check_shaped(path: str, module: nn.Module) -> None:
    """Raises `TargetError` for a layer that gets its shape from the first batch: it cannot be frozen before that."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and is_lazy(tensor):
            raise TargetError(
                "the model has a layer without a shape yet",
                where=path or "(the model itself)",
                found=f"{plain_class(module).__name__}: {name} has no shape yet",
                expected="a model whose tensors have shapes",
                fix="run the model on one example batch first: model(batch)",
            )


def choose(
    model: nn.Module, modules: Modules, targets: Targets, exclude: Targets, modules_to_save: Collection[str]
) -> list[str]:
    """The paths of the layers that `targets` name and `exclude` does not, in model order.

    Raises:
        TargetError: a pattern that matches nothing, a layer that cannot be adapted, or nothing left.
    """
    known = modules.known()
    if targets == ALL_LINEAR:
        chosen = all_linear(modules)
        saved = set(modules_to_save)
        chosen = [path for path in chosen if not inside(path, saved)]
    else:
        matched = match(targets, modules.aliases, known, "targets")
        chosen = list(dict.fromkeys(modules.aliases[path] for path in matched))
    if exclude:
        left_out = {modules.aliases[path] for path in match(exclude, modules.aliases, known, "exclude")}
        chosen = [path for path in chosen if path not in left_out]
    chosen = [path for path in chosen if _adaptable(path, modules)]
    if not chosen:
        kinds = sorted({type(module).__name__ for module in modules.by_path.values() if module._parameters})
        raise TargetError(
            "no layer is left to adapt",
            found=f"targets={targets!r}, exclude={exclude!r}; layers with weights: {some(kinds, 8)}",
            expected=f"at least one {KINDS}",
            fix=f"targets={[path.rpartition('.')[2] for path in known[:1]]!r}"
            if known
            else "use a model with such layers",
        )
    return chosen


def all_linear(modules: Modules) -> list[str]:
    """The paths of every linear layer but the output layer, as PEFT chooses them for "all-linear"."""
    model = modules.by_path[""]
    head = model.get_output_embeddings() if isinstance(model, HasOutputEmbeddings) else None
    paths = []
    for path, module in modules.by_path.items():
        kind = site_class(plain_class(module))
        if kind is not None and kind.all_linear and module is not head:
            paths.append(path)
    return paths


def _adaptable(path: str, modules: Modules) -> bool:
    """Whether a matched module is a layer to adapt. Raises for one that has weights but cannot take an adapter."""
    module = modules.by_path[path]
    base = plain_class(module)
    kind = site_class(base)
    if kind is None:
        if not any(parameter is not None for parameter in module._parameters.values()):
            return False  # a container or an activation that a broad pattern also matches: nothing there to adapt
        known = modules.known()
        raise TargetError(
            "a matched module cannot be adapted",
            where=path,
            found=base.__name__,
            expected=KINDS,
            near=nearest(path, known),
            fix=f"exclude=[{path!r}], or a narrower pattern",
        )
    refuse(path, module, base, kind, modules.parents[path])
    return True


def refuse(path: str, module: nn.Module, base: type[nn.Module], kind: type[Site], parent: nn.Module | None) -> None:
    """Raises `TargetError` for a layer of a known type on which an adapter would be wrong or without effect."""
    reason = bypass(parent, module) if parent is not None else None
    own = unfollowed(base)
    if own is not None:
        reason = (
            f"{own} has a forward of its own, which a low-rank path for {kind.kind} would not follow",
            f"leave it out with exclude=[{path!r}]",
        )
    elif "forward" in vars(module):
        reason = (
            "its forward was replaced on this one object (accelerate's device maps do that)",
            "attach first, then dispatch: load without device_map, attach, then accelerate.dispatch_model",
        )
    elif reason is None:
        reason = _weight_objection(path, module) or _taken(module, whole=False) or site_of(module).objection(path)
    if reason is not None:
        raise TargetError(
            "this layer cannot be adapted", where=path, found=f"{base.__name__}: {reason[0]}", fix=reason[1]
        )


def refuse_copy(path: str, modules: Modules) -> None:
    """Raises `TargetError` for a module of which a trained copy could not act."""
    module, parent = modules.by_path[path], modules.parents[path]
    passed = None if parent is None else bypass(parent, module)
    reason = _taken(module, whole=True) if passed is None else (passed[0], "name the module around it instead")
    reason = reason or _uncopied(path, modules)
    if reason is not None:
        raise TargetError(
            "this module cannot be saved in full",
            where=path,
            found=f"{plain_class(module).__name__}: {reason[0]}",
            fix=reason[1],
        )


def _weight_objection(path: str, module: nn.Module) -> tuple[str, str] | None:
    """Why the layer's weight is none to adapt, and what mends it."""
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is computed from other tensors (a parametrization, a weight norm or pruning does that)",
            "make it plain before attaching (remove_parametrizations, remove_weight_norm, prune.remove), "
            f"or exclude=[{path!r}]",
        )
    if isinstance(weight, UninitializedParameter):
        return ("its weight has no shape yet", "run the model on one example batch, then attach")
    if weight.device.type == "meta":
        return ("its weight is on the meta device and has no values", "load the weights, then attach")
    if _tiny(weight):
        return (
            f"its weight is stored as {weight.dtype}, which this version cannot train over",
            f"load the model in bfloat16, or exclude=[{path!r}]",
        )
    kind = site_class(plain_class(module))
    if not weight.is_floating_point() and (kind is None or not kind.packed):
        return (
            f"its weight is stored as {weight.dtype}, which this version cannot train over",
            f"load the model in bfloat16 or float32, or exclude=[{path!r}]",
        )
    return None


def _tiny(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers have fewer than 16 bits: torch computes with such only in a few places."""
    return tensor.is_floating_point() and tensor.element_size() < 2


def _uncopied(path: str, modules: Modules) -> tuple[str, str] | None:
    """Why no trained copy can be made of a module, and what mends it."""
    for _, inner, _ in walk(modules.by_path[path]):
        if packed(inner):
            return (
                "a weight in it is quantised, and integers cannot be trained",
                f"leave it as it is: quantise(model, exclude=[{path!r}])",
            )
        low = next((each for each in inner._parameters.values() if each is not None and _tiny(each)), None)
        if low is not None:
            return (f"a weight in it is stored as {low.dtype}, which cannot be trained", "load the model in bfloat16")
        if any(isinstance(each, torch.Tensor) and not each.is_leaf for each in vars(inner).values()):
            return (
                "it keeps a tensor that was computed from others, which torch does not copy (weight_norm and "
                "spectral_norm of torch.nn.utils do that)",
                "torch.nn.utils.parametrizations has both in a form that can be copied; or remove_weight_norm first",
            )
    return None


def _taken(module: nn.Module, *, whole: bool) -> tuple[str, str] | None:
    """Why the module has no room for an adapter, or for a full copy (`whole`), and what mends it."""
    bank = bank_of(module)
    if bank is None and _has(module, BANK):
        return (f"it has an attribute named {BANK!r}, where its adapters would be kept", "rename that attribute")
    if bank is not None and any(isinstance(entry, Adapter) == whole for entry in bank.values()):
        name, does = next(iter(bank)), "changes" if whole else "replaces"
        return (
            f"adapter {name!r} {does} it, and a module can be changed or replaced, not both",
            f"detach {name!r} first",
        )
    return None


def _has(module: nn.Module, name: str) -> bool:
    """Whether the module has an attribute of this name; `dir` would say so too, fifty times slower."""
    kept = (vars(module), module._parameters, module._buffers, module._modules)
    return any(name in names for names in kept) or any(name in vars(kind) for kind in type(module).__mro__)


def plan(
    model: nn.Module,
    method: Method,
    paths: Sequence[str],
    modules: Modules,
    *,
    name: str,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
) -> list[Planned]:
    """Each site with its method, rank and alpha resolved.

    Raises:
        ConfigError: a rank that the layer cannot have, a pattern that is none, or an adapter of this name.
        TargetError: a pattern key that matches no site.
    """
    for pattern, what in ((rank_pattern, "rank_pattern"), (alpha_pattern, "alpha_pattern")):
        _check_pattern(pattern, what)
        check_keys(pattern or {}, paths, what)
    ranks, alphas = Patterns(rank_pattern or {}), Patterns(alpha_pattern or {})
    planned = []
    shared = shared_weights(model, paths, modules)
    for path in paths:
        module = modules.by_path[path]
        bank = bank_of(module)
        if bank is not None and name in bank:
            raise ConfigError(
                "the model has an adapter of this name already",
                where=path,
                found=repr(name),
                expected=f"a name other than {some(list(bank))}",
                fix="attach(..., name=...), or detach the other one first",
            )
        kind = site_class(plain_class(module))
        assert kind is not None
        r, alpha = ranks.find(path), alphas.find(path)
        own = method if r is None and alpha is None else method.at(r=r, alpha=alpha)
        new = Planned(path, site_of(module), own, shared.get(path, ()))
        spot = new.spot
        reason = own.impossible(spot) or own.wasteful(spot)
        if reason is not None:
            raise ConfigError(
                f"{own.name} cannot be put on this layer",
                where=path,
                found=reason,
                expected=f"settings that suit {kind.kind} {tuple(new.site.raw_weight.shape)}",
                fix=_way_out(own, spot),
            )
        planned.append(new)
    return planned


def _check_pattern(pattern: object, what: str) -> None:
    """Raises `ConfigError` for what is no mapping from texts."""
    if pattern is None:
        return
    if not isinstance(pattern, Mapping):
        raise ConfigError(
            f"{what} must be a mapping",
            where=what,
            found=repr(pattern),
            expected="path pattern → number",
            fix=f'{what}={{"q_proj": 8}}',
        )
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"a key of {what} must be text: the end of a module path, or a regular expression for it",
                where=what,
                found=f"{key!r} of type {type(key).__name__}",
                expected=f"text, such as {str(key)!r}",
                fix=f"{what}={{{str(key)!r}: {value!r}}}",
            )


def _way_out(method: Method, spot: Spot) -> str:
    """What mends a spot that cannot take a method; a rank of its own only where that helps."""
    ways = [f"another method, or exclude=[{spot.path!r}]"]
    with suppress(ConfigError):  # a method whose spots have no rank of their own
        least = method.at(r=spot.shape.groups)
        if least.impossible(spot) is None and least.wasteful(spot) is None:
            r = "another r" if method.impossible(spot) is not None else "a smaller r"
            ways.insert(0, f"{r} (rank_pattern={{{spot.path!r}: ...}})")
    return ", ".join(ways)


def shared_weights(model: nn.Module, paths: Sequence[str], modules: Modules) -> dict[str, tuple[str, ...]]:
    """Path → names of other parameters that are the same memory as the layer's weight, for those that have any."""
    sites = zip(paths, modules.sites(paths), strict=True)
    rows = [(path, site.module, site.raw_weight) for path, site in sites]
    return {path: tuple(names) for path, names in shared_memory(model, rows).items()}


def saved_paths(modules: Modules, modules_to_save: Sequence[str]) -> list[str]:
    """The paths of modules to be trained in full.

    Raises:
        TargetError: a name that matches no module, one without parameters, or one whose forward is never called.
    """
    if not modules_to_save:
        return []
    if isinstance(modules_to_save, str):
        raise ConfigError(
            "modules_to_save must be a list",
            found=repr(modules_to_save),
            expected="a list of module suffixes",
            fix=f"modules_to_save=[{modules_to_save!r}]",
        )
    matched = match(modules_to_save, modules.aliases, list(modules.by_path), "modules_to_save")
    paths = list(dict.fromkeys(modules.aliases[path] for path in matched))
    # A module inside another that is saved in full is in that one's copy.
    roots = set(paths)
    paths = [path for path in paths if not any(head in roots for head in heads(path) if head != path)]
    for path in paths:
        refuse_copy(path, modules)
        if not any(True for _ in modules.by_path[path].parameters()):
            raise TargetError(
                "a module to save has no parameters",
                where=path,
                found=type(modules.by_path[path]).__name__,
                expected="a module that can be trained",
                fix=f"remove {path!r} from modules_to_save",
            )
    return paths
