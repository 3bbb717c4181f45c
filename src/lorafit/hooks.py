"""Work around the optimizer step, installed through `torch.optim`'s own hooks, so that any training loop has it.

A bare loop, `transformers.Trainer`, TRL and Lightning call `optimizer.step()`: nothing more is asked of them. The state
of a schedule travels inside of the optimizer's `state_dict`, which they all save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorafit.errors import CheckpointError, TrainingError, some
from lorafit.method import Schedule
from lorafit.sharded import alike, is_part, rewritten

STATE = "lorafit"
"""The key under which an optimizer's state has those of schedules, by the adapter's name."""


def check_gradients(
    named: Sequence[tuple[str, nn.Parameter]], idle: tuple[str, str] | None, allow_unused: bool
) -> None:
    """Looks whether an adapter learns at all.

    Args:
        named: its trained parameters.
        idle: why the whole adapter does not act, and what mends it; None when it acts.
        allow_unused: accept parameters without a gradient, as long as one has one.

    Raises:
        TrainingError: the adapter does not act, or parameters got no gradient.
    """
    unused = [key for key, parameter in named if parameter.grad is None]
    if idle is None and (not unused or (allow_unused and len(unused) < len(named))):
        return
    found, fix = idle or (
        f"{len(unused)} tensors: {some(unused, 3)}",
        "leave layers that the loss does not reach out with exclude=; under gradient checkpointing use "
        "use_reentrant=False; bind(optimizer, allow_unused=True) if some layers rightly see no data",
    )
    raise TrainingError(
        "the first step has come, and adapters got no gradient",
        found=found,
        expected="a gradient for every trained tensor",
        fix=fix,
    )


def with_copies(groups: list[dict[str, Any]], copies: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """A method's parameter groups, and at the plain rate what is trained in full: that is none of its matrices."""
    for group in groups:
        if copies and {key: value for key, value in group.items() if key != "params"} == {"lr": lr}:
            group["params"] = [*group["params"], *copies]
            return groups
    return [*groups, {"params": copies, "lr": lr}] if copies else groups


def quick(kind: type[torch.optim.Optimizer], named: Sequence[tuple[str, nn.Parameter]], given: Iterable[str]) -> bool:
    """Whether an optimizer can do its whole step in one fused kernel, and nothing was said against that.

    An adapter is hundreds of small tensors: one by one they take several times as long. The result is the same but for
    rounding.

    Args:
        kind: its class.
        named: what it will hold.
        given: the names of the settings that it was given.
    """
    said = {"fused", "foreach", "differentiable"}.intersection(given)
    known = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in named)
    known = known and alike(p for _, p in named)  # sharded ones and others are not for one kernel
    return kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) and known and not said


