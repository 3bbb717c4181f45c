"""Adapting a module in place: its class becomes a generated subclass of itself that consults a bank of adapters.

The module stays the object it was: its parameters, the base keys of its `state_dict`, `isinstance`, tied weights and
hooks are untouched. Generated classes are cached per base class, and pickle and deep-copy by rebuilding from that base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lorafit.casting import cast
from lorafit.errors import StateError, some
from lorafit.kernels.precision import autocasts
from lorafit.kernels.siblings import Member
from lorafit.layers import Acting, FollowingSite, Mixing, Site, TensorSite, site_class, site_of
from lorafit.memo import STEPS
from lorafit.method import Adapter
from lorafit.sharded import in_parts
from lorafit.together import Group

BANK = "adapters"
"""The name under which a module holds its adapters, so that keys read "<path>.adapters.<name>.A"."""
ModuleClass: TypeAlias = type[nn.Module]
Generator: TypeAlias = Callable[..., ModuleClass]


class Bank(nn.ModuleDict):
    """The adapters of one module by name, and which of them act.

    `acting` names the active adapters that are not merged into the weight; a tuple, so that a compiled model has one
    graph for each set of acting adapters. `together` is the group of layers that this one is computed with. `mixing`
    is asked instead of the acting adapters while the rows of a batch have different ones.
    """

    together: Group | None = None
    mixing: Mixing | None = None

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.acting: tuple[str, ...] = ()

    def set(self, *, active: tuple[str, ...] | None = None, merged: tuple[str, ...] | None = None) -> None:
        """Changes what is active or merged; names that this bank does not hold are left out."""
        # Past torch's __setattr__, which looks for parameters and modules first: a model has a thousand banks.
        own = vars(self)
        if active is not None:
            own["active"] = tuple(name for name in active if name in self)
        if merged is not None:
            own["merged"] = merged
        own["acting"] = tuple(name for name in self.active if name not in self.merged)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is made for another time and place: what acts row by row is of the block that runs here.
        return {key: value for key, value in vars(self).items() if key != "mixing"}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A checkpoint of the plain model knows nothing of adapters: it must load, and leave them as they are. torch
        # hands the children of this module what `state_dict` holds, so each absent entry is given its own values.
        for name, entry in self.items():
            if not any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                entry.state_dict(destination=state_dict, prefix=f"{prefix}{name}.", keep_vars=True)
            elif isinstance(entry, Adapter):
                _fit(entry, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def updates(self, site: Site) -> list[Acting]:
        """What the acting adapters say of the site's weight now."""
        return [self.said(name, site) for name in self.acting]

    def said(self, name: str, site: Site) -> Acting:
        """What one adapter says of the site's weight now."""
        adapter = self._modules[name]
        assert isinstance(adapter, Adapter)
        return Acting(adapter.update(site.weight), adapter.dropout if adapter.training else 0.0)


def _fit(adapter: Adapter, state_dict: dict[str, Any], prefix: str) -> None:
    """Gives an adapter the shapes that a checkpoint has for it, if it can take them; torch reports it if not."""
    own = adapter.state_dict()
    shapes = {key: state_dict[prefix + key].shape for key in own if prefix + key in state_dict}
    if any(own[key].shape != shape for key, shape in shapes.items()):
        with suppress(ValueError):
            adapter.resize(shapes)


RESERVED = frozenset(dir(Bank()))
"""Names that no entry of a bank can have, since torch keeps entries beside the bank's own attributes."""


@cache
def adapted(base: ModuleClass) -> ModuleClass:
    """The subclass of `base`, a known layer type, whose forward adds what its acting adapters say."""
    kind = site_class(base)
    assert kind is not None, base
    return _adapted(base, kind, adapted)


@cache
def adapted_tensor(base: ModuleClass) -> ModuleClass:
    """The same for a linear layer whose weight is a tensor of another library's."""
    return _adapted(base, TensorSite, adapted_tensor)


