"""A tiny model, little data, and the settings of a run of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.training.config import Settings, resolve

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model and data are."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="session")
def sums(place: Path) -> Path:
    """Eighty questions and answers, each question of its own."""
    path = place / "sums.jsonl"
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}"} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def llama(place: Path) -> Path:
    """A language model of two small layers, and a tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(place / "llama")
    tokenizer.save_pretrained(place / "llama")
    return place / "llama"


@pytest.fixture
def settings(llama: Path, sums: Path) -> Callable[..., Settings]:
    """Settings of a short run on the sums, with others put over them."""

    def make(**given: Any) -> Settings:
        flat = {
            "model": str(llama),
            "data": str(sums),
            "eval_split": 8,
            "samples": 0,
            "max_steps": 6,
            "save_steps": 2,
            "r": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
        }
        return resolve([("the test", {**flat, **given})])

    return make
