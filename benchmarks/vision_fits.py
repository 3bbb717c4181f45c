"""Ways to fit a network to pictures: its head alone, an adapter and the head, or all of its weights.

What is adapted goes through what every user has: `attach`, `handle.optimizer`, `importance`, `merge` and `save`.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafit as lf
from benchmarks.vision_candidates import Candidate, ready
from benchmarks.vision_data import Part
from lorafit.importance import importance
from lorafit.methods import build


class DivergedError(Exception):
    """The loss was not finite: what came to be is a result, and no error."""


@dataclass(frozen=True)
class Task:
    """What is asked of a fit.

    Attributes:
        candidate: which.
        rate: its learning rate at the highest.
        head_rate: that of the head beside a method, or beside all other weights.
        steps: of the optimizer.
        batch: pictures in each.
        size: pixels of a picture each way.
        seed: of the adapter's values and of the pictures' order.
        head: path of the network's last layer.
    """

    candidate: Candidate
    rate: float
    head_rate: float
    steps: int
    batch: int
    size: int
    seed: int
    head: str


class Fit(ABC):
    """A network that is ready to be trained.

    Attributes:
        optimizer: over what is trained.
        trainable: how many numbers that are.
        seconds: what was spent in steps before these.
        extra_steps: how many those were.
        facts: what else there is to tell, in JSON's types.
    """

    optimizer: torch.optim.Optimizer
    trainable: int
    seconds: float = 0.0
    extra_steps: int = 0

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def merge(self, x: Tensor) -> None:  # noqa: B027 (most have nothing to merge)
        """Makes the network what would be used; `x` shows whether it still computes the same."""

    @abstractmethod
    def stored_bytes(self, folder: Path) -> int | None:
        """The size of a file of what was trained; None where there can be none."""


@final
class Probe(Fit):
    """The head alone."""

    def __init__(self, model: nn.Module, task: Task, part: Part) -> None:
        super().__init__()
        head = model.requires_grad_(False).get_submodule(task.head).requires_grad_(True)
        self.trainable = _count(head)
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=task.rate, weight_decay=0.0, fused=True)

    def stored_bytes(self, folder: Path) -> int | None:
        return 4 * self.trainable


@final
class Full(Fit):
    """All weights; the head at a rate of its own."""

    def __init__(self, model: nn.Module, task: Task, part: Part) -> None:
        super().__init__()
        head = list(model.requires_grad_(True).get_submodule(task.head).parameters())
        rest = [each for each in model.parameters() if all(each is not own for own in head)]
        groups = [{"params": rest, "lr": task.rate}, {"params": head, "lr": task.head_rate}]
        self.trainable = _count(model)
        self._bytes = sum(each.numel() * each.element_size() for each in model.state_dict().values())
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def stored_bytes(self, folder: Path) -> int | None:
        return self._bytes


@final
class Adapted(Fit):
    """A method at the convolutions, and the head."""

    def __init__(self, model: nn.Module, task: Task, part: Part) -> None:
        super().__init__()
        self._model, self._task = model, task
        method = build(task.candidate.method, task.candidate.options)
        if isinstance(method, lf.LoRADrop):
            method = self._chosen(method, part)
        self._handle = self._attach(method)
        self.trainable = self._handle.num_trainable
        self.facts["sites"] = len(self._handle.sites)
        self.optimizer = self._optimizer(self._handle, task.steps)

    def _attach(self, method: lf.Method) -> lf.Handle:
        paths = sites(self._model, depthwise=self._task.candidate.depthwise)
        ranks = {path: groups for path, groups in paths.items() if groups > 1}
        return lf.attach(
            self._model,
            method,
            targets=list(paths),
            rank_pattern=ranks or None,
            modules_to_save=[self._task.head],
            seed=self._task.seed,
        )

    def _optimizer(self, handle: lf.Handle, steps: int) -> torch.optim.Optimizer:
        task = self._task
        return handle.optimizer(
            torch.optim.AdamW, task.rate, total_steps=steps, copies_lr=task.head_rate, weight_decay=0.0
        )

    def _chosen(self, method: lf.LoRADrop, part: Part) -> lf.LoRADrop:
        """LoRA-drop's trial, as long as `lorafit train` makes it: a short run that says which layers matter."""
        task, count = self._task, len(part.labels)
        shown = min(count, max(task.batch, min(task.batch * max(1, task.steps // 2), math.ceil(method.sample * count))))
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(task.seed))[:shown]
        handle = self._attach(method)
        optimizer = self._optimizer(handle, -(-shown // task.batch))
        for places in rows.split(task.batch):
            self.seconds += step(self._model, optimizer, part, places, task.size)
            self.extra_steps += 1
        scores = importance(handle, (ready(part.pixels[places], task.size) for places in rows.split(task.batch)))
        handle.detach()
        chosen = method.chosen(scores)
        self.facts["kept"] = list(chosen.keep or ())
        return chosen

    @torch.no_grad()
    def merge(self, x: Tensor) -> None:
        """Folds the adapter in; how far the outputs moved by that is told beside how large they are."""
        before = self._model(x)
        self._handle.merge()
        apart = float((self._model(x) - before).abs().max() / before.abs().max())
        if math.isfinite(apart):  # else the losses say what is wrong
            self.facts["apart"] = apart

    def stored_bytes(self, folder: Path) -> int | None:
        if self._handle.merged:
            self._handle.unmerge()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                saved = self._handle.save(folder)
            except lf.LorafitError as error:
                self.facts["unsaved"] = error.message
                return None
        self.facts["told"] = [str(one.message) for one in told]
        return sum(path.stat().st_size for path in saved.glob("*.safetensors"))


WAYS: Mapping[str, type[Probe] | type[Full] | type[Adapted]] = {"probe": Probe, "full": Full, "adapter": Adapted}
"""Kind of a candidate → how it is fitted."""


def sites(model: nn.Module, *, depthwise: bool) -> dict[str, int]:
    """Path → groups of the convolutions that have adapters: those of one group, and the others if that is said."""
    return {
        path: module.groups
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and (depthwise or module.groups == 1)
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part, rows: Tensor, size: int) -> float:
    """One step; gives its seconds, from the pictures as they are stored to changed weights.

    Raises:
        DivergedError: the loss is not finite.
    """
    begun = time.perf_counter()
    loss = F.cross_entropy(model(ready(part.pixels[rows], size)), part.labels[rows])
    if not math.isfinite(loss.item()):
        raise DivergedError("the loss was not finite")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - begun


def train(model: nn.Module, fit: Fit, part: Part, task: Task) -> float:
    """Takes all steps; gives their seconds. The rate rises over the first tenth, and falls to nothing after it.

    Raises:
        DivergedError: a loss was not finite; says at which step.
    """
    course = torch.optim.lr_scheduler.LambdaLR(fit.optimizer, lambda number: share(number, task.steps))
    seconds = 0.0
    for number, rows in enumerate(order(len(part.labels), task.steps, task.batch, task.seed), 1):
        try:
            seconds += step(model, fit.optimizer, part, rows, task.size)
        except DivergedError as error:
            raise DivergedError(f"{error} at step {number}") from None
        course.step()
    return seconds


def share(number: int, steps: int) -> float:
    """Of the highest rate, what step `number` (from 0 on) has.

    >>> [share(number, 20) for number in (0, 1, 2, 11, 20)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rising = max(1, steps // 10)
    return (number + 1) / rising if number < rising else (steps - number) / max(1, steps - rising)


def order(count: int, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The places of each step's pictures: every picture once, in an order drawn anew each time round."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch]
        left = left[batch:]


@torch.no_grad()
def measure(model: nn.Module, part: Part, size: int, batch: int = 50) -> tuple[Tensor, Tensor]:
    """(loss, right or not) of each picture."""
    losses, right = [], []
    for rows in torch.arange(len(part.labels)).split(batch):
        scores, labels = model(ready(part.pixels[rows], size)), part.labels[rows]
        losses.append(F.cross_entropy(scores, labels, reduction="none"))
        right.append((scores.argmax(1) == labels).double())
    return torch.cat(losses).double(), torch.cat(right)


def by_family(values: Tensor, families: Tensor) -> Tensor:
    """The sum of each family.

    >>> by_family(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0])).tolist()
    [5.0, 2.0]
    """
    return torch.zeros(int(families.max()) + 1, dtype=values.dtype).index_add(0, families, values)


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad)
