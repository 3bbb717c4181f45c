"""What a batch costs whose rows have different adapters: beside the base model, and beside PEFT's `adapter_names`."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import child, machine
from benchmarks.cases import CASES, SITES, Case
from benchmarks.statistic import Spread, ratios
from benchmarks.stored import FOLDER, Session, say

if TYPE_CHECKING:
    from torch import Tensor

NAME = "mixed"
HELP = "batches of different adapters beside the base model and PEFT"
FLOOR = "base"
OURS, PEFT = "lorafit", "PEFT"
COUNTS = (1, 4, 8, 32)
"""Adapters of one batch."""
ADDED = 8
"""Adapters that are brought into memory one by one, for the time of that."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(FOLDER / "serving"))
    parser.add_argument("case", choices=list(CASES), nargs="?", default="smollm2", help="the model")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each row before decoding")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--without-peft", action="store_true", help="leave PEFT out: it takes most of the time")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    session = Session(NAME, f"{NAME}-{options.case}", options)
    measured = child.call(
        "mixed:measured",
        threads=options.threads,
        case=vars(CASES[options.case]),
        rows=options.rows,
        prompt=options.prompt,
        rank=options.rank,
        rounds=options.rounds,
        warmup=options.warmup,
        seed=options.seed,
        peft=not options.without_peft,
    )
    for phase in ("prefill", "decode"):
        print(f"{phase}:")
        print("\n".join(table(measured[phase])), flush=True)
    for side, seconds in measured["added"].items():
        print(f"adding an adapter, {side}: {Spread.of(seconds).median * 1e3:.1f} ms", flush=True)
    return session.write({"case": vars(CASES[options.case]), **measured})


def table(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """The ratios to the base as lines of text."""
    lines = []
    for name in seconds:
        spread = Spread.of(ratios(seconds, name, FLOOR))
        middle = Spread.of(seconds[name]).median
        lines.append(f"  {name:24} {spread.median:6.3f}  ({spread.low:.3f}-{spread.high:.3f})  {middle * 1e3:9.1f} ms")
    return lines


Pass = Callable[["Tensor", Any], Any]
"""A forward pass of some tokens over a cache (None for none)."""


def measured(
    case: dict[str, Any],
    rows: int,
    prompt: int,
    rank: int,
    rounds: int,
    warmup: int,
    seed: int,
    peft: bool,
    threads: int,
) -> dict[str, Any]:
    """One measurement, in the process that this is called in."""
    import torch

    torch.set_num_threads(threads)
    chance = random.Random(seed)
    base = Case(**case).model(seed).eval()
    base.config.use_cache = True
    with tempfile.TemporaryDirectory() as root:
        folders = saved(base, Path(root), max(*COUNTS, ADDED), rank)
        added: dict[str, list[float]] = {}
        sides = {OURS: _ours(copy.deepcopy(base), folders, added)}
        if peft:
            sides[PEFT] = _theirs(copy.deepcopy(base), folders, added)
    orders = {count: _spread_out(list(folders), rows, count, chance) for count in COUNTS}
    passes: dict[str, Pass] = {FLOOR: lambda ids, cache: _forward(base, ids, cache)}
    for side, make in sides.items():
        for count, names in orders.items():
            passes[f"{side}, {count}"] = make(names)
    ids = torch.randint(case["vocabulary"], (rows, prompt), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        apart = _apart(passes, ids, sides)
        prefill = _turns(passes, ids, False, rounds, warmup, chance)
        decode = _turns(passes, ids, True, rounds, warmup, chance)
    return {
        "rows": rows,
        "prompt": prompt,
        "rank": rank,
        "gemm_rate": machine.gemm_rate(),
        "added": added,
        "apart": apart,
        "prefill": prefill,
        "decode": decode,
    }


def saved(base: Any, root: Path, number: int, rank: int) -> dict[str, Path]:
    """Adapters of random numbers, saved as PEFT's files."""
    import torch

    import lorafit as lf

    folders = {}
    handle = lf.attach(copy.deepcopy(base), lf.LoRA(r=rank), list(SITES["all"]), seed=0)
    for each in range(number):
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_(std=0.02)
        folders[f"adapter-{each}"] = Path(handle.save(root / f"adapter-{each}"))
    return folders


def _spread_out(names: Sequence[str], rows: int, count: int, chance: random.Random) -> list[str]:
    """A name for each row, as many rows of one as of another, in no order."""
    chosen = [names[row % count] for row in range(rows)]
    chance.shuffle(chosen)
    return chosen


def _forward(model: Any, ids: Tensor, cache: Any, **more: Any) -> Any:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)


def _ours(model: Any, folders: Mapping[str, Path], added: dict[str, list[float]]) -> Callable[[list[str]], Pass]:
    from lorafit.serve.bank import AdapterBank

    bank = AdapterBank(model)
    for number, (name, folder) in enumerate(folders.items()):
        bank.register(name, folder)
        begun = time.perf_counter()
        bank.take(name)
        if 0 < number <= ADDED:  # the first one brings what all need
            added.setdefault(OURS, []).append(time.perf_counter() - begun)

    def make(names: list[str]) -> Pass:
        def go(ids: Tensor, cache: Any) -> Any:
            with bank.rows(names):
                return _forward(model, ids, cache)

        return go

    return make


def _theirs(model: Any, folders: Mapping[str, Path], added: dict[str, list[float]]) -> Callable[[list[str]], Pass]:
    from peft import PeftModel

    wrapped: Any = None
    for number, (name, folder) in enumerate(folders.items()):
        begun = time.perf_counter()
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            wrapped.load_adapter(folder, name)
        if 0 < number <= ADDED:
            added.setdefault(PEFT, []).append(time.perf_counter() - begun)
    wrapped.eval()

    def make(names: list[str]) -> Pass:
        return lambda ids, cache: _forward(wrapped, ids, cache, adapter_names=names)

    return make


def _apart(passes: Mapping[str, Pass], ids: Tensor, sides: Mapping[str, Any]) -> dict[str, float]:
    """How far both sides' logits are from each other, as a share of how far they are from the base's."""
    if len(sides) < 2:
        return {}
    floor = passes[FLOOR](ids, None).logits
    found = {}
    for count in COUNTS:
        ours, theirs = (passes[f"{side}, {count}"](ids, None).logits for side in (OURS, PEFT))
        found[str(count)] = float((ours - theirs).abs().max() / (theirs - floor).abs().max())
    return found


def _turns(
    passes: Mapping[str, Pass], ids: Tensor, one_token: bool, rounds: int, warmup: int, chance: random.Random
) -> dict[str, list[float]]:
    """Seconds of each pass in each round: of the whole prompt, or of one token after it."""
    from transformers import DynamicCache

    seconds: dict[str, list[float]] = {name: [] for name in passes}
    past: Any = None
    token = ids[:, :1]
    for number in range(warmup + rounds):
        order = list(passes)
        chance.shuffle(order)
        for name in order:
            cache = DynamicCache()
            if one_token:
                if past is None:
                    past = DynamicCache()
                    passes[FLOOR](ids, past)
                cache = copy.deepcopy(past)
            gc.collect()
            gc.disable()
            begun = time.perf_counter()
            passes[name](token if one_token else ids, cache)
            passed = time.perf_counter() - begun
            gc.enable()
            if number >= warmup:
                seconds[name].append(passed)
        if number + 1 == warmup:
            say(f"  {'decode' if one_token else 'prefill'}: {len(passes)} passes in turn, {rounds} rounds")
    return seconds
