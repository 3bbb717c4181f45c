"""SmolLM2-135M-Instruct out of its GGUF file: weights, configuration and tokenizer as a plain checkpoint.

transformers can read the same file, but takes several times as long (it parses the file three times and
builds a table of known names for each module), leaves a model that cannot be saved, and does not split digits
as the file's `tokenizer.ggml.pre` says. This module reads the file once. It knows this one kind of model;
anything else in the file is an error. A slow test holds that every tensor equals transformers' bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import CheckpointError, MissingExtraError, some

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from tokenizers import Tokenizer

    Array = npt.NDArray[np.float32]

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of special tokens


def convert(source: Path, directory: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face checkpoint.

    Args:
        source: the GGUF file of a Llama-type model with a byte-level BPE tokenizer and tied embeddings.
        directory: an existing, empty directory; receives `config.json`, `generation_config.json`,
            `model.safetensors` (float32, the tied embedding once), `tokenizer.json` and
            `tokenizer_config.json` or `chat_template.jinja`.

    Raises:
        MissingExtraError: the package `gguf` is not installed.
        CheckpointError: the file is not of the kind this module knows.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError(
            "the embedded model is stored in the GGUF format, whose reader is not installed",
            fix="pip install 'gguf>=0.10'",
        ) from error
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    fields = _Fields(reader.fields, source)
    fields.demand("general.architecture", "llama")
    fields.demand("tokenizer.ggml.model", "gpt2")
    fields.demand("tokenizer.ggml.pre", "smollm")
    heads = int(fields["llama.attention.head_count"])
    kv_heads = int(fields["llama.attention.head_count_kv"])
    tensors = {}
    for tensor in reader.tensors:
        name, value = _tensor(tensor, heads, kv_heads)
        tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _save_config(fields, directory)
    _save_tokenizer(fields, directory)


class _Fields:
    """The key-value pairs of a GGUF file as Python values."""

    def __init__(self, fields: Any, source: Path) -> None:
        self._fields = fields
        self._source = source

    def __getitem__(self, key: str) -> Any:
        values = self.all(key)
        if len(values) != 1:
            raise CheckpointError(f"{key} holds {len(values)} values, one was expected", where=self._source)
        return values[0]

    def all(self, key: str) -> list[Any]:
        if key not in self._fields:
            raise CheckpointError(
                "a key is missing from the GGUF file",
                where=self._source,
                expected=key,
                found=some(self._fields),
            )
        from gguf import GGUFValueType

        field = self._fields[key]
        parts = (field.parts[index] for index in field.data)
        if field.types[-1] == GGUFValueType.STRING:
            return [bytes(part).decode("utf-8") for part in parts]
        return [part[0].item() for part in parts]

    def demand(self, key: str, value: str) -> None:
        found = self[key]
        if found != value:
            raise CheckpointError(
                "the GGUF file is not the embedded model",
                where=f"{self._source}, {key}",
                found=found,
                expected=value,
            )


def _tensor(tensor: Any, heads: int, kv_heads: int) -> tuple[str, torch.Tensor]:
    """The Hugging Face name and the float32 value of one tensor of the file."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    value: Array = dequantize(tensor.data, tensor.tensor_type)
    name = str(tensor.name)
    if name in _GLOBAL:
        target = _GLOBAL[name]
    else:
        prefix, _, rest = name.partition(".")
        block, _, part = rest.partition(".")
        kind, _, suffix = part.partition(".")
        if prefix != "blk" or suffix != "weight" or kind not in _BLOCK:
            raise CheckpointError("the GGUF file holds a tensor that the embedded model has not", found=name)
        target = f"model.layers.{block}.{_BLOCK[kind]}.weight"
        if kind == "attn_q":
            value = _halves(value, heads)
        elif kind == "attn_k":
            value = _halves(value, kv_heads)
    return target, torch.from_numpy(np.array(value, dtype=np.float32, order="C"))


def _halves(weight: Array, heads: int) -> Array:
    """Rows of a query or key projection, from GGUF's interleaved rotary pairs to Hugging Face's two halves.

    Args:
        weight: `[heads * head_dim, in]`, the rows of a head ordered (x0, y0, x1, y1, ...).
        heads: number of heads.

    Returns:
        `[heads * head_dim, in]`, the rows of a head ordered (x0, x1, ..., y0, y1, ...).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _save_config(fields: _Fields, directory: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    tokens = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        dtype="float32",
        **tokens,
    )
    config.save_pretrained(directory)
    GenerationConfig(**tokens).save_pretrained(directory)


def _save_tokenizer(fields: _Fields, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = fields.all("tokenizer.ggml.tokens")
    kinds = fields.all("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    backend = _bpe(tokens, fields.all("tokenizer.ggml.merges"), special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    tokenizer.save_pretrained(directory)


def _bpe(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that first splits off every digit, as the file's `pre = smollm` says."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend
