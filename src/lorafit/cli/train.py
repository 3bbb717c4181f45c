"""`lorafit train`: fine-tunes, shows what it came to, and goes on where it was stopped.

The function is long because its parameters are the options that the help shows.
"""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lorafit.cli import options

EPILOG = (
    "Every argument of transformers.TrainingArguments is taken by its own name (--save-steps 5, --bf16, "
    "--no-gradient-checkpointing), and so are the spellings of PEFT, TRL, LLaMA-Factory, Axolotl and others "
    "(--lora_r 8, --cutoff_len 512). Settings in --config may have any of these names."
)
PATTERN = (
    "suffixes of module names with commas between them (q_proj,v_proj), or one regular expression for whole names "
    "behind re: ('re:.*layers[.][0-3][.].*_proj')"
)


def train(
    context: typer.Context,
    model: options.Model = None,
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    data: options.Data = None,
    data_split: options.DataSplit = None,
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    eval_limit: options.EvalLimit = None,
    slice: options.Slice = None,  # noqa: A002 (the option's name)
    target: options.Target = None,
    general: options.General = None,
    columns: options.Columns = None,
    task: options.Task = None,
    max_length: options.MaxLength = None,
    method: options.MethodName = None,
    r: options.R = None,
    alpha: options.Alpha = None,
    dropout: options.Dropout = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="MODULES",
            help=f"Which layers: all-linear (the default), {PATTERN}.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="MODULES",
            help="Which layers not: written like --targets.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Default: from the model's width, announced.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    max_steps: options.MaxSteps = None,
    num_train_epochs: Annotated[
        float | None,
        typer.Option("--num-train-epochs", help="Default: 1.", rich_help_panel=options.TRAINING),
    ] = None,
    per_device_train_batch_size: options.BatchSize = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--gradient-accumulation-steps", help="Batches in a step. Default: 1.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    output_dir: options.OutputDir = None,
    seed: options.Seed = None,
    shard: options.Shard = None,
    samples: options.Samples = None,
    max_new_tokens: options.MaxNewTokens = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a model on your data.

    Prints the resolved settings first and held-out loss before and after last. Ctrl-C saves a checkpoint; the same
    command goes on from there. The run's folder receives the adapter, its records and a report. Under torchrun or
    accelerate launch (torchrun --nproc-per-node 2 -m lorafit train ...) it is one run in several processes.
    """
    from lorafit.cli.finish import finish
    from lorafit.cli.launched import heard
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather, resolved

    screen = Screen(as_json, heard=heard())
    given = context.params
    flags = {name: value for name, value in given.items() if name not in ("config", "set_", "as_json", "debug")}
    layers = gather(config=config, sets=set_ or (), flags=flags, extra=context.args)
    command = shlex.join(["lorafit", *context.obj.arguments])
    finish(resolved(layers, screen.say), command, screen, last="verdict")
