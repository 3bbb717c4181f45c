"""`python -m benchmarks COMMAND`."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from types import ModuleType

from benchmarks import (
    all_of_it,
    billion,
    dreambooth,
    forecast,
    head,
    keeping,
    load,
    machine,
    memory,
    mixed,
    real,
    report,
    serving,
    steps,
    stored,
    storing,
    sweep,
    throughput,
    train,
    vision,
    vision_page,
)
from benchmarks.child import ChildError
from benchmarks.stored import ResultsError, say

COMMANDS: tuple[ModuleType, ...] = (
    steps,
    memory,
    sweep,
    storing,
    train,
    forecast,
    billion,
    head,
    all_of_it,
    report,
    keeping,
    real,
    mixed,
    throughput,
    load,
    serving,
    vision,
    dreambooth,
    vision_page,
)


def common() -> ArgumentParser:
    """What every command takes. Each has its own: a default that one sets would be that of all others, too."""
    made = ArgumentParser(add_help=False, formatter_class=ArgumentDefaultsHelpFormatter)
    made.add_argument("--threads", type=int, default=machine.physical_cores(), help="of torch; by default one a core")
    made.add_argument("--seed", type=int, default=0, help="of weights, batches and orders")
    made.add_argument("--output", default=str(stored.FOLDER), help="folder of the JSON files")
    return made


def parser() -> ArgumentParser:
    """The command line: what every command takes, and the commands."""
    top = ArgumentParser(
        prog="python -m benchmarks",
        description="What training with adapters and serving them costs, beside PEFT and TRL.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        each = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            parents=[common()],
            formatter_class=ArgumentDefaultsHelpFormatter,
        )
        module.arguments(each)
        each.set_defaults(run=module.run)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 1 is a failure that is told in one line."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ResultsError, ChildError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped: what was being measured has no result yet")
        return 130
    return 0


if __name__ == "__main__":
    # A kill ends what was started, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
