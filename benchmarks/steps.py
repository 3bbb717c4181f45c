"""Step times: every method beside the floor, full fine-tuning and PEFT, taking turns in one process."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import child, machine, rounds
from benchmarks.cases import ABOUT, CASES
from benchmarks.stored import Session, say
from benchmarks.variants import FLOOR, GROUPS, VARIANTS

NAME = "steps"
HELP = "step times beside the floor and PEFT, interleaved in one process"
ROUNDS = {"six": 30, "smollm2": 8, "tiny": 3}
"""Rounds where the user names none: about 10 minutes for `six`, 15 for `smollm2`, on two cores."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "case", choices=list(CASES), nargs="?", default="six", help="; ".join(map(": ".join, ABOUT.items()))
    )
    parser.add_argument("--rounds", type=int, help=f"rounds that count; by default {ROUNDS}")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--variants", help=f"names with semicolons between them, of: {'; '.join(VARIANTS)}")
    parser.add_argument(
        "--instructions",
        choices=list(child.INSTRUCTIONS),
        default="all",
        help="those of the processor that may be used; the bars were set with AVX2",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base weights")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    case = replace(CASES[options.case], dtype=options.dtype)
    groups = GROUPS[options.case]
    if options.variants:
        groups = (tuple(chosen(options.variants)),)
    count = options.rounds or ROUNDS[options.case]
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    suffix += "" if options.instructions == "all" else f"-{options.instructions}"
    session = Session(NAME, f"{NAME}-{options.case}{suffix}", options)
    measured = []
    for group in groups:
        names = [name for name in group if name != FLOOR]
        say(f"{len(names)} variants and the floor, {count} rounds")
        seconds = child.call(
            "steps:group",
            threads=options.threads,
            instructions=options.instructions,
            case=vars(case),
            names=names,
            rounds=count,
            warmup=options.warmup,
            seed=options.seed,
        )
        measured.append(seconds)
        print("\n".join(rounds.table(seconds["seconds"])), flush=True)
    named = {name: VARIANTS[name] for group in groups for name in group}
    return session.write(
        {
            "case": {**vars(case), "about": ABOUT[case.name]},
            "rounds": count,
            "instructions": options.instructions,
            "warmup": options.warmup,
            "variants": rounds.plain({FLOOR: VARIANTS[FLOOR], **named}),
            "groups": measured,
        }
    )


def chosen(text: str) -> list[str]:
    """The variants that a list names."""
    names = [name.strip() for name in text.split(";") if name.strip()]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"no such variants: {unknown}; there are: {'; '.join(VARIANTS)}")
    return names


def group(case: dict[str, Any], names: list[str], rounds: int, warmup: int, seed: int, threads: int) -> dict[str, Any]:
    """One group, in the process that this is called in."""
    import torch

    from benchmarks import rounds as turns
    from benchmarks.cases import Case

    torch.set_num_threads(threads)
    variants = {name: VARIANTS[name] for name in names}
    rate = machine.gemm_rate()
    seconds = turns.measure(Case(**case), variants, rounds=rounds, warmup=warmup, seed=seed, say=say)
    return {"gemm_rate": rate, "peak_bytes": machine.resident()["peak"], "seconds": seconds}
