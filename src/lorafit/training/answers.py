"""Answers of a model to held-out questions, for showing what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorafit.training.sequences import Sample


def answers(model: Any, tokenizer: Any, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """The model's most probable answers (greedy), all in one batch.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a padding token.
        samples: the questions, already tokenised.
        max_new_tokens: length of the longest answer.

    Returns:
        The answers' text, special tokens left out, in the order of the samples.
    """
    if not samples:
        return []
    width = max(len(sample.input_ids) for sample in samples)
    pad = tokenizer.pad_token_id
    rows = [[pad] * (width - len(sample.input_ids)) + sample.input_ids for sample in samples]
    masks = [[0] * (width - len(sample.input_ids)) + [1] * len(sample.input_ids) for sample in samples]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                use_cache=True,
            )
    finally:
        model.train(was_training)
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in made]
