"""The table of commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lorafit.cli import (
    chat,
    check,
    compare,
    demo,
    dimension,
    draw,
    dreambooth,
    eval,  # noqa: A004 (a command is called eval)
    export,
    inspection,
    merge,
    methods,
    plan,
    pseudo,
    resize,
    serve,
    train,
)
from lorafit.cli.exits import USAGE
from lorafit.cli.launched import refuse
from lorafit.cli.openended import OpenEnded, dashed
from lorafit.cli.options import Debug

ALSO_LAUNCHED = "train"
"""The command that may run as several processes of one run."""
EPILOG = "Exit status: 0 done, 1 input or data must be mended, 2 wrong usage, 130 interrupted."


def command() -> Any:
    """The whole command line, ready for `main(args=...)`."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"token_normalize_func": dashed, "help_option_names": ["--help", "-h"]},
        epilog=EPILOG,
    )
    app.callback(invoke_without_command=True)(_root)
    app.command("demo", help=_unwrapped(demo.demo))(demo.demo)
    app.command("train", help=_unwrapped(train.train), cls=OpenEnded, epilog=train.EPILOG)(train.train)
    app.command("compare", help=_unwrapped(compare.compare), cls=OpenEnded, epilog=compare.EPILOG)(compare.compare)
    app.command("plan", help=_unwrapped(plan.plan), cls=OpenEnded, epilog=plan.EPILOG)(plan.plan)
    app.command("eval", help=_unwrapped(eval.evaluate))(eval.evaluate)
    app.command("chat", help=_unwrapped(chat.chat))(chat.chat)
    app.command("serve", help=_unwrapped(serve.serve))(serve.serve)
    app.command("dimension", help=_unwrapped(dimension.dimension), cls=OpenEnded, epilog=dimension.EPILOG)(
        dimension.dimension
    )
    app.command("few-labels", help=_unwrapped(pseudo.few_labels), cls=OpenEnded, epilog=pseudo.EPILOG)(
        pseudo.few_labels
    )
    app.command("dreambooth", help=_unwrapped(dreambooth.dreambooth), cls=OpenEnded, epilog=dreambooth.EPILOG)(
        dreambooth.dreambooth
    )
    app.command("draw", help=_unwrapped(draw.draw))(draw.draw)
    app.command("inspect", help=_unwrapped(inspection.inspect))(inspection.inspect)
    app.command("resize", help=_unwrapped(resize.resize))(resize.resize)
    app.command("export", help=_unwrapped(export.export))(export.export)
    app.command("merge", help=_unwrapped(merge.merge))(merge.merge)
    app.command("check", help=_unwrapped(check.check))(check.check)
    app.command("methods", help=_unwrapped(methods.methods))(methods.methods)
    return typer.main.get_command(app)


def _unwrapped(function: Callable[..., None]) -> str:
    """The docstring with each paragraph in one line, for Typer to wrap."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _version(asked: bool) -> None:
    if asked:
        from lorafit import __version__

        typer.echo(f"lorafit {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Low-rank adaptation of language models and classifiers: train, try, measure, merge.

    Begin with `lorafit demo`: it fine-tunes a small model that comes along, and shows what changed.
    """
    if context.invoked_subcommand not in (None, ALSO_LAUNCHED):
        refuse(context.invoked_subcommand)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)
