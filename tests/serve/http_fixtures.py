"""A server on a free port, in front of an engine that says what a test wants it to say."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from lorafit.errors import CheckpointError, ConfigError, DataError, StateError
from lorafit.serve.http import Options, application
from lorafit.serve.names import Folders
from lorafit.serve.requests import Asked, BusyError, Finish, Notify, Piece
from lorafit.serve.templates import Voices

BASE = "the-base"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
Said = Iterable[str | Piece]


@dataclass
class Counted:
    """What the server asks an engine about itself."""

    running: int = 0
    waiting: int = 0


@dataclass
class Ticket:
    """Of a request to a scripted engine."""

    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


def greeting(asked: Asked) -> Said:
    """Who was asked, in three pieces."""
    yield from ("I am ", asked.adapter or BASE, ".")


class Script:
    """Stands in for an engine. `says` gives, for a request, texts and at the end perhaps a whole last piece.

    Attributes:
        asked: all requests so far.
        tickets: theirs.
        full: whether there is room for another one.
    """

    context = 512

    def __init__(self, says: Callable[[Asked], Said] = greeting) -> None:
        self.says = says
        self.asked: list[Asked] = []
        self.tickets: list[Ticket] = []
        self.full = self.stopped = False

    def submit(self, asked: Asked, notify: Notify) -> Ticket:
        if self.stopped:
            raise StateError("the engine takes no requests any more")
        if self.full:
            raise BusyError("too many requests are waiting")
        if len(asked.ids) >= self.context:
            raise DataError("the prompt is too long")
        ticket = Ticket()
        self.asked.append(asked)
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(asked, notify, ticket), daemon=True).start()
        return ticket

    def _answer(self, asked: Asked, notify: Notify, ticket: Ticket) -> None:
        tokens = 0
        for part in self.says(asked):
            if ticket.cancelled.is_set():
                notify(Piece("", tokens, Finish.CANCELLED))
                return
            if isinstance(part, Piece):
                notify(part)
                return
            tokens += 1
            if tokens == asked.sampling.max_tokens:
                notify(Piece(part, tokens, Finish.LENGTH))
                return
            notify(Piece(part, tokens, None))
        notify(Piece("", tokens + 1, Finish.STOP))

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        if self.stopped:
            raise StateError("the engine takes no requests any more")
        future: Future[Any] = Future()
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        return future

    def stats(self) -> Counted:
        return Counted(running=sum(not ticket.cancelled.is_set() for ticket in self.tickets))

    def stop(self, *, wait: float = 30.0) -> None:
        self.stopped = True


class Shelf:
    """Stands in for a bank of adapters."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.used: set[str] = set()
        self.broken: set[str] = set()

    def names(self) -> list[str]:
        return list(self.folders)

    def known(self, name: str) -> bool:
        return name in self.folders

    def register(self, name: str, folder: Path, *, pinned: bool = False) -> None:
        if name in self.folders:
            raise ConfigError("an adapter of this name is here already")
        self.folders[name] = folder

    def forget(self, name: str) -> None:
        if name in self.used:
            raise StateError(f"adapter {name!r} is in use", found="1 requests")
        del self.folders[name]

    def take(self, name: str | None) -> None:
        if name in self.broken:
            raise CheckpointError("the file of weights is damaged or cut short", found="/home/me/secret: bad header")

    def drop(self, name: str | None) -> None:
        pass

    def resident(self) -> list[str]:
        return self.names()

    def used_bytes(self) -> int:
        return 1000 * len(self.folders)


@dataclass
class Server:
    """A server that runs, and what is behind it."""

    url: str
    app: Any
    engine: Any
    bank: Any
    folders: Folders
    voices: Voices


Start = Callable[..., Server]


def until(fact: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Has uvicorn serve an application on a free port; gives its address."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def starter(tokenizer: Any, adapters: Path) -> Iterator[Start]:
    """Gives what starts servers, each with all adapters of the folder; they are stopped at the end."""
    with ExitStack() as stack:

        def start(engine: Any = None, bank: Any = None, served: Iterable[str] | None = None, **options: Any) -> Server:
            engine, bank = engine or Script(), bank or Shelf()
            folders = Folders([adapters], base=BASE)
            for name, folder in folders.found().items():
                if served is None or name in served:
                    bank.register(name, folder)
                    folders.keep(name, folder)
            voices = Voices(tokenizer, folders, ends=(), vocabulary=len(tokenizer))
            app = application(engine, bank, voices, folders, Options(base=BASE, **options))
            return Server(stack.enter_context(listening(app)), app, engine, bank, folders, voices)

        yield start


def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=20, trust_env=False)


def ask(server: Server, path: str = CHAT, **body: Any) -> httpx.Response:
    body.setdefault("model", BASE)
    body.setdefault("messages" if path == CHAT else "prompt", HELLO if path == CHAT else "Hello")
    with client(server) as to:
        return to.post(path, json=body)


def events(answer: httpx.Response) -> list[Any]:
    """The events of a stream, which has to end as OpenAI's do."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = [part for part in answer.text.split("\n\n") if part and not part.startswith(":")]
    assert all(part.startswith("data: ") for part in parts) and parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])
