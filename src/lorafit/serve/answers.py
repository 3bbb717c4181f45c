"""From the engine's pieces to OpenAI's JSON and to its stream of events.

    Form
    ├── ChatForm   /v1/chat/completions
    └── TextForm   /v1/completions

A form knows how a finished answer and the parts of a stream are written; `Stream` sends them as they come, one event
for what has come since the last one, and cancels the request when nobody reads.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorafit.serve import schemas
from lorafit.serve.exchange import Exchange, gone
from lorafit.serve.problems import Problem
from lorafit.serve.requests import Finish, Piece

REASONS: Mapping[Finish, str] = {Finish.STOP: "stop", Finish.LENGTH: "length"}
"""How an answer ends that is one; all other ends are errors."""


@dataclass
class Written:
    """One answer so far."""

    parts: list[str] = field(default_factory=list)
    tokens: int = 0
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        """Another piece of it."""
        self.parts.append(piece.text)
        self.tokens, self.finish = piece.tokens, piece.finish

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


class Form(ABC):
    """How answers of one kind are written.

    Args:
        model: whose answers they are.
        prompt_tokens: of all prompts together.
    """

    mark: ClassVar[str]
    chunk: ClassVar[str]

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.id = f"{self.mark}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self._prompt_tokens = prompt_tokens

    @abstractmethod
    def whole(self, answers: Sequence[Written]) -> BaseModel:
        """The finished answers."""

    @abstractmethod
    def begin(self, index: int) -> dict[str, Any] | None:
        """The choice that opens an answer in a stream, if there is such."""

    @abstractmethod
    def more(self, index: int, text: str) -> dict[str, Any]:
        """A choice that brings more of an answer."""

    @abstractmethod
    def end(self, index: int, reason: str) -> dict[str, Any]:
        """The choice that ends an answer."""

    def usage(self, answers: Sequence[Written]) -> schemas.Usage:
        """The tokens that were read and written."""
        written = sum(answer.tokens for answer in answers)
        return schemas.Usage(
            prompt_tokens=self._prompt_tokens, completion_tokens=written, total_tokens=self._prompt_tokens + written
        )

    def part(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An event of a stream."""
        head = {"id": self.id, "object": self.chunk, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "system_fingerprint": None, **more}


@final
class ChatForm(Form):
    """Answers to a conversation."""

    mark = "chatcmpl"
    chunk = "chat.completion.chunk"

    def whole(self, answers: Sequence[Written]) -> BaseModel:
        choices = [
            schemas.ChatChoice(
                index=index, message=schemas.Answered(content=answer.text), finish_reason=_reason(answer)
            )
            for index, answer in enumerate(answers)
        ]
        return schemas.ChatCompletion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage(answers)
        )

    def begin(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, {"role": "assistant", "content": ""}, None)

    def more(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, {"content": text}, None)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._choice(index, {}, reason)

    def _choice(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


@final
class TextForm(Form):
    """Ways in which texts go on."""

    mark = "cmpl"
    chunk = "text_completion"

    def whole(self, answers: Sequence[Written]) -> BaseModel:
        choices = [
            schemas.TextChoice(index=index, text=answer.text, finish_reason=_reason(answer))
            for index, answer in enumerate(answers)
        ]
        return schemas.Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage(answers)
        )

    def begin(self, index: int) -> dict[str, Any] | None:
        return None

    def more(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


def _reason(answer: Written) -> Any:
    assert answer.finish is not None
    return REASONS[answer.finish]


@dataclass(frozen=True)
class Pace:
    """How long a stream waits.

    Attributes:
        quiet: seconds after which a stream that has nothing to say says that it is alive, for what stands between.
        stall: seconds that a client may take to read what it was sent.
    """

    quiet: float = 15.0
    stall: float = 30.0


@final
class Stream(Response):
    """Answers as events, each sent when it is there.

    Args:
        exchange: where they come from.
        form: how they are written.
        count: how many answers there are.
        begun: what has been taken of the exchange already.
        usage: whether the tokens are told at the end.
        problem: what the client is told of an answer that is none.
        pace: how long it waits.
    """

    def __init__(
        self,
        exchange: Exchange,
        form: Form,
        *,
        count: int,
        begun: Sequence[Mapping[int, Piece]],
        usage: bool,
        problem: Callable[[Piece], Problem],
        pace: Pace,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # nginx would hold the events back
        self._exchange, self._form, self._begun = exchange, form, begun
        self._answers = [Written() for _ in range(count)]
        self._more: dict[str, Any] = {"usage": None} if usage else {}
        self._problem = problem
        self._pace = pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events, or stops when nobody reads."""
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, watch}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._exchange.cancel()
            for task in (sending, watch):
                task.cancel()
            await asyncio.gather(sending, watch, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await asyncio.wait_for(send(message), self._pace.stall)

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            opening = [choice for index in range(len(self._answers)) if (choice := self._form.begin(index))]
            if opening:
                await write(self._events(opening))
            for pieces in self._begun:
                await write(self._told(pieces))
            while self._exchange.open:
                await write(await self._next())
            await write(self._last(), more=False)
        except asyncio.TimeoutError:
            return  # the client does not read; the connection is closed, since the answer is not whole
        except Problem as problem:
            with suppress(asyncio.TimeoutError):
                await write(event(problem.body), more=False)

    async def _next(self) -> bytes:
        """The events of what comes next, or a word of life."""
        try:
            return self._told(await asyncio.wait_for(self._exchange.take(), self._pace.quiet))
        except asyncio.TimeoutError:
            return b": waiting\n\n"

    def _told(self, pieces: Mapping[int, Piece]) -> bytes:
        choices: list[dict[str, Any]] = []
        for index, piece in pieces.items():
            self._answers[index].add(piece)
            if piece.text:
                choices.append(self._form.more(index, piece.text))
            if piece.finish is not None:
                if piece.finish not in REASONS:
                    raise self._problem(piece)
                choices.append(self._form.end(index, REASONS[piece.finish]))
        return self._events(choices)

    def _events(self, choices: Sequence[dict[str, Any]]) -> bytes:
        return b"".join(event(self._form.part([choice], **self._more)) for choice in choices)

    def _last(self) -> bytes:
        usage = event(self._form.part([], usage=self._form.usage(self._answers).model_dump())) if self._more else b""
        return usage + b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """An event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
