"""Memory and time of a run before it is started: by formula, and by a few real steps.

**Memory, by formula** (bytes, at the moment at which there are the most):

    process + max(base + adapter + gradients + optimizer + FRAGMENTATION · max(step, evaluation), loading)

* process: this process as it is, with the same libraries, tokenizer and data in it; on a GPU its context.
* base: the weights, each in its type, shared ones once. adapter: what is trained, and what comes with it. gradients: as
  much as is trained. optimizer: what its class keeps, from one step on a small matrix (AdamW: 8 bytes a number).
* step, evaluation: the largest batch goes forward and back (or the largest held-out one forward) through the model's
  own code and the adapter's own kernels, on tensors without memory (`planning_shades`): what autograd keeps, what an
  operation needs for a moment, and when each is given back are those of the real step. No term is written down by hand
  for an architecture or a method.
* loading: the plain weights, where a base is quantised after it was loaded.
* FRAGMENTATION: resident bytes for each byte alive, of the C library's allocator on a CPU.

**Time, by formula** (seconds): for each operation of that step the longer of operations / rate and bytes / bandwidth,
and a constant for the call, at rates measured here in 0.3 s (`planning_machine.rates`). A batch of another size lies on
the line through the median batch and the largest one. For LoRA on a linear layer W (d, k), b tokens and rank r the
operations come to 4bkd + 6br(k + d); attention, and the output head for learnt tokens, are added.

**Measured**: the run itself for `planning_child.STEPS` steps in another process, the batch with the longest record
first: its peak of resident memory (on a GPU, of allocated memory), and the time of the steps after the first. What a
whole run takes follows from these by the formula's proportions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch

from lorafit.training.config import Settings
from lorafit.training.data import Data, load_examples
from lorafit.training.measuring import batches as within
from lorafit.training.models import Located, choose_dtype, load_tokenizer, locate
from lorafit.training.planning_child import ENDED, PACKED, TOKENS, Measured, measure
from lorafit.training.planning_machine import CONTEXT, Limit, Rates, limit_of, rates, resident
from lorafit.training.planning_model import Price, Sizes, Skeleton, skeleton
from lorafit.training.planning_run import MOST, Course, batches, course, limited
from lorafit.training.prepare import data_settings, encode, training_arguments
from lorafit.training.trainer import records_in_all, records_per_step
from lorafit.training.valued import AnyData
from lorafit.training.watching import gather

Notify = Callable[[str], object]

FRAGMENTATION = {"cpu": 1.25}
"""Resident bytes for each byte of activations alive, by device type; 1 elsewhere. Recalibrate: plan_accuracy.py."""


@final
@dataclass(frozen=True)
class Part:
    """One row of the memory: bytes by formula, and as measured where that can be told."""

    name: str
    formula: int
    measured: int | None = None


@final
@dataclass(frozen=True)
class Times:
    """Seconds: of a step on average, of the longest batch, of all steps; of what else a run does; of it all."""

    step: float
    longest: float
    training: float
    evaluation: float
    answers: float
    watched: float
    rest: float

    @property
    def total(self) -> float:
        """The whole run."""
        return self.training + self.evaluation + self.answers + self.watched + self.rest


@final
@dataclass(frozen=True)
class Formula:
    """What the formula says of one set of settings.

    Attributes:
        sizes: what is held all the time.
        step, look: the longest batch in training, the largest held-out one (None without).
        watch: the largest batch of general text and target (None without).
        process: bytes of the process itself.
        activations: bytes of what a batch takes, fragmentation included.
    """

    sizes: Sizes
    step: Price
    look: Price | None
    watch: Price | None
    process: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.process + self.sizes.total + self.activations + self.loading

    @property
    def loading(self) -> int:
        """Bytes by which loading the base takes more than anything after it."""
        return max(0, self.sizes.loading - self.sizes.total - self.activations)


@final
@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it is started.

    Attributes:
        settings: of the run.
        device: on which it computes.
        limit: memory to compare with.
        course: its batches.
        formula: the memory by formula.
        times: by formula.
        measured: of a few steps; None under `dry`.
        not_measured: why not, where that was asked for.
        measured_times: from those.
        layout: how batches are laid out, in a sentence.
        watching: the names of the general text and of the target.
    """

    settings: Settings
    device: torch.device
    limit: Limit
    course: Course
    formula: Formula
    times: Times
    measured: Measured | None
    not_measured: str
    measured_times: Times | None
    layout: str
    watching: str

    @property
    def peak(self) -> int:
        """Bytes that the run takes at most, as measured where it was."""
        return self.formula.peak if self.measured is None else self.measured.peak

    @property
    def fits(self) -> bool:
        """Whether that is within the limit; what the system ended is not."""
        return (self.limit.size is None or self.peak <= self.limit.size) and not self.ended

    @property
    def ended(self) -> bool:
        """Whether the steps took more memory than there is."""
        return self.measured is None and self.not_measured == ENDED

    @property
    def parts(self) -> list[Part]:
        """The rows of the memory."""
        sizes, formula = self.formula.sizes, self.formula
        loading = [Part("plain weights, to begin with", formula.loading)] if formula.loading else []
        return [
            Part("process", formula.process),
            Part("base weights", sizes.base),
            Part("adapter", sizes.adapter),
            Part("gradients and optimizer", sizes.gradients + sizes.optimizer),
            Part("activations", formula.activations),
            *loading,
        ]


