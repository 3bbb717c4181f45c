"""What is asked of the engine, and what it answers: values that other threads and other modules exchange with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeAlias

from lorafit.errors import ConfigError, LorafitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLDEST = 1e-5
"""A temperature below this is 0: divided by it, logits leave the range of their type."""
SEEDS = range(-(2**63), 2**64)
"""What `torch.Generator.manual_seed` takes."""


class BusyError(LorafitError):
    """As many requests wait as may."""


class Finish(Enum):
    """Why an answer ends."""

    STOP = "stop"
    """The model wrote a token that ends an answer, or a stop string."""
    LENGTH = "length"
    """As many tokens as were asked for, or as the context holds."""
    CANCELLED = "cancelled"
    """Its ticket was cancelled, or the engine was stopped."""
    TIMEOUT = "timeout"
    """It took longer than a request may."""
    FAILED = "failed"
    """Something broke; `Piece.error` says what."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when an answer is long enough.

    Attributes:
        max_tokens: the longest answer. The context may end it earlier.
        temperature: 0 takes the most probable token each time.
        top_p: only the most probable tokens that together have this probability are drawn from.
        seed: the same seed gives the same draws, whatever else the engine does; None takes a fresh one.
        stop: texts that end the answer and are no part of it.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number from 0 up")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, and at most 1")
        _check("seed", self.seed, self.seed is None or self.seed in SEEDS, "a whole number of 64 bits")
        _check("stop", self.stop, all(self.stop), "texts that are not empty")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken each time."""
        return self.temperature < COLDEST


def _check(field: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(f"{field} has a value it cannot have", where=field, found=repr(value), expected=expected)


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        adapter: whose answer it is; None is the base model's.
        ids: the prompt's tokens.
        sampling: how the answer is drawn.
        tokenizer: makes text of its tokens.
        ends: tokens that end an answer.
    """

    adapter: str | None
    ids: tuple[int, ...]
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """What a request is told. Each accepted one is told exactly one last piece, that with a `finish`.

    Attributes:
        text: what is new of the answer; may be empty. All of them together are the answer.
        tokens: how many the model has written for it by now, that which ended it included.
        finish: why the answer ends here; None while it goes on.
        error: what broke, for `Finish.FAILED`.
    """

    text: str
    tokens: int
    finish: Finish | None
    error: str | None = None


Notify: TypeAlias = Callable[[Piece], None]
"""Told of each piece on the engine's thread, so it must not block. One that raises has its request cancelled."""


class Adapters(Protocol):
    """What the engine needs of a bank of adapters; all but `known` is called on its thread alone."""

    def known(self, name: str) -> bool:
        """Whether there is an adapter of this name."""

    def take(self, name: str | None) -> None:
        """A request of this adapter begins: makes it ready. Raises `LorafitError` where that fails."""

    def drop(self, name: str | None) -> None:
        """A request of this adapter has ended."""

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Within it, row i of what passes through the model has the adapter names[i]."""
