"""Whether a launcher (torchrun, accelerate) started this process as one of several, told without importing torch."""

from __future__ import annotations

import os

from lorafit.cli.exits import WrongUsageError
from lorafit.errors import ConfigError

ALONE = "lorafit {command}"


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def heard() -> bool:
    """Whether this process is the one that speaks to people."""
    return not several() or os.environ.get("RANK", "0") == "0"


def refuse(command: str) -> None:
    """Raises `WrongUsageError` where a command that runs in one process was launched as several."""
    if several():
        raise WrongUsageError(
            ConfigError(
                "this command runs in one process",
                where=f"lorafit {command}",
                found=f"{os.environ['WORLD_SIZE']} of them",
                expected="no launcher; `lorafit train` can have several processes",
                fix=ALONE.format(command=command),
            )
        )