def adapting(site: Site) -> Generator:
    """What makes the class of an adapted layer."""
    return adapted_tensor if isinstance(site, TensorSite) else adapted


def _adapted(base: ModuleClass, kind: type[Site], make: Generator) -> ModuleClass:
    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name for it)
        bank = self._modules[BANK]  # past torch's own way to attributes, which takes longer than all of this
        if bank.mixing is not None:
            mixed: Tensor = bank.mixing.output(self, base.forward, input)
            return mixed
        if not bank.acting:
            result: Tensor = base.forward(self, input)
            return result
        if bank.together is not None:
            shared: Tensor | None = bank.together.output(self, input, _member, _state)
            if shared is not None:
                return shared
        site = kind(self)
        return site.forward(input, base.forward, bank.updates(site))

    def following(self: Any, input: Tensor, *more: Any, **named: Any) -> Tensor:  # noqa: A002
        if not more and not named:
            return forward(self, input)
        bank, site = self._modules[BANK], kind(self)
        assert isinstance(site, FollowingSite)
        result: Tensor
        if bank.mixing is not None:
            result = bank.mixing.output(self, base.forward, input, *more, **named)
        elif bank.acting:
            result = site.called(input, base.forward, bank.updates(site), more, named)
        else:
            result = base.forward(self, input, *more, **named)
        return result

    made = _generate("Adapted", base, following if issubclass(kind, FollowingSite) else forward, make)
    made._lorafit_site = kind  # type: ignore[attr-defined]
    return made


def _state(module: nn.Module) -> tuple[object, ...]:
    """What an adapted layer's output depends on besides its input."""
    bank = module._modules.get(BANK)
    if not isinstance(bank, Bank):
        return ()
    entries = [bank._modules[name] for name in bank.acting]
    own = [module, *(entry for entry in entries if entry is not None)]
    held = (each for one in own for each in (*one._parameters.values(), *one._buffers.values()) if each is not None)
    versions = tuple((id(each), 0 if each.is_inference() else each._version) for each in held)
    modes = tuple(one.training for one in own)
    return (bank.acting, modes, versions, STEPS.now, len(module._forward_pre_hooks), "forward" in vars(module))


def _member(module: nn.Module, x: Tensor) -> Member | None:
    """What an adapted layer would compute for x by itself, if its weight is here and nothing is done around it."""
    bank = module._modules.get(BANK)
    if not isinstance(bank, Bank) or not bank.acting:
        return None
    if module._forward_pre_hooks or "forward" in vars(module):  # offloading puts weights in place only then
        return None
    site = type(module)._lorafit_site(module)  # type: ignore[attr-defined]
    found: Member | None = site.member(x, bank.updates(site))
    return found


@cache
def replaced(base: ModuleClass) -> ModuleClass:
    """The subclass of `base`, any module type, that hands its input to its acting trained copy, where it has one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bank = self.adapters
        if bank.mixing is not None:
            return bank.mixing.output(self, base.forward, *args, **kwargs)
        if not bank.acting:
            return base.forward(self, *args, **kwargs)
        return by_copy(self, bank[bank.acting[0]], args, kwargs)

    return _generate("Replaced", base, forward, replaced)


def by_copy(module: nn.Module, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a trained copy makes of the module's input, in the module's own types."""
    raised = _raised(module, entry)
    if raised is None:
        return entry(*args, **kwargs)
    low, high, back = raised
    args, kwargs = cast(args, low, high), cast(kwargs, low, high)
    return cast(entry(*args, **kwargs), high, back)


