"""`lorafit compare`: the methods on the user's own data, with the same budget each.

The function is long because its parameters are the options that the help shows.
"""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lorafit.cli import options

EPILOG = (
    "Settings of `lorafit train` are shared by all runs (--alpha 32, --set packing=false, --config shared.yaml); "
    "those of one method stand under its name: --set lora.r=8, or a mapping in the file."
)
SPENT = "What is spent"


def compare(
    context: typer.Context,
    model: options.Model = None,
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    data: options.Data = None,
    data_split: options.DataSplit = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="PATH|NAME",
            help="The test part. Default: held out of the data.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    eval_split: Annotated[
        str | None,
        typer.Option(
            "--eval-split",
            metavar="SHARE|NUMBER",
            help="Of the records for validation, and again for the test. Default: 0.1, and 100 and 200 at most.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    eval_limit: Annotated[
        int | None,
        typer.Option("--eval-limit", help="Of these two parts, so many at most.", rich_help_panel=options.DATA),
    ] = None,
    columns: options.Columns = None,
    task: options.Task = None,
    max_length: options.MaxLength = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B,...", help="Default: all nine.", rich_help_panel=options.METHOD),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="base,full,probe",
            help="Beside them: the base model as it is (always), all weights trained, the head alone trained.",
            rich_help_panel=options.METHOD,
        ),
    ] = "base",
    r: Annotated[
        int | None,
        typer.Option(
            "--r", help="Rank, where a method has one. Default: the method's.", rich_help_panel=options.METHOD
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="MODULES",
            help="Which layers, as for `lorafit train`. Default: all-linear.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    max_steps: options.MaxSteps = None,
    num_train_epochs: Annotated[
        float | None,
        typer.Option("--num-train-epochs", help="Default: 1.", rich_help_panel=options.TRAINING),
    ] = None,
    per_device_train_batch_size: options.BatchSize = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Plan what fits into 20min, 2h; says what it left out.",
            rich_help_panel=SPENT,
        ),
    ] = None,
    rates: Annotated[
        int, typer.Option("--rates", help="Learning rates to try for each candidate.", rich_help_panel=SPENT)
    ] = 5,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Seeds that are reported; 3 at least.", rich_help_panel=SPENT)
    ] = 3,
    metric: Annotated[
        str, typer.Option("--metric", metavar="loss|accuracy", help="What is ranked by.", rich_help_panel=options.RUN)
    ] = "loss",
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run trials on a Ray cluster: auto, ray://host:10001.",
            rich_help_panel=SPENT,
        ),
    ] = None,
    output_dir: options.OutputDir = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Of the split and the search; the seeds after it are reported. Default: 42.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare the methods on your data.

    Each method has the same records and steps, a learning rate of its own that was chosen on validation records, and
    three seeds or more, measured on test records that no choice has seen. Stopped or killed, the same command goes on.
    """
    from lorafit.cli.comparing import Wishes, go
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather

    own = ("methods", "reference", "budget", "rates", "seeds", "metric", "ray", "output_dir")
    besides = ("config", "set_", "as_json", "debug")
    flags = {name: value for name, value in context.params.items() if name not in (*own, *besides)}
    layers = gather(config=config, sets=set_ or (), flags=flags, extra=context.args)
    wishes = Wishes(
        layers=layers,
        methods=None if methods is None else _names(methods),
        references=_names(reference),
        budget=budget,
        rates=rates,
        seeds=seeds,
        metric=metric,
        ray=ray,
        output_dir=output_dir,
        command=shlex.join(["lorafit", *context.obj.arguments]),
    )
    go(wishes, Screen(as_json))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
