"""The records of a run as frozen values, checked while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Final

from lorafit.report.lines import Line
from lorafit.report.pictures import Sheet
from lorafit.report.watched import Forgetting, Shift, Slices

AGREEMENT: Final = ("mean_absolute_error", "pearson", "spearman")
"""What is told of a regression beside its loss."""
ENDS: Final = tuple(f"{name}{end}" for name in AGREEMENT for end in ("", "_low", "_high"))
"""These, and the ends of their 95 % intervals."""


@dataclass(frozen=True)
class Step:
    """One logged optimizer step. What was not recorded is None.

    Attributes:
        examples: of a loop of one's own, the records of these steps, and how many a second.
        instance_loss: of a DreamBooth run, the loss on the subject's pictures.
        prior_loss: of a DreamBooth run, the loss on pictures of the class.
        diverged: the loss was recorded, but was not a finite number.
    """

    event: ClassVar[str] = "step"

    step: int
    epoch: float | None
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens: float | None
    supervised_tokens: float | None
    tokens_per_second: float | None
    peak_rss_bytes: float | None
    peak_device_bytes: float | None
    seconds: float | None
    examples: float | None
    examples_per_second: float | None
    instance_loss: float | None
    prior_loss: float | None
    diverged: bool

    @classmethod
    def read(cls, line: Line) -> Step:
        """The step that `line` records."""
        loss = line.number("loss")
        return cls(
            step=line.needed("step", line.count),
            epoch=line.number("epoch"),
            loss=loss,
            learning_rate=line.number("learning_rate"),
            grad_norm=line.number("grad_norm"),
            tokens=line.number("tokens"),
            supervised_tokens=line.number("supervised_tokens"),
            tokens_per_second=line.number("tokens_per_second"),
            peak_rss_bytes=line.number("peak_rss_bytes"),
            peak_device_bytes=line.number("peak_device_bytes"),
            seconds=line.number("seconds"),
            examples=line.number("examples"),
            examples_per_second=line.number("examples_per_second"),
            instance_loss=line.number("instance_loss"),
            prior_loss=line.number("prior_loss"),
            diverged=loss is None and "loss" in line.fields,
        )


@dataclass(frozen=True)
class Evaluation:
    """One measurement on the held-out records. What was not recorded is None.

    Attributes:
        prior_loss: of a DreamBooth run, the loss on pictures of the class.
        agreement: of a regression, those of `AGREEMENT` that are known, and the ends of their intervals.
    """

    event: ClassVar[str] = "evaluation"

    step: int
    loss: float | None
    perplexity: float | None
    accuracy: float | None
    supervised_tokens: float | None
    seconds: float | None
    prior_loss: float | None
    agreement: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, line: Line) -> Evaluation:
        """The evaluation that `line` records."""
        return cls(
            step=line.needed("step", line.count),
            loss=line.number("loss"),
            perplexity=line.number("perplexity"),
            accuracy=line.number("accuracy"),
            supervised_tokens=line.number("supervised_tokens"),
            seconds=line.number("seconds"),
            prior_loss=line.number("prior_loss"),
            agreement={key: value for key in ENDS if (value := line.number(key)) is not None},
        )


@dataclass(frozen=True)
class Sample:
    """What the model made of one prompt, before or after the training."""

    event: ClassVar[str] = "sample"

    phase: str
    index: int
    prompt: str
    output: str
    gold: str | None

    @classmethod
    def read(cls, line: Line) -> Sample:
        """The sample that `line` records."""
        return cls(
            phase=line.choice("phase", ("before", "after")),
            index=line.needed("index", line.count),
            prompt=line.needed("prompt", line.text),
            output=line.needed("output", line.text),
            gold=line.text("gold"),
        )


@dataclass(frozen=True)
class Pair:
    """One prompt with its reference and the outputs before and after the training, where there are any."""

    index: int
    prompt: str
    gold: str | None
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Saved:
    """A checkpoint or an adapter that was written."""

    event: ClassVar[str] = "saved"

    step: int
    path: str | None

    @classmethod
    def read(cls, line: Line) -> Saved:
        """The saving that `line` records."""
        return cls(step=line.needed("step", line.count), path=line.text("path"))


@dataclass(frozen=True)
class Drop:
    """Which sites LoRA-drop gave adapters of their own, and why.

    Attributes:
        scores: module path → share of the squared output of all updates; None where it was not finite.
        kept: paths of the sites with adapters of their own.
        shared: shape → how many sites share one adapter of it.
        rest: what became of the other sites, "share" or "freeze".
        threshold: the share that the kept ones were to have.
        sample_records: how many records the trial run saw.
        steps: its optimizer steps.
    """

    event: ClassVar[str] = "drop"

    scores: Mapping[str, float | None]
    kept: tuple[str, ...]
    shared: Mapping[str, int]
    rest: str | None
    threshold: float | None
    sample_records: int | None
    steps: int | None

    @classmethod
    def read(cls, line: Line) -> Drop:
        """The choice that `line` records."""
        return cls(
            scores=line.measured("scores"),
            kept=line.texts("kept"),
            shared=line.counts("shared"),
            rest=line.text("rest"),
            threshold=line.number("threshold"),
            sample_records=line.count("sample_records"),
            steps=line.count("steps"),
        )


@dataclass(frozen=True)
class Schedule:
    """Where the schedule of a method stood. What was not recorded is None or empty.

    Attributes:
        budget: of AdaLoRA, how many ranks all sites together may have.
        interval: of AdaLoRA, the steps from one pruning to the next.
        ranks: of AdaLoRA, module path → ranks in use, which are those whose λ is not zero.
        start: of Delta-LoRA, after how many steps the weights move too.
        started: of Delta-LoRA, whether they do.
    """

    event: ClassVar[str] = "schedule"

    step: int
    budget: int | None
    interval: int | None
    ranks: Mapping[str, int]
    start: int | None
    started: bool

    @classmethod
    def read(cls, line: Line) -> Schedule:
        """The state that `line` records."""
        return cls(
            step=line.needed("step", line.count),
            budget=line.count("budget"),
            interval=line.count("interval"),
            ranks=line.counts("ranks"),
            start=line.count("start"),
            started=line.flag("started"),
        )


@dataclass(frozen=True)
class Anatomy:
    """How far the lengths and the directions of the weights' rows had moved. What was not finite is None.

    Attributes:
        magnitude: module path → ΔM, the mean change of a row's length.
        direction: module path → ΔD, the mean of 1 − cos of the angle between a row and what it was.
    """

    event: ClassVar[str] = "anatomy"

    step: int
    magnitude: Mapping[str, float | None]
    direction: Mapping[str, float | None]

    @classmethod
    def read(cls, line: Line) -> Anatomy:
        """The state that `line` records."""
        return cls(
            step=line.needed("step", line.count),
            magnitude=line.measured("magnitude"),
            direction=line.measured("direction"),
        )


@dataclass(frozen=True)
class Verdict:
    """What became of the run, as it judged itself. What was not recorded is None.

    Attributes:
        kind: in a word.
        sentence: the same with its numbers.
        hints: what to do about it.
        kept: the step of the adapter that was kept; None for the last one.
    """

    event: ClassVar[str] = "verdict"

    kind: str
    sentence: str
    hints: tuple[str, ...]
    kept: int | None

    @classmethod
    def read(cls, line: Line) -> Verdict:
        """The verdict that `line` records."""
        return cls(
            kind=line.needed("kind", line.text),
            sentence=line.needed("sentence", line.text),
            hints=line.texts("hints"),
            kept=line.count("kept"),
        )


@dataclass(frozen=True)
class End:
    """How a process ended. What was not recorded is None."""

    event: ClassVar[str] = "end"

    status: str
    steps: int | None
    seconds: float | None
    train_seconds: float | None
    peak_rss_bytes: float | None
    peak_device_bytes: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    prior_loss_before: float | None
    prior_loss_after: float | None
    adapter: str | None
    message: str | None

    @classmethod
    def read(cls, line: Line) -> End:
        """The end that `line` records."""
        return cls(
            status=line.choice("status", ("done", "interrupted", "failed")),
            steps=line.count("steps"),
            seconds=line.number("seconds"),
            train_seconds=line.number("train_seconds"),
            peak_rss_bytes=line.number("peak_rss_bytes"),
            peak_device_bytes=line.number("peak_device_bytes"),
            eval_loss_before=line.number("eval_loss_before"),
            eval_loss_after=line.number("eval_loss_after"),
            prior_loss_before=line.number("prior_loss_before"),
            prior_loss_after=line.number("prior_loss_after"),
            adapter=line.text("adapter"),
            message=line.text("message"),
        )


@dataclass(frozen=True)
class Process:
    """One process of a run: the first, or one that resumed it.

    Attributes:
        run: the identity of the run.
        command: the command line.
        resumed_from_step: the step of the checkpoint that it went on from; 0 for a fresh start.
        began: when.
        seconds: how long, up to its end or, when it has none, to its last record.
        last_step: the last step that it recorded; None when there is none.
        end: how it ended; None when it was killed or still runs.
    """

    event: ClassVar[str] = "run"

    run: str | None
    command: str | None
    resumed_from_step: int
    began: datetime | None
    seconds: float | None
    last_step: int | None
    end: End | None


@dataclass(frozen=True)
class Run:
    """A whole run, as its records tell it.

    Attributes:
        path: the records file.
        processes: the first process and those that resumed it.
        config: the settings as given (flat).
        resolved: what the run made of them.
        environment: where the last process ran.
        data: what was learned from.
        steps: the logged steps in order, each once.
        evaluations: the held-out measurements in order, each step once.
        pairs: the samples, by index.
        saved: what was written, in order.
        remarks: what a reader of the report should know of the records.
        drop: the choice of sites, where the method made one.
        schedules: where the method's schedule stood, in order, each step once.
        anatomies: how far lengths and directions had moved, in order, each step once.
        verdict: what became of it, once it was done.
        forgetting: what became of a general text.
        slices: what became of each slice of the held-out records.
        shift: what became of another domain.
        sheets: of a DreamBooth run, the sheets of samples in order, each step once.
    """

    path: Path
    processes: tuple[Process, ...]
    config: Mapping[str, Any]
    resolved: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    pairs: tuple[Pair, ...]
    saved: tuple[Saved, ...]
    remarks: tuple[str, ...]
    drop: Drop | None = None
    schedules: tuple[Schedule, ...] = ()
    anatomies: tuple[Anatomy, ...] = ()
    verdict: Verdict | None = None
    forgetting: Forgetting | None = None
    slices: Slices | None = None
    shift: Shift | None = None
    sheets: tuple[Sheet, ...] = ()

    @property
    def end(self) -> End | None:
        """How the last process ended; None when it was killed or still runs."""
        return self.processes[-1].end

    @property
    def resumes(self) -> tuple[int, ...]:
        """The steps that the run was resumed from, each once."""
        steps = (process.resumed_from_step for process in self.processes)
        return tuple(sorted({step for step in steps if step}))
