"""One request of HTTP and the answers that the engine writes for it.

The engine speaks on its own thread and never waits. What it says lies in a mailbox until the connection takes it: one
piece for each answer, to which later ones are joined, so that a slow reader costs no more memory than its answers are
long, and the event loop is woken once and not for every token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, final

from starlette.types import Receive

from lorafit.serve.metrics import Meter
from lorafit.serve.requests import Asked, Notify, Piece

if TYPE_CHECKING:
    from lorafit.serve.engine import Engine, Ticket

T = TypeVar("T")


class GoneError(Exception):
    """The client has gone away."""


@final
class Mailbox:
    """Pieces on their way from the engine's thread to the event loop in which it is made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._there = asyncio.Event()
        self._lock = threading.Lock()
        self._pieces: dict[int, list[Piece]] = {}

    def put(self, index: int, piece: Piece) -> None:
        """Leaves a piece of answer `index`; from any thread, without waiting."""
        with self._lock:
            empty = not self._pieces
            self._pieces.setdefault(index, []).append(piece)
        if empty:
            with suppress(RuntimeError):  # the event loop has ended, and whoever would read with it
                self._loop.call_soon_threadsafe(self._there.set)

    async def take(self) -> dict[int, Piece]:
        """What has come since the last time, one piece for each answer; waits until there is some."""
        while True:
            await self._there.wait()
            self._there.clear()
            with self._lock:
                pieces, self._pieces = self._pieces, {}
            if pieces:
                return {index: _joined(parts) for index, parts in sorted(pieces.items())}


def _joined(parts: Sequence[Piece]) -> Piece:
    last = parts[-1]
    return Piece("".join(part.text for part in parts), last.tokens, last.finish, last.error)


@final
class Exchange:
    """The answers to one request of HTTP.

    Args:
        engine: who answers.
        asked: what is asked; answers are numbered as these are.
        meters: one for each.

    Raises:
        LorafitError: the engine takes not all of them; then it answers none.
    """

    def __init__(self, engine: Engine, asked: Sequence[Asked], meters: Sequence[Meter]) -> None:
        self._mailbox = Mailbox()
        self._tickets: list[Ticket] = []
        self._open = set(range(len(asked)))
        try:
            for index, (one, meter) in enumerate(zip(asked, meters, strict=True)):
                self._tickets.append(engine.submit(one, self._notify(index, meter)))
        except BaseException:
            self.cancel()
            raise

    def _notify(self, index: int, meter: Meter) -> Notify:
        def notify(piece: Piece) -> None:
            meter.piece(piece)
            self._mailbox.put(index, piece)

        return notify

    @property
    def open(self) -> bool:
        """Whether an answer has not ended."""
        return bool(self._open)

    async def take(self) -> dict[int, Piece]:
        """What has been written since the last time, by answer; waits until there is some. Only while it is open."""
        pieces = await self._mailbox.take()
        self._open -= {index for index, piece in pieces.items() if piece.finish is not None}
        return pieces

    def cancel(self) -> None:
        """Nobody wants the answers any more. May be called at any time, also where all have ended."""
        for ticket in self._tickets:
            ticket.cancel()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives, while the client is there. The request's body must have been read.

    Raises:
        GoneError: the client went away; `work` is cancelled.
    """
    wanted = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({wanted, watch}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise GoneError
    finally:
        await _ended(wanted, watch)


async def gone(receive: Receive) -> None:
    """Returns once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
