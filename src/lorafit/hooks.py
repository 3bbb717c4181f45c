"""Work around the optimizer step, installed through `torch.optim`'s own hooks, so that any training loop has it.

A bare loop, `transformers.Trainer`, TRL and Lightning call `optimizer.step()`: nothing more is asked of them. The state
of a schedule travels inside of the optimizer's `state_dict`, which they all save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lorafit.errors import CheckpointError, TrainingError, some
from lorafit.method import Schedule

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


class StepHooks:
    """Runs a check before the first step and a schedule, where there is one, around every step.

    Args:
        name: the adapter's.
        first: the check.
        schedule: what the method does around a step, or None.
    """

    def __init__(self, name: str, first: Callable[[], None], schedule: Schedule | None) -> None:
        self._name = name
        self._first = first
        self._schedule = schedule
        self._checked = False
        self._late = False
        self._skipped = False

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Registers the hooks with `optimizer`."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        if self._schedule is not None:
            optimizer.register_state_dict_post_hook(self._save)
            optimizer.register_load_state_dict_pre_hook(self._load)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients come inside the step: then the first chance to look is after it.
        self._late = any(callable(argument) for argument in (*args[1:], *kwargs.values()))
        if not self._late:
            self._check()
        if self._schedule is not None:
            self._skipped = _overflowed(optimizer)
            if not self._skipped:
                _unscale(optimizer)
                self._schedule.before_step(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._late:
            self._check()
        if self._schedule is not None and not self._skipped:
            self._schedule.after_step(optimizer)

    def _check(self) -> None:
        if not self._checked:
            self._first()
            self._checked = True

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        assert self._schedule is not None
        return {**state, STATE: {**state.get(STATE, {}), self._name: self._schedule.state_dict()}}

    def _load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        assert self._schedule is not None
        saved = state.get(STATE, {})
        if self._name not in saved:
            raise CheckpointError(
                "this state of an optimizer lacks the schedule of the adapter",
                where=f"optimizer.load_state_dict: {STATE!r}, {self._name!r}",
                found=f"schedules of {some(saved)}" if saved else "no schedule",
                expected=f"what optimizer.state_dict() gave for adapter {self._name!r}",
                fix="attach with the method and name of the saved run, and bind before the state is loaded",
            )
        self._schedule.load_state_dict(saved[self._name])


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
