"""Work that must not leave threads behind: a model is loaded where the threads that helped end with it.

OpenMP gives each thread that computes helpers of its own, which stay for as long as it lives. The main thread loads a
model and then only waits, but its helpers count: with more of them in the process than there are cores, GNU's OpenMP no
longer has the engine's helpers wait awake between two operations, and waking them costs more than most operations of a
token do. On two cores a token of 32 rows took 1.3 times as long for it, and 2.6 times with ten adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """Does something in a thread of its own, which has ended when this returns.

    Returns:
        What `work` returns.

    Raises:
        BaseException: what `work` raises.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="lorafit-apart", daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    thread.join()
    return future.result()
