"""`lorafit demo`: the whole job on the embedded model and data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.training.config import Settings

SETTINGS: Mapping[str, Any] = {
    "r": 16,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_steps": 24,
    "warmup_steps": 0,
    "eval_strategy": "steps",
    "eval_steps": 12,
    "save_steps": 12,
    "eval_limit": 64,
    "samples": 4,
}
"""What the demo runs with; each of them can be set."""
FOLDER = "runs/demo"


def demo(
    context: typer.Context,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help=f"Optimizer steps. Default: {SETTINGS['max_steps']}.")
    ] = None,
    seed: options.Seed = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output-dir",
            metavar="DIR",
            help=f"Default: {FOLDER}, or {FOLDER}-2 and so on when a finished run is there.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a small model that comes along, and show what changed.

    SmolLM2-135M-Instruct learns to answer questions on Python's standard library: on a CPU, without a network. An
    interrupted demo goes on where it was.
    """
    from lorafit.cli.finish import finish
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved

    screen = Screen(as_json)
    layers = [
        ("the demo", SETTINGS),
        *gather(sets=set_ or (), flags={"max_steps": max_steps, "seed": seed, "output_dir": output_dir}),
    ]
    settings = resolved(layers, screen.say)
    if not settings.output_dir:
        settings = free(settings)
    command = shlex.join(["lorafit", *context.obj.arguments])
    finish(settings, command, screen, last="report")


def free(settings: Settings) -> Settings:
    """The settings with the first of the demo's folders that holds no finished run, and no other one."""
    from lorafit.errors import ConfigError
    from lorafit.training.folder import open_folder

    for number in count(1):
        candidate = settings.model_copy(update={"output_dir": FOLDER if number == 1 else f"{FOLDER}-{number}"})
        try:
            folder = open_folder(candidate)
        except ConfigError:
            continue  # another run's, or something else
        if folder.result() is None:
            return candidate
    raise AssertionError("numbers do not end")
