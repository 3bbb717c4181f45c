"""A tiny encoder as a package lays it out, and sentences with ratings; for tests of classifiers and regressions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = {"awful": -2.0, "bad": -1.0, "poor": -0.5, "fine": 0.5, "good": 1.0, "great": 2.0}
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def tokenizer() -> Any:
    """[CLS] a [SEP] b [SEP], words split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", *WORDS]
    bare = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def encoder(folder: Path, pooling: dict[str, Any] | None = None) -> Path:
    """Writes a BERT without a head; with `pooling` also what sentence-transformers writes beside one."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if pooling is not None:
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        listed = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def ratings(path: Path, count: int = 120, *, offset: float = 3.0) -> Path:
    """Writes sentences of three words, rated by their mean; each sentence is another."""
    chance = random.Random(0)
    rows = []
    for number in range(count):
        words = chance.choices(list(WORDS), k=3)
        rows.append(
            {
                "text": " ".join([*words, "film", f"n{number}"]),
                "label": round(offset + sum(map(WORDS.get, words)) / 3, 3),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
