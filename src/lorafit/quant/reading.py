"""Reading a checkpoint of safetensors tensor by tensor, each into the memory of the one before.

Files are read and not mapped: of a mapped file all that was looked at stays in memory, and a model's file is as large
as the model. Memory of each tensor's own would leave holes of that size among what is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorafit.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100 * 2**20
"""Bytes; the format's own limit."""


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of every tensor of a checkpoint; a tensor holds until the next one is asked for.

    Args:
        path: a file, or a folder with one or with shards and their index.

    Raises:
        CheckpointError: there is none, or a file of it cannot be read.
    """
    memory = bytearray()
    for file, name, places in _files(path):
        try:
            with file.open("rb") as stream:
                start, header = _header(stream, file)
                for key, kind, shape, offset, size in header:
                    if places.get(key, name) != name:  # the index says that another file has it
                        continue
                    if len(memory) < size:
                        memory = bytearray()  # the old one goes before the new one comes
                        memory = bytearray(size)
                    stream.seek(start + offset)
                    if stream.readinto(memoryview(memory)[:size]) != size:
                        raise _broken(file, f"{key} ends after the file does")
                    flat = torch.frombuffer(memory, dtype=kind, count=math.prod(shape)) if size else torch.empty(0)
                    yield key, flat.to(kind).view(shape)
        except OSError as error:
            raise CheckpointError(
                f"a file of the checkpoint cannot be read: {error}", where=str(file), fix="download it again"
            ) from error


def _header(stream: BinaryIO, file: Path) -> tuple[int, list[tuple[str, torch.dtype, list[int], int, int]]]:
    """(where the data begin, [(key, type, shape, offset, bytes)] in the order of the file)."""
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= LARGEST_HEADER:
        raise _broken(file, f"a header of {length:,} bytes")
    room = file.stat().st_size - 8 - length
    try:
        entries: dict[str, Any] = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        rows = []
        for key, entry in entries.items():
            begin, end = entry["data_offsets"]
            kind, shape = TYPES[entry["dtype"]], list(entry["shape"])
            if any(type(each) is not int or each < 0 for each in (*shape, begin, end)):
                raise _broken(file, f"{key} with shape {shape} and offsets {[begin, end]}")
            if end > room:
                raise _broken(file, f"{key} ends after the file does")
            if end - begin != math.prod(shape) * kind.itemsize:
                raise _broken(file, f"{key} has {end - begin:,} bytes for {entry['dtype']} {shape}")
            rows.append((key, kind, shape, begin, end - begin))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(file, f"a header that says {error!r}") from error
    return 8 + length, sorted(rows, key=lambda row: row[3])


def _broken(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "this is no safetensors file that can be read",
        where=str(file),
        found=found,
        expected=f"tensors of the types {', '.join(TYPES)}",
        fix="download it again",
    )


def _files(path: Path) -> list[tuple[Path, str, dict[str, str]]]:
    """The files of a checkpoint, in the order of its index: path, name in it, and key → name."""
    if path.is_file():
        return [(path, path.name, {})]
    index = path / INDEX
    if index.is_file():
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = list(dict.fromkeys(places.values()))
            outside = [name for name in names if _leaves(name)]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"the index of the checkpoint cannot be read: {error!r}", where=str(index), fix="download it again"
            ) from error
        if outside:
            raise CheckpointError(
                "the index of the checkpoint names a file outside of its folder",
                where=str(index),
                found=repr(outside[0]),
                expected="names of files beside it",
                fix="download it again, from a source that you trust",
            )
        return [(path / name, name, places) for name in names]
    if (path / SINGLE).is_file():
        return [(path / SINGLE, SINGLE, {})]
    raise CheckpointError(
        "there is no checkpoint here",
        where=str(path),
        found="a folder without it" if path.exists() else "no such folder",
        expected=f"{SINGLE} or {INDEX}",
        fix="huggingface_hub.snapshot_download(name) returns the folder of a model of the hub",
    )


def _leaves(name: str) -> bool:
    """Whether a name in an index leads out of the folder; links in the folder are the owner's own."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return any(each.is_absolute() or each.anchor != "" or ".." in each.parts for each in kinds)
