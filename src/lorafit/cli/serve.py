"""`lorafit serve`: one base model and many adapters, behind OpenAI's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options

SERVER = "Server"
ACCESS = "Access"
LIMITS = "Limits"


def serve(
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            metavar="[NAME=]DIR",
            help="An adapter, a run, or a directory of such; may be given several times. "
            "Each is served by the name of its folder, or by NAME.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|NAME",
            help="The base model. Default: the one that the adapters name, or the embedded SmolLM2-135M-Instruct.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="What clients call the base. Default: its hub name, or its directory's.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    dtype: options.Dtype = None,
    quantise: options.RunQuantise = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Where to listen; 0 takes a free one.", rich_help_panel=SERVER),
    ] = 8000,
    log: Annotated[
        bool,
        typer.Option(
            "--log",
            help="A line on stderr for each request: its number, route, model, status and time. Never a text.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Clients have to bring the key in this file. Default: that in the variable LORAFIT_API_KEY, if any. "
            "Needed to listen on other addresses than this machine's own.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_load: Annotated[
        bool,
        typer.Option(
            "--allow-load",
            help="Let clients load and unload adapters of the directories of --adapters.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Another name by which the server is called, such as that of a proxy in front of it.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="What adapters may take, such as 2GB; those that were used longest ago make room. Default: no limit.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Answers written at a time.", rich_help_panel=LIMITS)
    ] = 32,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Requests that may wait.", rich_help_panel=LIMITS)
    ] = 128,
    max_cached: Annotated[
        int,
        typer.Option(
            "--max-cached",
            min=2,
            help="Tokens whose keys and values are kept, over all answers that are written.",
            rich_help_panel=LIMITS,
        ),
    ] = 65536,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Tokens of a prompt and its answer together. Default: what the model has.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout",
            metavar="TIME",
            help="The longest that a request may take, waiting included: 60s, 5min. Default: no limit.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Serve a base model and many adapters at once: OpenAI's interface, and a page to try them on.

    Every request names its model: the base or an adapter. Requests for different adapters are answered in one batch.
    The first Ctrl-C finishes the answers that are being written, for up to 30 seconds, and the second does not.
    """
    from lorafit.cli.listening import listen, read_key, run, where
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.cli.serving import Wanted, prepare, seconds

    screen = Screen()
    wanted = Wanted(
        adapters=tuple(adapters or ()),
        model=model,
        name=name,
        dtype=dtype,
        quantise=quantise,
        load=allow_load,
        memory=memory,
        rows=max_rows,
        waiting=max_waiting,
        cached=max_cached,
        context=context,
        seconds=seconds(timeout),
        place=where(host, port, allow_host or (), read_key(api_key_file)),
    )
    wanted.check()
    with listen(wanted.place) as bound:  # before the model is loaded: an address that is taken is said at once
        quiet()
        run(prepare(wanted, screen), bound, screen, log=log)
