"""How much an engine does at once, and what it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.errors import ConfigError
from lorafit.serve.requests import Finish


@dataclass(frozen=True)
class Limits:
    """How much an engine does at once.

    Attributes:
        rows: answers written at once.
        waiting: requests in the queue.
        context: tokens of prompt and answer; None is what the model has.
        cached: tokens whose keys and values are kept, all rows as long as the longest; room to grow comes on top.
        chunk: a prompt's tokens that are read in one step, between two tokens of those who are answered already.
        seconds: how long a request may take, waiting included; None for as long as it likes.

    Raises:
        ConfigError: a value is out of its range.
    """

    rows: int = 32
    waiting: int = 128
    context: int | None = None
    cached: int = 65536
    chunk: int = 512
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {"rows": self.rows, "waiting": self.waiting, "cached": self.cached, "chunk": self.chunk}
        least = {**given, "context": 2 if self.context is None else self.context - 1}
        bad = next((name for name, value in least.items() if value < 1), None)
        if bad is None and self.seconds is not None and not self.seconds > 0:
            bad = "seconds"
        if bad is not None:
            expected = "2 or more" if bad == "context" else "more than 0"
            raise ConfigError(f"{bad} has a value it cannot have", where=bad, found=vars(self)[bad], expected=expected)


@dataclass(frozen=True)
class Stats:
    """What an engine does now, and has done since it was made.

    Attributes:
        running: requests whose prompt is read or whose answer is written.
        waiting: requests in the queue.
        tokens_generated: of all answers, by now.
        prompt_tokens: of all prompts that were begun.
        steps: forward passes that wrote tokens of running answers.
        prompt_steps: forward passes that read prompts.
        set_aside: how often an answer was set aside for want of cache, to be taken up again.
        columns: of the running answers' cache; times the rows, what counts against `Limits.cached`.
        cache_bytes: what that cache takes, with its room to grow.
        finished: requests that have ended, by why.
    """

    running: int
    waiting: int
    tokens_generated: int
    prompt_tokens: int
    steps: int
    prompt_steps: int
    set_aside: int
    columns: int
    cache_bytes: int
    finished: Mapping[Finish, int]
