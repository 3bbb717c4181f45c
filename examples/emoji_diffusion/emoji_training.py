"""Training by the clock: a stage gets so many minutes, goes on after a kill, and ends with averaged weights.

What a step draws depends on the seed and the step's number alone, and not on what was drawn before it: a run that was
killed draws on as if it had not been. With a number of steps instead of minutes it ends with the same bits, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from lorafit import files
from lorafit.errors import TrainingError

SAVED_EVERY = 60.0
"""Seconds of training between checkpoints: no more is lost by a kill."""
SAID_EVERY = 100
"""Steps between words of how far it is."""
WARMUP = 100
"""Steps until the rate is there."""
LEAST = 0.05
"""Of the rate at the end."""
SLOW, SLOW_AT_FIRST = 3.0, 20.0
"""An engine is given up where a step, or its first one, takes so many times as long as the best engine's."""
AVERAGED, POWER = 0.999, 0.75
"""Of the averaged weights: how much of them is kept in a step at most, and how fast that is reached."""

Say = Callable[[str], object]


class Budget(ABC):
    """How long a stage is trained."""

    @abstractmethod
    def progress(self, step: int, seconds: float) -> float:
        """The share that is done after so many steps in so many seconds; 1 and more ends the stage."""


@final
@dataclass(frozen=True)
class Minutes(Budget):
    """By the clock: as many steps as fit."""

    minutes: float

    def progress(self, step: int, seconds: float) -> float:
        """Of the minutes."""
        return seconds / (60 * self.minutes)


@final
@dataclass(frozen=True)
class Steps(Budget):
    """So many steps, however long they take."""

    steps: int

    def progress(self, step: int, seconds: float) -> float:
        """Of the steps."""
        return step / self.steps


def rate(step: int, progress: float) -> float:
    """The share of the learning rate: it rises for `WARMUP` steps, and falls along a cosine.

    >>> [round(rate(step, progress), 3) for step, progress in ((0, 0.0), (99, 0.0), (500, 0.5), (900, 1.0))]
    [0.01, 1.0, 0.525, 0.05]
    """
    falling = LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARMUP) * falling


def generator(*what: object) -> torch.Generator:
    """A generator of its own for one purpose."""
    text = "/".join(map(str, what))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def rows(count: int, batch: int, step: int, *what: object) -> Tensor:
    """Which of `count` records make the batch of a step: all of them once, in an order of its own, then again.

    >>> sorted(torch.cat([rows(6, 4, step, 0) for step in range(3)]).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    """
    found: list[Tensor] = []
    place, left = step * batch, batch
    while left:
        epoch, start = divmod(place, count)
        order = torch.randperm(count, generator=generator(*what, "epoch", epoch))
        taken = order[start : start + left]
        found.append(taken)
        place, left = place + len(taken), left - len(taken)
    return torch.cat(found)


@dataclass(frozen=True)
class Engine:
    """How a step is computed: on some processors twice as fast one way as the other.

    Attributes:
        dtype: "float32", or "bfloat16": weights stay in float32, products are computed in halves.
        layout: "contiguous", or "channels-last": which number lies beside which.
    """

    dtype: str
    layout: str

    @property
    def name(self) -> str:
        """As one writes it: float32/contiguous."""
        return f"{self.dtype}/{self.layout}"

    @property
    def memory(self) -> torch.memory_format:
        """The layout as torch calls it."""
        return torch.channels_last if self.layout == "channels-last" else torch.contiguous_format

    def computing(self) -> torch.autocast:
        """Within it products are computed as the engine says."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("float32", "contiguous"),
        Engine("float32", "channels-last"),
        Engine("bfloat16", "contiguous"),
        Engine("bfloat16", "channels-last"),
    )
}


class Stage(ABC):
    """Something that is trained.

    Attributes:
        name: its own, of its files, too.
        modules: what is trained.
    """

    name: str
    modules: Sequence[nn.Module]

    @property
    @abstractmethod
    def count(self) -> int:
        """How many records there are."""

    @abstractmethod
    def loss(self, chosen: Tensor, drawn: torch.Generator, engine: Engine) -> Tensor:
        """The loss on these records."""

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for module in self.modules for parameter in module.parameters()]


@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    Attributes:
        budget: how long.
        batch: records in a step.
        rate: the learning rate at its highest.
        seed: of everything that is drawn.
        engine: a name of `ENGINES`, or "auto": all are tried, and the fastest is taken.
    """

    budget: Budget
    batch: int
    rate: float
    seed: int
    engine: str