def _raised(module: nn.Module, entry: nn.Module) -> tuple[torch.dtype, torch.dtype, torch.dtype] | None:
    """The module's type, its copy's, and that of what the module puts out; None where there is nothing to cast."""
    found = None
    for (_, own, _), (_, other, _) in zip(walk(module), walk(entry), strict=False):
        for mine, its in zip(own._parameters.values(), other._parameters.values(), strict=False):
            if mine is None or its is None:
                continue
            if mine.dtype != its.dtype:
                if autocasts(its.device.type):
                    return None
                found = (mine.dtype, its.dtype, mine.dtype)
            elif found is not None:  # a module of several types: the last parameter says what comes out
                found = (*found[:2], mine.dtype)
    return found


def _generate(label: str, base: ModuleClass, forward: Callable[..., Any], make: Generator) -> ModuleClass:
    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # A generated class cannot be imported by name: rebuild it from its base instead.
        state = base.__reduce_ex__(self, protocol)
        assert isinstance(state, tuple)
        rebuild, args = state[:2]
        if type(self) in args:  # the object's own way
            return (_revive, (make, base), *state[2:])
        return (_around, (make, rebuild, args), *state[2:])  # the base has a way of its own

    name = f"{label}[{base.__name__}]"
    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": name,
        "__doc__": f"`{base.__qualname__}`, {label.lower()} in place.",
        "_lorafit_base": base,
    }
    return type(name, (base,), namespace)


def _revive(make: Generator, base: ModuleClass) -> nn.Module:
    kind = make(base)
    return kind.__new__(kind)


