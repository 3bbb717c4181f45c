"""A fixed batch of tokens, and what a model makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROWS, LENGTH = 2, 24


def probe_for(model: Any) -> dict[str, torch.Tensor]:
    """Tokens from all over the vocabulary; the same for one model each time."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    # Most models end a text at the padding token, and a classifier looks for it: none may be in the midst.
    pad = model.config.pad_token_id
    if pad is not None:
        ids[ids == pad] = pad ^ 1
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits for it, float32 on the CPU."""
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(**probe).logits
    return logits.float().cpu()
