"""Attaching adapters to a model in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lorafit.adapted import RESERVED, adapting, banks, install, prepare, replaced, trained_copy
from lorafit.errors import ConfigError, StateError, some
from lorafit.handle import Handle
from lorafit.layers import Site
from lorafit.ledger import LEDGER, Ledger
from lorafit.method import Adapter, Method, Sample, Spot
from lorafit.methods import validate
from lorafit.patterns import inside
from lorafit.plan import Modules, Planned, check_model, choose, plan, saved_paths
from lorafit.targets import ALL_LINEAR, Targets


def attach(
    model: nn.Module,
    method: Method,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: Targets = (),
    name: str = "default",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    seed: int | None = None,
    sample: Sample | None = None,
) -> Handle:
    """Adapts layers of `model` in place and freezes everything else; the new adapter alone is active.

    Args:
        model: any PyTorch model on any device; not yet sharded, wrapped or compiled.
        method: the method and its hyperparameters, such as ``LoRA(r=16)``.
        targets: "all-linear" (every linear layer but the output layer), a regular expression for whole module paths, or
            a list of path suffixes.
        exclude: a regular expression or a list of suffixes to leave out.
        name: the adapter's name; several adapters by different names may be attached.
        rank_pattern: path pattern → rank, first match wins, as in PEFT.
        alpha_pattern: path pattern → alpha.
        modules_to_save: suffixes of modules of which a full copy is trained, such as a new classifier head.
        seed: makes the initial values reproducible; None draws from torch's own generator.
        sample: a part of the data, for methods that look at data first (``init="eva"``, ``init="lora_ga"``).

    Returns:
        The handle of the new adapter. Adapter tensors are at least float32 and sit on their layer's device.

    Raises:
        TargetError: a pattern matches nothing, or a layer cannot be adapted. The model is as it was.
        ConfigError: a setting does not fit a layer, or a sample is missing or of no use. The model is as it was.
        StateError: an adapter is merged, or sits on a part of the model only. The model is as it was.
    """
    check_model(model)
    check_name(model, method, name)
    modules = Modules.of(model)
    saved = saved_paths(modules, modules_to_save)
    paths = choose(model, modules, targets, exclude, saved)
    overlap = [path for path in paths if inside(path, set(saved))] if saved else []
    if overlap:
        raise ConfigError(
            "a module is both adapted and saved in full",
            where=overlap[0],
            found="named by targets and by modules_to_save",
            expected="one of the two",
            fix=f"exclude=[{overlap[0]!r}]",
        )
    planned = plan(model, method, paths, modules, name=name, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    generator = validate.generator("attach.seed", seed)
    with torch.inference_mode(False):  # what inference mode makes could never be trained
        spots = observed(model, method, planned, sample)
        adapters = method.adapters(spots, generator=generator)
    if not adapters:
        raise ConfigError(
            f"{method.name} leaves every layer as it is",
            found=f"no adapter for any of {len(planned)} layers",
            expected="at least one",
            fix="see the method's settings that choose among layers",
        )
    methods = {spot.path: spot.method for spot in spots}
    planned = [replace(site, method=methods[site.path]) for site in planned if site.path in adapters]
    return install_all(model, method, planned, adapters, {path: modules.by_path[path] for path in saved}, name)


def observed(model: nn.Module, method: Method, planned: Sequence[Planned], sample: Sample | None) -> list[Spot]:
    """The spots, with what the method has to learn from data first."""
    spots = [site.spot for site in planned]
    evidence = method.evidence()
    if evidence is None:
        if sample is not None:
            raise ConfigError(
                f"{method.name} with these settings does not look at data",
                where="sample",
                found="a sample",
                expected="none",
                fix='leave sample out, or set init="eva" or init="lora_ga"',
            )
        return spots
    if sample is None:
        raise ConfigError(
            f"{method.name} with these settings has to look at a part of the data first",
            where="sample",
            found="None",
            expected="a Sample",
            fix="attach(..., sample=Sample(batches)) with a few batches of your data",
        )
    if not isinstance(sample, Sample):
        raise ConfigError(
            "this is no sample",
            where="sample",
            found=f"a {type(sample).__name__}",
            expected="a Sample, which says how its batches are to be used",
            fix="sample=Sample(batches)",
        )
    with _plain(model):
        return evidence.gather(model, {site.path: site.site for site in planned}, spots, sample)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Within it no adapter acts: what is learnt from data shall be of the base model."""
    before = [(bank, bank.active) for bank in banks(model)]
    try:
        for bank, _ in before:
            bank.set(active=())
        yield
    finally:
        for bank, active in before:
            bank.set(active=active)


