"""How a conversation becomes text: by the tokenizer's chat template, or plainly.

    Layout
    ├── ChatTemplate   the template that the tokenizer carries
    └── Plain          prompt, newline, completion, end-of-sequence token

A layout renders text and nothing else; `encode.py` finds out which of its tokens are learnt.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from lorafit.errors import DataError
from lorafit.training.examples import Conversation, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Layout(ABC):
    """Renders conversations.

    Attributes:
        description: the layout in a few words, for people.
        head: token ids that go in front of what is rendered, because the text does not hold them.
    """

    description: ClassVar[str]
    head: tuple[int, ...]

    @abstractmethod
    def render(self, chats: Sequence[Sequence[Turn]], wheres: Sequence[str], *, ask: bool) -> list[str]:
        """The text of each chat.

        Args:
            chats: turns.
            wheres: where each chat was read, for errors.
            ask: whether the text ends where the assistant is to begin, as it does at inference.

        Raises:
            DataError: the layout has no place for a chat.
        """

    @abstractmethod
    def marked(self, example: Conversation) -> tuple[list[int], list[bool]] | None:
        """The token ids of `example` and whether each is the assistant's, where the layout itself marks them."""


@final
class ChatTemplate(Layout):
    """The chat template of `tokenizer`, exactly as inference applies it."""

    description = "the tokenizer's chat template"
    head = ()  # a template writes its own beginning-of-sequence token

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self._marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def render(self, chats: Sequence[Sequence[Turn]], wheres: Sequence[str], *, ask: bool) -> list[str]:
        messages = [_messages(chat) for chat in chats]
        try:
            return self._apply(messages, ask)
        except Exception:  # templates raise whatever they like; the chat that fails is found below
            return [self._one(chat, where, ask) for chat, where in zip(messages, wheres, strict=True)]

    def _one(self, chat: list[dict[str, str]], where: str, ask: bool) -> str:
        try:
            return self._apply([chat], ask)[0]
        except Exception as error:
            raise DataError(
                "The chat template refuses the conversation.",
                where=where,
                found=f"{' '.join(message['role'] for message in chat)}: {error}",
                expected="turns that the model's template has a place for",
                fix="many templates want user and assistant in turn, and some no system text: change or leave "
                "out the record, or take another model",
            ) from error

    def _apply(self, chats: list[list[dict[str, str]]], ask: bool) -> list[str]:
        rendered: list[str] = self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=ask)
        return rendered

    def marked(self, example: Conversation) -> tuple[list[int], list[bool]] | None:
        if not self._marks:
            return None
        encoded: Any = self._tokenizer.apply_chat_template(
            _messages(example.turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


@final
class Plain(Layout):
    """For a tokenizer without a chat template: prompt, newline, completion, end-of-sequence token.

    Raises:
        DataError: the tokenizer has no end-of-sequence token.
    """

    description = "no chat template: prompt, newline, completion, end-of-sequence token"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        end = tokenizer.eos_token
        if end is None or tokenizer(end, add_special_tokens=False)["input_ids"] != [tokenizer.eos_token_id]:
            raise DataError(
                "The tokenizer has neither a chat template nor an end-of-sequence token.",
                found=f"eos_token={end!r}",
                expected="a token that ends an answer, or the model would never learn to stop",
                fix="set tokenizer.eos_token or tokenizer.chat_template, or take a model that has one",
            )
        self.head = head_of(tokenizer)
        self._end: str = end

    def render(self, chats: Sequence[Sequence[Turn]], wheres: Sequence[str], *, ask: bool) -> list[str]:
        return [self._one(chat, where, ask) for chat, where in zip(chats, wheres, strict=True)]

    def _one(self, chat: Sequence[Turn], where: str, ask: bool) -> str:
        roles = [turn.role for turn in chat]
        if roles != (["user"] if ask else ["user", "assistant"]):
            raise DataError(
                "The tokenizer has no chat template, so there is no way to write a conversation.",
                where=where,
                found=" ".join(roles),
                expected="one prompt and its completion, without a system text",
                fix="take a model with a chat template (an -Instruct or -it one), or set tokenizer.chat_template",
            )
        prompt = f"{chat[0].content}\n"
        return prompt if ask else f"{prompt}{chat[1].content}{self._end}"

    def marked(self, example: Conversation) -> None:
        return None


def layout_of(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The chat template of `tokenizer` if it has one, else `Plain`."""
    return ChatTemplate(tokenizer) if tokenizer.chat_template else Plain(tokenizer)


def head_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that `tokenizer` itself puts in front of every text: a beginning-of-sequence token, or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start])
    return ()


def _messages(chat: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in chat]
