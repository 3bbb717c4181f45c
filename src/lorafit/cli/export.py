"""`lorafit export`: an adapter in the files of other programs, compared with itself after it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.formats import FORMATS, Done, Job

FORMAT = "Format"


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="hf, vllm, gguf or diffusers.", show_default=False)],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", metavar="DIR", help="A new or empty directory.", show_default=False)
    ],
    merged: Annotated[
        bool,
        typer.Option("--merged", help="gguf: the whole model with the adapter in its weights.", rich_help_panel=FORMAT),
    ] = False,
    r: Annotated[
        int | None,
        typer.Option(
            "--r",
            min=1,
            help="vllm, gguf: the nearest LoRA of this rank, where there is no exact one.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            "--component",
            metavar="NAME",
            help="diffusers: unet, transformer, text_encoder or text_encoder_2. Default: as the layers' names tell.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="hf, gguf --merged: give a weight that another layer shares a copy of its own.",
            rich_help_panel=FORMAT,
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="What it is called there. Default: as the directory.", rich_help_panel=FORMAT
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="float32, bfloat16, float16, or q8_0 (gguf --merged). Default: that of the base for whole models, "
            "float32 for adapters.",
            rich_help_panel=FORMAT,
        ),
    ] = None,
    model: options.BaseModel = None,
    labels: options.Labels = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write an adapter for other programs: merged for Hugging Face, plain LoRA for vLLM, GGUF for llama.cpp, diffusers.

    What was written is read again and compared with the adapter. If they do not agree, that is said and the exit status
    is 1; the files stay.
    """
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.exporting.folder import check_free

    screen = Screen(as_json)
    with usage():
        job = Job(
            *(adapter, output_dir, name or output_dir.absolute().name, merged, untie, r, component, model, dtype),
            labels=labels,
            screen=screen,
        )
        kind = _checked(to, job)
        check_free(output_dir)
    quiet()
    done = kind(job)
    screen.say(f"written: {output_dir}", whole=True)
    result = {"output_dir": output_dir, "to": to, "difference": done.difference, "tolerance": done.tolerance}
    screen.result({**result, "of": done.what, **done.facts})
    _agree(done, output_dir)
    screen.say(f"max {done.what} difference {done.difference:.2g} (at most {done.tolerance:.2g} allowed)")


def _checked(to: str, job: Job) -> Callable[[Job], Done]:
    """The format's function. Raises `ConfigError` for one that is not known, or an option that it has not."""
    from lorafit.errors import ConfigError, nearest
    from lorafit.exporting.gguf_names import TYPES

    if to not in FORMATS:
        near = nearest(to, FORMATS)
        raise ConfigError(
            "no such format",
            where="--to",
            found=repr(to),
            expected=", ".join(FORMATS),
            near=near,
            fix=f"--to {next(iter(near), 'hf')}",
        )
    kind, words = FORMATS[to]
    given = {
        "--merged": job.merged,
        "--r": job.r is not None,
        "--component": job.component is not None,
        "--untie": job.untie,
        "--model": job.model is not None,
        "--labels": job.labels is not None,
    }
    odd = [word for word, there in given.items() if there and word not in words]
    odd += ["--untie"] if job.untie and to == "gguf" and not job.merged else []
    odd += ["--r"] if job.r is not None and job.merged else []
    if odd:
        raise ConfigError(f"{odd[0]} has no meaning for --to {to}", found=odd[0], fix=f"leave {odd[0]} out")
    known = TYPES if job.merged else TYPES[:3]
    if job.dtype not in (None, *known):
        raise ConfigError(
            "no such type here",
            where="--dtype",
            found=repr(job.dtype),
            expected=", ".join(known),
            near=nearest(str(job.dtype), known),
            fix="--dtype float32",
        )
    if job.component is not None:
        from lorafit.exporting.diffusers import COMPONENTS

        if job.component not in COMPONENTS:
            raise ConfigError(
                "no such part of a pipeline",
                where="--component",
                found=repr(job.component),
                expected=", ".join(COMPONENTS),
                near=nearest(job.component, COMPONENTS),
                fix="--component unet",
            )
    return kind


def _agree(done: Done, output: Path) -> None:
    from lorafit.errors import MergeError

    if not done.difference <= done.tolerance:
        raise MergeError(
            "what was written does not compute what the adapter computes; the files were left there",
            where=output,
            found=f"a difference of {done.difference:.3g} in {done.what}",
            expected=f"at most {done.tolerance:.3g}",
            fix="--dtype float32 rounds least; if it is float32 already, this is a bug",
        )
