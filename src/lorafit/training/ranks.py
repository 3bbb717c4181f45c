"""The processes of one run: how they find each other, which one speaks and writes, and what all of them agree on.

A launcher (torchrun, accelerate, Ray Train) starts them and says so in the environment; torch.distributed joins them.
The first one says what there is to say and writes what is written once. Where one process finds something out that
decides what all do next, all of them learn it: a decision that two processes take differently is a run that hangs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from textwrap import shorten
from typing import Any, TypeVar

import torch

from lorafit.errors import ConfigError, LorafitError, TrainingError
from lorafit.sharded import by_one

T = TypeVar("T")
distributed = torch.distributed

GRACE = 0.1
"""Seconds between the last exchange and the end."""
TIMEOUT = 1800
"""Seconds after which a process gives the others up, where `ddp_timeout` does not say."""
LOST = (
    "Application timeout",
    "Connection closed by peer",
    "Connection refused",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "failed to recv, got 0 bytes",
    "gloo/transport",
    "NCCL",
    "Watchdog",
    "wait timeout",
)
"""What gloo, NCCL and torch's store say, in various releases, when another process does not answer."""


class ElsewhereError(TrainingError):
    """A run that cannot go on because of what happened in another process."""


class EchoError(TrainingError):
    """A run that cannot go on, for a reason that the first process says."""


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def silent() -> bool:
    """Whether another process of this run speaks, told before they have found each other."""
    return launched() and int(os.environ.get("RANK", "0")) > 0


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def count() -> int:
    """How many processes this run has."""
    return distributed.get_world_size() if _joined() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if _joined() else 0


def speaks() -> bool:
    """Whether this is the process that says and writes what is said and written once."""
    return number() == 0


def join(training: Mapping[str, Any]) -> None:
    """Waits for the other processes, if this one was started as one of several, and connects them.

    Args:
        training: the trainer's arguments as given: `use_cpu`, `ddp_timeout`, `ddp_backend`.

    Raises:
        TrainingError: the others did not come.
        ConfigError: the launcher is set to shard by itself.
    """
    if not launched() or _joined():
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            "accelerate is set to shard the model by itself, and would leave the adapters' buffers behind",
            where="the configuration of `accelerate launch`",
            found="distributed_type: FSDP",
            expected="distributed_type: MULTI_GPU (or MULTI_CPU), and shard: true among the run's settings",
            fix="accelerate launch --config_file examples/distributed/fsdp2.yaml -m lorafit train --shard ...",
        )
    from accelerate import PartialState

    cpu = bool(training.get("use_cpu", not torch.accelerator.is_available()))
    backend = training.get("ddp_backend")
    options = {} if backend is None else {"backend": backend}
    seconds = int(training.get("ddp_timeout", TIMEOUT))
    try:
        PartialState(cpu=cpu, timeout=timedelta(seconds=seconds), **options)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            "the processes of this run did not find each other",
            found=_first(error),
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            expected=f"{os.environ['WORLD_SIZE']} processes that reach this address",
            fix="start torchrun on every machine with the same --rdzv-id and --rdzv-endpoint; see docs/distributed.md",
        ) from error


def leave() -> None:
    """Parts from the other processes, at the very end."""
    if _joined():
        # A thread of gloo frees the tensors of the last exchange, for which it needs the interpreter: if that is on its
        # way out by then, the process is aborted.
        time.sleep(GRACE)
        distributed.destroy_process_group()


def first(job: Callable[[], T]) -> T:
    """What a job comes to that the first process does, for all of them.

    Raises:
        LorafitError: what it raised, in the first process.
        EchoError: the same in all others.
    """
    try:
        return by_one(job)
    except LorafitError as error:
        if speaks():
            raise
        raise EchoError(error.message, found=error.found, fix=error.fix) from error


