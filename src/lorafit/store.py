"""Adapter folders: written in one step, read strictly, never through pickle.

The weights file is the commit point: it carries a copy of its config in its metadata. The config is renamed right after
it. Should a kill fall between the two, the new config still lies beside as a temporary file, and reading completes the
step: old adapter or new adapter, never a mixture.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from lorafit import files
from lorafit.card import model_card
from lorafit.errors import CheckpointError, some
from lorafit.layouts import config_of, mathematics, tensors_of
from lorafit.peft_layout import Description
from lorafit.sharded import by_one, in_parts, whole

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
CARD = "README.md"
CONFIG_COPY = "lorafit_config"
CHECKSUM = "lorafit_crc32"


@dataclass(frozen=True)
class Stored:
    """An adapter as its folder holds it.

    `ours` tells a file that this library wrote; `edited` names the settings by which its config asks for other
    mathematics than the config that was saved with the weights.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    config_path: Path
    weights_path: Path
    ours: bool = False
    edited: tuple[str, ...] = ()


def write(folder: Path, description: Description) -> None:
    """Writes an adapter in PEFT's layout; see the module's docstring for what a kill can leave.

    Of a sharded adapter it is to be called in every process: the first one writes, and all return when it has.

    Raises:
        CheckpointError: the folder cannot be written; what was there is untouched.
    """
    entries = [*(placed.adapter for placed in description.sites.values()), *description.copies.values()]
    with whole(entries):
        config, tensors, card = config_of(description), tensors_of(description), model_card(description)
    if any(map(in_parts, (*(placed.site.module for placed in description.sites.values()), *entries))):
        by_one(partial(write_parts, folder, config, tensors, card))
    else:
        write_parts(folder, config, tensors, card)


def write_parts(folder: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor], card: str) -> None:
    """Writes an adapter's folder from its parts, as `write` does; `tensors` are plain ones on the CPU."""
    config = json.dumps(settings, indent=2, sort_keys=True)
    metadata = {"format": "pt", CONFIG_COPY: config, CHECKSUM: _checksum(tensors)}
    contents: list[tuple[Path, Callable[[Path], object]]] = [
        (folder / WEIGHTS, lambda path: _write_tensors(path, tensors, metadata)),
        (folder / CONFIG, lambda path: path.write_bytes(config.encode())),
    ]
    if not (folder / CARD).exists():
        contents.append((folder / CARD, lambda path: path.write_bytes(card.encode())))
    staged: list[Path] = []
    try:
        for path, fill in contents:
            staged.append(files.stage(path, fill))
        files.commit(staged[0], folder / WEIGHTS)
    except BaseException:
        for left in staged:
            left.unlink(missing_ok=True)
        raise
    # From here on the new adapter is what `read` finds, even if the rest never comes.
    for temporary, (path, _) in zip(staged[1:], contents[1:], strict=True):
        files.commit(temporary, path)
    _sweep(folder)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # its way of passing on what the system said: disk full, quota, file too large
        raise OSError(str(error)) from error
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Sorts the metadata, whose order safetensors leaves to chance: the same adapter is then the same bytes."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else the file stays as it is, which is as good to read
            file.seek(8)
            file.write(text.ljust(size))


def _sweep(folder: Path) -> None:
    """Removes what killed writers left, once it is too old to be a writer that is still at work."""
    for left in (path for name in (WEIGHTS, CONFIG, CARD) for path in folder.glob(f".{name}.*.tmp")):
        try:
            if time.time() - left.stat().st_mtime > 60:
                left.unlink()
        except FileNotFoundError:
            continue


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for key in sorted(tensors):
        value = tensors[key]
        total = zlib.crc32(key.encode(), total)
        total = zlib.crc32(memoryview(value.reshape(-1).view(uint8).numpy()), total)  # type: ignore[arg-type]
    return f"{total:08x}"


