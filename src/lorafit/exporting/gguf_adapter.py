"""An adapter as llama.cpp loads it with --lora: one GGUF file with A and B of each tensor of the base.

general.type is `adapter`, adapter.type `lora`; a tensor's A is called `<its name>.lora_a` and is (r, in), B
`<its name>.lora_b` and is (out, r); of the embedding A is the other way round, (rows of the table, r). The scale is
adapter.lora.alpha / r with each tensor's own r (convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import CheckpointError, some
from lorafit.exporting.flat import Checked, Flat, compared, refuse_copies
from lorafit.exporting.gguf_names import Names, package
from lorafit.exporting.gguf_values import dequantised, quantised, writing
from lorafit.layouts.lora import EMBEDDING

FILE = "adapter.gguf"
HALVES = (".lora_a", ".lora_b")


def write(own: Flat, folder: Path, *, config: Any, dtype: str, name: str) -> int:
    """Writes the file.

    Args:
        own: the adapter.
        folder: where to write `adapter.gguf`.
        config: the base model's, of transformers.
        dtype: "float32", "float16" or "bfloat16".
        name: what the file says that the adapter is called.

    Returns:
        How many tensors are adapted.

    Raises:
        CheckpointError: GGUF has no place for what the adapter does; says which module.
    """
    names = Names.of(config, whole=False)
    refuse_copies(own, "a GGUF adapter")
    odd = [path for path, pair in own.plain.pairs.items() if pair.kernel]
    if odd:
        raise CheckpointError("a GGUF adapter takes no convolutions", found=some(odd))
    if names.tied and any(pair.keys == EMBEDDING for pair in own.plain.pairs.values()):
        raise CheckpointError(
            "a GGUF adapter cannot change an embedding to which the output is tied: llama.cpp has one tensor for both, "
            "and would apply A and B to the output, too",
            where="config.json: tie_word_embeddings",
            found=some([path for path, pair in own.plain.pairs.items() if pair.keys == EMBEDDING]),
            expected="linear layers of the model's blocks",
            fix="--to hf --untie, and then llama.cpp's own convert_hf_to_gguf.py; or --merged --untie",
        )
    alpha = max(pair.down.shape[0] for pair in own.plain.pairs.values())
    with writing(folder / FILE, names.kind.arch) as writer:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        for path, pair in own.plain.pairs.items():
            tensor = names.tensor(f"{path}.weight")
            up, down = own.scaled(path)
            up = names.ordered(tensor, up * (down.shape[0] / alpha))
            down = down.mT if pair.keys == EMBEDDING else down
            for half, values in zip(HALVES, (down, up), strict=True):
                data, kind = quantised(values, dtype)
                writer.add_tensor(tensor + half, data, raw_dtype=kind)
    return len(own.paths)


def check(own: Flat, written: Path, *, config: Any, dtype: str) -> Checked:
    """Reads the file anew and compares the change of each tensor with the adapter's own."""
    names = Names.of(config, whole=False)
    reader = package().GGUFReader(written / FILE)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    return compared(own, lambda path: _change(own, path, names, tensors, alpha), dtype)


def _change(own: Flat, path: str, names: Names, tensors: dict[str, Any], alpha: float) -> Tensor:
    """What llama.cpp computes with the tensors of the file: alpha / r · B A."""
    tensor = names.tensor(f"{path}.weight")
    down, up = (dequantised(tensors[tensor + half]) for half in HALVES)
    scale = alpha / up.shape[1]
    up = names.unordered(tensor, up)
    if own.plain.pairs[path].keys == EMBEDDING:
        return torch.as_tensor(scale * (down @ up.mT))
    return torch.as_tensor(scale * (up @ down))
