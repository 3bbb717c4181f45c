"""The models to measure with: Llama's architecture, weights from a seed, and batches of random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SITES = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "q, v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Sets of adapted layers; "all" is every linear layer but the head."""


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int = 4
    length: int = 256
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    def model(self, seed: int) -> nn.Module:
        """The model in training mode, with weights drawn from `seed`."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(2048, self.length),
            tie_word_embeddings=True,
            use_cache=False,
        )
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
        return model.to(self.torch_dtype).train()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' type."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches without end; every token is learnt."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = torch.randint(self.vocabulary, (self.batch, self.length), generator=generator)
            yield {"input_ids": ids, "labels": ids.clone()}

    def shapes(self, sites: str = "all") -> list[tuple[int, int]]:
        """(out, in) of every adapted layer."""
        value = self.hidden // self.heads * self.kv_heads
        wide, h = self.intermediate, self.hidden
        kinds = {
            "q_proj": (h, h),
            "k_proj": (value, h),
            "v_proj": (value, h),
            "o_proj": (h, h),
            "gate_proj": (wide, h),
            "up_proj": (wide, h),
            "down_proj": (h, wide),
        }
        return [kinds[name] for name in SITES[sites]] * self.layers

    def adapter_operations(self, r: int, sites: str = "all", *, merging: bool = True) -> float:
        """What LoRA adds to a step in floating-point operations: the cheaper order at each site.

        Low-rank order: 6 b r (k + d). Merged (W + sBA formed in the forward pass and again in the backward pass):
        4 b r (k + d) + 4 r k d, which dropout excludes.
        """
        total = 0.0
        for d, k in self.shapes(sites):
            thin, merged = 6 * self.tokens * r * (k + d), 4 * self.tokens * r * (k + d) + 4 * r * k * d
            total += min(thin, merged) if merging else thin
        return total


CASES = {
    case.name: case
    for case in (
        Case("six", 6, 576, 1536, 9, 3, 2048),
        Case("smollm2", 30, 576, 1536, 9, 3, 49152),
        Case("tiny", 2, 32, 64, 4, 2, 64, batch=2, length=8),
    )
}
ABOUT = {
    "six": "six layers of hidden size 576 (intermediate 1,536, 9 heads, 3 for keys and values), vocabulary 2,048",
    "smollm2": "the architecture of SmolLM2-135M: 30 layers of hidden size 576, vocabulary 49,152",
    "tiny": "two layers of hidden size 32: to see whether the program runs",
}


def wide(hidden: int, tokens: int, *, layers: int = 2) -> Case:
    """A model of two layers of a given width, for the sweep; keys and values are as wide, to take every rank."""
    heads = max(1, hidden // 64)
    intermediate = -(-hidden * 8 // 3 // 64) * 64
    length = min(256, tokens)
    return Case(f"h{hidden}", layers, hidden, intermediate, heads, heads, 2048, tokens // length, length)