@final
class Planner:
    """What several plans share: data, tokenizer and the machine's rates are read once.

    Args:
        settings: of the run.
        notify: is told what is found and decided.

    Raises:
        LorafitError: settings, data or model do not do, as in a run.
    """

    def __init__(self, settings: Settings, notify: Notify) -> None:
        self.settings = settings
        self.arguments = training_arguments(settings, Path("unused"))
        self.located: Located = locate(settings.model, notify)
        self.tokenizer = load_tokenizer(self.located)
        loaded = load_examples(data_settings(settings))
        self.data: AnyData = encode(settings, self.tokenizer, loaded)
        records = records_in_all(self.arguments, len(self.data.train))
        self.watched = gather(settings, self.tokenizer, loaded, self.data, records)
        for sentence in (*self.data.announcements, *self.watched.told):
            notify(sentence)
        self.device: torch.device = self.arguments.device
        self.process = CONTEXT

    def model(self, settings: Settings, data: AnyData) -> Skeleton:
        """The model of some settings, without weights."""
        arguments = training_arguments(settings, Path("unused"))
        dtype = choose_dtype(settings.dtype, self.device)
        return skeleton(settings, arguments, self.located, data, self.tokenizer.pad_token_id, dtype)

    def formula(self, settings: Settings, data: AnyData, built: Skeleton | None = None) -> Formula:
        """The memory of some settings."""
        built = self.model(settings, data) if built is None else built
        longest, held = longest_batches(built, settings, data)
        step = built.step(longest)
        look = built.look(held) if held else None
        size = built.arguments.eval_batch_size
        watched = [batch for part in self.watched.parts() for batch in within(part.records, size)]
        watch = built.look(max(watched, key=built.places)) if watched else None
        activations = max(each.peak for each in (step, look, watch) if each is not None)
        taken = int(activations * FRAGMENTATION.get(self.device.type, 1.0))
        return Formula(built.sizes, step, look, watch, self.process, taken)

    def forecast(self, *, dry: bool, limit: int | None, notify: Notify) -> Forecast:
        """Plans the run.

        Args:
            dry: by formula alone.
            limit: bytes to compare with; None is what is free.
            notify: is told when the steps are run.
        """
        built = self.model(self.settings, self.data)
        machine = self._rates(built)
        if self.device.type == "cpu":
            self.process = resident()
        formula = self.formula(self.settings, self.data, built)
        most = limit_of(self.device)
        measured, reason = None, ""
        if not dry:
            if most.size is not None and formula.peak > most.size:
                reason = "by the formula it would not fit here"
            else:
                notify("running a few steps in a process of their own, the longest batch first")
                answer = measure(self.settings)
                measured, reason = (answer, "") if isinstance(answer, Measured) else (None, answer)
        told = built.told
        if measured is not None and measured.layout != told:
            # The run can try whether records stay apart in a row; the formula took that for granted.
            told = measured.layout
            if not told.startswith(PACKED):
                built = self.model(self.settings.model_copy(update={"packing": False}), self.data)
                formula = self.formula(self.settings, self.data, built)
        clock = _Clock(built, machine, self._course(built), formula)
        return Forecast(
            settings=self.settings,
            device=self.device,
            limit=most if limit is None else Limit(limit, "--memory"),
            course=clock.way,
            formula=formula,
            times=clock.times(self.settings),
            measured=measured,
            not_measured=reason,
            measured_times=None if measured is None else clock.scaled(self.settings, measured, self.data),
            layout=told,
            watching=" and ".join(part.name for part in self.watched.parts()),
        )

    def _course(self, built: Skeleton) -> Course:
        samples = len(self.data.samples) if isinstance(self.data, Data) else 0
        watched = [part.records for part in self.watched.parts()]
        return course(self.settings, built.arguments, self.data.train, self.data.eval, samples, built.places, watched)

    def _rates(self, built: Skeleton) -> Rates:
        dtype = choose_dtype(self.settings.dtype, self.device)
        longest, _ = longest_batches(built, self.settings, self.data)
        width = built.model.config.get_text_config().hidden_size
        return rates(self.device, dtype, built.places(longest), width)


