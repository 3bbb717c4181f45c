"""The intrinsic dimension d90 of a task (Li et al. 2018; Aghajanyan et al. 2020), measured by training.

The base is measured, the reference trained (a few rates, then further seeds), and then subspaces, as the search asks
for them. Rates are chosen by the loss on the validation part, scores are those on the test part. What is trained once
is never trained again: the search depends on results alone, so that the same command asks the same and reads what is
there.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from lorafit.errors import ConfigError, TrainingError
from lorafit.experiments.dimension_curve import Measurements, Scored, mean
from lorafit.experiments.dimension_limits import Limits
from lorafit.experiments.dimension_search import Plan, Search, Seen, Try, next_rate
from lorafit.experiments.runner import Runner
from lorafit.experiments.trial import Kind, Measured, Notify, Result, Trial
from lorafit.training.config import Settings

HEADS = 5
"""Seeds of an untrained classifier: nothing is trained, so that they cost little."""


class Projection(enum.Enum):
    """How the subspace lies in the weights."""

    SAID = "said"
    DID = "did"

    @property
    def layerwise(self) -> bool:
        """Whether each layer has a factor λ of its own."""
        return self is Projection.SAID


class Metric(enum.Enum):
    """What a score is. Higher is better for both: a loss counts negatively."""

    LOSS = "loss"
    ACCURACY = "accuracy"

    def scored(self, measured: Measured) -> Scored:
        """A model's records by this metric."""
        counts = np.array(measured.counts, dtype=np.float64)
        if self is Metric.LOSS:
            return Scored(-np.array(measured.losses, dtype=np.float64), counts)
        assert measured.correct is not None, "checked when the base was measured"
        return Scored(np.array(measured.correct, dtype=np.float64), counts)

    def plain(self, score: float) -> float:
        """The score as people know it."""
        return -score if self is Metric.LOSS else score


@final
@dataclass(frozen=True)
class Reference:
    """What stands for all that can be learnt.

    Attributes:
        name: in trials and files.
        told: for people.
        kind: of its trials.
        settings: of its runs.
        guess: the first of its rates.
    """

    name: str
    told: str
    kind: Kind
    settings: Settings
    guess: float