def install_all(
    model: nn.Module,
    method: Method,
    planned: Sequence[Planned],
    adapters: Mapping[str, Adapter],
    saved: Mapping[str, nn.Module],
    name: str,
    *,
    trainable: bool = True,
) -> Handle:
    """Puts adapters that are ready, by path, into their sites; nothing in here can fail halfway."""
    with torch.inference_mode(False):
        for site in planned:
            place(site.site, adapters[site.path])
        copies = {path: trained_copy(module).requires_grad_(trainable) for path, module in saved.items()}
    for site in planned:
        prepare([site.site.module], adapting(site.site))
    prepare(saved.values(), replaced)
    ledger = vars(model).get(LEDGER)
    if ledger is None:
        named = model.named_parameters(remove_duplicate=False)
        ledger = Ledger([key for key, parameter in named if parameter.requires_grad])
        model.requires_grad_(False)
        setattr(model, LEDGER, ledger)
    for site in planned:
        adapter = adapters[site.path]
        adapter.requires_grad_(trainable)
        install(site.site.module, name, adapter, adapting(site.site))
    for path, module in saved.items():
        install(module, name, copies[path], replaced)
    ledger.names = (*ledger.names, name)
    handle = Handle(model, name, method, planned, saved)
    handle.activate(name)
    return handle


def place(site: Site, adapter: Adapter) -> Adapter:
    """Moves an adapter to its site's device, in the site's precision or float32, whichever is higher."""
    weight = site.raw_weight
    adapter.to(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    _straighten(adapter)
    return adapter


def _straighten(adapter: Adapter) -> None:
    """Gives each tensor of an adapter the layout that a file gives it: products round by the layout, too."""
    tensors = [each for each in (*adapter.parameters(), *adapter.buffers()) if each.layout is torch.strided]
    if all(each.is_contiguous() for each in tensors):
        return
    users = Counter(each.untyped_storage().data_ptr() for each in tensors)
    for tensor in tensors:
        if not tensor.is_contiguous() and users[tensor.untyped_storage().data_ptr()] == 1:
            tensor.data = tensor.data.contiguous()


def check_name(model: nn.Module, method: object, name: str) -> None:
    """Raises `ConfigError` for something that is no method, or a name that cannot be or is taken.

    Raises `StateError` for adapters on a part of the model: two objects cannot both keep the books.
    """
    if not isinstance(method, Method):
        raise ConfigError(
            "this is no method",
            where="method",
            found=repr(method),
            expected="an instance of a method",
            fix="attach(model, LoRA(r=16))",
        )
    allowed = isinstance(name, str) and name.isprintable() and name == name.strip() and not name.startswith("-")
    if not allowed or not name or any(mark in name for mark in "./\\"):
        raise ConfigError(
            "this cannot be an adapter's name",
            where="name",
            found=repr(name),
            expected="a name that can be a folder's: not empty, printable, without dots and slashes",
            fix='name="default"',
        )
    if name in RESERVED:
        raise ConfigError(
            "this cannot be an adapter's name: torch modules have an attribute of that name",
            where="name",
            found=repr(name),
            expected="another name",
            fix=f"name={name + '_adapter'!r}",
        )
    ledger = vars(model).get(LEDGER)
    if ledger is None and any(True for _ in banks(model)):
        raise StateError(
            "a part of this model, or a model that this is a part of, has adapters already",
            found="adapted layers that were not attached to this object",
            expected="one object to which all adapters are attached",
            fix="attach to that same object, or detach its adapters first",
        )
    if ledger is not None and name in ledger.names:
        raise ConfigError(
            "the model has an adapter of this name already",
            where="name",
            found=repr(name),
            expected=f"a name other than {some(ledger.names)}",
            fix=f"name={name + '2'!r}, or detach the other one first",
        )
