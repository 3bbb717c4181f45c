"""The `Journal`: beside a training loop of one's own, what `lorafit train` does beside its own."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, cast, final, overload

import torch
from torch import Tensor

from lorafit.errors import ConfigError, LorafitWarning, StateError, TrainingError
from lorafit.handle import Handle
from lorafit.hooks import check_held
from lorafit.journal import asked, telling
from lorafit.journal.book import Book, Plan
from lorafit.journal.buffers import Buffers
from lorafit.journal.condition import Kept, set_random_state
from lorafit.journal.keeping import Keeping
from lorafit.journal.measuring import Measure, Numbers, check_asked, computed, given
from lorafit.journal.place import CHECKPOINT, Place, Say
from lorafit.journal.telling import WAYS, Ended
from lorafit.methods import validate
from lorafit.sharded import in_parts
from lorafit.training import ranks
from lorafit.training.owned import REPORT
from lorafit.training.verdict import Evaluation, Kind, judge


@final
class Journal:
    """Keeps the books of a training loop: records, checkpoints, the best adapter, a verdict and a report.

    It is a context manager, and an iterator over the rounds of the loop that are left: a program that was killed goes
    on from its last checkpoint when it is started again, as if it had never been stopped.

    Args:
        folder: where all is kept; a new one, or that of the same loop.
        handle: the adapter that is trained.
        optimizer: trains it, made before; its state is kept with the checkpoints.
        epochs: how many rounds the loop has. A checkpoint is written after each.
        steps: the same, where a round is one optimizer step. A checkpoint is written after each tenth of them.
        also: what else has to go on with the loop, by names of your own: a learning rate scheduler, a gradient scaler,
            the `torch.Generator` of a data loader, an average of the weights.
        data: what the report says of the data, such as ``{"source": "digits", "train_records": 900}``.
        keep_best: keep the adapter with the lowest held-out loss, instead of the last one.
        save_every: rounds from one checkpoint to the next.
        log_every: steps from one record of the loss to the next.
        seed: of the loop, for its records.
        say: is told, line by line, what happens.

    Attributes:
        taken: optimizer steps so far.
        rounds: rounds so far.
        outcome: what the loop came to, once it has ended.

    Raises:
        ConfigError: a setting has a value that it cannot have.
    """

    def __init__(
        self,
        folder: str | Path,
        handle: Handle,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        also: Mapping[str, Kept] | None = None,
        data: Mapping[str, Any] | None = None,
        keep_best: bool = True,
        save_every: int | None = None,
        log_every: int = 10,
        seed: int | None = None,
        say: Say = print,
    ) -> None:
        for name, value in (("epochs", epochs), ("steps", steps), ("save_every", save_every), ("log_every", log_every)):
            if value is not None:
                validate.whole(f"Journal.{name}", value)
        if epochs is not None and steps is not None:
            raise ConfigError(
                "a loop has a number of epochs or of steps, not both",
                where="Journal",
                found=f"epochs={epochs}, steps={steps}",
                expected="one of the two",
                fix=f"epochs={epochs}",
            )
        every = save_every or max(1, (steps or 1) // 10)
        asked.check(folder, handle, optimizer, seed, say)
        validate.flag("Journal.keep_best", keep_best)
        self._also = asked.along(also)
        self._data = asked.told(data)
        names = tuple(sorted(self._also))
        self._plan = Plan(epochs, steps, every, log_every, keep_best, seed, names)
        self._place = Place(Path(folder))
        self._handle = handle
        self._optimizer = optimizer
        self._say = say
        self._inside: tuple[Book, Keeping] | None = None
        self._random: Mapping[str, Any] | None = None
        self._measure: tuple[Measure, Iterable[Any]] | None = None
        self._norm: float | Tensor | None = None
        self._stepless = False
        self._finished = False
        self.taken = 0
        self.rounds = 0
        self.outcome: Ended | None = None

    # The loop

    def __enter__(self) -> Journal:
        """Opens the folder, and puts everything back as the last checkpoint has it, if there is one.

        Raises:
            ConfigError: the folder is another loop's.
            CheckpointError: the checkpoint is damaged.
            TrainingError: the optimizer does not train this adapter, or the model is sharded.
        """
        self._check()
        say = self._say if ranks.speaks() else _nobody
        place, handle = self._place, self._handle
        ranks.first(lambda: place.open(self._signature()))
        result = ranks.first(place.result)
        book = Book(place, handle, self._optimizer, self._plan, self._data, say)
        keeping = Keeping(place, handle, self._optimizer, self._also, Buffers(handle.model), say)
        self._finished = result is not None
        if result is not None:
            ranks.first(place.clear)
            keeping.finished()
            self.outcome = Ended.read(result)
            self.taken = self.outcome.steps
        else:
            newest = ranks.first(lambda: place.newest(say))
            if newest is not None:
                self.taken = newest.step
                self.rounds, self._random = keeping.resume(newest)
        if self.taken:
            book.take_up(self.taken)
        if not self._finished:
            book.begin(self.taken, self.rounds)
        if self._plan.rounds is None:
            self._go_on()
        self._inside = book, keeping
        return self

    def _go_on(self) -> None:
        """Puts the random numbers back: only now, what was drawn since the start is no part of the loop."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def __iter__(self) -> Iterator[int]:
        """The numbers of the rounds that are left, from 0; after each a checkpoint is written if one is due.

        Raises:
            ConfigError: nobody said how many there are.
            StateError: outside of the `with` block.
        """
        planned, (book, _) = self._plan.rounds, self._open()
        if planned is None:
            raise ConfigError(
                "nobody said how many rounds the loop has",
                where="Journal",
                found="neither epochs nor steps",
                expected="one of the two",
                fix="Journal(folder, handle, optimizer, epochs=10)",
            )
        if self.rounds >= planned:  # a loop that was stopped after its last round: what comes after it is left
            self._go_on()
        while self.rounds < planned and not self._finished:
            self._go_on()
            book.pace.begin()
            before = self.taken
            yield self.rounds
            self.rounds += 1
            self._check_step(before)
            if self.rounds % self._plan.save_every == 0 or self.rounds == planned:
                self._save()

    def step(
        self, loss: Tensor | float, *, examples: int | None = None, grad_norm: Tensor | float | None = None
    ) -> None:
        """Notes an optimizer step: call it after each.

        Args:
            loss: the training loss of the step.
            examples: how many records it was computed on, for the speed.
            grad_norm: what `clip_grad_norm_` gave.

        Raises:
            ConfigError: the loss is not one number.
            TrainingError: the loss is not finite, noticed when it is recorded, before the next checkpoint.
            StateError: outside of the `with` block, or in a loop that is finished.
        """
        book, _ = self._going()
        norm = None if grad_norm is None else asked.number("grad_norm", grad_norm)
        book.pace.add(loss, asked.examples(examples))
        self.taken += 1
        self._norm = norm
        if self.taken % self._plan.log_every == 0:
            self._log(book)

    def _log(self, book: Book) -> None:
        book.log(self.taken, self.rounds, None if self._norm is None else float(self._norm))

    @overload
    def evaluate(self, losses: Numbers, *, correct: Numbers | None = None, counts: Numbers | None = None) -> float: ...

    @overload
    def evaluate(self, losses: Measure, loader: Iterable[Any]) -> float: ...

    def evaluate(
        self,
        losses: Numbers | Measure,
        loader: Iterable[Any] | None = None,
        *,
        correct: Numbers | None = None,
        counts: Numbers | None = None,
    ) -> float:
        """Notes the losses of the held-out records: the same ones in the same order every time.

        Call it before the first step, and in every epoch. A second call at the same step changes nothing.

        Args:
            losses: one for each record; or a function from a batch of `loader` to those of its records, alone or with
                what was right of each. It is called without gradients, with the model in evaluation mode.
            loader: the held-out batches, where `losses` is a function.
            correct: of each record, whether or how many of its predictions were right, for the accuracy.
            counts: of each record, its predictions, where `losses` are sums over several.

        Returns:
            The mean loss.

        Raises:
            ConfigError: not one number for each record, or others than before.
            TrainingError: a loss is not finite.
            StateError: outside of the `with` block.
        """
        book, keeping = self._open()
        check_asked(losses, loader, correct, counts)
        known = next((one for one in book.evaluations if one.step == self.taken), None)
        if known is not None:
            return known.mean
        if self._finished:  # the adapter is the one that was kept; nothing is measured any more
            return math.nan if self.outcome is None or self.outcome.after is None else self.outcome.after
        self._log(book)
        started = time.perf_counter()
        if loader is None:
            found = given(cast(Numbers, losses), correct, counts)
        else:
            self._measure = (cast(Measure, losses), loader)
            found = computed(self._handle.model, *self._measure)
        found = ranks.first(lambda: found)
        one = Evaluation.of(self.taken, found.losses, found.counts)
        over = self._plan.rounds is not None and self.rounds >= self._plan.rounds
        if self._random is None or over:  # else it was asked before the loop goes on: its first start had it already
            book.measured(one, found, time.perf_counter() - started)
            if self._plan.keep_best and self.taken and all(one.mean <= other.mean for other in book.evaluations):
                keeping.best(self.taken)  # before it is noted: what is noted is there
            book.note(one, found.accuracy)
        book.pace.begin()
        return one.mean

    def save(self) -> None:
        """Writes a checkpoint now, in a loop of no stated length: others write theirs between their rounds.

        Raises:
            CheckpointError: it cannot be written.
            StateError: in a loop with rounds, outside of the `with` block, or in a loop that is finished.
        """
        self._going()
        if self._plan.rounds is not None:
            raise StateError(
                "a loop with rounds has its checkpoints between them: from within one it could not go on exactly",
                found=f"a call in a loop of {self._plan.told()}",
                expected="a loop without epochs and steps",
                fix="Journal(..., save_every=1)",
            )
        self._save()

    def _check_step(self, before: int) -> None:
        """Warns of a round without a step, once: evaluations are told by the steps until then."""
        if self.taken == before and not self._stepless and self._plan.steps is None:
            self._stepless = True
            self._warn(f"round {self.rounds:,} is over, and no step was noted in it")

    def _warn(self, what: str) -> None:
        if ranks.speaks():
            text = f"{what}: call journal.step(loss) after each optimizer step; of evaluations without one in between"
            warnings.warn(f"{text} only the first is noted", LorafitWarning, stacklevel=4)

    def _save(self) -> None:
        book, keeping = self._going()
        self._log(book)
        if keeping.checkpoint(self.taken, self.rounds, None if book.best is None else book.best.step):
            book.saved(self.taken)
        book.pace.begin()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The held-out losses so far, record by record."""
        return () if self._inside is None else tuple(self._inside[0].evaluations)

    @property
    def overfits(self) -> bool:
        """Whether the held-out loss has risen since its lowest, by more than chance: a reason to stop."""
        found = judge(self.evaluations)
        return found is not None and found.kind is Kind.OVERFITTING

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the books: the best adapter, the verdict and the report; after an error, what it was."""
        book, keeping = self._open()
        if self._finished:
            if error is None:
                self._tell(f"this loop is finished already: {self._place.path}")
                if ranks.speaks() and not (self._place.path / REPORT).is_file():  # a kill came before it was drawn
                    telling.report(self._place.records, self._place.path / REPORT, self._say)
            return
        try:
            if error is None:
                self._finish(book, keeping)
        except BaseException as failed:
            self._failed(book, failed)
            raise
        if error is not None:
            self._failed(book, error)
        elif self.outcome is not None and ranks.speaks():
            page = telling.report(self._place.records, self._place.path / REPORT, self._say)
            for line in (*self.outcome.lines(), f"report:  {page or 'not written'}", self.outcome.last()):
                self._say(line)

    # What happens at its ends

    def _check(self) -> None:
        if in_parts(self._handle.model):
            raise TrainingError(
                "the model is sharded, and a journal keeps whole tensors",
                expected="a model that every process has a whole copy of",
                fix="lorafit train --shard, or save with lorafit.distributed",
            )
        if self._optimizer is not None:
            check_held(self._optimizer, list(self._handle.named_parameters()))

    def _signature(self) -> dict[str, Any]:
        """What makes this loop another one than others."""
        handle = self._handle
        return {
            "method": handle.method.name,
            "settings": handle.method.settings(),
            "adapter": handle.name,
            "sites": len(handle.sites),
            "in_full": sorted(handle.saved),
            "epochs": self._plan.epochs,
            "steps": self._plan.steps,
        }

    def _finish(self, book: Book, keeping: Keeping) -> None:
        self._go_on()  # a loop that was stopped after its last round has none that would
        self._log(book)
        if not self.taken and not self._stepless and (book.evaluations or self.rounds):
            self._warn("the loop is over, and no step was noted")
        if self._measure is not None and all(one.step != self.taken for one in book.evaluations):
            self.evaluate(*self._measure)
        verdict = judge(book.evaluations, book.trained(self.taken), ways=WAYS)
        kept = self._best_put_back(book, keeping)
        moved = keeping.buffers.told()
        if moved is not None:
            self._tell(moved)
        self.outcome = book.end(self.taken, keeping.finish(), verdict, kept)
        result = asdict(self.outcome)
        ranks.first(lambda: self._place.finish(result))  # the last thing: who finds it has all of the rest
        self._finished = True

    def _best_put_back(self, book: Book, keeping: Keeping) -> Evaluation | None:
        """Makes the adapter the best one, if that is not the last; gives its evaluation."""
        best = book.best if self._plan.keep_best else None
        if best is None or best.step in (0, self.taken) or not keeping.put_back(best.step):
            return None
        return best

    def _failed(self, book: Book, error: BaseException) -> None:
        book.failed(self.taken, error)
        newest = next(reversed(self._place.whole(CHECKPOINT)), None)
        place = "the start" if newest is None else f"step {newest.step:,}"
        self._tell(f"stopped at step {self.taken:,}; the same program goes on from {place}")

    def _tell(self, text: str) -> None:
        if ranks.speaks():
            self._say(text)

    def _open(self) -> tuple[Book, Keeping]:
        if self._inside is None:
            raise StateError(
                "the journal is not open",
                expected="a call within its with block",
                fix="with Journal(folder, handle, optimizer, epochs=10) as journal: ...",
            )
        return self._inside

    def _going(self) -> tuple[Book, Keeping]:
        if self._finished:
            raise StateError(
                "this loop is finished already, and its adapter is the one that it ended with",
                where=self._place.path,
                found=f"a loop of {self.taken:,} steps",
                expected="a new folder for a new loop",
                fix=f"choose another folder, or remove {self._place.path}",
            )
        return self._open()


def _nobody(text: str) -> None:
    """Is told what another process says already."""