def train(stage: Stage, plan: Plan, folder: Path, say: Say) -> dict[str, Any]:
    """Trains a stage, from its checkpoint if there is one, and leaves the averaged weights in its modules.

    Returns:
        Steps, seconds, the engine and the last losses, in JSON's types.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint is of other networks.
    """
    path = folder / f"{stage.name}.pt"
    saved: dict[str, Any] | None = torch.load(path, weights_only=True) if path.is_file() else None
    engine = ENGINES[saved["engine"]] if saved else _engine(stage, plan, say)
    for module in stage.modules:
        module.train().to(memory_format=engine.memory)
    parameters = stage.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    average = EMAModel(parameters, decay=AVERAGED, use_ema_warmup=True, power=POWER, foreach=True)
    step, seconds, shown = 0, 0.0, 0.0
    if saved:
        _restore(stage, optimizer, average, saved, path)
        step, seconds, shown = saved["step"], saved["seconds"], saved["shown"]
        say(f"{stage.name}: goes on from step {step:,}, after {seconds / 60:.1f} minutes")
    kept = seconds
    while (progress := plan.budget.progress(step, seconds)) < 1:
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * rate(step, progress)
        chosen = rows(stage.count, plan.batch, step, plan.seed, stage.name)
        loss = stage.loss(chosen, generator(plan.seed, stage.name, "step", step), engine)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(stage, step, value, path)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        average.step(parameters)
        step += 1
        shown = value if step == 1 else shown + (value - shown) * max(1 / step, 0.02)
        seconds += time.perf_counter() - begun
        if step % SAID_EVERY == 0:
            say(f"{stage.name}: step {step:,}, {seconds / 60:.1f} minutes, {progress:.0%}, loss {shown:.4f}")
        if seconds - kept >= SAVED_EVERY:
            _save(stage, optimizer, average, engine, (step, seconds, shown), path)
            kept = seconds
    _save(stage, optimizer, average, engine, (step, seconds, shown), path)
    average.copy_to(parameters)
    for module in stage.modules:
        module.eval().to(memory_format=torch.contiguous_format)
    said = {"steps": step, "seconds": seconds, "loss": shown, "engine": engine.name, "records": stage.count}
    say(f"{stage.name}: {step:,} steps of {plan.batch} in {seconds / 60:.1f} minutes, loss {shown:.4f}")
    return {**said, "batch": plan.batch, "parameters": sum(each.numel() for each in parameters)}


def _save(
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    average: EMAModel,
    engine: Engine,
    reached: tuple[int, float, float],
    path: Path,
) -> None:
    step, seconds, shown = reached
    state = {
        "modules": [module.state_dict() for module in stage.modules],
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
        "engine": engine.name,
        "step": step,
        "seconds": seconds,
        "shown": shown,
    }
    files.commit(files.stage(path, lambda temporary: torch.save(state, temporary)), path)


def _restore(
    stage: Stage, optimizer: torch.optim.Optimizer, average: EMAModel, saved: dict[str, Any], path: Path
) -> None:
    try:
        for module, state in zip(stage.modules, saved["modules"], strict=True):
            module.load_state_dict(state)
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            "this checkpoint is of other networks",
            where=path,
            found=str(error).partition("\n")[0],
            expected=f"a checkpoint of the {stage.name} that this run trains",
            fix="remove the run's folder, or take another",
        ) from error


def _diverged(stage: Stage, step: int, value: float, path: Path) -> TrainingError:
    return TrainingError(
        f"the loss of the {stage.name} is not finite",
        where=f"step {step}",
        found=value,
        expected="a number",
        fix=f"a lower --rate, and {path.name} removed",
    )


def _engine(stage: Stage, plan: Plan, say: Say) -> Engine:
    """The engine of the plan, or the fastest; parameters are not changed, and no gradient is left."""
    if plan.engine != "auto":
        return ENGINES[plan.engine]
    taken: dict[str, float] = {}
    chosen = rows(stage.count, plan.batch, 0, plan.seed, stage.name)
    for name, engine in ENGINES.items():
        for module in stage.modules:
            module.train().to(memory_format=engine.memory)
        try:
            for attempt in range(4):
                begun = time.perf_counter()
                stage.loss(chosen, generator("engine"), engine).backward()
                seconds = time.perf_counter() - begun
                for parameter in stage.parameters():
                    parameter.grad = None
                # The first one prepares what the others find, and takes several times as long anywhere.
                slow = SLOW_AT_FIRST if attempt == 0 else SLOW
                if seconds > slow * min((each for other, each in taken.items() if other != name), default=math.inf):
                    say(f"{stage.name}: {name} is slow here, {seconds:.1f} s for a step of {plan.batch}")
                    break
                if attempt:
                    taken[name] = min(seconds, taken.get(name, math.inf))
        except RuntimeError as error:
            if engine.dtype == "float32":
                raise
            say(f"{stage.name}: {name} cannot be computed here ({str(error).partition(chr(10))[0]})")
    best = min(taken, key=lambda name: taken[name])
    told = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in taken.items())
    say(f"{stage.name}: a step of {plan.batch} takes {told}: {best}")
    return ENGINES[best]


def settled(folder: Path, settings: Any, expected: str = "plan.json") -> None:
    """Keeps the settings of a run beside it; a run with others does not go on in the same folder.

    Raises:
        TrainingError: the folder has a run with other settings.
    """
    path = folder / expected
    mine = json.loads(json.dumps(asdict(settings)))
    if not path.is_file():
        files.write_text(path, json.dumps(mine, indent=1) + "\n")
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if theirs != mine:
        odd = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        raise TrainingError(
            "this folder has a run with other settings",
            where=path,
            found=", ".join(f"{key} = {theirs.get(key)}" for key in odd),
            expected=", ".join(f"{key} = {mine.get(key)}" for key in odd),
            fix="another --output, or the settings of that run",
        )
