"""Where the ratios go with width, tokens, rank, sites and dropout: every method that PEFT has, ours beside PEFT's.

One setting at a time is moved away from a centre: rank 16, 1,024 tokens, all sites, no dropout.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import child, machine
from benchmarks.cases import SITES, wide
from benchmarks.statistic import Spread, ratios
from benchmarks.stored import Session, say
from benchmarks.variants import ALIKE, FLOOR, NO_DROPOUT, PEFT, Variant

NAME = "sweep"
HELP = "time and memory beside PEFT's against width, tokens, rank, sites and dropout"


@dataclass(frozen=True)
class Point:
    """One setting."""

    hidden: int
    tokens: int = 1024
    r: int = 16
    sites: str = "all"
    dropout: float = 0.0

    def variants(self) -> dict[str, Variant]:
        """Ours and PEFT's of each method that this setting makes sense for."""
        found = {}
        for method in ALIKE:
            if self.dropout and method in NO_DROPOUT:
                continue
            ours = Variant("ours", method, r=self.r, dropout=self.dropout, sites=self.sites)
            found[method] = ours
            found[PEFT + method] = replace(ours, side="peft")
        return found


@dataclass(frozen=True)
class Axes:
    """The settings at one width, beside the centre."""

    centre: Point
    r: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    dropout: tuple[float, ...] = (0.1,)

    def points(self) -> Iterator[Point]:
        """Each once, the centre first."""
        seen = {self.centre: None}
        seen |= {replace(self.centre, r=value): None for value in self.r}
        seen |= {replace(self.centre, tokens=value): None for value in self.tokens}
        seen |= {replace(self.centre, sites=value): None for value in self.sites}
        seen |= {replace(self.centre, dropout=value): None for value in self.dropout}
        yield from seen


GRID = {
    576: Axes(Point(576), (8, 16, 32, 64, 128, 256), (512, 1024, 2048, 4096), tuple(SITES)),
    1024: Axes(Point(1024), (8, 16, 64, 256), (512, 1024, 2048), ("q, v",)),
    2048: Axes(Point(2048, tokens=512), (16, 256)),
}
"""Width → settings; wider models take less of the grid, for they take longer."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--hidden", type=int, nargs="*", choices=list(GRID), default=list(GRID), help="widths")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count at each setting")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--layers", type=int, default=2, help="layers of each model")
    parser.add_argument("--memory", action="store_true", help="peak memory at the centres and with dropout, too")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    session = Session(NAME, NAME, options)
    points = [point for hidden in options.hidden for point in GRID[hidden].points()]
    say(f"{len(points)} settings, {options.rounds} rounds each")
    measured = [timed(point, options) for point in points]
    held = [point for point in points if options.memory and point.r == 16 and point.sites == "all"]
    return session.write(
        {
            "rounds": options.rounds,
            "warmup": options.warmup,
            "layers": options.layers,
            "points": measured,
            "memory": [weighed(point, options) for point in held],
        }
    )


def timed(point: Point, options: Namespace) -> dict[str, Any]:
    """The step times of one setting, measured in a process of its own."""
    found: dict[str, Any] = child.call(
        "sweep:group",
        threads=options.threads,
        point=asdict(point),
        layers=options.layers,
        rounds=options.rounds,
        warmup=options.warmup,
        seed=options.seed,
    )
    seconds = found["seconds"]
    shown = []
    for name in point.variants():
        if not name.startswith(PEFT):
            ours, other = (Spread.of(ratios(seconds, one, FLOOR)).median for one in (name, PEFT + name))
            shown.append(f"{name} {ours:.2f} ({other:.2f})")
    print(f"  {asdict(point)}: {', '.join(shown)}", flush=True)
    return {"point": asdict(point), **found}


def group(point: dict[str, Any], layers: int, rounds: int, warmup: int, seed: int, threads: int) -> dict[str, Any]:
    """One setting, in the process that this is called in."""
    import torch

    from benchmarks import rounds as turns

    torch.set_num_threads(threads)
    setting = Point(**point)
    case = wide(setting.hidden, setting.tokens, layers=layers)
    rate = machine.gemm_rate(case.tokens, case.hidden, case.intermediate)
    seconds = turns.measure(case, setting.variants(), rounds=rounds, warmup=warmup, seed=seed, say=say)
    operations = case.adapter_operations(setting.r, setting.sites, merging=not setting.dropout)
    return {"gemm_rate": rate, "adapter_operations": operations, "seconds": seconds}


def weighed(point: Point, options: Namespace) -> dict[str, Any]:
    """Peak memory of each variant at one setting."""
    case = wide(point.hidden, point.tokens, layers=options.layers)
    peaks = {
        name: child.call(
            "memory:peak", threads=options.threads, case=vars(case), variant=vars(variant), steps=3, seed=options.seed
        )
        for name, variant in point.variants().items()
    }
    ratio = {name: peaks[name]["peak"] / peaks[PEFT + name]["peak"] for name in peaks if not name.startswith(PEFT)}
    print(f"  memory {asdict(point)}: {', '.join(f'{name} {value:.2f}' for name, value in ratio.items())}", flush=True)
    return {"point": asdict(point), "peaks": peaks}
