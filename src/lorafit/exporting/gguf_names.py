"""Which models GGUF files can be written of, what their tensors are called there, and in which order rows stand.

A model of llama.cpp's type `llama` has rotary pairs beside each other, (x₀, y₀, x₁, y₁, …); in transformers they are in
two halves, (x₀, x₁, …, y₀, y₁, …). So the rows of the query and key projections are put in another order, and with
them the rows of an adapter's B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from lorafit.errors import CheckpointError, MissingExtraError

TYPES = ("float32", "float16", "bfloat16", "q8_0")


@dataclass(frozen=True)
class Kind:
    """A type of models.

    Attributes:
        arch: its name in GGUF.
        pairs: whether rotary pairs stand beside each other there.
        whole: whether merged models of it are written, too.
    """

    arch: str
    pairs: bool
    whole: bool


KINDS: Mapping[str, Kind] = {
    "llama": Kind("llama", pairs=True, whole=True),
    "mistral": Kind("llama", pairs=True, whole=True),
    "qwen2": Kind("qwen2", pairs=False, whole=False),
    "qwen3": Kind("qwen3", pairs=False, whole=False),
}
"""`model_type` of transformers → type."""


def package() -> Any:
    """The package gguf. Raises `MissingExtraError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError(
            "GGUF files are written by the package gguf, which is not installed",
            fix="pip install 'lorafit[embedded]'",
        ) from None
    return gguf


@dataclass(frozen=True)
class Names:
    """The names of one model's tensors in GGUF."""

    kind: Kind
    heads: int
    kv_heads: int
    tied: bool
    layers: int

    @classmethod
    def of(cls, config: Any, *, whole: bool) -> Names:
        """Those of a model with this config of transformers.

        Raises:
            CheckpointError: GGUF files of such models are not written here.
        """
        kind = KINDS.get(config.model_type)
        if kind is None or (whole and not kind.whole):
            known = [name for name, each in KINDS.items() if each.whole or not whole]
            raise CheckpointError(
                f"{'merged models' if whole else 'adapters'} of this type are not written as GGUF here",
                found=f"model_type {config.model_type!r}",
                expected=", ".join(known),
                fix="--to hf, and then llama.cpp's own convert_hf_to_gguf.py",
            )
        return cls(
            kind,
            config.num_attention_heads,
            config.num_key_value_heads,
            bool(config.tie_word_embeddings),
            config.num_hidden_layers,
        )

    def tensor(self, key: str) -> str:
        """The name of the tensor `key` of a model, `model.layers.0.self_attn.q_proj.weight`.

        Raises:
            CheckpointError: GGUF has none for it.
        """
        found = _map(self.kind.arch, self.layers).get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None or (self.tied and found == "output.weight"):
            tied = "it is tied to the embedding, which has a tensor of its own" if found else "no such tensor"
            raise CheckpointError(
                f"a GGUF file of type {self.kind.arch} has no place for this",
                where=key,
                found=tied,
                expected="the layers of the model's blocks, its embedding, or an output of its own",
                fix=f"--to hf{' --untie' if found else ''} merges the adapter into its base",
            )
        return str(found)

    def ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows (out, …) of a tensor as GGUF has them."""
        heads = self._heads(name)
        return rows if heads is None else _moved(rows, heads, 2)

    def unordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows as transformers has them, from a GGUF file."""
        heads = self._heads(name)
        return rows if heads is None else _moved(rows, heads, rows.shape[0] // heads // 2)

    def _heads(self, name: str) -> int | None:
        if not self.kind.pairs:
            return None
        part = name.split(".")[2] if name.startswith("blk.") else ""
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(part)


@lru_cache(maxsize=4)
def _map(arch: str, layers: int) -> Any:
    """The package's own table of names, which takes a while to make."""
    gguf = package()
    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(kind, layers)


def _moved(rows: Tensor, heads: int, fast: int) -> Tensor:
    """In each head, the `fast` axis of its rows from the slow place to the quick one."""
    return rows.reshape(heads, fast, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
