"""One accepted request on its way: what it has written, what it has told, and whether it goes on."""

from __future__ import annotations

import logging
import time
from typing import final

from lorafit.serve.requests import Asked, Finish, Notify, Piece
from lorafit.serve.sampling import Draw
from lorafit.serve.text import Answer

LOG = logging.getLogger("lorafit.serve")


@final
class Row:
    """A request from its acceptance to its last piece.

    Everything but `cancel` is the engine's thread's.

    Args:
        asked: the request.
        notify: who is told of its pieces.
        longest: tokens of the longest answer that the context has room for.
        seconds: how long it may take, from now; None for as long as it likes.
    """

    def __init__(self, asked: Asked, notify: Notify, longest: int, seconds: float | None) -> None:
        self.adapter = asked.adapter
        self.ids = list(asked.ids)
        self.draw = Draw(asked.sampling)
        self.written = 0
        self.finish: Finish | None = None
        self._notify = notify
        self._longest = min(longest, asked.sampling.max_tokens)
        self._ends = frozenset(asked.ends)
        self._answer = Answer(asked.tokenizer, asked.sampling.stop)
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = False

    @property
    def cached(self) -> int:
        """How many of its tokens have keys and values once it is decoded: all but the last, which is the next input."""
        return len(self.ids) - 1

    def cancel(self) -> None:
        """Asks that it ends soon. From any thread."""
        self._cancelled = True

    def due(self, now: float) -> Finish | None:
        """Why it has to end though it could go on, if so."""
        if self._cancelled:
            return Finish.CANCELLED
        return Finish.TIMEOUT if self._deadline is not None and now >= self._deadline else None

    def write(self, token: int) -> None:
        """The next token of its answer, after which it may have ended."""
        self.ids.append(token)
        self.written += 1
        if token in self._ends:
            self.end(Finish.STOP)
            return
        text, stopped = self._answer.add(token)
        if stopped:
            self._last(text, Finish.STOP)
        elif self.written == self._longest:
            self.end(Finish.LENGTH, before=text)
        elif text:
            self._tell(Piece(text, self.written, None))

    def end(self, finish: Finish, *, before: str = "") -> None:
        """Tells the last piece, with all text that was held back after `before`; does nothing if it has been told."""
        if self.finish is None:
            text, stopped = self._answer.rest()
            self._last(before + text, Finish.STOP if stopped else finish)

    def fail(self, error: str) -> None:
        """Tells the last piece, which says what broke; does nothing if it has been told."""
        self._last("", Finish.FAILED, error)

    def _last(self, text: str, finish: Finish, error: str | None = None) -> None:
        if self.finish is None:
            self.finish = finish
            self._tell(Piece(text, self.written, finish, error))

    def _tell(self, piece: Piece) -> None:
        try:
            self._notify(piece)
        except Exception:
            LOG.exception("a request could not be told of its answer: it is cancelled")
            if piece.finish is None:
                self._last("", Finish.CANCELLED)
