"""Opening a pipeline of diffusers: safetensors alone, and errors that name what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lorafit.diffusion.families import family
from lorafit.diffusion.library import library
from lorafit.errors import ConfigError, some
from lorafit.training.models import choose_dtype

__all__ = ["INDEX", "choose_dtype", "default_device", "family", "open_pipeline"]

INDEX = "model_index.json"
"""What tells a pipeline's directory."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
AGAIN = "get the pipeline again, or save it whole: pipe.save_pretrained(folder)"


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
        ConfigError: there is no such pipeline, its weights are not in safetensors files, or some are missing.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = library()
    place = torch.device(device) if device is not None else default_device()
    folder = Path(name)
    if folder.exists():
        _check_folder(folder)
    kind = choose_dtype("auto", place) if dtype is None else dtype
    try:
        config = diffusers.DiffusionPipeline.load_config(str(name))
        if folder.is_dir():
            _check_parts(folder, config)
        with warnings.catch_warnings():
            # Newer releases have it under another name, and take both until 1.0.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            models = {part: _model(name, part, made_by, kind) for part, made_by in _models(config).items()}
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(name), torch_dtype=kind, use_safetensors=True, **_absent(config), **models
            )
        pipe = pipe.to(place)
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unopened(name, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _models(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pipeline that are networks of diffusers or transformers → their classes."""
    found = {}
    for part, value in config.items():
        if not isinstance(value, list | tuple) or len(value) != 2 or value[0] not in ("diffusers", "transformers"):
            continue
        made_by = getattr(import_module(value[0]), value[1])
        if isinstance(made_by, type) and issubclass(made_by, nn.Module):
            found[part] = made_by
    return found


def _model(name: str | Path, part: str, made_by: Any, kind: torch.dtype) -> Any:
    """A network with all of its weights: what its files lack would be drawn at random, without a word.

    Raises:
        ConfigError: some are missing, or of another shape.
    """
    found = ""
    try:
        model, info = made_by.from_pretrained(
            str(name), subfolder=part, torch_dtype=kind, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            found = f"none for {some(sorted(info['missing_keys']), 3)}"
    except (RuntimeError, ValueError) as error:
        if "mismatch" not in str(error):
            raise
        found = "some of other shapes than its config.json says"
    if found:
        raise ConfigError(
            "the files of the pipeline lack weights",
            where=f"{name}: {part}",
            found=found,
            expected=f"all weights of {made_by.__name__}",
            fix=AGAIN,
        )
    return model


def _check_parts(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the folder of a part is not there, which some loaders make up for in silence."""
    said = [part for part, value in config.items() if isinstance(value, list | tuple) and any(value)]
    absent = [part for part in said if not (folder / part).is_dir()]
    if absent:
        raise ConfigError(
            "parts of the pipeline are not there",
            where=folder,
            found=f"no folder {some(absent, 3)}",
            expected=f"a folder for each part that {INDEX} names",
            fix=AGAIN,
        )


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
