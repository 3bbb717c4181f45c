"""Work around the optimizer step, installed through `torch.optim`'s own hooks, so that any training loop has it.

A bare loop, `transformers.Trainer`, TRL and Lightning call `optimizer.step()`: nothing more is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorafit.method import Schedule


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
