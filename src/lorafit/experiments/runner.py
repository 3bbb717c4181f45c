"""Who runs trials: processes of this machine, one after the other.

A trial has a process of its own, so that its peak memory is its own and what a trial breaks stays broken there. The
process ends with the one that started it, whatever ended that: it holds one end of a pipe and watches it. This needs
nothing of an operating system that has pipes, and works on Linux, macOS and Windows.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

from lorafit.errors import LorafitError, TrainingError
from lorafit.experiments.trial import Notify, Result, Trial, finished

LOG = ".log"
LOCK = ".lock"
PRELOADED = ("lorafit.training.run", "lorafit.experiments.running")
"""What the process that trials are forked from imports once, where the system has such: it takes seconds."""
KILLS = 2
"""So often in one command the system may kill the process of a trial before the trial is given up."""
KILL = 9
"""What the signal that nobody can refuse is numbered, also where Python does not name it."""
ASKED_TO_END = frozenset(one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP"))
"""Signals by which somebody stops a process, rather than what happens to it."""
GRACE = 60.0
"""Seconds that a trial is given to finish its step and to save, when it is asked to stop."""


class Runner(ABC):
    """Runs trials that are not done, wherever it does, and reads those that are."""

    @abstractmethod
    def run(self, trials: Sequence[Trial]) -> Iterator[Result]:
        """The results of trials, in the order in which they finish; those that are done come first.

        Raises:
            LorafitError: a trial cannot run (one that diverged is a result). What is finished stays finished.
        """


@final
class Local(Runner):
    """Runs trials on this machine, one at a time: what a trial takes is measured, and two would disturb each other.

    Args:
        folder: the experiment's.
        notify: is told which trial begins, and that trials stop.
    """

    def __init__(self, folder: Path, notify: Notify) -> None:
        self._folder = folder
        self._notify = notify
        self._context: Any = context()

    def run(self, trials: Sequence[Trial]) -> Iterator[Result]:
        done = [finished(trial, self._folder) for trial in trials]
        yield from (each for each in done if each is not None)
        for trial, each in zip(trials, done, strict=True):
            if each is None:
                self._notify(f"runs {trial.name}")
                yield self._one(trial)

    def _one(self, trial: Trial) -> Result:
        """Runs a trial; one that is killed goes on from its last checkpoint, and if it is killed again is given up."""
        for left in reversed(range(KILLS)):
            code = self._process(trial)
            result = finished(trial, self._folder)
            if result is not None:
                return result
            if code is None or code >= 0 or -code in ASKED_TO_END:
                break
            by = f"signal {-code}" + (", as where memory runs out" if -code == KILL else "")
            if left:
                self._notify(f"the process of {trial.name} was killed ({by}); it goes on from its last checkpoint")
                continue
            from lorafit.experiments.running import given_up

            return given_up(trial, self._folder, f"its process was killed {KILLS} times ({by})")
        raise self._crashed(trial, code)

    def _process(self, trial: Trial) -> int | None:
        """The exit status of a process that runs a trial; raises what went wrong in it."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_child, args=(theirs, trial, str(self._folder)), daemon=False)
        process.start()
        theirs.close()
        try:
            try:
                answer = _answer(ours)
            except KeyboardInterrupt:
                self._stop(process)
                raise
            process.join()
        finally:
            if process.is_alive():
                process.kill()
                process.join()
            ours.close()
        if isinstance(answer, BaseException):
            raise answer
        status: int | None = process.exitcode
        return status

    def _stop(self, process: Any) -> None:
        """Has a trial finish its step, save, and end."""
        self._notify("stopping after this step, and saving; once more to stop at once")
        process.terminate()
        process.join(GRACE)

    def _crashed(self, trial: Trial, code: int | None) -> TrainingError:
        log = log_of(trial, self._folder)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        stopped = code is not None and code < 0
        return TrainingError(
            f"the process of the trial {trial.name} ended before its trial did",
            where=log,
            found=f"stopped by signal {-code}" if code is not None and stopped else (lines or [f"status {code}"])[-1],
            expected="a result",
            fix=f"{'' if stopped else 'see the log; '}the same command goes on from the last checkpoint",
        )


def context() -> Any:
    """How processes of trials are started: from one that has imported what all of them need, or from nothing.

    That one begins to import at once, beside whatever its user does next.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(PRELOADED))
    from multiprocessing import forkserver

    forkserver.ensure_running()
    return made


def log_of(trial: Trial, experiment: Path) -> Path:
    """Where a trial's process writes what it says: beside the trial's folder, which is the run's own."""
    folder = trial.folder(experiment)
    return folder.with_name(folder.name + LOG)


def _answer(connection: Connection) -> object:
    """What the process says at its end: None for a result, or an error; None also if it can say nothing any more."""
    try:
        return connection.recv()
    except (EOFError, OSError):  # the latter where it was killed while it said it
        return None


def _child(connection: Connection, trial: Trial, folder: str) -> None:
    """The process of a trial."""
    _alone(connection)
    experiment = Path(folder)
    log = log_of(trial, experiment)
    log.parent.mkdir(parents=True, exist_ok=True)
    _redirect(log)
    # While a process that was left behind by a killed one has the trial, this one waits for its end.
    from filelock import FileLock

    with FileLock(log.with_suffix(LOCK)):
        connection.send(_ran(trial, experiment))


def _ran(trial: Trial, experiment: Path) -> BaseException | None:
    import traceback

    from lorafit.experiments.trial import run_trial

    try:
        run_trial(trial, experiment, _tell)
    except KeyboardInterrupt:
        return KeyboardInterrupt()
    except LorafitError as error:
        traceback.print_exc()
        return error
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        return TrainingError(
            f"the trial {trial.name} failed",
            where=log_of(trial, experiment),
            found=f"{type(error).__name__}: {first}",
            expected="a result",
            fix="see the log; the same command goes on from the last checkpoint",
        )
    return None


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _alone(connection: Connection) -> None:
    """This process ends when the one that started it does; Ctrl-C reaches that one alone, which then tells this one."""
    if os.name == "posix":
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            connection.recv()  # nothing is ever sent: this returns when the other end is gone
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _redirect(log: Path) -> None:
    """Has everything that this process or a library in it prints go into a file."""
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
