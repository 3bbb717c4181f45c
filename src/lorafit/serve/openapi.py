"""The description of the interface at /openapi.json: what is accepted, and each answer by its status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import lorafit
from lorafit.serve import schemas

REF = "#/components/schemas/{model}"
REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.ChatCompletionRequest,
    schemas.CompletionRequest,
    schemas.LoadRequest,
    schemas.UnloadRequest,
)
ANSWERS: tuple[type[BaseModel], ...] = (
    schemas.ChatCompletion,
    schemas.Completion,
    schemas.ModelCard,
    schemas.ModelList,
    schemas.Health,
)
Mode: TypeAlias = Literal["validation", "serialization"]
MODES: tuple[tuple[tuple[type[BaseModel], ...], Mode], ...] = (
    (REQUESTS, "validation"),
    ((*ANSWERS, schemas.ErrorAnswer), "serialization"),
)
STATUSES: Mapping[int, str] = {
    400: "The request is not one that is served; the message names the field.",
    401: "The API key is missing or wrong.",
    403: "Not allowed: a page of another site, or loading where it was not switched on.",
    404: "There is no such model.",
    405: "The route has no such method.",
    408: "The body came too slowly.",
    409: "The adapter is in use, or there is no room for another one.",
    413: "The body is too large.",
    415: "The body is no JSON by its type.",
    431: "Address and headers are too large.",
    429: "As many requests wait as may.",
    500: "The server failed.",
    503: "The server is stopping.",
    504: "The answer took longer than the time limit.",
}
ALL = (400, 403, 405, 431, 500)
BODY = (408, 413, 415)
ENGINE = (404, 429, 503, 504)


class Described(FastAPI):
    """An application with a description that is written by hand: routes read their bodies themselves.

    Attributes:
        keyed: whether clients have to bring a key.
    """

    keyed: bool = False

    def openapi(self) -> dict[str, Any]:
        """The description."""
        if not self.openapi_schema:
            self.openapi_schema = document(self.title, self.keyed)
        return self.openapi_schema


def document(title: str, keyed: bool) -> dict[str, Any]:
    """The whole description.

    Args:
        title: of the interface.
        keyed: whether clients have to bring a key.
    """
    kinds: list[tuple[type[BaseModel], Mode]] = []
    for models, mode in MODES:
        kinds += [(model, mode) for model in models]
    _, definitions = models_json_schema(kinds, ref_template=REF)
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": lorafit.__version__,
            "description": "A base model and many adapters, behind OpenAI's interface.",
        },
        "paths": _paths(keyed),
        "components": components,
    }


def _paths(keyed: bool) -> dict[str, Any]:
    def get(name: str, summary: str, answer: Mapping[str, Any], more: Iterable[int] = (), key: bool = keyed) -> Any:
        return {"get": _operation(name, summary, answer, (*ALL, *more), key)}

    def post(name: str, summary: str, kind: type[BaseModel], answer: Mapping[str, Any], more: Iterable[int]) -> Any:
        operation = _operation(name, summary, answer, (*ALL, *BODY, *more), keyed)
        operation["requestBody"] = {"required": True, "content": _content(kind)}
        return {"post": operation}

    one = get("model", "One model.", _content(schemas.ModelCard), (404,))
    one["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    html, plain = _text("text/html"), _text("text/plain")
    events: dict[str, Any] = {"text/event-stream": {}}  # 3.1 has no words for the schema of an event
    return {
        "/": get("page", "A page to try the models on.", html, key=False),
        "/health": get("health", "Whether the server answers.", _content(schemas.Health), (503,), key=False),
        "/metrics": get("metrics", "Numbers for Prometheus.", plain),
        "/v1/models": get("models", "The base and all adapters.", _content(schemas.ModelList)),
        "/v1/models/{model}": one,
        "/v1/chat/completions": post(
            "chat",
            "An answer to a conversation; with stream: true as events.",
            schemas.ChatCompletionRequest,
            {**_content(schemas.ChatCompletion), **events},
            ENGINE,
        ),
        "/v1/completions": post(
            "completions",
            "How a text goes on; with stream: true as events.",
            schemas.CompletionRequest,
            {**_content(schemas.Completion), **events},
            ENGINE,
        ),
        "/v1/load_lora_adapter": post(
            "load", "Serve another adapter from now on.", schemas.LoadRequest, plain, (404, 409, 503)
        ),
        "/v1/unload_lora_adapter": post(
            "unload", "Serve an adapter no more.", schemas.UnloadRequest, plain, (404, 409, 503)
        ),
    }


def _operation(
    name: str, summary: str, answer: Mapping[str, Any], statuses: Iterable[int], keyed: bool
) -> dict[str, Any]:
    error = _content(schemas.ErrorAnswer)
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": dict(answer)}}
    for status in sorted({*statuses, *((401,) if keyed else ())}):
        responses[str(status)] = {"description": STATUSES[status], "content": error}
        if status in (429, 503):
            seconds = {"description": "Seconds until it is worth trying again.", "schema": {"type": "string"}}
            responses[str(status)]["headers"] = {"retry-after": seconds}
    made: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    return {**made, "security": [{"key": []}]} if keyed else made


def _content(kind: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=kind.__name__)}}}


def _text(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string"}}}
