"""Numbers in the types of GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.exporting.gguf_names import package

BLOCK = 32
"""Numbers that share a scale in Q8_0; the rows of a tensor must be a multiple of it long."""


def fitting(shape: tuple[int, ...], dtype: str) -> str:
    """The type that a tensor gets: vectors stay in float32, and rows that are no whole blocks become float16.

    >>> fitting((64,), "q8_0"), fitting((8, 64), "q8_0"), fitting((8, 40), "q8_0")
    ('float32', 'q8_0', 'float16')
    """
    if len(shape) == 1:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype


def quantised(values: Tensor, dtype: str) -> tuple[Any, Any]:
    """The bytes of a tensor for a GGUF writer, and their type."""
    gguf = package()
    kinds = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    kind = kinds[dtype]
    array = values.detach().to("cpu", torch.float32).contiguous().numpy()
    return gguf.quants.quantize(array, kind), kind


@contextmanager
def writing(path: Path, arch: str) -> Iterator[Any]:
    """A GGUF writer whose fields and tensors come to the disk at the end, and which is closed whatever happens."""
    writer = package().GGUFWriter(path, arch)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def dequantised(tensor: Any) -> Tensor:
    """The numbers of a tensor that a GGUF reader found."""
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
