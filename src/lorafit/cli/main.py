"""The console script: runs a command, and turns whatever it raises into a message and an exit status."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lorafit.cli.exits import DONE, INTERRUPTED, MEND, USAGE, StoppedError, WrongUsageError
from lorafit.cli.launched import heard
from lorafit.errors import LorafitError, LorafitWarning

INSTALL = "pip install 'lorafit[train]'"
UNEXPECTED = "this is a bug or an unexpected condition; --debug shows where"


@dataclass
class State:
    """What the commands and this module share.

    Attributes:
        arguments: the command line, without the program's name.
        debug: whether errors come with their traceback.
    """

    arguments: tuple[str, ...]
    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; those of this process if None.

    Returns:
        The exit status: 0 done, 1 the input must be mended, 2 wrong usage, 130 interrupted.
    """
    state = State(tuple(sys.argv[1:] if arguments is None else arguments))
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: the command line needs the package {error.name!r}\n  fix:      {INSTALL}\n")
        return MEND
    # Typer's base of all usage errors, which is click's under older releases; it is public under neither's own name.
    wrong_words: type[Exception] = typer.BadParameter.__mro__[1]
    with warnings.catch_warnings():
        warnings.simplefilter("always", LorafitWarning)
        warnings.showwarning = _show_warning
        try:
            return _run(state)
        except StoppedError:
            return INTERRUPTED
        except (KeyboardInterrupt, typer.Abort):
            sys.stderr.write("\ninterrupted\n")
            return INTERRUPTED
        except WrongUsageError as wrong:
            return _report(str(wrong), wrong, USAGE, state) if heard() else USAGE  # all processes have the same line
        except LorafitError as error:
            return _report(str(error), error, MEND, state)
        except wrong_words as error:
            return _report(_usage_text(error), error, USAGE, state)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            return _report(f"{type(error).__name__}: {first}\n  fix:      {UNEXPECTED}", error, MEND, state)


def _run(state: State) -> int:
    from lorafit.cli.app import command

    status = command().main(args=list(state.arguments), prog_name="lorafit", standalone_mode=False, obj=state)
    if status == INTERRUPTED:  # a newer Typer makes this of a KeyboardInterrupt
        raise KeyboardInterrupt
    return status if isinstance(status, int) else DONE


def _usage_text(error: Any) -> str:
    asked = "lorafit" if error.ctx is None else error.ctx.command_path
    return f"{error.format_message()}\n  fix:      see {asked} --help"


def _report(text: str, error: BaseException, status: int, state: State) -> int:
    """Says on stderr what went wrong, with the traceback if it was asked for."""
    from rich.console import Console
    from rich.text import Text

    if state.debug:
        traceback.print_exception(error, file=sys.stderr)
    head, *rows = text.split("\n")
    said = Text.assemble(("error: ", "bold red"), (head, "bold"))
    for row in rows:
        label, colon, value = row.partition(":")
        known = colon and label.strip() in ("where", "found", "expected", "nearest", "fix")
        said.append("\n")
        said.append_text(Text.assemble((label + colon, "dim"), value) if known else Text(row))
    Console(stderr=True, highlight=False).print(said, soft_wrap=True)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for a warning; one that is not this library's says whose it is."""
    whose = "" if issubclass(category, LorafitWarning) else f" ({category.__name__} from {_package(filename)})"
    (file or sys.stderr).write(f"warning{whose}: {message}\n")


def _package(filename: str) -> str:
    """The package that a file of site-packages belongs to, else the file's name.

    >>> _package("/usr/lib/python3/site-packages/torch/utils/data.py")
    'torch'
    """
    parts = Path(filename).parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else filename
