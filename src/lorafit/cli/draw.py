"""`lorafit draw`: pictures of a pipeline with its adapters, beside each other on one sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.draw_asked import Asked
    from lorafit.cli.screen import Screen

SHEET = "Sheet"
SAMPLER = "Sampler"


def draw(
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="DIR|NAME",
            help="A directory that diffusers' save_pretrained wrote, or a hub name. Default: that of the first "
            "adapter's run.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="PATH[=WEIGHT]",
            help="A run of lorafit dreambooth, or a file that diffusers' load_lora_weights reads; give it several "
            "times for several subjects. Default: the pipeline alone.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Of the pipeline: float32, bfloat16, float16, or auto (bfloat16 where a GPU has it).",
            rich_help_panel=options.MODEL,
        ),
    ] = "auto",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="What to draw, a row each; give it several times. Default: the prompts of the adapters' runs.",
            rich_help_panel=SHEET,
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            "--rows",
            metavar="all|each|together",
            help="Of several adapters: a row for each, one for their sum by weight, or both.",
            rich_help_panel=SHEET,
        ),
    ] = "all",
    scale: Annotated[
        str,
        typer.Option(
            "--scale",
            metavar="NUMBERS",
            help="How strongly adapters act, a column each: 0,0.5,1. 0 is the pipeline alone.",
            rich_help_panel=SHEET,
        ),
    ] = "1",
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            metavar="NUMBER|LIST",
            help="So many pictures of each, or seeds with commas between them. Default: 4, or 1 with several scales.",
            rich_help_panel=SHEET,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FILE", help="The PNG file to write.", rich_help_panel=SHEET),
    ] = Path("sheet.png"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Of the sampler, for each picture.", rich_help_panel=SAMPLER)
    ] = 30,
    guidance: Annotated[
        float,
        typer.Option("--guidance", min=0.0, help="How closely the prompt is followed.", rich_help_panel=SAMPLER),
    ] = 7.5,
    negative: Annotated[
        str, typer.Option("--negative", metavar="TEXT", help="What not to draw.", rich_help_panel=SAMPLER)
    ] = "",
    size: Annotated[
        int | None,
        typer.Option("--size", min=8, help="Pixels of a side. Default: the pipeline's own.", rich_help_panel=SAMPLER),
    ] = None,
    r: Annotated[
        int | None,
        typer.Option(
            "--r",
            min=1,
            help="The sum of several as the nearest LoRA of this rank, where there is no exact one (DoRA).",
            rich_help_panel=SAMPLER,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Fold the adapters into the weights first: the same pictures but for rounding, drawn faster.",
            rich_help_panel=SAMPLER,
        ),
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Draw prompts with a pipeline and its adapters: a sheet with strengths and seeds beside each other.

    A picture depends on its prompt, its seed and the adapters' strength, and on nothing else of the sheet: what differs
    between two columns of one seed is the strength.
    """
    from lorafit.cli.draw_asked import Sampler, ask
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet_pipelines
    from lorafit.cli.screen import Screen

    screen = Screen(as_json)
    with usage():
        asked = ask(
            pipeline=pipeline,
            adapters=adapter or (),
            dtype=dtype,
            prompts=prompt or (),
            rows=rows,
            scale=scale,
            seeds=seeds,
            sampler=Sampler(steps, guidance, negative, size),
            r=r,
            merge=merge,
            output=output,
        )
    quiet_pipelines()
    _draw(asked, screen)


def _draw(asked: Asked, screen: Screen) -> None:
    import time

    from lorafit.cli.draw_sheet import drawn
    from lorafit.diffusion.drawing import write_png

    for line in asked.said:
        screen.say(line, whole=True)
    started = time.perf_counter()
    picture = drawn(asked, screen.say)
    seconds = time.perf_counter() - started
    if asked.output.exists():
        screen.say(f"{asked.output} was there, and is replaced", whole=True)
    write_png(picture, asked.output)
    screen.result({**told(asked), "seconds": seconds, "width": picture.width, "height": picture.height})
    screen.say(f"{asked.count:,} pictures in {seconds:.1f} s: {asked.output}", whole=True)


def told(asked: Asked) -> dict[str, Any]:
    """What was drawn, and where on the sheet it stands."""
    return {
        "output": asked.output,
        "pipeline": asked.pipeline,
        "prompts": asked.prompts,
        "rows": [
            {"prompt": prompt, "adapters": [{"path": one.path, "weight": one.weight} for one in row.subjects]}
            for prompt in asked.prompts
            for row in asked.rows
        ],
        "columns": [{"seed": seed, "scale": scale} for seed, scale in asked.columns],
        "steps": asked.sampler.steps,
        "guidance": asked.sampler.guidance,
        "merged": asked.merge,
    }
