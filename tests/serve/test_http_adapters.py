"""Adapters that come and go over HTTP, and what the metrics tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.http_fixtures import (
    BASE,
    CHAT,
    Start,
    ask,
    client,
    error,
    starter,
)


@pytest.fixture
def start(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Start]:
    with starter(tiny[1], adapters) as start:
        yield start


def test_loading_and_unloading_in_vllms_words(start: Start, adapters: Path) -> None:
    server = start(load=True, served=("lora",))
    with client(server) as to:
        said = to.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "dora"})
        assert said.status_code == 200 and said.headers["content-type"].startswith("text/plain")
        assert said.text == "Success: LoRA adapter 'mine' added successfully."
        assert server.bank.folders["mine"] == adapters / "dora"
        assert ask(server, model="mine").json()["choices"][0]["message"]["content"] == "I am mine."
        again = to.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": str(adapters / "vera")})
        assert "has already been loaded" in error(again, 400)["message"]
        assert again.json()["error"]["type"] == "InvalidUserInput"
        gone = to.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert gone.text == "Success: LoRA adapter 'mine' removed successfully."
        error(ask(server, model="mine"), 404)
        told = error(to.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}), 404)
        assert told["message"] == "The lora adapter 'mine' cannot be found." and told["type"] == "NotFoundError"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"lora_name": "", "lora_path": "dora"}, 400, "InvalidUserInput"),
        ({"lora_name": "mine", "lora_path": ""}, 400, "InvalidUserInput"),
        ({"lora_name": "a b", "lora_path": "dora"}, 400, "InvalidUserInput"),
        ({"lora_name": BASE, "lora_path": "dora"}, 400, "InvalidUserInput"),
        ({"lora_name": "mine", "lora_path": "nothing"}, 404, "NotFoundError"),
        ({"lora_name": "mine", "lora_path": "/etc"}, 404, "NotFoundError"),
        ({"lora_name": "mine", "lora_path": "../../.."}, 404, "NotFoundError"),
        ({"lora_name": "mine"}, 400, "invalid_request_error"),
    ],
)
def test_what_is_not_loaded(start: Start, body: dict[str, str], status: int, kind: str) -> None:
    server = start(load=True, served=())
    with client(server) as to:
        assert error(to.post("/v1/load_lora_adapter", json=body), status)["type"] == kind
    assert server.bank.names() == []


def test_an_adapter_that_cannot_be_read_leaves_nothing(start: Start) -> None:
    server = start(load=True, served=())
    server.bank.broken.add("mine")
    with client(server) as to:
        answer = to.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "dora"})
        told = error(answer, 400)
        assert told["type"] == "BadRequestError" and "damaged" in told["message"] and "/home" not in answer.text
        assert server.bank.names() == []
        server.bank.broken.clear()
        assert to.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "dora"}).status_code == 200


def test_an_adapter_in_use_stays(start: Start) -> None:
    server = start(load=True)
    server.bank.used.add("lora")
    with client(server) as to:
        error(to.post("/v1/unload_lora_adapter", json={"lora_name": "lora"}), 409)
    assert ask(server, model="lora").status_code == 200


def test_loading_has_to_be_allowed(start: Start) -> None:
    server = start()
    with client(server) as to:
        for path, body in (("load", {"lora_name": "x", "lora_path": "dora"}), ("unload", {"lora_name": "lora"})):
            assert "--allow-load" in error(to.post(f"/v1/{path}_lora_adapter", json=body), 403)["message"]
    assert "lora" in server.bank.names()


# Metrics -----------------------------------------------------------------------


def test_metrics(start: Start) -> None:
    server = start()
    assert ask(server, model="lora").status_code == 200
    assert ask(server, stream=True).status_code == 200
    for n in range(5):
        error(ask(server, model=f"nobody-{n}"), 404)
    with client(server) as to:
        to.get("/nothing/at/all")
        answer = to.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    tokens = len(server.engine.asked[0].ids)
    for line in (
        f'lorafit_requests_total{{model="lora",route="{CHAT}",status="200"}} 1.0',
        f'lorafit_requests_total{{model="{BASE}",route="{CHAT}",status="200"}} 1.0',
        f'lorafit_requests_total{{model="other",route="{CHAT}",status="404"}} 5.0',
        'lorafit_requests_total{model="other",route="other",status="404"} 1.0',
        f'lorafit_prompt_tokens_total{{model="lora"}} {float(tokens)}',
        'lorafit_generated_tokens_total{model="lora"} 4.0',
        'lorafit_answers_total{finish="stop",model="lora"} 1.0',
        "lorafit_first_token_seconds_count 2.0",
        "lorafit_next_token_seconds_count 6.0",
        "lorafit_adapters_resident 4.0",
        "lorafit_adapters_bytes 4000.0",
        "lorafit_requests_waiting 0.0",
    ):
        assert line in lines, line
    assert "nobody" not in answer.text, "names of strangers are no labels"
    assert "nothing/at" not in answer.text
