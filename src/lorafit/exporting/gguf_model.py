"""A merged model of llama's type as one GGUF file, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lorafit.errors import CheckpointError
from lorafit.exporting.flat import Checked
from lorafit.exporting.gguf_names import Names, package
from lorafit.exporting.gguf_tokenizer import Vocabulary
from lorafit.exporting.gguf_values import dequantised, fitting, quantised, writing

FILE = "model.gguf"
ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 127}
"""How far a weight may be from what it was, as a share of the largest one of its tensor."""


def check_config(config: Any) -> Names:
    """The names of a model's tensors.

    Raises:
        CheckpointError: such a model is not written here.
    """
    names = Names.of(config, whole=True)
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        raise CheckpointError(
            "merged models whose rotary embedding is stretched are not written as GGUF here",
            where="config.json: rope_parameters",
            found=f"rope_type {rope!r}",
            expected="'default'",
            fix="--to gguf without --merged writes the adapter alone; --to hf, then llama.cpp's convert_hf_to_gguf.py",
        )
    return names


def write(
    tensors: dict[str, Tensor], folder: Path, *, config: Any, vocabulary: Vocabulary, dtype: str, name: str
) -> list[str]:
    """Writes the file.

    Args:
        tensors: of the merged model, by their keys in transformers; a tied output is left out.
        folder: where to write `model.gguf`.
        config: the model's.
        vocabulary: the tokenizer.
        dtype: "float32", "float16", "bfloat16" or "q8_0".
        name: what the file says that the model is called.

    Returns:
        The tensors that were written in another type than `dtype`, matrices only.

    Raises:
        CheckpointError: a tensor has no place in such a file.
    """
    names, other = check_config(config), []
    with writing(folder / FILE, names.kind.arch) as writer:
        _describe(writer, config, name, dtype)
        vocabulary.write(writer)
        for key, values in tensors.items():
            if names.tied and key == "lm_head.weight":
                continue
            tensor = names.tensor(key)
            kind = fitting(tuple(values.shape), dtype)
            if kind != dtype and values.dim() > 1:
                other.append(tensor)
            data, raw = quantised(names.ordered(tensor, values), kind)
            writer.add_tensor(tensor, data, raw_dtype=raw)
    return other


def _describe(writer: Any, config: Any, name: str, dtype: str) -> None:
    gguf = package()
    kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    if head != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head)
        writer.add_value_length(head)


def check(tensors: dict[str, Tensor], written: Path, *, config: Any, dtype: str) -> Checked:
    """Reads the file anew and compares every tensor: the worst one, as a share of its largest number."""
    names = Names.of(config, whole=True)
    found = {str(tensor.name): tensor for tensor in package().GGUFReader(written / FILE).tensors}
    worst = 0.0
    for key, values in tensors.items():
        if names.tied and key == "lm_head.weight":
            continue
        tensor = names.tensor(key)
        again = names.unordered(tensor, dequantised(found.pop(tensor)))
        apart = float((again - values.float().cpu()).abs().max()) / max(float(values.abs().max()), 1e-30)
        worst = apart if not worst >= apart else worst
    if found:
        raise CheckpointError("the file holds tensors that the model has not", where=written / FILE, found=list(found))
    return Checked(worst, ROUNDING[dtype], "weight")
