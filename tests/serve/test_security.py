"""Who is let in, what is taken from whom, and what nobody is told."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorafit.serve.gate import Gate, host_of
from lorafit.serve.http import Options
from tests.serve.http_fixtures import BASE, Script, Server, Start, starter, until

CHAT = "/v1/chat/completions"
ASKED = {"model": BASE, "messages": [{"role": "user", "content": "Hello"}]}
KEY = "sk-a-key-of-a-test"
OPEN = ("/", "/health", "/openapi.json")
LOCKED = ("/v1/models", "/v1/models/lora", "/metrics", "/nothing")
LOCAL = ("localhost", "127.0.0.1", "::1")


@pytest.fixture
def start(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Start]:
    with starter(tiny[1], adapters) as start:
        yield start


def client(server: Server, **settings: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=20, trust_env=False, **settings)


def raw(server: Server, head: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request was sent as it stands."""
    made = socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20)
    made.sendall(head.replace("\n", "\r\n").encode("latin1") + body)
    return made


def answer(connection: socket.socket) -> str:
    """All that comes until the connection ends."""
    parts = []
    with connection:
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
    return b"".join(parts).decode("latin1")


# The key -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer ü"],
)
def test_without_the_key(start: Start, given: str | None) -> None:
    server = start(key=KEY)
    headers = {} if given is None else {"authorization": given.encode()}
    with client(server, headers=headers) as to:
        for path in LOCKED:
            told = to.get(path)
            assert told.status_code == 401 and told.headers["www-authenticate"] == "Bearer", path
            assert told.json()["error"]["code"] == "invalid_api_key"
        assert to.post(CHAT, json=ASKED).status_code == 401
        assert to.post("/v1/load_lora_adapter", json={}).status_code == 401
        for path in OPEN:
            assert to.get(path).status_code == 200, path
    assert server.engine.asked == []


def test_with_the_key(start: Start) -> None:
    server = start(key=KEY)
    for scheme in ("Bearer", "bearer"):
        with client(server, headers={"authorization": f"{scheme} {KEY}"}) as to:
            assert to.get("/v1/models").status_code == to.post(CHAT, json=ASKED).status_code == 200
            assert to.get("/metrics").status_code == 200


def test_what_is_open_tells_nothing(start: Start) -> None:
    server = start(key=KEY)
    with client(server) as to:
        for path in OPEN:
            text = to.get(path).text
            assert BASE not in text and "dora" not in text and KEY not in text, path


