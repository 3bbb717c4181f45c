"""Everything that docs/results/speed.md shows, one measurement after the other, and then the page."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

from benchmarks import billion, forecast, memory, report, steps, storing, sweep, train
from benchmarks.stored import say

NAME = "all"
HELP = "what docs/results/speed.md shows, one measurement after the other, then the report"
PARTS: tuple[tuple[ModuleType, list[str], int], ...] = (
    (steps, ["six"], 12),
    (steps, ["six", "--instructions", "avx2", "--rounds", "20"], 12),
    (memory, ["six"], 8),
    (steps, ["smollm2"], 20),
    (memory, ["smollm2"], 20),
    (train, [], 25),
    (forecast, [], 5),
    (billion, [], 5),
    (storing, [], 4),
    (sweep, ["--memory"], 45),
)
"""The commands, their arguments, and about how many minutes they take on two quiet cores."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    minutes = sum(part[2] for part in PARTS)
    parser.description = f"{parser.description} About {minutes} minutes on two quiet cores."
    parser.add_argument("--page", default=str(report.PAGE), help="the page to write")


def run(options: Namespace) -> Path:
    """Runs the parts; what is done is stored even if a later part fails."""
    for module, given, minutes in PARTS:
        say(f"{module.NAME} {' '.join(given)}: about {minutes} min")
        parser = ArgumentParser()
        module.arguments(parser)
        own = parser.parse_args(given)
        module.run(
            Namespace(**{**vars(own), "threads": options.threads, "seed": options.seed, "output": options.output})
        )
    return report.run(Namespace(output=options.output, page=options.page, no_pictures=False))
