"""Answers over HTTP: whole and as they come, their ends, and clients that go away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.serve.answers import Pace
from lorafit.serve.requests import Asked
from tests.serve.http_fixtures import (
    BASE,
    CHAT,
    HELLO,
    TEXT,
    Said,
    Script,
    Start,
    ask,
    client,
    error,
    events,
    starter,
    until,
)


@pytest.fixture
def start(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Start]:
    with starter(tiny[1], adapters) as start:
        yield start


# Models ------------------------------------------------------------------------


def test_models(start: Start) -> None:
    server = start()
    with client(server) as to:
        cards = to.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == [BASE, "dora", "lora", "small", "vera"]
        assert {card["parent"] for card in cards[1:]} == {BASE} and cards[0]["parent"] is None
        assert {card["max_model_len"] for card in cards} == {Script.context}
        assert to.get("/v1/models/lora").json() == cards[2]
        told = error(to.get("/v1/models/lara"), 404)
    assert told["code"] == "model_not_found" and "lora" in told["message"]


def test_health_ends_with_the_engine(start: Start) -> None:
    server = start()
    with client(server) as to:
        assert to.get("/health").json() == {"status": "ok"}
        server.engine.stop()
        error(to.get("/health"), 503)


# Whole answers -----------------------------------------------------------------


@pytest.mark.parametrize("model", [BASE, "lora"])
def test_a_conversation(start: Start, model: str) -> None:
    server = start()
    answer = ask(server, model=model, temperature=0, seed=7, stop=["x", "yy"], max_tokens=9, top_p=0.5)
    assert answer.status_code == 200
    body = answer.json()
    message = {"role": "assistant", "content": f"I am {model}.", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["model"] == model and body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    [asked] = server.engine.asked
    assert asked.adapter == (None if model == BASE else model)
    tokens = len(asked.ids)
    assert body["usage"] == {"prompt_tokens": tokens, "completion_tokens": 4, "total_tokens": tokens + 4}
    wanted = asked.sampling
    assert (wanted.temperature, wanted.seed, wanted.stop, wanted.max_tokens, wanted.top_p) == (
        0,
        7,
        ("x", "yy"),
        9,
        0.5,
    )
    assert server.voices.of(None).tokenizer.decode(asked.ids) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked.ends == server.voices.of(None).ends


def test_parts_and_developers(start: Start) -> None:
    server = start()
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    said = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": "short"}, *HELLO, said, {"role": "user", "content": parts}]
    assert ask(server, messages=messages).status_code == 200
    text = server.voices.of(None).tokenizer.decode(server.engine.asked[0].ids)
    assert "<|im_start|>system\nshort<|im_end|>" in text and text.count("user\nHello<|im_end|>") == 2


def test_defaults_are_openais(start: Start) -> None:
    server = start()
    assert ask(server).status_code == 200 and ask(server, TEXT).status_code == 200
    chat, text = (asked.sampling for asked in server.engine.asked)
    assert (chat.temperature, chat.top_p, chat.seed, chat.stop) == (1.0, 1.0, None, ())
    assert chat.max_tokens == Script.context, "as many as the context holds"
    assert text.max_tokens == 16


def test_the_length(start: Start) -> None:
    server = start()
    choice = ask(server, max_completion_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == f"I am {BASE}"
    assert ask(server, max_tokens=2, max_completion_tokens=2).status_code == 200
    assert "differ" in error(ask(server, max_tokens=2, max_completion_tokens=3), 400)["message"]


def test_several_answers_have_seeds_of_their_own(start: Start) -> None:
    server = start(Script(lambda asked: [str(asked.sampling.seed)]))
    body = ask(server, n=3, seed=5).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["5", "6", "7"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens"] == len(server.engine.asked[0].ids), "it was read once for all"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([65, 66], ["bc"]), ([[65], [66, 67]], ["b", "cd"])],
)
def test_prompts_of_every_kind(start: Start, tiny: tuple[Any, Any], prompt: Any, texts: list[str]) -> None:
    letters = tiny[1]
    if isinstance(prompt[0], int):
        prompt, texts = letters("bc")["input_ids"], ["bc"]
    elif isinstance(prompt[0], list):
        prompt = [letters(text)["input_ids"] for text in texts]
    server = start(Script(lambda asked: [letters.decode(asked.ids)]))
    body = ask(server, TEXT, prompt=prompt).json()
    assert [choice["text"] for choice in body["choices"]] == texts
    assert body["object"] == "text_completion" and body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_several_ways_for_several_texts(start: Start) -> None:
    server = start(Script(lambda asked: [f"{len(asked.ids)} {asked.sampling.seed}"]))
    body = ask(server, TEXT, prompt=["a", "bc"], n=2, seed=1).json()
    assert [choice["text"] for choice in body["choices"]] == ["1 1", "1 2", "2 1", "2 2"]
    assert error(ask(server, TEXT, prompt=["a"] * 5, n=8), 400)["param"] == "n"


# Streams -----------------------------------------------------------------------


def test_a_stream_of_a_conversation(start: Start) -> None:
    answer = ask(start(), model="lora", stream=True)
    told = events(answer)
    assert {one["object"] for one in told} == {"chat.completion.chunk"} and len({one["id"] for one in told}) == 1
    choices = [one["choices"][0] for one in told]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "I am lora."
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all("usage" not in one for one in told)


def test_a_stream_tells_its_usage_if_asked(start: Start) -> None:
    told = events(ask(start(), stream=True, stream_options={"include_usage": True}))
    assert all(one["usage"] is None for one in told[:-1])
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] == 4


def test_a_stream_of_texts(start: Start) -> None:
    told = events(ask(start(), TEXT, prompt=["a", "b"], stream=True))
    texts = ["", ""]
    for one in told:
        for choice in one["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [f"I am {BASE}."] * 2
    assert sorted(c["index"] for one in told for c in one["choices"] if c["finish_reason"]) == [0, 1]


def test_pieces_come_when_they_are_written(start: Start) -> None:
    go = [threading.Event() for _ in range(3)]

    def says(asked: Asked) -> Said:
        for number, event in enumerate(go):
            assert event.wait(10)
            yield f"<{number}>"

    server = start(Script(says))
    body = {"model": BASE, "messages": HELLO, "stream": True}
    with client(server) as to:
        go[0].set()
        with to.stream("POST", CHAT, json=body) as answer:
            parts = answer.iter_text()
            seen = ""
            for number in range(3):
                while f"<{number}>" not in seen:
                    seen += next(parts)
                assert f"<{number + 1}>" not in seen
                if number < 2:
                    go[number + 1].set()


def test_what_a_slow_reader_missed_comes_together(start: Start) -> None:
    """Pieces are joined while nobody takes them: memory is that of the text, and events are few."""
    count = 20_000
    server = start(Script(lambda asked: ("word " for _ in range(count))), pace=Pace(stall=20))
    Script.context, before = 10**6, Script.context
    try:
        with (
            client(server) as to,
            to.stream("POST", CHAT, json={"model": BASE, "messages": HELLO, "stream": True}) as a,
        ):
            time.sleep(0.5)
            text = a.read().decode()
    finally:
        Script.context = before
    told = [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in told) == "word " * count
    assert len(told) < count / 2


def test_a_reader_that_stops_reading_is_given_up(start: Start) -> None:
    """Its request is cancelled, and the connection closed."""

    def says(asked: Asked) -> Said:
        while True:
            time.sleep(0.001)
            yield "x" * 100_000

    server = start(Script(says), pace=Pace(stall=0.3))
    Script.context, before = 10**9, Script.context
    try:
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
            body = json.dumps({"model": BASE, "messages": HELLO, "stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: server.engine.tickets)
            until(lambda: server.engine.tickets[0].cancelled.is_set())
    finally:
        Script.context = before


def test_a_stream_that_waits_says_that_it_lives(start: Start) -> None:
    def says(asked: Asked) -> Said:
        time.sleep(0.5)
        yield "at last"

    answer = ask(start(Script(says), pace=Pace(quiet=0.1)), stream=True)
    assert answer.text.count(": waiting\n\n") >= 2
    assert "at last" in answer.text


# Who goes away -----------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_who_goes_away_is_answered_no_more(start: Start, stream: bool, begun: bool) -> None:
    over = threading.Event()

    def says(asked: Asked) -> Said:
        if begun:
            yield "a"
        while not over.wait(0.01):
            if begun:
                yield "a"

    server = start(Script(says))
    body = json.dumps({"model": BASE, "messages": HELLO, "stream": stream, "n": 2}).encode()
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(server.engine.tickets) == 2)
        if stream and begun:
            assert raw.recv(10)
    until(lambda: all(ticket.cancelled.is_set() for ticket in server.engine.tickets))
    over.set()
    with client(server) as to:
        until(
            lambda: 'status="499"' in to.get("/metrics").text or (stream and 'status="200"' in to.get("/metrics").text)
        )


def test_answers_that_are_complete_are_not_cancelled_by_a_new_request(start: Start) -> None:
    server = start()
    with client(server) as to:
        for _ in range(3):  # on one connection
            assert to.post(CHAT, json={"model": BASE, "messages": HELLO}).status_code == 200
            assert events(to.post(CHAT, json={"model": BASE, "messages": HELLO, "stream": True}))
