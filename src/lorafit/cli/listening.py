"""Where `lorafit serve` listens, who may call it, and how it runs until it is stopped."""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.cli.exits import usage
from lorafit.errors import ConfigError, MissingExtraError, some

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lorafit.cli.screen import Screen
    from lorafit.serve.engine import Engine

VARIABLE = "LORAFIT_API_KEY"
LOCAL = "localhost"
OWN = (LOCAL, "127.0.0.1", "::1")
"""The names of this machine for itself."""
GRACE = 30
"""Seconds that running answers have when the server stops."""
IDLE = 30
"""Seconds that a connection may be silent between two requests."""
HEADERS = 32 * 1024
"""Bytes of all headers of a request."""


@dataclass(frozen=True)
class Place:
    """Where the server listens, and who may call it.

    Attributes:
        host: the address, or a name of it.
        port: 0 is any that is free.
        key: what clients have to bring; None lets everybody in.
        hosts: the names by which it may be called; none lets every name pass.
    """

    host: str
    port: int
    key: str | None = field(repr=False)
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A server that could begin.

    Attributes:
        engine: not started yet.
        app: the application.
        place: where it is to listen.
        base: what the base is called.
        names: the adapters.
        connections: how many it may have.
    """

    engine: Engine
    app: FastAPI
    place: Place
    base: str
    names: tuple[str, ...]
    connections: int


def packages() -> None:
    """Raises `MissingExtraError` where a package is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"serving needs the package {error.name!r}, which is not installed", fix="pip install 'lorafit[serve]'"
        ) from error


def read_key(path: Path | None) -> str | None:
    """The key in a file, or in the environment; None where there is neither.

    Raises:
        ConfigError: the file cannot be read, or what it holds is no key.
    """
    source = f"the variable {VARIABLE}" if path is None else str(path)
    try:
        text = os.environ.get(VARIABLE) if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the file of the API key cannot be read", where=source, found=error) from error
    if text is None:
        return None
    key = text.strip()
    # What it is, is not said: errors end in logs.
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "there is no API key in it",
            where=source,
            found="nothing" if not key else "several words or lines, or characters that headers cannot hold",
            expected="one word of ASCII characters",
            fix="openssl rand -hex 24 writes one" + ("" if path is not None else f"; or unset {VARIABLE}"),
        )
    return key


def where(host: str, port: int, hosts: Sequence[str], key: str | None) -> Place:
    """Where to listen, and by which names to be called. Raises wrong usage for an open door to the network."""
    if _loopback(host):
        return Place(host, port, key, tuple(dict.fromkeys((*OWN, host, *hosts))))
    if key is None:
        with usage():
            raise ConfigError(
                "other machines can reach this address, and without a key they may all use the model",
                where="--host",
                found=host,
                expected="an API key, or an address of this machine alone",
                fix=f"--api-key-file FILE, or the variable {VARIABLE}, or --host 127.0.0.1",
            )
    return Place(host, port, key, tuple(dict.fromkeys((*OWN, host, *hosts))) if hosts else ())


def _loopback(host: str) -> bool:
    try:
        return host == LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(place: Place) -> socket.socket:
    """A socket that has the address; it does not listen yet.

    Raises:
        ConfigError: the address is taken, or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would share the address with whoever has it
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            "the server cannot listen there",
            where=f"--host {place.host} --port {place.port}",
            found=error.strerror,
            fix="--port 0 takes a port that is free",
        ) from error
    return bound


def run(prepared: Prepared, bound: socket.socket, screen: Screen, *, log: bool) -> None:
    """Serves until the user stops it."""
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it listens, once it does."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _announce(prepared, bound, screen)

    _log(every=log)
    config = uvicorn.Config(
        prepared.app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who calls is never asked
        h11_max_incomplete_event_size=HEADERS,
        limit_concurrency=prepared.connections,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=GRACE,
    )
    prepared.engine.start()
    try:
        # uvicorn raises the signal again that ended it; nothing at all where Ctrl-C is ignored, as in a script's
        # background.
        with suppress(KeyboardInterrupt):
            Server(config).run(sockets=[bound])
    finally:
        prepared.engine.stop(wait=0.0)
    screen.say("stopped")


def _log(*, every: bool) -> None:
    """Has the server's log written to stderr: what failed, or every request."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("lorafit.serve", logging.INFO if every else logging.WARNING), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _announce(prepared: Prepared, bound: socket.socket, screen: Screen) -> None:
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else {"0.0.0.0": LOCAL}.get(host, host)
    address = f"http://{shown}:{port}"
    screen.say(f"listening: {address}  (Ctrl-C stops)", whole=True)
    more = f"; adapters: {some(prepared.names, 8)}" if prepared.names else "; no adapters"
    screen.say(f"base: {prepared.base}{more}", whole=True)
    body = {"model": (*prepared.names, prepared.base)[0], "messages": [{"role": "user", "content": "Hello"}]}
    words = ["curl", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json"]
    line = f"{shlex.join(words)} -d {shlex.quote(json.dumps(body))}"
    if prepared.place.key is not None:
        line += f' -H "Authorization: Bearer ${VARIABLE}"'
    screen.say(line, whole=True)
