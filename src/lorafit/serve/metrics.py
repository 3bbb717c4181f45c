"""What the server counts and measures, in Prometheus' words.

Label values come from a closed set: the routes of this server, the models that are served, and the statuses of HTTP. A
model that is not served counts as `other`, so that nobody can fill the memory with names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lorafit.serve.requests import Asked, Finish, Piece

OTHER = "other"
MOST_MODELS = 1000
"""So many models have numbers of their own; what is loaded after them counts as `other`."""
FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@final
class Metrics:
    """The server's numbers, in a registry of their own.

    Args:
        running: how many requests are being answered.
        waiting: how many wait.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "lorafit_requests", "Requests that were answered.", ["model", "route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "lorafit_request_seconds", "From a request to its answer's end.", ["route"], registry=registry,
            buckets=REQUEST_BUCKETS,
        )  # fmt: skip
        self._prompt = Counter("lorafit_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._written = Counter("lorafit_generated_tokens", "Tokens of answers.", ["model"], registry=registry)
        self._finished = Counter("lorafit_answers", "Answers by their end.", ["model", "finish"], registry=registry)
        self._first = Histogram(
            "lorafit_first_token_seconds", "From asking the engine to the first token.", registry=registry,
            buckets=FIRST_BUCKETS,
        )  # fmt: skip
        self._next = Histogram(
            "lorafit_next_token_seconds", "From one token of an answer to the next.", registry=registry,
            buckets=TOKEN_BUCKETS,
        )  # fmt: skip
        Gauge("lorafit_requests_running", "Being answered.", registry=registry).set_function(running)
        Gauge("lorafit_requests_waiting", "In the queue.", registry=registry).set_function(waiting)
        self._adapters = Gauge("lorafit_adapters", "Adapters that are served.", registry=registry)
        self._resident = Gauge("lorafit_adapters_resident", "Adapters in memory.", registry=registry)
        self._models: set[str] = set()
        self._lock = threading.Lock()
        self._bytes = Gauge("lorafit_adapters_bytes", "Memory that they take.", registry=registry)

    def answered(self, model: str, route: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        self._requests.labels(self._label(model), route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def meter(self, model: str, asked: Asked) -> Meter:
        """Follows one answer from now on."""
        return Meter(self, model, len(asked.ids))

    def first_token(self, seconds: float) -> None:
        """A first token has come."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Another token has come."""
        self._next.observe(seconds)

    def finished(self, model: str, prompt: int, written: int, finish: Finish) -> None:
        """An answer has ended."""
        label = self._label(model)
        self._prompt.labels(label).inc(prompt)
        self._written.labels(label).inc(written)
        self._finished.labels(label, finish.value).inc()

    def bank(self, served: int, resident: int, size: int) -> None:
        """How many adapters there are, how many of them are in memory, and their bytes."""
        self._adapters.set(served)
        self._resident.set(resident)
        self._bytes.set(size)

    def _label(self, model: str) -> str:
        with self._lock:
            if model not in self._models:
                if len(self._models) >= MOST_MODELS:
                    return OTHER
                self._models.add(model)
        return model

    def text(self) -> bytes:
        """All numbers, as Prometheus reads them."""
        return generate_latest(self._registry)


@final
class Meter:
    """Measures one answer. `piece` is called on the engine's thread, for one piece after the other.

    Args:
        metrics: where the numbers go.
        model: whose answer it is.
        prompt: the tokens of its prompt.
    """

    def __init__(self, metrics: Metrics, model: str, prompt: int) -> None:
        self._metrics = metrics
        self._model = model
        self._prompt = prompt
        self._tokens = 0
        self._last = time.monotonic()

    def piece(self, piece: Piece) -> None:
        """Counts a piece of the answer."""
        now, new = time.monotonic(), piece.tokens - self._tokens
        if new > 0:
            if self._tokens == 0:
                self._metrics.first_token(now - self._last)
            else:
                for _ in range(min(new, 16)):  # so many as came together
                    self._metrics.next_token((now - self._last) / new)
            self._tokens, self._last = piece.tokens, now
        if piece.finish is not None:
            self._metrics.finished(self._model, self._prompt, piece.tokens, piece.finish)