def read(path: Path, name: str = "default") -> Stored:
    """Reads an adapter's folder; nothing is interpreted yet.

    Args:
        path: the folder, or the folder that holds it under the adapter's name (which is looked at first unless
            the name is "default").
        name: the adapter's name.

    Raises:
        CheckpointError: no adapter there, a damaged file, or a pickle (never read).
    """
    folder = _locate(path, name)
    weights_path, config_path = folder / WEIGHTS, folder / CONFIG
    try:
        with safe_open(weights_path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(weights_path, error) from None
    if CHECKSUM in metadata and _checksum(tensors) != metadata[CHECKSUM]:
        raise CheckpointError(
            "the file of weights was changed after it was written",
            where=weights_path,
            found=f"checksum {_checksum(tensors)}",
            expected=metadata[CHECKSUM],
            fix="copy or download it again, or go back to an earlier checkpoint",
        )
    config, edited = _read_config(config_path, metadata)
    return Stored(config, tensors, config_path, weights_path, ours=CONFIG_COPY in metadata, edited=edited)


def peek(path: Path, name: str = "default") -> Stored:
    """The same without the tensors: only the header of the file of weights is read.

    Raises:
        CheckpointError: as `read`, as far as config and header show it.
    """
    folder = _locate(path, name)
    weights_path, config_path = folder / WEIGHTS, folder / CONFIG
    try:
        with safe_open(weights_path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(weights_path, error) from None
    config, edited = _read_config(config_path, metadata)
    return Stored(config, {}, config_path, weights_path, ours=CONFIG_COPY in metadata, edited=edited)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the file of weights is damaged or cut short",
        where=path,
        found=str(error),
        expected="a whole safetensors file",
        fix="copy or download it again, or go back to an earlier checkpoint",
    )


def _read_config(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    text = _text(path)
    copy = metadata.get(CONFIG_COPY)
    if copy is not None and copy != text:
        pending = [left for left in path.parent.glob(f".{CONFIG}.*.tmp") if _text(left) == copy]
        text = copy if pending else text
    config = _parsed(text, path)
    return config, () if copy is None or copy == text else _differences(config, _parsed(copy, path))


def _differences(config: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings by which a config asks for other mathematics than the one that was saved with the weights."""
    return tuple(
        f"{key} (saved as {saved.get(key)!r}, now {config.get(key)!r})"
        for key in sorted(mathematics(saved))
        if config.get(key) != saved.get(key)
    )


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointError(
            "the config is no JSON",
            where=f"{path}{line}",
            found=str(error),
            expected="a JSON object",
            fix="mend the file, or copy it again",
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(
            "the config is no JSON object",
            where=path,
            found=type(config).__name__,
            expected="an object",
            fix="copy it again",
        )
    return config


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("the config cannot be read", where=path, found=str(error), fix="copy it again") from None


def _locate(path: Path, name: str) -> Path:
    # A folder of several adapters holds "default" itself and each other one in a sub-folder of its name.
    for folder in (path, path / name) if name == "default" else (path / name, path):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder" if not path.exists() else "an adapter is a folder, this is a file",
            where=path,
            expected=f"a folder with {CONFIG} and {WEIGHTS}",
            fix="give the folder that holds the two files; for a hub name download it first (huggingface_hub)",
        )
    pickled = [path / file for file in PICKLED if (path / file).is_file()]
    if pickled:
        raise CheckpointError(
            "the weights are pickled, and pickle is never read: it can run any code",
            where=pickled[0],
            expected=WEIGHTS,
            fix="load it with PEFT where you trust it, and save it again (safe_serialization=True)",
        )
    inner = sorted(str(child.relative_to(path).parent) for child in path.rglob(CONFIG))
    missing = [file for file in (CONFIG, WEIGHTS) if not (path / file).is_file()]
    raise CheckpointError(
        "this folder holds no adapter",
        where=path,
        found=f"adapters below it in {some(inner)}" if inner else f"no {' and no '.join(missing)}",
        expected=f"{CONFIG} and {WEIGHTS}",
        near=inner[:3],
        fix=f"give {path / inner[0]}" if inner else "give the folder that `handle.save` or PEFT wrote",
    )
