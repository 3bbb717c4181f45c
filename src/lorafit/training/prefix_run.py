"""What makes a run faster or smaller without a change in what it computes, decided before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafit.training.compiled import compile_layers
from lorafit.training.config import Settings
from lorafit.training.prefix import Batch, Prefix, Run, make_prefix
from lorafit.training.prepare import Task
from lorafit.training.recompute_cheap import make_cheap
from lorafit.training.trainer import AdapterTrainer, steps_per_epoch


def shorten(
    trainer: AdapterTrainer,
    task: Task,
    settings: Settings,
    held: Sequence[Any],
    folder: Path,
    notify: Callable[[str], object],
) -> Prefix:
    """Gives the trainer its prefix cache, what it recomputes, and compiled layers, as the settings and the model allow.

    Args:
        trainer: not started yet.
        task: what it trains.
        settings: of the run.
        held: the held-out records that are evaluated.
        folder: the run's.
        notify: is told what was decided.

    Returns:
        How the lower layers are run: to be closed by whoever ends the run.

    Raises:
        ConfigError: compilation is asked for and cannot be.
    """
    train = task.data.train

    def loss(batch: Batch) -> Tensor:
        with trainer.accelerator.autocast():
            return task.objective.loss(task.model, batch, None)

    def batch(records: Sequence[Any]) -> Batch:
        prepared: Batch = trainer._prepare_inputs(task.layout(records))
        return prepared

    trainer.prefix = make_prefix(
        Run(
            wanted=settings.prefix_cache,
            model=task.model,
            arguments=trainer.args,
            passes=trainer.planned_steps() / steps_per_epoch(trainer.args, len(train)),
            train=train,
            held=held,
            loss=loss,
            batch=batch,
            folder=folder,
        ),
        notify,
    )
    if settings.recompute == "cheap":
        small = batch(sorted(train, key=len)[:2])
        trainer.keeping, told = make_cheap(task.model, loss, small, trainer.args.device)
        notify(told)
    if settings.compile:
        notify(compile_layers(task.model, trainer.args.device))
    return trainer.prefix