def agreed(job: Callable[[], T]) -> T:
    """What a job comes to that every process does by itself, if it fails in none.

    Raises:
        LorafitError: what it raised here.
        EchoError: it failed in the first process, too, or alone.
        ElsewhereError: what it raised in another process, if it did not fail here.
    """
    if count() == 1:
        return job()
    result, raised = None, None
    try:
        result = job()
    except Exception as error:
        if is_lost(error):
            raise  # nobody would answer
        raised = error
    told: list[str | None] = [None] * count()
    distributed.all_gather_object(told, None if raised is None else _text(raised))
    if not speaks() and told[0] is not None:
        raise EchoError(told[0], where=_place(), fix="see what process 0 says") from raised
    if raised is not None:
        raise raised
    failed = next((place for place, text in enumerate(told) if text is not None), None)
    if failed is not None:
        raise ElsewhereError(
            f"process {failed} of this run failed", found=told[failed], fix="mend what it says", where=_place()
        )
    made: T = result  # type: ignore[assignment]
    return made


def check_alike(value: str, what: str) -> None:
    """Raises `ConfigError` in every process if they do not all have the same."""
    if count() == 1:
        return
    values: list[str] = [""] * count()
    distributed.all_gather_object(values, value)
    other = next((place for place, each in enumerate(values) if each != values[0]), None)
    if other is not None:
        raise ConfigError(
            f"the processes of this run have different {what}",
            found=f"{values[other][:12]} in process {other}",
            expected=f"{values[0][:12]}, as in process 0",
            fix="give all machines the same files",
        )


def total(values: Sequence[float]) -> list[float]:
    """The sums of these numbers over all processes."""
    return _over_all(values, distributed.ReduceOp.SUM) if count() > 1 else list(values)


def largest(value: float) -> float:
    """The largest of this number over all processes."""
    return _over_all([value], distributed.ReduceOp.MAX)[0] if count() > 1 else value


def any_of(flag: bool) -> bool:
    """Whether it is so in at least one process."""
    return flag if count() == 1 else largest(float(flag)) > 0


def _over_all(values: Sequence[float], how: Any) -> list[float]:
    numbers = torch.tensor(values, dtype=torch.float64, device=_device())
    distributed.all_reduce(numbers, op=how)
    found: list[float] = numbers.tolist()
    return found


def _device() -> torch.device:
    """Where the backend wants its tensors: gloo has them in memory, others on the accelerator of this process."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    plain = kind is None or distributed.get_backend() in ("gloo", "mpi")
    return torch.device("cpu") if plain or kind is None else kind


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and not isinstance(error, LorafitError) and _says(error)


def _says(error: RuntimeError) -> bool:
    return any(mark in str(error) for mark in LOST)


@contextmanager
def lost(command: str) -> Iterator[None]:
    """Within, what the libraries say of a process that does not answer is an error that says what to do.

    Once it or any other error is raised, SIGTERM does not end this process any more: a launcher sends it to all as soon
    as one has ended, which would cut off what this one has yet to write and say. One that takes long is killed by it.

    Args:
        command: with which the run goes on.

    Raises:
        ElsewhereError: another process ended or hangs.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        cause = _loss(error)
        if count() == 1 or (cause is None and isinstance(error, KeyboardInterrupt)):
            raise
        _be_left_to_finish()
        if cause is None:
            raise
        raise ElsewhereError(
            "another process of this run ended, or did not answer in time",
            where=_place(),
            found=_first(cause),
            expected=f"all {count()} processes until the end",
            fix="read what that process said (one that the system killed, as for want of memory, says nothing); the "
            f"same command under the same launcher goes on from the last checkpoint, on any number of processes: "
            f"{command}",
        ) from cause


def _loss(error: BaseException) -> BaseException | None:
    """What says that another process does not answer: the error, or what was on its way when a signal cut it off."""
    found: BaseException | None = error
    while found is not None and not is_lost(found):
        found = found.__context__ if isinstance(found, KeyboardInterrupt) else None
    return found


def _be_left_to_finish() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _place() -> str:
    return f"process {number()} of {count()}"


def _first(error: BaseException) -> str:
    """The type of an error, and as much of its first line as people read."""
    return shorten(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 200, placeholder=" ...")


def _text(error: Exception) -> str:
    return error.message if isinstance(error, LorafitError) else _first(error)