def test_the_key_is_shown_nowhere(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = start(key=KEY, load=True)
    with client(server, headers={"authorization": f"Bearer {KEY}"}) as to:
        for path in (*OPEN, *LOCKED):
            assert KEY not in to.get(path).text
        to.post(CHAT, json=ASKED)
        to.post(CHAT, json={**ASKED, "key": KEY})
        to.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y"})
    assert KEY not in caplog.text and "req-" in caplog.text
    assert KEY not in repr(Options(base=BASE, key=KEY))


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared are digests of one length, by the function that is made for it."""
    import hmac

    seen: list[tuple[int, int]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or real(a, b))
    from starlette.datastructures import Headers

    gate = Gate(None, metrics=None, key=KEY, hosts=())  # type: ignore[arg-type]
    assert gate._holds_key(Headers({"authorization": f"Bearer {KEY}"}))
    assert not gate._holds_key(Headers({"authorization": "Bearer x"}))
    assert seen == [(32, 32), (32, 32)]


# Pages of others ---------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "a b"])
def test_a_name_that_is_not_the_servers(start: Start, host: str) -> None:
    server = start(hosts=LOCAL)
    told = answer(raw(server, f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n\n"))
    assert told.startswith("HTTP/1.1 400") and "lora" not in told


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_names_that_are(start: Start, host: str) -> None:
    server = start(hosts=LOCAL)
    told = answer(raw(server, f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n\n"))
    assert told.startswith("HTTP/1.1 200")


def test_names_of_hosts() -> None:
    assert [host_of(text) for text in ("a.b:80", "a.b", "[::1]", "::1", "a:b:c", ":80", "[x")] == [
        *("a.b", "a.b", "::1", "", "", "", ""),
    ]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites(start: Start, site: str) -> None:
    server = start(load=True)
    with client(server, headers={"sec-fetch-site": site, "origin": "https://evil.example"}) as to:
        for told in (to.get("/v1/models"), to.post(CHAT, json=ASKED)):
            assert told.status_code == 403 and "lora" not in told.text
        assert to.get("/").status_code == 200, "a link to the page works"
    with client(server, headers={"sec-fetch-site": "same-origin"}) as to:
        assert to.post(CHAT, json=ASKED).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
def test_what_a_form_can_send_is_not_taken(start: Start, kind: str | None) -> None:
    """Browsers send these to any site without asking it first, whatever page they are on."""
    server = start(load=True)
    body = json.dumps({"lora_name": "mine", "lora_path": "dora"})
    headers = {} if kind is None else {"content-type": kind}
    with client(server) as to:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", CHAT, "/v1/completions"):
            told = to.post(path, content=body, headers=headers)
            assert told.status_code == 415 and "application/json" in told.text
    assert "mine" not in server.bank.names()


def test_no_origin_may_read_the_answers(start: Start) -> None:
    with client(start(), headers={"origin": "https://evil.example"}) as to:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        for told in (to.get("/v1/models"), to.options(CHAT, headers=asked)):
            assert not [name for name in told.headers if name.startswith("access-control")]
        assert to.options(CHAT, headers=asked).status_code == 405


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/metrics", "/openapi.json"])
def test_headers_that_keep_browsers_from_guessing(start: Start, path: str) -> None:
    with client(start()) as to:
        headers = to.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY" and "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers
    assert re.fullmatch("req-[0-9a-f]{16}", headers["x-request-id"])


def test_the_policy_of_the_page(start: Start) -> None:
    with client(start()) as to:
        told = to.get("/")
    policy = dict(part.strip().split(" ", 1) for part in told.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in told.headers["content-security-policy"]
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name])
    assert "innerHTML" not in told.text and "outerHTML" not in told.text and "insertAdjacent" not in told.text
    assert not re.search(r"""(src|href)=["'](?!data:)""", told.text), "it is complete in itself"


# Bodies and connections --------------------------------------------------------


def test_bodies_that_are_too_large(start: Start) -> None:
    server = start(body=1000)
    large = json.dumps({**ASKED, "user": "x" * 1500}).encode()
    headers = {"content-type": "application/json"}
    with client(server, headers=headers) as to:
        told = to.post(CHAT, content=large)
        assert told.status_code == 413 and "1,000 bytes" in told.text
        assert to.post(CHAT, content=iter([large[:500], large[500:]])).status_code == 413, "chunked"
        assert to.post(CHAT, json=ASKED).status_code == 200, "the connection is still good"
    assert len(server.engine.asked) == 1


def test_a_body_without_end_is_not_read_to_its_end(start: Start) -> None:
    server = start(body=1000)
    head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
    connection = raw(server, head)
    sent = 0
    try:
        for _ in range(10_000):
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            sent += 1024
            time.sleep(0.001)
    except OSError:
        pass
    assert sent < 5_000_000
    connection.close()


def test_a_body_that_is_announced_too_large_is_not_waited_for(start: Start) -> None:
    server = start(body=1000)
    head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 999999999\n\n"
    assert answer(raw(server, head)).startswith("HTTP/1.1 413")
    head = head.replace("999999999\n", "2000\nExpect: 100-continue\n")
    assert answer(raw(server, head)).startswith("HTTP/1.1 413"), "and no leave to send it"


def test_a_body_that_does_not_come(start: Start) -> None:
    server = start(body_seconds=0.3)
    head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 100\n\n"
    assert answer(raw(server, head, b'{"model"')).startswith("HTTP/1.1 408")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\nHost: localhost\nX: " + "x" * 40_000 + "\n\n", 431),
        ("GET /" + "x" * 40_000 + " HTTP/1.1\nHost: localhost\n\n", 431),
        ("GET / HTTP/1.1\nHost: localhost\n" + "".join(f"X{n}: y\n" for n in range(6000)) + "\n", 431),
        ("GET / HTTP/1.1\nHost: localhost\nX: " + "x" * 2_000_000, 400),
        ("BOO\n\n", 400),
        ("POST / HTTP/1.1\nHost: localhost\nContent-Length: -1\n\n", 400),
        ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 1\nContent-Length: 2\n\n", 400),
    ],
    ids=["header", "path", "headers", "endless", "words", "length", "lengths"],
)
def test_what_is_no_http(start: Start, head: str, status: int) -> None:
    server = start()
    head = head.replace("Host: localhost\n", "Host: localhost\nConnection: close\n")
    try:
        told = answer(raw(server, head))
    except OSError:  # it hung up on us while we sent
        told = ""
    assert told.startswith(f"HTTP/1.1 {status}") or (not told and len(head) > 10**6)
    with client(server) as to:
        assert to.get("/health").status_code == 200


def test_paths_do_not_lead_anywhere(start: Start) -> None:
    server = start()
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/../../../etc/passwd",
        "/static/x",
        "//x",
    ):
        told = answer(raw(server, f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close\n\n"))
        assert told.startswith("HTTP/1.1 404") and "root:" not in told, path


def test_names_of_models_come_back_as_text(start: Start) -> None:
    with client(start()) as to:
        told = to.get("/v1/models/<script>alert(1)</script>")
    assert told.status_code == 404 and told.headers["content-type"].startswith("application/json")


# What is not foreseen ----------------------------------------------------------


def test_a_bug_is_not_shown(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Script):
        def submit(self, asked: Any, notify: Any) -> Any:
            raise ZeroDivisionError("/home/me/secret.py is broken")

    server = start(Broken())
    with client(server) as to:
        told = to.post(CHAT, json=ASKED)
        assert told.status_code == 500 and told.json()["error"]["type"] == "server_error"
        assert "secret" not in told.text and "Traceback" not in told.text and "Zero" not in told.text
        number = told.headers["x-request-id"]
        assert number in told.text
        assert 'status="500"' in to.get("/metrics").text
    assert number in caplog.text and "secret.py is broken" in caplog.text, "the log says it all"
    assert told.headers["x-content-type-options"] == "nosniff"


def test_many_who_go_away_leave_nothing(start: Start) -> None:
    """Threads, tickets and connections of requests that were given up are gone."""
    over = threading.Event()
    server = start(Script(lambda asked: ("a" for _ in iter(lambda: over.wait(0.01), True))))
    body = json.dumps({**ASKED, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    connections = [raw(server, head, body) for _ in range(30)]
    until(lambda: len(server.engine.tickets) == 30)
    for connection in connections:
        connection.close()
    until(lambda: all(ticket.cancelled.is_set() for ticket in server.engine.tickets))
    over.set()
    with client(server) as to:
        assert to.get("/health").status_code == 200
