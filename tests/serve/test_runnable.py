"""Which models the engine runs, and how long their context is."""

from __future__ import annotations

import pytest

from lorafit.errors import ConfigError
from lorafit.serve.engine import Engine, Limits
from lorafit.serve.runnable import context, windows


def test_the_windows_of_models(kit):
    assert [windows(kit.make_model(family)) for family in ("llama", "gpt2", "mistral", "gemma2")] == [
        (None, None, None),
        (None, None, None),
        (7, 7, 7),
        (7, None, 7),
    ]


def test_models_with_another_kind_of_cache_are_refused_by_name(kit):
    import transformers as hf

    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    cases = [
        (hf.MambaForCausalLM(hf.MambaConfig(**small, state_size=4)), "state instead of keys"),
        (
            hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)),
            "an encoder and a decoder",
        ),
        (hf.LlamaModel(hf.LlamaConfig(**small, **heads)), "without a head"),
        (hf.BloomForCausalLM(hf.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2)), "position_ids"),
        (
            hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, add_cross_attention=True)),
            "an encoder and a decoder",
        ),
    ]
    for model, said in cases:
        with pytest.raises(ConfigError, match="cannot be served") as caught:
            Engine(model, kit.PlainBank(model))
        assert said in str(caught.value.found) and caught.value.where == type(model).__name__


def test_where_rows_would_change_each_others_frequencies_the_context_ends(kit):
    import transformers as hf

    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    config = hf.Phi3Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters=scaling,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = hf.Phi3ForCausalLM(config)
    assert context(model, Limits()) == 32
    with pytest.raises(ConfigError, match="shorter"):
        context(model, Limits(context=40))
    assert context(model, Limits(context=10)) == 10