def _around(make: Generator, rebuild: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = rebuild(*args)
    module.__class__ = make(type(module))
    return module


def plain_class(module: nn.Module) -> ModuleClass:
    """The module's class without what this library made of it."""
    base = vars(type(module)).get("_lorafit_base")
    return type(module) if base is None else base


def bank_of(module: nn.Module) -> Bank | None:
    """The module's bank, or None for a module that is not adapted."""
    bank = module._modules.get(BANK)
    return bank if isinstance(bank, Bank) else None


def rescales(module: nn.Module, name: str) -> bool:
    """Whether the module has an adapter of this name with a gain: what that one changes depends on what W is."""
    bank, kind = bank_of(module), site_class(plain_class(module))
    adapter = None if bank is None or name not in bank else bank[name]
    if kind is None or not isinstance(adapter, Adapter):
        return False
    with torch.inference_mode(False), torch.no_grad():
        return adapter.update(site_of(module).weight).gain is not None


def group(modules: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> None:
    """Has the adapted modules of each group, by their paths, computed as one, and all others by themselves."""
    for module in modules.values():
        bank = bank_of(module)
        assert bank is not None
        for other in () if bank.together is None else bank.together.modules:
            left = bank_of(other)
            if left is not None:
                left.together = None
    for paths in groups:
        members = [modules[path] for path in paths]
        made = Group(members)
        for module in members:
            bank = bank_of(module)
            assert bank is not None
            bank.together = made


def install(module: nn.Module, name: str, entry: nn.Module, make: Generator) -> None:
    """Puts `entry` into the module's bank under `name`, adapting the module if it was plain."""
    bank = _opened(module, make)
    entry.train(module.training)
    bank[name] = entry


def _opened(module: nn.Module, make: Generator) -> Bank:
    bank = bank_of(module)
    if bank is None:
        bank = Bank()
        vars(bank)["training"] = module.training
        module.add_module(BANK, bank)
        module.__class__ = make(type(module))
    return bank


def mix(module: nn.Module, mixing: Mixing, make: Generator) -> None:
    """Has `mixing` decide what acts in the module, adapting it if it was plain."""
    vars(_opened(module, make))["mixing"] = mixing


def unmix(module: nn.Module) -> None:
    """Has the module's own adapters act again; a module without any becomes the plain one it was."""
    bank = bank_of(module)
    if bank is not None:
        vars(bank).pop("mixing", None)
        _close(module, bank)


def _close(module: nn.Module, bank: Bank) -> None:
    if not bank and bank.mixing is None:
        module.__class__ = plain_class(module)
        del module._modules[BANK]


def prepare(modules: Iterable[nn.Module], make: Generator) -> None:
    """Generates the classes that `install` will need: a base class may object to being subclassed."""
    for module in modules:
        make(plain_class(module))


def uninstall(module: nn.Module, name: str) -> None:
    """Takes `name` out of the module's bank; a module whose bank is empty becomes the plain module it was."""
    bank = bank_of(module)
    assert bank is not None
    del bank[name]
    bank.set(active=bank.active, merged=tuple(other for other in bank.merged if other != name))
    _close(module, bank)


def check_removable(modules: Iterable[tuple[str, nn.Module]], name: str) -> None:
    """Raises `StateError` if `uninstall` could not take `name` out of one of these modules."""
    for path, module in modules:
        bank = bank_of(module)
        if bank is None or name not in bank:
            raise StateError(f"adapter {name!r} is not attached any more", where=path, fix="attach it again")
        if plain_class(module) is type(module):
            raise StateError(
                "the layer got another class after the adapter was attached, so it cannot be made plain again",
                where=path,
                found=type(module).__name__,
                expected="the class that attach gave it",
                fix="undo what was done to the layer since (fully_shard, parametrize), then detach",
            )
        if in_parts(bank[name]):
            raise StateError(
                f"adapter {name!r} is sharded with its model, which cannot be undone",
                where=path,
                found="parameters of which each process keeps a part",
                expected="an adapter as attach left it",
                fix="handle.save(folder) in all processes, then lorafit.load(model, folder) on a new, plain model",
            )


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """(path, module, parent) for every module of the model itself, adapters left out; shared modules once per path."""
    left: list[tuple[str, nn.Module, nn.Module | None]] = [(path, model, None)]
    while left:  # no recursion: a path of ten parts would be passed up ten times
        found = left.pop()
        yield found
        path, module, _ = found
        children = [
            (f"{path}.{name}" if path else name, child, module)
            for name, child in module._modules.items()
            if child is not None and not isinstance(child, Bank)
        ]
        left += reversed(children)


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module as it would be without any adapter."""
    copied = copy.deepcopy(module)
    for _, inner, _ in list(walk(copied)):
        if bank_of(inner) is not None:
            inner.__class__ = plain_class(inner)
            del inner._modules[BANK]
    return copied


def trained_copy(module: nn.Module) -> nn.Module:
    """A plain copy with numbers that can be trained: of at least single precision, as adapters are."""
    copied = plain_copy(module)
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return copied


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict without what belongs to adapters."""
    inside = tuple(
        f"{path}.{BANK}." if path else f"{BANK}." for path, inner, _ in walk(module) if bank_of(inner) is not None
    )
    return {key: value for key, value in module.state_dict().items() if not key.startswith(inside)}


def banks(model: nn.Module) -> Iterator[Bank]:
    """Every bank of the model, once."""
    seen: set[int] = set()
    for _, module, _ in walk(model):
        bank = bank_of(module)
        if bank is not None and id(bank) not in seen:
            seen.add(id(bank))
            yield bank


def check_together(model: nn.Module, names: Sequence[str]) -> None:
    """Raises `StateError` for adapters of which one hides another: both replace a module, or one what holds it."""
    over: dict[str, str] = {}
    for path, module, _ in walk(model):
        bank = bank_of(module)
        here = [name for name in names if bank is not None and name in bank]
        if bank is None or not here:
            continue
        hidden = [name for root, name in over.items() if path == root or path.startswith(f"{root}.")]
        whole = not isinstance(bank[here[0]], Adapter)
        both = list(dict.fromkeys([*hidden, *here])) if hidden or whole else []
        if len(both) > 1:
            raise StateError(
                "two adapters cannot act together: one replaces in full what the other changes or replaces",
                where=path,
                found=some(both),
                expected="one of them",
                fix=f"activate({both[0]!r})",
            )
        if whole:
            over[path] = here[0]
