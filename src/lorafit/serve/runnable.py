"""Which models an engine can run: those that keep keys and values of every token in every layer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import get_layer_types_and_kwargs

from lorafit.errors import ConfigError, some
from lorafit.serve.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"
NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values")
"""What a model's forward pass has to take."""


def windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """For each layer the width of its sliding window, or None.

    Raises:
        ConfigError: the model keeps something else than keys and values of every token in every layer, or cannot be
            told the position of each row.
    """
    config = model.config.get_text_config(decoder=True)
    if not model.can_generate():
        raise _refusal(model, "a model without a head that writes tokens")
    if model.config.is_encoder_decoder or config.to_dict().get("add_cross_attention"):
        raise _refusal(model, "an encoder and a decoder")
    if model._is_stateful:
        raise _refusal(model, "layers with a state instead of keys and values")
    kinds, settings = get_layer_types_and_kwargs(config)
    others = sorted(set(kinds) - {FULL, SLIDING})
    if others:
        raise _refusal(model, f"layers of the kind {some(others)}")
    missing = [name for name in NEEDED if name not in inspect.signature(model.forward).parameters]
    if missing:
        raise _refusal(model, f"a forward pass that does not take {some(missing)}")
    return tuple(given.get("sliding_window") for given in settings)


def _refusal(model: PreTrainedModel, found: str) -> ConfigError:
    return ConfigError(
        "this model cannot be served with rows that come and go",
        where=type(model).__name__,
        found=found,
        expected="a decoder with attention in every layer, full or in a sliding window",
        fix="lorafit chat, or transformers' own generate",
    )


def context(model: PreTrainedModel, limits: Limits) -> int:
    """Tokens of prompt and answer that a request may have.

    Raises:
        ConfigError: the limits ask for more than the model has.
    """
    longest = _positions(model.config.get_text_config(decoder=True))
    if limits.context is not None and longest is not None and limits.context > longest:
        raise ConfigError(
            "the model's context is shorter than that",
            where="context",
            found=limits.context,
            expected=f"at most {longest}",
            fix="leave it out: the model's own is the default",
        )
    return min(value for value in (longest, limits.context, limits.cached) if value is not None)


def _positions(config: Any) -> int | None:
    """The positions that a model has, or None for one that counts on without end.

    Where frequencies change with the longest row of a batch (longrope), only the positions before that: beyond them a
    row would depend on the others.
    """
    try:
        longest: int | None = config.max_position_embeddings
    except AttributeError:
        return None
    parameters = vars(config).get("rope_parameters") or {}
    for one in (parameters, *parameters.values()):
        if isinstance(one, dict) and one.get("rope_type") == "longrope":
            found = one.get("original_max_position_embeddings")
            longest = min(value for value in (longest, found) if value is not None)
    return longest
