"""The engine: one thread that owns the model, and the doors through which other threads reach it.

Requests join and leave between two tokens. Other threads only put something down (a request, a job, a wish that one be
cancelled, or that all end) and wake the thread; nothing but the thread touches the model, its adapters or their cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar, final

from lorafit.errors import DataError, StateError
from lorafit.serve.batch import Forward
from lorafit.serve.limits import Limits, Stats
from lorafit.serve.requests import Adapters, Asked, BusyError, Finish, Notify
from lorafit.serve.row import Row
from lorafit.serve.runnable import context, windows
from lorafit.serve.schedule import Schedule, end

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Engine", "Limits", "Stats", "Ticket"]

LOG = logging.getLogger("lorafit.serve")
T = TypeVar("T")


class Phase(Enum):
    """What an engine does with requests."""

    OPEN = "open"
    """It takes them."""
    CLOSING = "closing"
    """It takes no new ones, and finishes those that run."""
    HURRYING = "hurrying"
    """It cancels those that run, too."""
    CLOSED = "closed"
    """It has no thread any more."""


@final
class Ticket:
    """What is given for an accepted request."""

    def __init__(self, row: Row, wake: Callable[[], None]) -> None:
        self._row = row
        self._wake = wake

    def cancel(self) -> None:
        """Nobody wants the answer any more. From any thread, at any time, any number of times."""
        self._row.cancel()
        self._wake()


@final
class Job(Generic[T]):
    """Something to be done on the engine's thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.future: Future[T] = Future()

    def run(self) -> None:
        """Does it, unless nobody wants it any more; whoever waits gets what it gives, or what it raises."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._work())
            except BaseException as error:  # nothing that a job raises may end the thread
                self.future.set_exception(error)

    def refuse(self, error: StateError) -> None:
        """It will not be done."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@final
