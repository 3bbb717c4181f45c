"""Which layers are to be quantised, checked before the first one changes."""

from __future__ import annotations

from torch import nn

from lorafit.adapted import banks
from lorafit.errors import StateError, TargetError, nearest, some
from lorafit.layers import bypass, own_forward, site_class
from lorafit.plan import Modules, all_linear, shared_weights
from lorafit.targets import ALL_LINEAR, Targets, match


def select(model: nn.Module, targets: Targets, exclude: Targets) -> list[str]:
    """The paths of the linear layers that `targets` name and `exclude` does not, in model order.

    Raises:
        TargetError: a pattern that matches nothing, a layer that cannot be quantised, or nothing left.
        StateError: the model has adapters.
    """
    if not isinstance(model, nn.Module):
        raise TargetError("this is no model", found=type(model).__name__, expected="a torch.nn.Module")
    if any(True for _ in banks(model)):
        raise StateError(
            "the model has adapters, which were made for its weights as they are",
            expected="a model without adapters: the order is quantise, attach, shard, compile",
            fix="detach them, quantise, then attach",
        )
    modules = Modules.of(model)
    known = modules.known()
    if targets == ALL_LINEAR:
        chosen = all_linear(modules)
    else:
        matched = match(targets, modules.aliases, known, "targets")
        chosen = list(dict.fromkeys(modules.aliases[path] for path in matched))
        chosen = [path for path in chosen if modules.by_path[path]._parameters]
    if exclude:
        left_out = {modules.aliases[path] for path in match(exclude, modules.aliases, known, "exclude")}
        chosen = [path for path in chosen if path not in left_out]
    if not chosen:
        raise TargetError(
            "no layer is left to quantise",
            found=f"targets={targets!r}, exclude={exclude!r}",
            expected="at least one linear layer",
            fix=f"targets={[path.rpartition('.')[2] for path in known[:1]]!r}"
            if known
            else "use a model with such layers",
        )
    for path in chosen:
        reason = _reason(modules.by_path[path], modules.parents[path])
        if reason is not None:
            raise TargetError(
                "this layer cannot be quantised",
                where=path,
                found=f"{type(modules.by_path[path]).__name__}: {reason}",
                expected="a torch.nn.Linear or HF Conv1D with a weight of its own",
                near=nearest(path, [other for other in all_linear(modules) if other != path]),
                fix=f"exclude=[{path!r}]",
            )
    for path, names in shared_weights(model, chosen, modules).items():
        raise TargetError(
            "this layer cannot be quantised: its weight is also another layer's",
            where=path,
            found=f"shared with {some(names)}",
            expected="a weight of its own",
            fix=f"exclude=[{path!r}]",
        )
    return chosen


def _reason(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a layer cannot be quantised; None when it can."""
    kind = site_class(type(module))
    if kind is None or not kind.all_linear:
        return "not a linear layer"
    if kind.packed:
        return "its weight is stored in another form already"
    if "forward" in vars(module):
        return "its forward was replaced on this one object"
    passed = bypass(parent, module) if parent is not None else None
    if passed is not None:
        return passed[0]
    owner = own_forward(type(module))
    if owner is not None:
        return f"{owner} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors"
    if weight.numel() == 0:
        return f"its weight is empty, {tuple(weight.shape)}"
    if weight.is_floating_point() and weight.element_size() == 1:
        return f"its weight is stored as {weight.dtype}, of which the scale is kept elsewhere"
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        return f"its weight is stored as {type(weight).__name__} of {weight.dtype} already"
    return None
