"""Work around the optimizer step, installed through `torch.optim`'s own hooks, so that any training loop has it.

A bare loop, `transformers.Trainer`, TRL and Lightning call `optimizer.step()`: nothing more is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lorafit.errors import TrainingError, some
from lorafit.method import Schedule


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


class StepHooks:
    """Runs a check before the first step and a schedule, where there is one, around every step."""

    def __init__(self, first: Callable[[], None], schedule: Schedule | None) -> None:
        self._first = first
        self._schedule = schedule
        self._checked = False
        self._late = False

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Registers both hooks with `optimizer`."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients come inside the step: then the first chance to look is after it.
        self._late = any(callable(argument) for argument in (*args[1:], *kwargs.values()))
        if not self._late:
            self._check()
        if self._schedule is not None:
            self._schedule.before_step(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._late:
            self._check()
        if self._schedule is not None:
            self._schedule.after_step(optimizer)

    def _check(self) -> None:
        if not self._checked:
            self._first()
            self._checked = True
