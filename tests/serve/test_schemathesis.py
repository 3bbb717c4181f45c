"""The description at /openapi.json against the server: requests of its making get answers of its kinds, and no 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.http_fixtures import BASE, Server, starter

pytest.importorskip("schemathesis")
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = {
    *(("GET", path) for path in ("/", "/health", "/metrics", "/v1/models", "/v1/models/{model}")),
    *(("POST", f"/v1/{name}") for name in ("chat/completions", "completions")),
    *(("POST", f"/v1/{name}_lora_adapter") for name in ("load", "unload")),
}


@pytest.fixture(scope="module")
def server(tiny: tuple[Any, Any], adapters: Path) -> Iterator[Server]:
    with starter(tiny[1], adapters) as start:
        yield start(load=True)


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_dict(server.app.openapi())


def test_every_route_is_described(server: Server) -> None:
    described = {
        (method.upper(), path) for path, methods in server.app.openapi()["paths"].items() for method in methods
    }
    routes = {
        (method, route.path.replace(":path", ""))
        for route in server.app.routes
        for method in route.methods - {"HEAD"}
        if route.path != "/openapi.json"
    }
    assert described == routes == OPERATIONS


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in sorted(OPERATIONS)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if method == "POST" or mode is GenerationMode.POSITIVE  # without a body there is nothing to get wrong
    ],
)
def test_the_server_keeps_to_its_description(
    server: Server, schema: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]
    checks = CHECKS + ([negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and data.draw(st.booleans()):
            if "model" in case.body and isinstance(case.body["model"], str):
                case.body["model"] = BASE  # else no request gets past the name
            if "prompt" in case.body and isinstance(case.body["prompt"], str):
                case.body["prompt"] = case.body["prompt"][:100] or "x"
        case.call_and_validate(base_url=server.url, checks=checks)

    run()
