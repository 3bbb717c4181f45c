"""What goes wrong over HTTP: the status, OpenAI's shape, and nothing of the machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import StateError
from lorafit.serve.requests import Asked, Finish, Piece
from tests.serve.http_fixtures import (
    CHAT,
    HELLO,
    TEXT,
    Said,
    Script,
    Start,
    ask,
    client,
    error,
    starter,
    until,
)


@pytest.fixture
def start(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Start]:
    with starter(tiny[1], adapters) as start:
        yield start


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("last", "status"),
    [
        (Piece("", 0, Finish.FAILED, "out of memory at /home/me"), 500),
        (Piece("", 0, Finish.TIMEOUT), 504),
        (Piece("", 0, Finish.CANCELLED), 503),
    ],
)
def test_answers_that_fail_at_once(start: Start, last: Piece, status: int, stream: bool) -> None:
    server = start(Script(lambda asked: [last]), seconds=3.0)
    answer = ask(server, stream=stream)
    told = error(answer, status)
    assert "/home/me" not in answer.text
    if status == 500:
        assert answer.headers["x-request-id"] in told["message"]
    if status == 504:
        assert "3 s" in told["message"] and answer.headers["x-should-retry"] == "false"


def test_answers_that_fail_on_the_way(start: Start) -> None:
    def says(asked: Asked) -> Said:
        yield "one "
        time.sleep(0.3)
        yield Piece("", 1, Finish.FAILED, "out of memory at /home/me")

    server = start(Script(says))
    answer = ask(server, stream=True)
    assert answer.status_code == 200 and "/home/me" not in answer.text and "[DONE]" not in answer.text
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    error(ask(server), 500)


def test_a_full_queue(start: Start) -> None:
    server = start()
    server.engine.full = True
    answer = ask(server)
    assert error(answer, 429)["code"] == "rate_limit_exceeded" and answer.headers["retry-after"] == "1"
    error(ask(server, stream=True), 429)


def test_of_several_answers_all_or_none(start: Start) -> None:
    class Small(Script):
        def submit(self, asked: Any, notify: Any) -> Any:
            self.full = len(self.asked) == 2
            return super().submit(asked, notify)

    server = start(Small(lambda asked: ("a" for _ in iter(lambda: time.sleep(0.01), 1))))
    error(ask(server, n=3), 429)
    until(lambda: all(ticket.cancelled.is_set() for ticket in server.engine.tickets))
    assert len(server.engine.tickets) == 2


def test_an_engine_that_has_ended(start: Start) -> None:
    server = start()
    server.engine.stop()
    assert error(ask(server), 503)["code"] == "stopping"


def test_an_adapter_that_goes_while_it_is_asked(start: Start) -> None:
    class Gone(Script):
        def submit(self, asked: Any, notify: Any) -> Any:
            server.bank.folders.pop("lora")
            raise StateError("there is no such adapter")

    server = start(Gone())
    assert error(ask(server, model="lora"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
def test_an_adapter_that_goes_while_its_request_waits(start: Start, stream: bool) -> None:
    def says(asked: Asked) -> Said:
        server.bank.folders.pop("lora", None)
        yield Piece("", 0, Finish.FAILED, "no adapter of this name is registered")

    server = start(Script(says))
    assert error(ask(server, model="lora", stream=stream), 404)["code"] == "model_not_found"


def test_prompts_that_are_too_long(start: Start) -> None:
    told = error(ask(start(), TEXT, prompt="x" * 600), 400)
    assert told["code"] == "context_length_exceeded" and "600" in told["message"]


def test_prompts_that_cannot_be_written(start: Start, tiny: tuple[Any, Any]) -> None:
    server = start()
    assert "user" in error(ask(server, messages=[{"role": "system", "content": "x"}]), 400)["message"]
    assert "empty" in error(ask(server, TEXT, prompt=""), 400)["message"]
    assert "does not know" in error(ask(server, TEXT, prompt=[len(tiny[1])]), 400)["message"]
    server.voices.of(None).tokenizer.chat_template, before = None, server.voices.of(None).tokenizer.chat_template
    try:
        two = [*HELLO, {"role": "assistant", "content": "a"}, *HELLO]
        assert error(ask(server, messages=two), 400)["code"] == "no_chat_template"
    finally:
        server.voices.of(None).tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"logprobs": True}, "logprobs", ""),
        ({"tools": [{"type": "function"}]}, "tools", ""),
        ({"response_format": {"type": "json_object"}}, "response_format", ""),
        ({"frequency_penalty": 0.5}, "frequency_penalty", ""),
        ({"logit_bias": {"1": 2}}, "logit_bias", ""),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": 3}, "temperature", ""),
        ({"temperature": True}, "temperature", ""),
        ({"n": 9}, "n", ""),
        ({"n": 1.5}, "n", ""),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"top_p": 0}, "top_p", ""),
        ({"seed": 2**63}, "seed", ""),
        ({"stop": [""]}, "stop", ""),
        ({"stop": ["a"] * 5}, "stop", ""),
        ({"messages": []}, "messages", ""),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", ""),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0]", "'name' is not served here"),
        ({"stream_options": {"include_usage": True}}, None, "stream"),
        ({"model": 3}, "model", ""),
        ({"model": None}, "model", ""),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    start: Start, more: dict[str, Any], param: str | None, words: str
) -> None:
    told = error(ask(start(), **more), 400)
    assert words in told["message"]
    if words.startswith(("did you mean", "'name'")):
        assert told["code"] == "unknown_field"
    if param is not None:
        assert param.split("[")[0] in str(told["param"] or told["message"])


def test_what_says_nothing_of_the_answer_is_let_be(start: Start) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "parallel_tool_calls": True,
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "modalities": ["text"],
        "stop": None,
        "stream": False,
    }
    assert ask(start(), **harmless).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"a":NaN}', b'"\\ud800"', b"\xff", b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}"],
    ids=lambda body: body[:10].decode("latin1"),
)
def test_what_is_no_request(start: Start, body: bytes) -> None:
    server = start()
    with client(server) as to:
        error(to.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


def test_hostile_bodies_cost_little(start: Start) -> None:
    """A body within the limit makes one complaint, however many it could make."""
    server = start()
    bodies = [
        b'{"messages":[' + b"0," * 400_000 + b"0]}",
        b"{" + b",".join(b'"%d":0' % n for n in range(80_000)) + b"}",
        b'{"prompt":[' + b"[]," * 300_000 + b"[]]}",
    ]
    with client(server) as to:
        for body in bodies:
            for path in (CHAT, TEXT):
                began = time.monotonic()
                told = to.post(path, content=body, headers={"content-type": "application/json"})
                assert error(told, 400) and len(told.content) < 2000
                assert time.monotonic() - began < 5


def test_routes_that_are_none(start: Start) -> None:
    server = start()
    with client(server) as to:
        error(to.get("/nothing"), 404)
        error(to.get("/docs"), 404)
        answer = to.get(CHAT)
        error(answer, 405)
        assert answer.headers["allow"] == "POST"