@final
@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        settings: shared by all trials; `data` is the training part and `eval_data` the validation part.
        test: the file of the test part.
        projection: SAID or DID.
        reference: what 90 % is of.
        plan: how far the search may go.
        metric: of the score; None is accuracy for classifiers, and loss else.
        share: of the reference.
        gain: the share is of what the reference gains over the base; false: of its score.
        budget: seconds of all trials together; None for as long as it takes.
    """

    settings: Settings
    test: str
    projection: Projection
    reference: Reference
    plan: Plan
    metric: Metric | None = None
    share: float = 0.9
    gain: bool = True
    budget: float | None = None

    def expected(self) -> int:
        """Trials of a search beside those of the base, unless noise has seeds tried at a third d."""
        plan, further = self.plan, len(self.plan.seeds) - 1
        rates = plan.rates + (plan.points - 1) * max(1, plan.rates - 1)
        return plan.rates + further + rates + 2 * further


class SpentError(Exception):
    """The budget does not reach for the next trial."""


@final
@dataclass
class Measuring:
    """A question on its way to an answer.

    Attributes:
        question: what is asked.
        limits: of the model.
        runner: of the trials.
        notify: is told of each trial.
        kept: is given this object and each result, to write down where it stands.
        results: trial → what it came to, in the order in which they were asked for.
        search: of the subspaces, once the reference is known.
        spent: whether the budget ended it.
    """

    question: Question
    limits: Limits
    runner: Runner
    notify: Notify
    kept: Callable[[Measuring, Result], object]
    results: dict[str, Result] = field(default_factory=dict)
    search: Search | None = None
    spent: bool = False
    metric: Metric = Metric.LOSS
    base: list[str] = field(default_factory=list)
    tried: dict[float, str] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    trials: dict[Try, str] = field(default_factory=dict)

    def run(self) -> None:
        """To the end, or to that of the budget.

        Raises:
            TrainingError: the reference diverged at every rate, or the budget does not reach for it.
            ConfigError: the metric cannot be had of these data.
        """
        try:
            self._base()
            self._reference()
        except SpentError:
            raise TrainingError(
                "the budget does not reach for the reference, and without it there is nothing to compare with",
                where="--budget",
                found=f"{self.seconds():.0f} s spent on {len(self.results)} trials",
                expected="the base, the reference with its rates and seeds, and two subspaces or more",
                fix="raise --budget (what is trained is kept), lower --max-steps, or take --against lora",
            ) from None
        if self.gained() <= 0:
            return
        try:
            self._subspaces()
        except SpentError:
            self.spent = True
            self.notify("the budget is spent")

    def expected(self) -> int:
        """Trials in all, as far as can be told."""
        return max(len(self.results), self.question.expected() + (HEADS if self.limits.head else 1))

    def seconds(self) -> float:
        """Of all trials so far."""
        return math.fsum(one.total_seconds for one in self.results.values())

    def gained(self) -> float:
        """What the reference has over the base."""
        return mean(self.scored(self.full)) - mean(self.scored(self.base))

    def measurements(self, *, gain: bool | None = None) -> Measurements:
        """All scores at the chosen rates; a d at which every rate diverged has none."""
        question = self.question
        points = {d: found for d in self.places() if (found := self.scored(self.at(d)))}
        gained = question.gain if gain is None else gain
        return Measurements(self.scored(self.base), self.scored(self.full), points, question.share, gained)

    def places(self) -> list[int]:
        """The d tried."""
        return [] if self.search is None else self.search.places()

    def at(self, d: int) -> list[str]:
        """The trials of a d at its best rate."""
        rate = None if self.search is None else self.search.best(d)
        return [name for asked, name in self.trials.items() if asked.d == d and asked.rate == rate]

    def scored(self, names: Sequence[str]) -> list[Scored]:
        """The models of these trials that did not diverge."""
        found = (self.results[name].measured for name in names if name in self.results)
        return [self.metric.scored(one) for one in found if one is not None]

    # The three parts ---------------------------------------------------------

    def _base(self) -> None:
        # A classifier's new head has other values with each seed; a language model is the same.
        first = self.question.plan.seeds[0]
        seeds = range(first, first + (HEADS if self.limits.head else 1))
        self.base = [f"base/seed-{seed}" for seed in seeds]
        made = [
            self._trial(name, self.question.settings, seed, None, Kind.BASE)
            for name, seed in zip(self.base, seeds, strict=True)
        ]
        self._run(made)
        measured = self.results[self.base[0]].measured
        if measured is None:
            raise TrainingError(
                "the base model's loss is not finite on the test part",
                where=self.question.test,
                expected="a model that can be measured",
                fix="lorafit eval --base shows the same; try --dtype float32",
            )
        counted = measured.correct is not None
        self.metric = self.question.metric or self.metric
        if self.metric is Metric.ACCURACY and not counted:
            raise ConfigError(
                "there is no accuracy of these data",
                where="--metric",
                found="texts or conversations",
                expected="texts with labels: accuracy is that of a classifier",
                fix="--metric loss",
            )
        if self.metric is Metric.LOSS and not self.question.gain:
            raise ConfigError(
                "a share of a loss is no measure: a loss has no value that stands for nothing learnt",
                where="--of",
                found="score, of the loss",
                expected="gain: the share of what training takes away from the base's loss",
                fix="--of gain, or --metric accuracy for a classifier",
            )

    def _reference(self) -> None:
        question, reference = self.question, self.question.reference
        first, *further = question.plan.seeds
        losses: dict[float, float | None] = {}
        while (rate := next_rate(losses, reference.guess, 1, question.plan.rates, self._untrained())) is not None:
            name = f"{reference.name}/rate-{rate:.2e}/seed-{first}"
            self.tried[rate] = name
            self._run([self._trial(name, reference.settings, first, rate, reference.kind)])
            losses[rate] = _validation(self.results[name])
        good = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not good:
            raise TrainingError(
                f"{reference.told} diverged at every rate",
                found=", ".join(f"{rate:.2g}" for rate in losses),
                expected="a finite loss at one of them",
                fix="--learning-rate sets the first of them: try a hundredth; or look at the data: lorafit check",
            )
        best = min(good, key=lambda rate: (good[rate], rate))
        self.full = [f"{reference.name}/rate-{best:.2e}/seed-{seed}" for seed in (first, *further)]
        made = [
            self._trial(name, reference.settings, seed, best, reference.kind)
            for name, seed in zip(self.full[1:], further, strict=True)
        ]
        self._run(made)

    def _subspaces(self) -> None:
        base, full = mean(self.scored(self.base)), mean(self.scored(self.full))
        threshold = self.measurements().threshold(base, full)
        self.search = Search(self.question.plan, threshold, self._untrained())
        while asked := self.search.ask():
            for one in asked:
                self.trials[one] = self._name(one)
            made = {self.trials[one]: one for one in asked}
            try:
                self._run([self._subspace(one) for one in asked])
            finally:
                for name, one in made.items():
                    if name in self.results:
                        self.search.tell(one, self._seen(name))

    def _untrained(self) -> float:
        """The validation loss of the base with the seed of the search."""
        validation = _validation(self.results[self.base[0]])
        return math.inf if validation is None else validation

    # Trials ------------------------------------------------------------------

    def _name(self, asked: Try) -> str:
        return f"{self.question.projection.value}/d-{asked.d}/rate-{asked.rate:.2e}/seed-{asked.seed}"

    def _subspace(self, asked: Try) -> Trial:
        settings = subspace(self.question.settings, asked.d, self.question.projection)
        return self._trial(self._name(asked), settings, asked.seed, asked.rate, Kind.ADAPTER)

    def _trial(self, name: str, settings: Settings, seed: int, rate: float | None, kind: Kind) -> Trial:
        training = settings.training if rate is None else {**settings.training, "learning_rate": rate}
        made = settings.model_copy(update={"seed": seed, "training": training})
        return Trial(name, made, self.question.test, kind, forget=True)

    def _seen(self, name: str) -> Seen:
        result = self.results[name]
        validation = _validation(result)
        if validation is None or result.measured is None:
            return Seen(None, None)
        return Seen(validation, self.metric.scored(result.measured).mean)

    def _run(self, trials: Sequence[Trial]) -> None:
        """Runs trials: all at once, or one at a time while the budget reaches for the next."""
        parts = [trials] if self.question.budget is None else [[one] for one in trials]
        for part in parts:
            if self.question.budget is not None and self._beyond(part[0]):
                raise SpentError
            for result in self.runner.run(part):
                self.results[result.name] = result
                if self.question.metric is None and result.measured is not None and result.measured.correct is not None:
                    self.metric = Metric.ACCURACY
                self.kept(self, result)

    def _beyond(self, trial: Trial) -> bool:
        """Whether a trial would go beyond the budget, if it took as long as those of its kind so far."""
        assert self.question.budget is not None
        kind = trial.name.partition("/")[0]
        known = [one.total_seconds for one in self.results.values() if one.name.partition("/")[0] == kind]
        next_one = math.fsum(known) / len(known) if known else 0.0
        return self.seconds() + next_one > self.question.budget


def subspace(settings: Settings, d: int, projection: Projection) -> Settings:
    """The settings with training in a subspace of `d` dimensions as their method."""
    return settings.model_copy(
        update={
            "method": "intrinsic",
            "method_options": {"d": d, "layerwise": projection.layerwise},
            "rank_pattern": None,
            "alpha_pattern": None,
        }
    )


def _validation(result: Result) -> float | None:
    return None if result.failed is not None or result.measured is None else result.validation