class Engine:
    """Answers requests with one model and many adapters.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode. On a CPU a thread that has
            computed slows the engine's down for as long as it lives: load the model with `lorafit.serve.apart.apart`.
        bank: its adapters.
        limits: how much is done at once.

    Raises:
        ConfigError: the model keeps something else than keys and values of every token, or has a shorter context than
            the limits ask for.
    """

    def __init__(self, model: PreTrainedModel, bank: Adapters, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._bank = bank
        self._schedule = Schedule(Forward(model.eval(), bank, windows(model)), bank, self.limits)
        self.context = context(model, self.limits)
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._changed = threading.Condition()
        self._phase = Phase.OPEN
        self._failure: str | None = None
        self._waiting: deque[Row] = deque()
        self._jobs: deque[Job[object]] = deque()
        self._thread = threading.Thread(target=self._run, name="lorafit-engine", daemon=True)

    # From any thread

    def start(self) -> None:
        """Begins with what has been asked by now.

        Raises:
            StateError: it was started before, or stopped.
        """
        with self._changed:
            if self._phase is not Phase.OPEN or self._thread.ident is not None:
                raise StateError("an engine is started once", fix="make a new one")
            self._thread.start()

    def submit(self, asked: Asked, notify: Notify) -> Ticket:
        """Accepts a request, which is then told exactly one last piece, whatever happens.

        Args:
            asked: the request.
            notify: told of each piece of the answer, on the engine's thread; it must not block.

        Raises:
            BusyError: as many requests wait as may.
            DataError: a prompt that is empty, too long or of tokens that the model does not have; no such adapter.
            StateError: the engine takes no requests any more.
        """
        self._check(asked)
        row = Row(asked, notify, self.context - len(asked.ids), self.limits.seconds)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.limits.waiting:
                raise BusyError(
                    "too many requests are waiting",
                    found=len(self._waiting),
                    expected=f"fewer than {self.limits.waiting}",
                    fix="ask again in a moment",
                )
            self._waiting.append(row)
            self._changed.notify()
        return Ticket(row, self._wake)

    def call(self, job: Callable[[], T]) -> Future[T]:
        """Has something done on the engine's thread, between two tokens: what concerns the model or its adapters.

        Raises:
            StateError: the engine was stopped.
        """
        made = Job(job)
        with self._changed:
            self._check_open()
            self._jobs.append(made)  # type: ignore[arg-type]  # what it gives is between the job and its future
            self._changed.notify()
        return made.future

    def stop(self, *, wait: float = 30.0) -> None:
        """Takes no new requests, cancels those that wait, and those that run if they are not finished in time.

        Returns when the thread has ended; at once where the thread itself calls it.

        Args:
            wait: seconds for what runs.
        """
        with self._changed:
            begun = self._thread.ident is not None
            if self._phase is Phase.OPEN:
                self._phase = Phase.CLOSING
            self._changed.notify()
        if not begun:
            self._close()
        elif threading.current_thread() is not self._thread:
            self._thread.join(wait)
            with self._changed:
                if self._phase is Phase.CLOSING:
                    self._phase = Phase.HURRYING
                self._changed.notify()
            self._thread.join()

    def stats(self) -> Stats:
        """What it does now and has done."""
        schedule = self._schedule
        return Stats(
            running=schedule.running,
            waiting=len(self._waiting),
            tokens_generated=schedule.tokens,
            prompt_tokens=schedule.prompt_tokens,
            steps=schedule.steps,
            prompt_steps=schedule.prompt_steps,
            set_aside=schedule.set_aside,
            columns=schedule.columns,
            cache_bytes=schedule.cache_bytes,
            finished=dict(schedule.finished),
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _check_open(self) -> None:
        if self._phase is not Phase.OPEN:
            raise self._closed_error()

    def _closed_error(self) -> StateError:
        found = self._failure or "it was stopped"
        return StateError("the engine takes no requests any more", found=found, fix="start a new one")

    def _check(self, asked: Asked) -> None:
        ids = asked.ids
        if not ids:
            raise DataError("the prompt is empty", expected="at least one token")
        if len(ids) >= self.context:
            raise DataError(
                "the prompt is too long",
                found=f"{len(ids)} tokens",
                expected=f"at most {self.context - 1}, of a context of {self.context} for prompt and answer",
                fix="a shorter prompt",
            )
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            strange = next(token for token in ids if not 0 <= token < self._vocabulary)
            raise DataError(
                "the prompt has a token that the model does not have",
                found=strange,
                expected=f"numbers from 0 to {self._vocabulary - 1}",
            )
        if asked.adapter is not None and not self._bank.known(asked.adapter):
            raise DataError("there is no such adapter", found=repr(asked.adapter))

    # On the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._work()
        except BaseException as error:
            LOG.critical("the engine has failed and takes no requests any more", exc_info=error)
            self._failure = f"the engine has failed: {type(error).__name__}"
            self._schedule.fail(self._failure)
        finally:
            self._close()

    def _wait(self) -> bool:
        """Waits until there is something to do; False when there will be nothing any more."""
        with self._changed:
            while True:
                if self._jobs or self._waiting or self._schedule.running:
                    return True
                if self._phase is not Phase.OPEN:
                    return False
                self._changed.wait()

    def _work(self) -> None:
        """Jobs, then whoever has to leave, then whoever may begin, then a token for everyone."""
        with self._changed:
            jobs, self._jobs = self._jobs, deque()
        for job in jobs:
            job.run()
        now = time.monotonic()
        self._dismiss(now)
        if self._phase is Phase.HURRYING:
            self._schedule.end(now, everything=Finish.CANCELLED)
        self._admit()
        self._schedule.turn(now)

    def _dismiss(self, now: float) -> None:
        """Ends those in the queue that nobody wants any more, that have waited too long, or all of them at the end."""
        leaving: list[tuple[Row, Finish]] = []
        with self._changed:
            closing = None if self._phase is Phase.OPEN else Finish.CANCELLED
            staying: deque[Row] = deque()
            for row in self._waiting:
                finish = closing or row.due(now)
                if finish is None:
                    staying.append(row)
                else:
                    leaving.append((row, finish))
            self._waiting = staying
        for row, finish in leaving:
            end(row, finish)
            self._schedule.ended(row)

    def _admit(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or not self._schedule.fits(self._waiting[0]):
                    return
                row = self._waiting.popleft()
            if not self._schedule.admit(row):
                with self._changed:
                    self._waiting.appendleft(row)

    def _close(self) -> None:
        """The last thing that happens: whoever still waits is told."""
        with self._changed:
            self._phase = Phase.CLOSED
            rows, self._waiting = self._waiting, deque()
            jobs, self._jobs = self._jobs, deque()
        for row in rows:
            if self._failure is None:
                end(row, Finish.CANCELLED)
            else:
                row.fail(self._failure)
            self._schedule.ended(row)
        for job in jobs:
            job.refuse(self._closed_error())
