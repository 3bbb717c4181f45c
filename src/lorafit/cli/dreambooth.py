"""`lorafit dreambooth`: teaches a diffusion pipeline a subject from a handful of pictures.

The function is long because its parameters are the options that the help shows.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.diffusion.settings import Settings
    from lorafit.training.spelling import Layer

EPILOG = (
    "Every setting of a run is an option by its own name (--sample-steps 20, --save-every 50, --crop random), and so "
    "are the fields of the method and the spellings of diffusers' scripts (--train_batch_size 2, --snr_gamma 5). "
    "Settings in --config may have any of these names."
)
PICTURES = "Pictures"
SAMPLES = "Samples"


def dreambooth(
    context: typer.Context,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="DIR|NAME",
            help="A directory that diffusers' save_pretrained wrote, or a hub name.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Of the pipeline: float32, bfloat16, float16, or auto (bfloat16 where a GPU has it). "
            "Adapters are float32.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    instance_images: Annotated[
        str | None,
        typer.Option(
            "--instance-images",
            metavar="DIR",
            help="The pictures of the subject: three to ten will do. A .txt file beside one is its own prompt.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(
            "--instance-prompt",
            metavar="TEXT",
            help='What they show, with a rare word for the subject: "a photo of sks dog".',
            rich_help_panel=PICTURES,
        ),
    ] = None,
    class_prompt: Annotated[
        str | None,
        typer.Option(
            "--class-prompt",
            metavar="TEXT",
            help='What the subject is one of: "a photo of a dog". Keeps what the pipeline knows of the others.',
            rich_help_panel=PICTURES,
        ),
    ] = None,
    class_images: Annotated[
        str | None,
        typer.Option(
            "--class-images",
            metavar="DIR",
            help="Pictures of the class; missing ones are drawn into it by the pipeline. Default: class/ of the run.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    keep_prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-prompt",
            metavar="TEXT",
            help="What else is to stay as it is, beside the class; give it several times. Every other class picture "
            "is drawn for one of these.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    num_class_images: Annotated[
        int | None,
        typer.Option("--num-class-images", help="So many of them. Default: 100.", rich_help_panel=PICTURES),
    ] = None,
    prior_loss_weight: Annotated[
        float | None,
        typer.Option(
            "--prior-loss-weight", help="Weight of the loss on the class. Default: 1.", rich_help_panel=PICTURES
        ),
    ] = None,
    eval_images: Annotated[
        str | None,
        typer.Option(
            "--eval-images",
            metavar="DIR",
            help="Further pictures of the subject, for the held-out loss alone. Default: those that are trained on, "
            "under noise that training never draws.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option("--resolution", help="Pixels of a side in training. Default: 512.", rich_help_panel=PICTURES),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            "--crop", metavar="centre|random", help="Of pictures that are not square.", rich_help_panel=PICTURES
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Show each picture mirrored, too.", rich_help_panel=PICTURES),
    ] = None,
    method: options.MethodName = None,
    r: options.R = None,
    alpha: options.Alpha = None,
    dropout: options.Dropout = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="LAYERS",
            help="Of the UNet or transformer: attention (the default), convolutions, all-linear, suffixes with commas "
            "between them (to_q,to_v), or one regular expression behind re:.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="LAYERS",
            help="Which layers not: suffixes, or an expression behind re:.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    train_text_encoder: Annotated[
        bool | None,
        typer.Option(
            "--train-text-encoder",
            help="Give the text encoders adapters of their own.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Optimizer steps. Default: 400.", rich_help_panel=options.TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Default: 1e-4 times what the method asks for.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            help="Pictures of the subject in a batch; as many of the class come to them. Default: 1.",
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--gradient-accumulation-steps", help="Batches in a step. Default: 1.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again in the backward pass: less memory, more time.",
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    min_snr: Annotated[
        float | None,
        typer.Option(
            "--min-snr",
            metavar="GAMMA",
            help="Weigh times by min-SNR (5 is usual). Default: all alike.",
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    sample_prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--sample-prompt",
            metavar="TEXT",
            help="What to draw on the way; give it several times. Default: both prompts above.",
            rich_help_panel=SAMPLES,
        ),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(
            "--sample-every",
            help="Steps between sheets of samples; 0: before and after alone. Default: 100.",
            rich_help_panel=SAMPLES,
        ),
    ] = None,
    sample_count: Annotated[
        int | None,
        typer.Option("--sample-count", help="Pictures of each prompt. Default: 4; 0: none.", rich_help_panel=SAMPLES),
    ] = None,
    output_dir: options.OutputDir = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Of crops, order, noise and initial values. Default: 42.", rich_help_panel=options.RUN
        ),
    ] = None,
    config: options.Config = None,
    set_: options.Set = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Teach a diffusion pipeline a subject from a handful of pictures (DreamBooth).

    Any method of the household trains on the UNet or transformer. The run's folder receives the adapter in diffusers'
    layout, sheets of samples on the way, records and a report. Ctrl-C saves a checkpoint; the same command goes on.
    """
    from lorafit.cli.dreambooth_finish import finish
    from lorafit.cli.screen import Screen
    from lorafit.cli.settings import gather

    screen = Screen(as_json)
    left = ("config", "set_", "as_json", "debug")
    flags = {name: value for name, value in context.params.items() if name not in left}
    settings = resolved(gather(config=config, sets=set_ or (), flags=flags, extra=context.args), screen)
    finish(settings, shlex.join(["lorafit", *context.obj.arguments]), screen)


def resolved(layers: Iterable[Layer], screen: Screen) -> Settings:
    """The settings, checked as far as they can be without pictures and pipeline.

    Raises:
        WrongUsageError: an unknown setting, one that is missing, or a value it cannot have.
    """
    from lorafit.cli.exits import usage
    from lorafit.diffusion.settings import resolve

    with usage():
        return resolve(layers, screen.say)