def check_held(optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raises `TrainingError` if an optimizer lacks some of these parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [key for key, parameter in named if id(parameter) not in held]
    if missing:
        raise TrainingError(
            "the optimizer does not hold this adapter's parameters",
            found=f"{len(missing)} missing: {some(missing, 3)}",
            expected="all parameters of the adapter",
            fix="make it after attach, from handle.param_groups(lr=...)",
        )


@dataclass(eq=False)
class Binding:
    """One adapter at one optimizer.

    Attributes:
        name: the adapter's.
        method: the name of its method.
        first: the check before the first step.
        named: gives what it trains now, by name.
        schedule: what the method does around a step, or None.
        entries: gives its adapters and full copies, by the module's path; asked where they are sharded.
        key: its name among the optimizer's adapters: that of the adapter, numbered if another one has it.
    """

    name: str
    method: str
    first: Callable[[], None]
    named: Callable[[], Iterable[tuple[str, nn.Parameter]]]
    schedule: Schedule | None
    entries: Callable[[], Mapping[str, nn.Module]] = dict
    key: str = ""
    checked: bool = False
    acts: bool = True

    def check(self) -> None:
        """Runs the first check once."""
        if not self.checked:
            self.first()
            self.checked = True

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within it the adapters are whole and what is done to them stays, where the optimizer holds parts of them."""
        if any(is_part(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            with rewritten(self.entries().values()):
                yield
        else:
            yield


class StepHooks:
    """What is done around the steps of one optimizer, for all adapters that it trains: checks first, then schedules."""

    def __init__(self) -> None:
        self._bindings: list[Binding] = []
        self._late = False
        self._loaded: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> StepHooks:
        """The hooks of an optimizer, registered with it when they are asked for first."""
        found = _HOOKS.get(optimizer)
        if found is None:
            found = _HOOKS[optimizer] = cls()
            optimizer.register_step_pre_hook(found._before)
            optimizer.register_step_post_hook(found._after)
            optimizer.register_state_dict_post_hook(found._save)
            optimizer.register_load_state_dict_pre_hook(found._look)
            optimizer.register_load_state_dict_post_hook(found._load)
        return found

    def add(self, binding: Binding) -> None:
        """Takes an adapter in."""
        same = sum(other.name == binding.name for other in self._bindings)
        binding.key = f"{binding.name}#{same + 1}" if same else binding.name
        self._bindings.append(binding)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients come inside the step: then the first chance to look is after it.
        self._late = any(callable(argument) for argument in (*args[1:], *kwargs.values()))
        for binding in self._bindings:
            if not self._late:
                _check_seen(optimizer, binding)
                binding.check()
            elif binding.schedule is not None and binding.schedule.needs_gradients:
                raise _no_closure(binding)
        scheduled = [binding for binding in self._bindings if binding.schedule is not None]
        if not scheduled:
            return
        skipped = _overflowed(optimizer)
        if not skipped:
            _unscale(optimizer)
        for binding in scheduled:
            assert binding.schedule is not None
            # An adapter that does not act has no gradients, and takes no part in the step.
            reached = self._late or any(parameter.grad is not None for _, parameter in binding.named())
            binding.acts = reached and not skipped
            if binding.acts:
                with binding.whole(optimizer):
                    binding.schedule.before_step(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for binding in self._bindings:
            if self._late:
                binding.check()
            if binding.schedule is not None and binding.acts:
                with binding.whole(optimizer):
                    binding.schedule.after_step(optimizer)

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        found = {
            each.key: {"method": each.method, "schedule": each.schedule.state_dict()}
            for each in self._bindings
            if each.schedule is not None
        }
        return {**state, STATE: found} if found else state

    def _look(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Whether a state that is about to be loaded is one of these adapters; nothing is changed yet."""
        saved = state.get(STATE, {})
        for binding in self._bindings:
            entry = saved.get(binding.key)
            if entry is None and binding.schedule is None:
                continue
            known = isinstance(entry, dict) and entry.keys() >= {"method", "schedule"}
            if not known or entry["method"] != binding.method or binding.schedule is None:
                raise CheckpointError(
                    "this state of an optimizer is not one of the adapter that it shall go on with",
                    where=f"optimizer.load_state_dict: {STATE!r}, {binding.key!r}",
                    found=f"the schedule of {entry['method']}" if known else f"schedules of {some(saved) or 'none'}",
                    expected=f"{'a' if binding.schedule else 'no'} schedule of {binding.method}",
                    fix="attach with the method and name of the saved run, and bind before the state is loaded",
                )
        self._loaded = {binding.key: saved[binding.key] for binding in self._bindings if binding.key in saved}

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        for binding in self._bindings:
            if binding.schedule is None:
                continue
            try:
                binding.schedule.load_state_dict(self._loaded[binding.key]["schedule"])
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"the schedule of {binding.method} in this state of an optimizer is damaged",
                    where=f"optimizer.load_state_dict: {STATE!r}, {binding.key!r}",
                    found=f"{type(error).__name__}: {error}",
                    expected="what optimizer.state_dict() gave",
                    fix="go on from an earlier checkpoint",
                ) from error
        self._loaded = {}


_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, StepHooks] = WeakKeyDictionary()
"""The hooks of each optimizer that trains an adapter."""


def _check_seen(optimizer: torch.optim.Optimizer, binding: Binding) -> None:
    """Raises `TrainingError` at the first step of a sharded model whose backward pass torch did not see the end of."""
    if binding.checked or not any(map(is_part, (p for group in optimizer.param_groups for p in group["params"]))):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for _, parameter in binding.named()):
        raise TrainingError(
            "the model is sharded, and its parameters are gathered still when the optimizer steps",
            found="a backward pass that torch has not noticed",
            expected="a model that returns tensors, alone or in tuples, lists, dicts and dataclasses",
            fix="return the loss in one of these; in a class of any other kind torch does not look for it",
        )


def _no_closure(binding: Binding) -> TrainingError:
    return TrainingError(
        f"{binding.method} needs the gradients before the optimizer steps",
        found="a step that computes them itself (a closure)",
        expected="loss.backward(), then optimizer.step()",
        fix="call optimizer.step() without a closure; in Lightning: automatic_optimization = False",
    )


def check_unused(optimizer: torch.optim.Optimizer, schedule: Schedule, parameters: Sequence[nn.Parameter]) -> None:
    """Raises `TrainingError` for an optimizer that has a state for parameters of which a schedule knows nothing."""
    if schedule.state_dict() and any(optimizer.state.get(parameter) for parameter in parameters):
        raise TrainingError(
            "the optimizer has stepped, or was loaded, before it was bound: the schedule would begin anew",
            found="a state for parameters of the adapter",
            expected="a new optimizer",
            fix="bind(optimizer) first, then optimizer.load_state_dict(...)",
        )


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler has told a fused optimizer to leave this step out; others it does not even call."""
    found = vars(optimizer).get("found_inf")
    return isinstance(found, torch.Tensor) and bool(found.item())


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divides gradients by the loss scale that a gradient scaler leaves to fused optimizers."""
    scale = vars(optimizer).get("grad_scale")
    if not isinstance(scale, torch.Tensor):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
