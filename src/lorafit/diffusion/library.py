"""The library diffusers, where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

from lorafit.errors import MissingExtraError

INSTALL = "pip install 'lorafit[diffusion]'"


def library() -> Any:
    """The module `diffusers`. Raises `MissingExtraError` where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise MissingExtraError(
            "diffusers, which holds the pipelines, is not installed or cannot be imported",
            found=str(error).partition("\n")[0],
            expected="diffusers 0.35 or newer",
            fix=INSTALL,
        ) from error
