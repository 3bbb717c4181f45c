"""The tokenizer's part of a GGUF file: copied from the file that the base came from, or written from tokenizer.json.

GGUF names a way of splitting a text before the byte pairs are merged (`tokenizer.ggml.pre`); llama.cpp has a piece of
code for each name. So a tokenizer is written only where its own splitting is one of those known here, which are of
byte-level BPE. SentencePiece needs scores that tokenizer.json does not hold, and WordPiece is none of llama's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import CheckpointError, some
from lorafit.exporting.gguf_names import package

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's types of tokens."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPLITS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "gpt-2": ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},),
    "smollm": (
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ),
    "qwen2": (
        {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ),
    "llama-bpe": (
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ),
}
"""GGUF's name of a way of splitting → the pre-tokenizer of tokenizer.json, as far as it counts."""


@dataclass(frozen=True)
class Vocabulary:
    """What is to be written of a tokenizer.

    Attributes:
        fields: key → value, and for an array the name of the type of its elements.
        said: where it comes from, for people.
    """

    fields: Mapping[str, tuple[Any, str | None]]
    said: str

    def write(self, writer: Any) -> None:
        """Adds the fields to a GGUF file."""
        gguf = package()
        for key, (value, inner) in self.fields.items():
            kind = gguf.GGUFValueType.ARRAY if inner else gguf.GGUFValueType.get_type(value)
            if not inner and kind == gguf.GGUFValueType.INT32:
                kind = gguf.GGUFValueType.UINT32  # all whole numbers here are places in the vocabulary
            writer.add_key_value(key, value, kind, gguf.GGUFValueType[inner] if inner else None)


def vocabulary(tokenizer: Any, size: int, source: Path | None) -> Vocabulary:
    """What to write of a tokenizer.

    Args:
        tokenizer: of transformers.
        size: rows of the model's embedding.
        source: the GGUF file that the base came from, if it came from one.

    Raises:
        CheckpointError: GGUF files with this tokenizer are not written here.
    """
    if source is not None:
        copied = _copied(source)
        tokens = copied["tokenizer.ggml.tokens"][0]
        if tokens == _tokens(tokenizer, size)[0]:
            template = tokenizer.chat_template
            if isinstance(template, str):
                copied["tokenizer.chat_template"] = (template, None)
            return Vocabulary(copied, f"tokenizer: copied from {source.name}")
    return Vocabulary(_made(tokenizer, size), f"tokenizer: {len(tokenizer):,} tokens from tokenizer.json")


def _copied(source: Path) -> dict[str, tuple[Any, str | None]]:
    gguf = package()
    found: dict[str, tuple[Any, str | None]] = {}
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            found[key] = (field.contents(), field.types[-1].name if array else None)
    return found


def _made(tokenizer: Any, size: int) -> dict[str, tuple[Any, str | None]]:
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    pre = _pre(described)
    assert described is not None
    tokens, kinds = _tokens(tokenizer, size)
    merges = [each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]]
    found: dict[str, tuple[Any, str | None]] = {
        "tokenizer.ggml.model": ("gpt2", None),
        "tokenizer.ggml.pre": (pre, None),
        "tokenizer.ggml.tokens": (tokens, "STRING"),
        "tokenizer.ggml.token_type": (kinds, "INT32"),
    }
    if merges:
        found["tokenizer.ggml.merges"] = (merges, "STRING")
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, place in special.items():
        if place is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = (int(place), None)
    framed = tokenizer("a")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = (_at(framed, 0, tokenizer.bos_token_id), None)
    found["tokenizer.ggml.add_eos_token"] = (_at(framed, -1, tokenizer.eos_token_id), None)
    found["tokenizer.ggml.add_space_prefix"] = (False, None)
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = (tokenizer.chat_template, None)
    return found


def _at(ids: list[int], place: int, token: int | None) -> bool:
    return bool(ids) and token is not None and ids[place] == token


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """The tokens in the order of the embedding's rows, and the type of each."""
    tokens = [f"[PAD{place}]" for place in range(size)]
    kinds = [UNUSED] * size
    for token, place in tokenizer.get_vocab().items():
        if place >= size:
            raise CheckpointError(
                "the tokenizer has a token for which the model has no row",
                found=f"{token!r} at {place}",
                expected=f"places below {size}",
                fix="take the tokenizer that belongs to the base model",
            )
        tokens[place], kinds[place] = token, NORMAL
    for place, added in tokenizer.added_tokens_decoder.items():
        kinds[place] = CONTROL if added.special else USER_DEFINED
    return tokens, kinds


def _pre(described: Mapping[str, Any] | None) -> str:
    """GGUF's name for a tokenizer's way of splitting."""
    if described is None or described["model"]["type"] != "BPE" or described["model"].get("byte_fallback"):
        kind = "one without tokenizer.json" if described is None else described["model"]["type"]
        raise _refused(f"{kind}{' with bytes as a fallback (SentencePiece)' if kind == 'BPE' else ''}")
    splitter = described["pre_tokenizer"] or {"type": "none"}
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    for name, wanted in SPLITS.items():
        if len(parts) == len(wanted) and all(_like(part, own) for part, own in zip(parts, wanted, strict=True)):
            normalizer = (described["normalizer"] or {}).get("type")
            if normalizer not in (None, "NFC"):
                raise _refused(f"byte-level BPE with the normalizer {normalizer}")
            return name
    raise _refused(f"BPE split by {some([part['type'] for part in parts])} in a way that has no name here")


def _like(part: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(part.get(key) == value for key, value in wanted.items())


def _refused(found: str) -> CheckpointError:
    return CheckpointError(
        "a GGUF file with this tokenizer is not written here",
        where="tokenizer.json",
        found=found,
        expected=f"byte-level BPE split as in {', '.join(SPLITS)}",
        fix="--to hf, and then llama.cpp's own convert_hf_to_gguf.py; or the adapter alone, which needs no tokenizer",
    )
