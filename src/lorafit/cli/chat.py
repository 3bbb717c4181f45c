"""`lorafit chat`: talk with an adapter, and with its base model beside it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.adapters import Loaded
    from lorafit.cli.screen import Screen
    from lorafit.training.examples import Turn

BASE, ADAPTER = "base", "adapter"
HELP = "/base, /adapter, /both: who answers    /reset: forget the conversation    /quit: leave"
NARROW = 60
"""Columns of a terminal below which two panels do not fit beside each other."""


def chat(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Answer this and leave.", rich_help_panel=options.ANSWERS),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system text.", rich_help_panel=options.ANSWERS)
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, help="0 takes the most probable token each time.", rich_help_panel=options.ANSWERS
        ),
    ] = 0.0,
    max_new_tokens: options.MaxNewTokens = 128,
    seed: Annotated[int, typer.Option("--seed", help="For a temperature.", rich_help_panel=options.ANSWERS)] = 42,
    model: options.BaseModel = None,
    dtype: options.Dtype = None,
    quantise: options.RunQuantise = None,
    debug: options.Debug = False,
) -> None:
    """Talk with an adapter, its base model beside it.

    Each side has its own conversation. Ctrl-C stops an answer; at the prompt it leaves.
    """
    from lorafit.cli.adapters import ANY, CAUSAL, check_dtype, check_quantise, describe, load, storage_of
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.errors import ConfigError

    with usage():
        check_dtype(dtype)
        check_quantise(quantise)
    screen = Screen()
    quiet()
    described = describe(adapter, model, ANY, screen.say)
    if described.task_type != CAUSAL:
        raise ConfigError(
            f"this adapter is a {'classifier' if described.scale is None else 'regression'}: it does not talk",
            where=adapter,
            expected="the adapter of a language model",
            fix=f"lorafit eval {adapter}",
        )
    loaded = load(described, dtype, storage_of(adapter, quantise, screen.say), screen.say)
    conversation = Conversation(loaded, system, temperature, max_new_tokens or 128, seed)
    if prompt is not None:
        _answer(conversation, prompt, screen)
        return
    _talk(conversation, screen)


@dataclass
class Side:
    """One of the two who answer, and what it remembers."""

    name: str
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """Who said what, and why it does not end by itself, if it does not."""

    name: str
    text: str
    note: str


@final
class Conversation:
    """Both sides of a chat.

    Args:
        loaded: the model with the adapter on it.
        system: the first turn of each conversation, if any.
        temperature: 0 is greedy.
        length: tokens of the longest answer.
        seed: makes answers at a temperature reproducible.
    """

    def __init__(self, loaded: Loaded, system: str | None, temperature: float, length: int, seed: int) -> None:
        import torch

        self._loaded = loaded
        self._system = system
        self._temperature = temperature
        self._length = length
        self.remembers = loaded.tokenizer.chat_template is not None
        self.sides = [Side(BASE), Side(ADAPTER)]
        self.answering: tuple[str, ...] = (BASE, ADAPTER)
        torch.manual_seed(seed)

    def reset(self) -> None:
        """Forgets what was said."""
        for side in self.sides:
            side.turns.clear()

    def ask(self, text: str, stopped: Callable[[], bool]) -> Iterator[Answer]:
        """What each side that answers says.

        Raises:
            DataError: the chat template refuses the conversation, or it has grown too long for the model.
        """
        from lorafit.training.examples import Turn

        for side in self.sides:
            if side.name not in self.answering or stopped():
                continue
            asked = [*(side.turns if self.remembers else ()), Turn("user", text)]
            answer = self._reply(side, asked, stopped)
            side.turns = [*asked, Turn("assistant", answer.text)]
            yield answer

    def _reply(self, side: Side, turns: list[Turn], stopped: Callable[[], bool]) -> Answer:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), stopped(), device=input_ids.device)

        loaded = self._loaded
        assert loaded.handle is not None
        ids = torch.tensor([self._ids(turns)], device=next(loaded.model.parameters()).device)
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        greedy = {} if self._temperature else {"temperature": None, "top_p": None, "top_k": None}
        with torch.no_grad(), loaded.handle.disabled() if side.name == BASE else nullcontext():
            made = loaded.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._length,
                pad_token_id=loaded.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([Stop()]),
                **sampling,
                **greedy,
            )
        written = made[0, ids.shape[1] :]
        text: str = loaded.tokenizer.decode(written, skip_special_tokens=True)
        ends = loaded.model.generation_config.eos_token_id
        ended = int(written[-1]) in (ends if isinstance(ends, list) else [ends])
        note = "stopped" if stopped() else "" if ended else f"cut at {self._length} tokens"
        return Answer(side.name, text.strip(), note)

    def _ids(self, turns: list[Turn]) -> list[int]:
        """The tokens of the question, exactly as training writes them."""
        from lorafit.errors import DataError
        from lorafit.training.encode import Encoder
        from lorafit.training.examples import Conversation as Written
        from lorafit.training.examples import Turn

        first = [] if self._system is None else [Turn("system", self._system)]
        whole = Written((*first, *turns, Turn("assistant", "")), "the conversation")
        ids = Encoder(self._loaded.tokenizer, 2).sample(whole).input_ids
        limit = self._loaded.model.config.max_position_embeddings
        if len(ids) + self._length > limit:
            raise DataError(
                "the conversation has grown too long for the model",
                found=f"{len(ids)} tokens, and {self._length} for the answer",
                expected=f"at most {limit} together",
                fix="/reset, or a smaller --max-new-tokens",
            )
        return ids


def _talk(conversation: Conversation, screen: Screen) -> None:
    from lorafit.errors import DataError

    with suppress(ImportError):
        import readline  # noqa: F401  (gives the prompt its history and its arrow keys)
    screen.say(HELP, style="dim")
    if not conversation.remembers:
        screen.say("the tokenizer has no chat template: every question stands alone")
    while True:
        try:
            text = screen.console.input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            screen.say()
            return
        if text.startswith("/"):
            if text in ("/quit", "/exit"):
                return
            _obey(conversation, text, screen)
        elif text:
            try:
                _answer(conversation, text, screen)
            except DataError as error:
                screen.say(str(error))


def _obey(conversation: Conversation, text: str, screen: Screen) -> None:
    answering: dict[str, tuple[str, ...]] = {"/base": (BASE,), "/adapter": (ADAPTER,), "/both": (BASE, ADAPTER)}
    if text == "/reset":
        conversation.reset()
        screen.say("forgotten", style="dim")
    elif text in answering:
        conversation.answering = answering[text]
        screen.say(f"answering: {' and '.join(conversation.answering)}", style="dim")
    else:
        screen.say(HELP, style="dim")


def _answer(conversation: Conversation, text: str, screen: Screen) -> None:
    """Shows the answers: panels beside each other on a terminal that is wide enough, else one after the other."""
    beside = screen.fancy and screen.console.width >= NARROW and len(conversation.answering) > 1
    given: list[Answer] = []
    with _interruptible() as stopped:
        waiting = screen.console.status("thinking ...") if screen.fancy else nullcontext()
        with waiting:
            for answer in conversation.ask(text, stopped):
                given.append(answer)
                if not beside:
                    note = f" ({answer.note})" if answer.note else ""
                    screen.say(Text.assemble((f"{answer.name}: ", "bold"), answer.text, (note, "dim")))
    if beside and given:
        grid = Table.grid(expand=True)
        for _ in given:
            grid.add_column(ratio=1)
        panels = (
            Panel(
                Text(answer.text),
                title=answer.name,
                subtitle=answer.note or None,
                border_style="green" if answer.name == ADAPTER else "dim",
            )
            for answer in given
        )
        grid.add_row(*panels)
        screen.console.print(grid)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C is noted instead of raised; yields whether it has come."""
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
