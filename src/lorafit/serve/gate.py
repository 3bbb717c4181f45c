"""What every request passes before anything else: whose host it names, whose key it brings, and how much it sends.

    a page on another site    has no way in: the host it names is not this one's (DNS rebinding), the answer may not be
                              read there (no CORS), and what it may send without asking (a form) is not taken
    a client without the key  gets 401, whatever it asks for; comparing takes the same time for every wrong key
    a body that is too large  gets 413 while it is read, chunked or not

Plain ASGI: streams pass through unbuffered, and a client that goes away is seen at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.serve.metrics import OTHER, Metrics
from lorafit.serve.problems import Problem, broken, too_large

LOG = logging.getLogger("lorafit.serve")
OPEN = frozenset({"/", "/health", "/openapi.json"})
"""What is answered without a key: nothing of it tells anything of the models or of who uses them."""
ROUTES = frozenset(
    {
        *OPEN,
        "/metrics",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
ONE_MODEL = "/v1/models/"
NOTE = "lorafit.note"
SECURITY: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?")
HEAD = 32 * 1024
DRAINED = 4
"""A body is read on to so many times the limit, for the client to see the answer; then the connection is closed."""


@dataclass
class Note:
    """What is noted of a request while it is answered, for the log and the metrics.

    Attributes:
        number: by which client and log name the request.
        model: which was asked, if it is served.
        status: of the answer; 499 where the client went away before.
    """

    number: str = field(default_factory=lambda: f"req-{secrets.token_hex(8)}")
    model: str = OTHER
    status: int = 499


def note_of(request: Request) -> Note:
    """The note of a request."""
    note = request.scope[NOTE]
    assert isinstance(note, Note)
    return note


@final
class Gate:
    """The outermost part of the server.

    Args:
        app: what answers.
        metrics: where requests are counted.
        key: what clients have to bring; None lets everybody in.
        hosts: the names by which the server may be called; none lets every name pass.
        head: bytes of the address and the headers of a request.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, key: str | None, hosts: Sequence[str], head: int = HEAD
    ) -> None:
        self._head = head
        self._app = app
        self._metrics = metrics
        self._key = None if key is None else _digest(key)
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what may not pass, and lets all else in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note, began, started = Note(), time.monotonic(), False
        scope[NOTE] = note

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                note.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in (*SECURITY.items(), ("x-request-id", note.number)):
                    headers.setdefault(name, value)
            await send(message)

        try:
            problem = self._refused(scope, Headers(scope=scope))
            if problem is None:
                await self._app(scope, receive, marked)
            else:
                await problem.response()(scope, receive, marked)
        except Exception:
            LOG.exception("%s failed", note.number)
            if started:
                raise  # the connection is closed: the answer is not whole
            await broken(note.number).response()(scope, receive, marked)
        finally:
            seconds, route = time.monotonic() - began, route_of(scope["path"])
            self._metrics.answered(note.model, route, note.status, seconds)
            LOG.info("%s %s %s %s %d %.3f s", note.number, scope["method"], route, note.model, note.status, seconds)

    def _refused(self, scope: Scope, headers: Headers) -> Problem | None:
        # uvicorn's own limit is for what comes in parts: a head that comes at once passes it.
        if sum(map(len, chain.from_iterable(headers.raw)), len(scope["path"])) > self._head:
            return Problem(431, f"address and headers are larger than {self._head:,} bytes", code="headers_too_large")
        if self._hosts and host_of(headers.get("host", "")) not in self._hosts:
            return Problem(400, "the server does not go by the name in the Host header", code="unknown_host")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and scope["path"] != "/":
            return Problem(403, "pages of other sites may not use this server", code="cross_site")
        if self._key is not None and scope["path"] not in OPEN and not self._holds_key(headers):
            return Problem(
                401,
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return None

    def _holds_key(self, headers: Headers) -> bool:
        assert self._key is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests have one length, so that the time tells nothing of the key's.
        return hmac.compare_digest(_digest(given.strip()), self._key) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def host_of(header: str) -> str:
    """The name in a Host header, without the port; empty for what is none.

    >>> host_of("LocalHost:8000"), host_of("[::1]:8000"), host_of("a b:c")
    ('localhost', '::1', '')
    """
    found = _HOST.fullmatch(header)
    return "" if found is None else (found["six"] or found["name"]).lower()


def route_of(path: str) -> str:
    """The route of a path, for labels: one of a few.

    >>> route_of("/v1/models/x/y"), route_of("/../etc/passwd")
    ('/v1/models/{model}', 'other')
    """
    if path in ROUTES:
        return path
    return f"{ONE_MODEL}{{model}}" if path.startswith(ONE_MODEL) else OTHER


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The JSON body of a request, read no further than it may be large.

    Raises:
        Problem: it is no JSON by its type, too large, or comes too slowly.
    """
    headers = request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(
            415,
            f"the body has to be JSON: send 'Content-Type: application/json', not '{kind[:100]}'",
            code="unsupported_media_type",
        )
    declared = headers.get("content-length", "")
    size = int(declared[:20]) if declared.isascii() and declared.isdigit() else 0
    # A client that waits for leave to send gets the answer instead of the leave.
    if size > DRAINED * limit or (size > limit and "expect" in headers):
        raise too_large(limit, close=True)
    try:
        return await asyncio.wait_for(_received(request.receive, limit), seconds)
    except asyncio.TimeoutError:
        message = f"the body did not come within {seconds:g} s"
        raise Problem(408, message, code="request_timeout", headers={"connection": "close"}) from None


async def _received(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "the client went away while it sent", headers={"connection": "close"})
        body = message.get("body", b"")
        size += len(body)
        if size <= limit:
            parts.append(body)
        else:
            parts.clear()
        more = message.get("more_body", False)
        if size > DRAINED * limit:
            raise too_large(limit, close=True)
        if not more:
            if size > limit:
                raise too_large(limit)
            return b"".join(parts)
