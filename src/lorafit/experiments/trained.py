"""Which weights a reference trains: all of them, or those of the head alone (a linear probe)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from safetensors.torch import load_file, save_file

from lorafit import files
from lorafit.errors import CheckpointError
from lorafit.experiments.candidates import no_head
from lorafit.training.data import Data
from lorafit.training.models import head_paths
from lorafit.training.prepare import Task, headed

MODEL = "model"
HEAD = "head"
WEIGHTS = "head.safetensors"


class Trained(ABC):
    """Which weights are trained, and how they are kept.

    Attributes:
        name: the reference's.
        times: its default rate, relative to that of LoRA.
    """

    name: ClassVar[str]
    times: ClassVar[float]

    @abstractmethod
    def choose(self, model: Any) -> None:
        """Freezes the others.

        Raises:
            ConfigError: the model has no such weights.
        """

    @abstractmethod
    def settle(self, model: Any) -> None:
        """Puts a model that is trained into the mode of its next pass."""

    @abstractmethod
    def save(self, task: Task, folder: Path) -> None:
        """Writes what was trained into the run's folder."""


@final
class Everything(Trained):
    """All weights; ten times lower a rate than LoRA's ("LoRA Without Regret", 2025)."""

    name = "full"
    times = 0.1

    def choose(self, model: Any) -> None:
        """Nothing is frozen."""

    def settle(self, model: Any) -> None:
        """The trainer's mode is right."""

    def save(self, task: Task, folder: Path) -> None:
        task.model.save_pretrained(folder / MODEL)
        task.tokenizer.save_pretrained(folder / MODEL)
        if not isinstance(task.data, Data):
            headed(task).write(folder / MODEL)


@final
class Probe(Trained):
    """The head alone, on what the untouched model gives: without dropout in it, as its states are taken from it."""

    name = "probe"
    times = 1.0

    def choose(self, model: Any) -> None:
        paths = head_paths(model)
        if model.get_output_embeddings() is not None or not paths:
            raise no_head()
        model.requires_grad_(False)
        for path in paths:
            model.get_submodule(path).requires_grad_(True)

    def settle(self, model: Any) -> None:
        model.eval()
        for path in head_paths(model):
            model.get_submodule(path).train()

    def save(self, task: Task, folder: Path) -> None:
        (folder / HEAD).mkdir(exist_ok=True)
        headed(task).write(folder / HEAD)
        path, weights = folder / HEAD / WEIGHTS, head_weights(task.model)
        files.commit(files.stage(path, lambda temporary: save_file(weights, temporary)), path)


def head_weights(model: Any) -> dict[str, torch.Tensor]:
    """The head's tensors by their names in the model, on the CPU."""
    inside = tuple(f"{path}." for path in head_paths(model))
    state = model.state_dict()
    return {name: value.detach().cpu().contiguous() for name, value in state.items() if name.startswith(inside)}


def load_head(model: Any, folder: Path) -> None:
    """Puts a head that `Probe` saved into a model.

    Raises:
        CheckpointError: the file is not one of this model's head.
    """
    path = folder / WEIGHTS
    expected = head_weights(model)
    found = load_file(path) if path.is_file() else {}
    alike = found.keys() == expected.keys() and all(found[name].shape == expected[name].shape for name in found)
    if not alike:
        raise CheckpointError(
            "the file holds no head of this model",
            where=path,
            found=", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items()) or "no such file",
            expected=", ".join(f"{name} {tuple(value.shape)}" for name, value in expected.items()),
            fix=f"remove {folder.parent}: the same command runs this trial again",
        )
    model.load_state_dict(found, strict=False)