def longest_batches(built: Skeleton, settings: Settings, data: AnyData) -> tuple[list[Any], list[Any]]:
    """The largest batch of training, of the first `MOST`, and the largest one of evaluation.

    The batch with the longest record is the first of all, and with padding the largest.
    """
    size = built.arguments.eval_batch_size
    held = list(limited(data.eval, settings.eval_limit))
    parts = [held[start : start + size] for start in range(0, len(held), size)]
    size, step = built.arguments.train_batch_size, records_per_step(built.arguments)
    first = islice(batches(data.train, size, settings.seed, step), MOST)
    return max(first, key=built.places), max(parts, key=built.places, default=[])


@final
class _Clock:
    """Times by formula, and by the formula's proportions from measured ones."""

    def __init__(self, built: Skeleton, machine: Rates, way: Course, formula: Formula) -> None:
        self._built = built
        self._machine = machine
        self.way = way
        self._longest = formula.step
        self._look = formula.look
        self._watch = formula.watch
        self._median = built.step(way.median)

    def step(self, tokens: float) -> float:
        """Of a batch of so many places: on the line through the median batch and the longest one."""
        low, high = self._median, self._longest
        one, two = low.seconds(self._machine), high.seconds(self._machine)
        if high.tokens <= low.tokens or two <= one:
            return one * tokens / low.tokens
        return max(one + (two - one) * (tokens - low.tokens) / (high.tokens - low.tokens), 0.2 * one)

    def evaluation(self, records: Sequence[Any]) -> float:
        """Of these held-out records."""
        if self._look is None:
            return 0.0
        size = self._built.arguments.eval_batch_size
        parts = [records[start : start + size] for start in range(0, len(records), size)]
        places = sum(map(self._built.places, parts))
        return self._look.seconds(self._machine) * places / self._look.tokens

    def watched(self, tokens: int) -> float:
        """Of so many places of general text and target."""
        return 0.0 if self._watch is None else self._watch.seconds(self._machine) * tokens / self._watch.tokens

    def answers(self, tokens: int) -> float:
        """Of one round of answers: the prompts go in at once, then the weights are read for each token."""
        if not self.way.samples:
            return 0.0
        samples = self.way.samples
        prompt = self._built.look([self.way.median[0]])
        flops = samples * sum(one.flops * count for one, count in prompt.work.items()) / prompt.tokens
        reading = self._built.sizes.base / self._machine.moved
        each = max(flops / self._machine.flops, reading) + self._machine.call * sum(prompt.work.values())
        total: float = samples * prompt.seconds(self._machine) + tokens * each
        return total

    def times(self, settings: Settings) -> Times:
        """By formula alone; the start of a run is not in it."""
        way, each = self.way, self.step(self.way.tokens)
        per_step = way.micro_batches / way.steps
        return Times(
            each * per_step,
            self.step(self._longest.tokens),
            each * way.micro_batches,
            self.evaluation(way.held) * way.evaluations,
            2 * self.answers(settings.max_new_tokens),
            2 * self.watched(sum(map(self._built.places, way.watched))),
            0.0,
        )

    def scaled(self, settings: Settings, measured: Measured, data: AnyData) -> Times:
        """From measured seconds: a whole run takes as much more as the formula says."""
        size, step = self._built.arguments.train_batch_size, records_per_step(self._built.arguments)
        done = [
            self._built.places(batch)
            for batch, _ in zip(batches(data.train, size, settings.seed, step), measured.seconds, strict=False)
        ]
        warm = slice(1, None) if len(done) > 1 else slice(None)
        factor = sum(measured.seconds[warm]) / max(1e-9, sum(map(self.step, done[warm])))
        formula = self.times(settings)
        looked = list(limited(data.eval, measured.evaluated)) if data.eval else []
        expected = self.evaluation(looked)
        evaluation = formula.evaluation * (measured.evaluation or 0.0) / expected if expected else 0.0
        short = self.answers(min(settings.max_new_tokens, TOKENS))
        text = self.watched(measured.watched_tokens)
        return Times(
            formula.step * factor,
            formula.longest * factor,
            formula.training * factor,
            evaluation,
            formula.answers * measured.answers / short if short else 0.0,
            formula.watched * (measured.watched / text if text else factor),
            measured.rest,
        )


def plan(settings: Settings, *, dry: bool, limit: int | None, notify: Notify) -> tuple[Forecast, Planner]:
    """What a run of these settings will take, and the planner that can be asked about others.

    Raises:
        LorafitError: settings, data or model do not do, as in a run.
    """
    planner = Planner(settings, notify)
    return planner.forecast(dry=dry, limit=limit, notify=notify), planner
