"""Peak memory: every variant in a process of its own."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import child, machine
from benchmarks.cases import ABOUT, CASES, Case
from benchmarks.rounds import plain
from benchmarks.statistic import Spread
from benchmarks.steps import chosen
from benchmarks.stored import Session, say
from benchmarks.variants import FLOOR, GROUPS, VARIANTS, Variant

NAME = "memory"
HELP = "peak resident memory of every variant, each in a process of its own"


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("case", choices=list(CASES), nargs="?", default="six", help="as for steps")
    parser.add_argument("--steps", type=int, default=3, help="steps of each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each variant")
    parser.add_argument("--variants", help="names with semicolons between them, as for steps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base weights")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    case = replace(CASES[options.case], dtype=options.dtype)
    names = chosen(options.variants) if options.variants else [name for group in GROUPS[options.case] for name in group]
    names = list(dict.fromkeys([FLOOR, *names]))
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    session = Session(NAME, f"{NAME}-{options.case}{suffix}", options)
    say(f"{len(names)} variants, {options.repeats} processes each")
    found = measure(case, {name: VARIANTS[name] for name in names}, options)
    return session.write(
        {
            "case": {**vars(case), "about": ABOUT[case.name]},
            "steps": options.steps,
            "repeats": options.repeats,
            "variants": plain({name: VARIANTS[name] for name in names}),
            "peaks": found,
        }
    )


def measure(case: Case, variants: dict[str, Variant], options: Namespace) -> dict[str, list[dict[str, int]]]:
    """Name → what each process found."""
    found: dict[str, list[dict[str, int]]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name, variant in variants.items():
            found[name].append(
                child.call(
                    "memory:peak",
                    threads=options.threads,
                    case=vars(case),
                    variant=vars(variant),
                    steps=options.steps,
                    seed=options.seed,
                )
            )
    for name, each in found.items():
        print(f"  {name:44} {Spread.of([one['peak'] for one in each]).median / 2**20:8.0f} MiB", flush=True)
    return found


def peak(case: dict[str, Any], variant: dict[str, Any], steps: int, seed: int, threads: int) -> dict[str, int]:
    """Bytes resident after the imports, after the model is built, and at the highest, of the process this runs in."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from benchmarks.variants import trainee

    torch.set_num_threads(threads)
    what, chosen_variant = Case(**case), Variant(**variant)
    _import(chosen_variant.side)
    imported = machine.resident()["now"]
    made = trainee(chosen_variant, what.model(seed), seed)
    built = machine.resident()["now"]
    batches = what.batches(seed)
    for _ in range(steps):
        made.step(next(batches))
    return {"imported": imported, "built": built, "peak": machine.resident()["peak"]}


def _import(side: str) -> None:
    """What the variant's library takes by itself belongs to the imports."""
    if side == "ours":
        import lorafit.checkpoint  # noqa: F401
    elif side == "peft":
        import peft  # noqa: F401
