"""The server's routes: OpenAI's interface over one engine, vLLM's words for adapters that come and go, and a page.

Nothing here computes. Prompts are written in a few threads, answers by the engine on its own, and the event loop only
passes on. A request ends when its answer has ended or its client has gone, whichever comes first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lorafit.errors import DataError, LorafitError, StateError, nearest
from lorafit.serve import problems, schemas
from lorafit.serve.answers import REASONS, ChatForm, Form, Pace, Stream, TextForm, Written
from lorafit.serve.exchange import Exchange, GoneError, unless_gone
from lorafit.serve.gate import Gate, Note, note_of, read_body
from lorafit.serve.loading import Loading
from lorafit.serve.metrics import Metrics
from lorafit.serve.names import Folders
from lorafit.serve.openapi import Described
from lorafit.serve.page import page
from lorafit.serve.problems import Problem
from lorafit.serve.requests import Asked, Finish, Piece, Sampling
from lorafit.serve.templates import Voice, Voices
from lorafit.training.examples import Turn

if TYPE_CHECKING:
    from lorafit.serve.bank import AdapterBank
    from lorafit.serve.engine import Engine

LOG = logging.getLogger("lorafit.serve")
WRITERS = 4
"""So many prompts are written at a time."""
SYSTEM = "developer"
MOST_COMPARED = 200
LONGEST_COMPARED = 64

T = TypeVar("T")
B = TypeVar("B", bound=schemas.Body)


@dataclass(frozen=True)
class Options:
    """How the server answers.

    Attributes:
        base: what the base model is called.
        key: what clients have to bring; None lets everybody in.
        load: whether clients may load and unload adapters.
        hosts: the names by which the server may be called; none lets every name pass.
        body: bytes of the largest body.
        body_seconds: how long a body may take to come.
        seconds: the engine's time limit of a request, to be told where it was passed.
        pace: how long a stream waits.
    """

    base: str
    key: str | None = field(default=None, repr=False)
    load: bool = False
    hosts: tuple[str, ...] = ()
    body: int = 2**20
    body_seconds: float = 30.0
    seconds: float | None = None
    pace: Pace = field(default_factory=Pace)


def application(engine: Engine, bank: AdapterBank, voices: Voices, folders: Folders, options: Options) -> FastAPI:
    """The server, ready for uvicorn. It stops the engine when it ends; whoever makes it starts the engine."""
    return Service(engine, bank, voices, folders, options).application()


@final
class Service:
    """The routes and what they share.

    Args:
        engine: who answers.
        bank: which adapters there are.
        voices: how prompts are written.
        folders: where adapters may come from.
        options: how it answers.
    """

    def __init__(self, engine: Engine, bank: AdapterBank, voices: Voices, folders: Folders, options: Options) -> None:
        self._engine, self._bank, self._voices = engine, bank, voices
        self._options = options
        self._started = int(time.time())
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="lorafit-prompts")
        self._metrics = Metrics(lambda: engine.stats().running, lambda: engine.stats().waiting)
        self._loading = Loading(engine, bank, voices, folders, allowed=options.load)
        self._page = page()

    def application(self) -> FastAPI:
        """The application with all routes."""
        app = Described(
            title="lorafit serve",
            lifespan=self._lifespan,
            docs_url=None,  # they load scripts from elsewhere
            redoc_url=None,
            redirect_slashes=False,
            exception_handlers={
                Problem: _problem,
                LorafitError: _lorafit_error,
                HTTPException: _http_error,
                RequestValidationError: _http_error,
            },
        )
        app.keyed = self._options.key is not None
        routes: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
            ("GET", "/", self.front),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model:path}", self.model),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/load_lora_adapter", self.load),
            ("POST", "/v1/unload_lora_adapter", self.unload),
        )
        for method, path, answer in routes:
            app.add_route(path, answer, methods=[method])
        app.add_middleware(Gate, metrics=self._metrics, key=self._options.key, hosts=self._options.hosts)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        loop = asyncio.get_running_loop()
        # Connections have had their time by now: what still runs has nobody to read it.
        await loop.run_in_executor(None, lambda: self._engine.stop(wait=1.0))
        self._writers.shutdown(wait=False, cancel_futures=True)

    # Models

    async def front(self, request: Request) -> Response:
        """The page."""
        return Response(self._page.html, media_type="text/html", headers=self._page.headers)

    async def health(self, request: Request) -> Response:
        """Whether the server answers, and its engine takes requests."""
        self._engine.call(lambda: None)  # refused where the engine has ended
        return _json(schemas.Health())

    async def metrics(self, request: Request) -> Response:
        """The numbers for Prometheus."""
        await self._loading.measure(self._metrics)
        return Response(self._metrics.text(), headers={"content-type": self._metrics.content_type})

    async def models(self, request: Request) -> Response:
        """The base and all adapters."""
        cards = [self._card(self._options.base), *map(self._card, self._bank.names())]
        return _json(schemas.ModelList(data=cards))

    async def model(self, request: Request) -> Response:
        """One model."""
        name = str(request.path_params["model"])
        self._adapter(name, note_of(request))
        return _json(self._card(name))

    def _card(self, name: str) -> schemas.ModelCard:
        base = self._options.base
        return schemas.ModelCard(
            id=name,
            created=self._started,
            parent=None if name == base else base,
            max_model_len=self._engine.context,
        )

    def _adapter(self, name: str, note: Note) -> str | None:
        """The adapter that a model's name means, None for the base."""
        base = self._options.base
        if name != base and not self._bank.known(name):
            # Likeness takes time, and names come from strangers.
            others = (base, *self._bank.names())[:MOST_COMPARED]
            raise problems.no_model(name, nearest(name, others) if len(name) <= LONGEST_COMPARED else ())
        note.model = name
        return None if name == base else name

    # Answers

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        body = await self._body(request, schemas.ChatCompletionRequest)
        adapter = self._adapter(body.model, note_of(request))
        turns = [Turn(_role(message.role), message.text()) for message in body.messages]
        voice, prompts = await self._written(adapter, [lambda voice: voice.prompt(turns)])
        asked = self._asked(adapter, voice, prompts, body, body.length())
        return await self._answer(request, body, asked, ChatForm(body.model, sum(map(len, prompts))))

    async def completions(self, request: Request) -> Response:
        """How a text goes on."""
        body = await self._body(request, schemas.CompletionRequest)
        adapter = self._adapter(body.model, note_of(request))
        given = body.prompts()
        if len(given) * (body.n or 1) > schemas.MOST_PROMPTS:
            message = f"more than {schemas.MOST_PROMPTS} answers in one request: fewer prompts, or a smaller n"
            raise Problem(400, message, param="n")
        voice, prompts = await self._written(adapter, [_reader(prompt) for prompt in given])
        asked = self._asked(adapter, voice, prompts, body, body.length())
        return await self._answer(request, body, asked, TextForm(body.model, sum(map(len, prompts))))

    async def _written(
        self, adapter: str | None, readers: Sequence[Callable[[Voice], list[int]]]
    ) -> tuple[Voice, list[list[int]]]:
        """The voice of a model, and the tokens of its prompts."""

        def work() -> tuple[Voice, list[list[int]]]:
            voice = self._voices.of(adapter)
            return voice, [read(voice) for read in readers]

        return await asyncio.get_running_loop().run_in_executor(self._writers, work)

    def _asked(
        self,
        adapter: str | None,
        voice: Voice,
        prompts: Sequence[Sequence[int]],
        body: schemas.Asking,
        length: int | None,
    ) -> list[Asked]:
        """What the engine is asked: each prompt as often as answers are wanted, with a seed of its own each."""
        made = []
        for ids in prompts:
            if len(ids) >= self._engine.context:
                raise problems.too_long(len(ids), self._engine.context)
            for number in range(body.n or 1):
                sampling = Sampling(
                    max_tokens=length or self._engine.context,
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=None if body.seed is None else body.seed + number,
                    stop=body.stops(),
                )
                made.append(Asked(adapter, tuple(ids), sampling, voice.tokenizer, voice.ends))
        return made

    async def _answer(self, request: Request, body: schemas.Asking, asked: Sequence[Asked], form: Form) -> Response:
        note = note_of(request)
        exchange = self._exchange(asked, body.model)
        handed = False
        try:
            if not body.stream:
                answers = await unless_gone(request.receive, self._collect(exchange, len(asked), note))
                return _json(form.whole(answers))
            begun = await unless_gone(request.receive, self._begun(exchange, note))
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            handed = True
            return Stream(
                exchange,
                form,
                count=len(asked),
                begun=begun,
                usage=usage,
                problem=lambda piece: self._failed(piece, note),
                pace=self._options.pace,
            )
        except GoneError:
            return Response(status_code=note.status)
        finally:
            if not handed:
                exchange.cancel()

    def _exchange(self, asked: Sequence[Asked], model: str) -> Exchange:
        try:
            return Exchange(self._engine, asked, [self._metrics.meter(model, one) for one in asked])
        except (DataError, StateError):
            adapter = asked[0].adapter
            if adapter is not None and not self._bank.known(adapter):  # unloaded since the request came
                raise problems.no_model(model, ()) from None
            raise

    async def _collect(self, exchange: Exchange, count: int, note: Note) -> list[Written]:
        answers = [Written() for _ in range(count)]
        while exchange.open:
            for index, piece in (await exchange.take()).items():
                self._check(piece, note)
                answers[index].add(piece)
        return answers

    async def _begun(self, exchange: Exchange, note: Note) -> list[dict[int, Piece]]:
        """The first pieces of a stream, if they come soon: what fails at once still gets a status of its own."""
        try:
            pieces = await asyncio.wait_for(exchange.take(), self._options.pace.quiet)
        except asyncio.TimeoutError:
            return []
        for piece in pieces.values():
            self._check(piece, note)
        return [pieces]

    def _check(self, piece: Piece, note: Note) -> None:
        """Raises `Problem` for a last piece that ends no answer."""
        if piece.finish is not None and piece.finish not in REASONS:
            raise self._failed(piece, note)

    def _failed(self, piece: Piece, note: Note) -> Problem:
        if piece.finish is Finish.TIMEOUT:
            return problems.timed_out(self._options.seconds)
        if piece.finish is Finish.CANCELLED:
            return problems.stopping()
        if note.model not in (self._options.base, *self._bank.names()):  # unloaded while the request waited
            return problems.no_model(note.model, ())
        LOG.error("%s failed: %s", note.number, piece.error)
        return problems.broken(note.number)

    # Adapters

    async def load(self, request: Request) -> Response:
        """Serves another adapter from now on."""
        body = await self._body(request, schemas.LoadRequest)
        return PlainTextResponse(await self._loading.load(body, note_of(request)))

    async def unload(self, request: Request) -> Response:
        """Serves an adapter no more."""
        body = await self._body(request, schemas.UnloadRequest)
        return PlainTextResponse(await self._loading.unload(body))

    async def _body(self, request: Request, kind: type[B]) -> B:
        data = await read_body(request, self._options.body, self._options.body_seconds)
        try:
            return kind.model_validate(from_json(data))
        except ValidationError as error:
            raise problems.of_validation(error) from None
        except ValueError as error:
            raise Problem(400, f"the body is no JSON: {error}") from None


def _role(role: str) -> str:
    return "system" if role == SYSTEM else role


def _reader(prompt: str | list[int]) -> Callable[[Voice], list[int]]:
    def read(voice: Voice) -> list[int]:
        return voice.text(prompt) if isinstance(prompt, str) else voice.ids(prompt)

    return read


def _json(value: BaseModel) -> JSONResponse:
    return JSONResponse(value.model_dump())


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _lorafit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LorafitError)
    note = note_of(request)
    problem = problems.of_error(error, note.number)
    if problem.status >= 500:
        LOG.error("%s failed: %s", note.number, error, exc_info=error)
    return problem.response()


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return Problem(400, "the request cannot be read").response()
    return Problem(error.status_code, str(error.detail), headers=error.headers).response()
