"""How each model of the server reads: the tokenizer and the chat template of the base, and of each adapter of its own.

A conversation is written by the code that writes it in training, so that a model is asked as it was taught. Most
adapters bring the same tokenizer as their base: what has the same files is loaded once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lorafit.errors import CheckpointError, DataError
from lorafit.serve.names import Folders
from lorafit.training.encode import Encoder
from lorafit.training.examples import Conversation, Turn
from lorafit.training.layouts import head_of, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer_config.json"
"""An adapter's folder with this file has a tokenizer of its own."""
FILES = ("tokenizer*.json", "tokenizer.model", "*.jinja", "vocab.*", "merges.txt", "special_tokens_map.json")
"""What a tokenizer is read from."""
HERE = "the messages"


class NoTemplateError(DataError):
    """A conversation for a tokenizer that has no way to write one."""


@final
class Voice:
    """How one model reads prompts. May be used by several threads.

    Args:
        tokenizer: its tokenizer.
        ends: tokens that end an answer; the tokenizer's end-of-sequence token and that with which its chat template
            ends a turn are added.
        vocabulary: how many tokens the model knows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], vocabulary: int) -> None:
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.tokenizer = tokenizer
        self.ends = tuple(sorted({*ends, *own, *_closing(tokenizer)}))
        self._vocabulary = vocabulary
        self._head = head_of(tokenizer)
        self._encoder: Encoder | None = None
        # A fast tokenizer complains when two threads use it at a time.
        self._lock = threading.Lock()

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens after which the model answers a conversation, exactly as training writes them.

        Raises:
            DataError: there is no question in it, or the chat template refuses it.
            NoTemplateError: it is more than one question, and the tokenizer has no chat template.
        """
        if not any(turn.role == "user" for turn in turns):
            raise DataError("there is nothing to answer: no message is the user's", where=HERE)
        if not self.tokenizer.chat_template and [turn.role for turn in turns] != ["user"]:
            raise NoTemplateError(
                "the tokenizer has no chat template: this model answers one question, and no conversation",
                where=HERE,
                found=" ".join(turn.role for turn in turns[:10]),
                expected="one message of the user's",
            )
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(self.tokenizer, 2)
            ids = self._encoder.sample(Conversation((*turns, Turn("assistant", "")), HERE)).input_ids
        return self.ids(ids)

    def text(self, prompt: str) -> list[int]:
        """The tokens of a text that the model is to go on with, begun as training begins a document."""
        with self._lock:
            ids: list[int] = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        head = [] if tuple(ids[: len(self._head)]) == self._head else self._head
        return self.ids([*head, *ids])

    def ids(self, ids: Sequence[int]) -> list[int]:
        """The tokens themselves, if the model knows them all.

        Raises:
            DataError: there are none, or one is out of the vocabulary.
        """
        if not ids:
            raise DataError("the prompt is empty, and the tokenizer puts nothing in front of a text")
        odd = min(ids) if min(ids) < 0 else max(ids)
        if not 0 <= odd < self._vocabulary:
            raise DataError(
                "the prompt has a token that the model does not know",
                found=odd,
                expected=f"0 to {self._vocabulary - 1}",
            )
        return list(ids)


@final
class Voices:
    """The voice of the base and of each adapter. May be used by several threads.

    Args:
        tokenizer: the base's.
        folders: where the adapters lie.
        ends: tokens that end an answer of the base.
        vocabulary: how many tokens the model knows.
        kept: so many different tokenizers of adapters are kept in memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folders: Folders,
        *,
        ends: Iterable[int],
        vocabulary: int,
        kept: int = 16,
    ) -> None:
        self._ends = tuple(ends)
        self._vocabulary = vocabulary
        self._folders = folders
        self._kept = kept
        self._base = Voice(tokenizer, self._ends, vocabulary)
        self._prints: dict[str, str] = {}
        self._voices: OrderedDict[str, Voice] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str | None) -> Voice:
        """The voice of an adapter, None for the base; takes a moment when it is read.

        Raises:
            UnknownAdapterError: there is no such adapter.
            CheckpointError: its tokenizer cannot be read.
        """
        if name is None:
            return self._base
        folder = self._folders.folder(name)
        if not (folder / OWN).is_file():
            return self._base
        with self._lock:
            mark = self._prints.get(name)
            if mark is None:
                mark = self._prints[name] = _print(folder)
            voice = self._voices.get(mark)
            if voice is None:
                voice = self._voices[mark] = Voice(_tokenizer(folder, name), self._ends, self._vocabulary)
            self._voices.move_to_end(mark)
            while len(self._voices) > self._kept:
                self._voices.popitem(last=False)
        return voice

    def forget(self, name: str) -> None:
        """An adapter is not served any more: what comes by its name later is read anew."""
        with self._lock:
            self._prints.pop(name, None)


def _tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        # Nothing is fetched, and no code that comes with an adapter is run.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # third-party code that reads a stranger's files
        raise CheckpointError(
            "the adapter's own tokenizer cannot be read",
            where=folder,
            found=str(error).strip().partition("\n")[0],
            fix=f"mend its files, or remove {OWN} there: {name} then reads as its base",
        ) from error


def _print(folder: Path) -> str:
    """The same for folders whose tokenizers are the same."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _closing(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special token with which the chat template ends an answer: what training taught the model to end with."""
    if not tokenizer.chat_template:
        return ()
    try:
        chat = (Turn("user", "a"), Turn("assistant", "b"))
        text = layout_of(tokenizer).render([chat], ["the chat template"], ask=False)[0].rstrip()
    except DataError:
        return ()
    special = {token.content: place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [content for content in special if text.endswith(content)]
    return (special[max(ends, key=len)],) if ends else ()
