"""Opening a pipeline of diffusers: safetensors alone, and errors that name what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorafit.diffusion.families import family
from lorafit.diffusion.library import library
from lorafit.errors import ConfigError, some
from lorafit.training.models import choose_dtype

__all__ = ["INDEX", "choose_dtype", "default_device", "family", "open_pipeline"]

INDEX = "model_index.json"
"""What tells a pipeline's directory."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def default_device() -> torch.device:
    """The machine's accelerator, or its CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def open_pipeline(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Any:
    """A pipeline, ready to draw.

    Args:
        name: a directory that `save_pretrained` wrote, or a hub name.
        dtype: of its weights; None is bfloat16 where a GPU has it, else float32.
        device: where it is put; None is the accelerator, or the CPU.

    Returns:
        A `diffusers.DiffusionPipeline`, whose progress bars are off.

    Raises:
        ConfigError: there is no such pipeline, or its weights are not in safetensors files.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = library()
    place = torch.device(device) if device is not None else default_device()
    folder = Path(name)
    if folder.exists():
        _check_folder(folder)
    kind = choose_dtype("auto", place) if dtype is None else dtype
    try:
        absent = _absent(diffusers.DiffusionPipeline.load_config(str(name)))
        with warnings.catch_warnings():
            # Newer releases have it under another name, and take both until 1.0.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(name), torch_dtype=kind, use_safetensors=True, **absent
            )
    except (OSError, ValueError, AttributeError, ImportError, KeyError, RuntimeError) as error:
        raise _unopened(name, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir() or not (folder / INDEX).is_file():
        inner = sorted(str(found.parent) for found in folder.glob(f"*/{INDEX}")) if folder.is_dir() else []
        raise ConfigError(
            "this is no pipeline",
            where=folder,
            found="a file" if folder.is_file() else f"no {INDEX}",
            expected=f"a directory with {INDEX}, as pipe.save_pretrained writes it, or a hub name",
            near=inner[:3],
            fix=f"give {inner[0]}" if inner else "give the pipeline's directory",
        )


def _absent(config: Mapping[str, Any]) -> dict[str, None]:
    """The components that a pipeline was saved without: loading it asks for them unless it is told."""
    return {key: None for key, value in config.items() if isinstance(value, list | tuple) and list(value) == [None] * 2}


def _unopened(name: str | Path, error: Exception) -> ConfigError:
    folder = Path(name)
    pickled = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLED) if folder.is_dir() else []
    if pickled and not any(folder.rglob("*.safetensors")):
        return ConfigError(
            "the pipeline's weights are pickled, and pickle is never read: it can run any code",
            where=folder,
            found=some(pickled, 3),
            expected="safetensors files",
            fix="where you trust it: pipe.save_pretrained(folder, safe_serialization=True)",
        )
    lines = str(error).strip().splitlines() or [""]
    return ConfigError(
        "the pipeline cannot be opened",
        where=name,
        found=f"{type(error).__name__}: {lines[0]}",
        expected="a directory that pipe.save_pretrained wrote, or a hub name",
        fix="look at the message; a misspelt name is taken for one on the hub",
    )
