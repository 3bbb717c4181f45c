"""The output head and its cross-entropy alone: time and memory of four ways to the loss and its gradient.

The head is frozen, as it is under adapters. A share of the positions is learnt, as the answers of a chat are; what a
way does with the others is its own affair: lorafit and plain torch leave them out first, TRL does so on GPUs only.
"""

from __future__ import annotations

import gc
import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import child, machine
from benchmarks.statistic import Spread, ratios
from benchmarks.stored import Session, say

NAME = "head"
HELP = "the output head and its cross-entropy alone, beside torch's and TRL's"
OURS = "lorafit"
WAYS = (OURS, "torch", "torch, chunked", "TRL, fused")
IGNORED = -100
RESET = Path("/proc/self/clear_refs")
Way = Callable[[Any, Any], Any]
"""(hidden states of all positions, their targets) → the summed loss."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048], help="positions")
    parser.add_argument("--learnt", type=float, default=1.0, help="the share of them that is learnt")
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the head")
    parser.add_argument("--hidden", type=int, default=576, help="columns of the head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of head and states")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    learnt = "" if options.learnt == 1 else f"-{options.learnt:g}"
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    session = Session(NAME, f"{NAME}{learnt}{suffix}", options)
    shape = {name: getattr(options, name) for name in ("learnt", "vocabulary", "hidden", "dtype", "seed", "threads")}
    measured = []
    for rows in options.rows:
        seconds = child.call("head:times", rows=rows, rounds=options.rounds, warmup=options.warmup, **shape)
        peaks = {way: child.call("head:peak", rows=rows, way=way, **shape) for way in WAYS}
        measured.append({"rows": rows, **seconds, "bytes": peaks})
        print(f"{rows} positions", *_table(seconds["seconds"], peaks), sep="\n", flush=True)
    fixed = ("learnt", "vocabulary", "hidden", "dtype", "rounds", "warmup")
    return session.write({**{name: getattr(options, name) for name in fixed}, "measured": measured})


def _table(seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[str]:
    lines = []
    for way, own in seconds.items():
        spread = Spread.of(ratios(seconds, way, OURS))
        middle = Spread.of(own).median * 1e3
        lines.append(
            f"  {way:16} {middle:9.1f} ms  {spread.median:6.3f} of lorafit's ({spread.low:.3f}-{spread.high:.3f})"
            f"  {peaks[way] / 2**20:8.0f} MiB"
        )
    return lines


def times(
    rows: int,
    learnt: float,
    vocabulary: int,
    hidden: int,
    dtype: str,
    rounds: int,
    warmup: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """Seconds of each way, taking turns in this process; and how far their losses and gradients lie apart."""
    weight, states, targets = _problem(rows, learnt, vocabulary, hidden, dtype, seed, threads)
    made = {way: _way(way, weight) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    chance = random.Random(seed)
    found: dict[str, tuple[float, Any]] = {}
    for number in range(warmup + rounds):
        order = list(WAYS)
        chance.shuffle(order)
        for way in order:
            passed, loss, gradient = _once(made[way], states, targets)
            found[way] = (loss, gradient)
            if number >= warmup:
                seconds[way].append(passed)
    loss, gradient = found[OURS]
    apart = {
        way: {
            "loss": abs(other - loss) / abs(loss),
            "gradient": float((slope - gradient).norm() / gradient.norm()),
        }
        for way, (other, slope) in found.items()
    }
    return {"gemm_rate": machine.gemm_rate(), "seconds": seconds, "apart": apart}


def peak(rows: int, way: str, learnt: float, vocabulary: int, hidden: int, dtype: str, seed: int, threads: int) -> int:
    """Bytes by which this process grew at most over a loss and its gradient."""
    weight, states, targets = _problem(rows, learnt, vocabulary, hidden, dtype, seed, threads)
    made = _way(way, weight)
    _once(made, states[:2], targets[:2])
    gc.collect()
    if RESET.exists():
        RESET.write_text("5")  # the highest so far is that of now: what making the problem took does not count
    before = machine.resident()["now"]
    _once(made, states, targets)
    return max(0, machine.resident()["peak"] - before)


def _problem(
    rows: int, learnt: float, vocabulary: int, hidden: int, dtype: str, seed: int, threads: int
) -> tuple[Any, Any, Any]:
    """Head, hidden states and targets; the last positions are learnt, and at least two."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator).mul_(hidden**-0.5).to(kind)
    states = torch.randn(rows, hidden, generator=generator).to(kind)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[2 : rows - max(2, round(rows * learnt)) + 2] = IGNORED
    return weight, states, targets


def _once(way: Way, states: Any, targets: Any) -> tuple[float, float, Any]:
    """Seconds, loss and gradient."""
    leaf = states.clone().requires_grad_()
    gc.collect()
    begun = time.perf_counter()
    loss = way(leaf, targets)
    loss.backward()
    passed = time.perf_counter() - begun
    return passed, float(loss), leaf.grad.float()


def _way(name: str, weight: Any) -> Way:
    import torch
    from torch.nn import functional

    if name == OURS:
        from lorafit.training.crossentropy import FrozenMatrix, summed_cross_entropy

        head = FrozenMatrix(weight, None)

        def ours(states: Any, targets: Any) -> Any:
            kept = targets != IGNORED
            return summed_cross_entropy(states[kept], targets[kept], head, through_head=False, chunk=192)

        return ours
    if name == "torch":

        def plain(states: Any, targets: Any) -> Any:
            kept = targets != IGNORED
            logits = functional.linear(states[kept], weight).float()
            return functional.cross_entropy(logits, targets[kept], reduction="sum")

        return plain
    if name == "torch, chunked":
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(states: Any, targets: Any) -> Any:
            kept = targets != IGNORED
            return functional.linear_cross_entropy(
                states[kept], weight, targets[kept], reduction="sum", options=options
            )

        return chunked
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def fused(states: Any, targets: Any) -> Any:
        # As SFTTrainer calls it on a CPU: every position, and what its metrics need.
        outputs = ("log_probs", "entropy", "is_top1")
        wanted = targets.clamp(min=0)
        size = _CHUNKED_LOGPROB_CHUNK_SIZE
        scores = ChunkedLogProbFunction.apply(states, weight, None, wanted, 1.0, size, None, 1.0, outputs)[0]
        return -scores.masked_fill(targets == IGNORED, 0).sum()

    return fused


def main() -> None:
    """`python -m benchmarks.head`: the command by itself."""
    from benchmarks.stored import FOLDER

    parser = ArgumentParser(description=__doc__)
    arguments(parser)
    parser.add_argument("--threads", type=int, default=machine.physical_cores(), help="of torch")
    parser.add_argument("--seed", type=int, default=0, help="of head, states and targets")
    parser.add_argument("--output", default=str(FOLDER), help="folder of the JSON file")
    say(str(run(parser.parse_args())))


if __name__ == "__main__":
    main()
