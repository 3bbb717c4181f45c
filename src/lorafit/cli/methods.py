"""`lorafit methods`: the household, from `lorafit.METHODS`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.layers import Shape

DEFAULT = "SmolLM2-135M"
LAYERS = 30
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""Of one layer of SmolLM2-135M (q, k, v, o, gate, up, down), so that the table needs no model."""


def methods(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|NAME",
            help=f"Count the trained numbers for this model. Only its config is read. Default: {DEFAULT}.",
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the methods: what each trains, how many numbers that is, where it can be used, and its paper."""
    from lorafit.cli.screen import Screen
    from lorafit.methods.table import COLUMNS, rows

    screen = Screen(as_json)
    shapes = default_shapes() if model is None else shapes_of(model)
    name = DEFAULT if model is None else model
    found = rows(shapes)
    screen.table(COLUMNS, [row.cells() for row in found], right=(2,), whole=(0, 2))
    screen.say(f"numbers: trained at the defaults on the {len(shapes)} linear layers of {name} (all-linear)")
    screen.say("in PEFT, in vLLM: as what its files are read, or what makes such files (export, lorafit.convert)")
    screen.result({"model": name, "sites": len(shapes), "methods": [asdict(row) for row in found]})


def default_shapes() -> list[Shape]:
    """The linear layers of the embedded model."""
    from lorafit.layers import Shape

    return [Shape(*shape) for shape in SHAPES * LAYERS]


def shapes_of(model: str) -> list[Shape]:
    """The shapes of a model's linear layers; its weights are not loaded."""
    import torch
    from transformers import AutoConfig, AutoModel

    from lorafit.cli.quiet import quiet
    from lorafit.errors import ConfigError
    from lorafit.plan import Modules, all_linear
    from lorafit.training.models import locate

    quiet()
    located = locate(model, lambda _: None)
    try:
        with torch.device("meta"):
            empty = AutoModel.from_config(AutoConfig.from_pretrained(located.path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model's config cannot be read: {str(error).strip().partition(chr(10))[0]}",
            where=f"model: {model}",
            fix="name a model directory, or a hub name that can be reached",
        ) from error
    modules = Modules.of(empty)
    return [site.shape for site in modules.sites(all_linear(modules))]
