"""Tokens a second of the engine against how many adapters are registered and asked for."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks import child, machine
from benchmarks.cases import CASES, Case
from benchmarks.mixed import saved
from benchmarks.stored import FOLDER, Session, say

NAME = "throughput"
HELP = "tokens a second against the number of adapters, 1 to 1,000"
BASE = 0
COUNTS = (BASE, 1, 10, 100, 1000)
DIFFERENT = 32
"""So many files there are; further adapters are links to them, each read for itself."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(FOLDER / "serving"))
    parser.add_argument("case", choices=list(CASES), nargs="?", default="smollm2", help="the model")
    parser.add_argument("--requests", type=int, default=128, help="of each measurement")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter")
    parser.add_argument("--resident", type=int, default=64, help="adapters that the memory limit has room for")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, in turns")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    session = Session(NAME, f"{NAME}-{options.case}", options)
    measured = child.call(
        "throughput:measured",
        threads=options.threads,
        case=vars(CASES[options.case]),
        requests=options.requests,
        prompt=options.prompt,
        answer=options.answer,
        rank=options.rank,
        resident=options.resident,
        repeats=options.repeats,
        seed=options.seed,
    )
    for point in measured["points"]:
        rates = sorted(point["tokens_per_second"])
        print(f"  {point['adapters']:5} adapters: {rates[len(rates) // 2]:8.1f} tokens/s", flush=True)
    return session.write({"case": vars(CASES[options.case]), **measured})


def measured(
    case: dict[str, Any],
    requests: int,
    prompt: int,
    answer: int,
    rank: int,
    resident: int,
    repeats: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """One measurement, in the process that this is called in."""
    import torch

    from lorafit.serve.apart import apart
    from lorafit.serve.bank import AdapterBank

    torch.set_num_threads(threads)
    chance = random.Random(seed)
    model = apart(lambda: Case(**case).model(seed).eval())
    model.config.use_cache = True
    points: dict[int, dict[str, Any]] = {
        count: {"adapters": count, "tokens_per_second": [], "resident_bytes": 0, "process_bytes": 0} for count in COUNTS
    }
    with tempfile.TemporaryDirectory() as root:
        folders = apart(lambda: list(saved(model, Path(root), DIFFERENT, rank).values()))
        for repeat in range(repeats):
            order = list(COUNTS)
            chance.shuffle(order)
            for count in order:
                bank = AdapterBank(model, limit=resident * folder_bytes(folders[0]))
                names: list[str | None] = [f"adapter-{number}" for number in range(count)]
                for number, name in enumerate(names):
                    assert name is not None
                    bank.register(name, folders[number % len(folders)])
                seconds, tokens = answered(
                    model, bank, names or [None], requests=requests, prompt=prompt, answer=answer, chance=chance
                )
                points[count]["tokens_per_second"].append(tokens / seconds)
                points[count]["resident_bytes"] = max(points[count]["resident_bytes"], bank.used_bytes())
                points[count]["process_bytes"] = machine.resident()["now"]
                bank.close()
                say(f"  {repeat + 1} of {repeats}: {count} adapters, {tokens / seconds:.0f} tokens/s")
    return {
        "requests": requests,
        "prompt": prompt,
        "answer": answer,
        "rank": rank,
        "resident": resident,
        "gemm_rate": machine.gemm_rate(),
        "points": list(points.values()),
    }


def folder_bytes(folder: Path) -> int:
    """What an adapter's file of weights takes."""
    return (folder / "adapter_model.safetensors").stat().st_size


def answered(
    model: Any, bank: Any, names: list[str | None], *, requests: int, prompt: int, answer: int, chance: random.Random
) -> tuple[float, int]:
    """Seconds and tokens of many requests, all there at once, each of an adapter drawn evenly."""
    from lorafit.serve.engine import Engine
    from lorafit.serve.limits import Limits
    from lorafit.serve.requests import Asked, Finish, Piece, Sampling

    engine = Engine(model, bank, Limits(rows=32, waiting=requests))
    done = threading.Semaphore(0)
    ended: list[Piece] = []

    def notify(piece: Piece) -> None:
        if piece.finish is not None:
            ended.append(piece)
            done.release()

    tokenizer = tokens_as_text(model.config.vocab_size)
    sampling = Sampling(max_tokens=answer, temperature=0)
    for number in range(requests):
        ids = tuple(chance.randrange(model.config.vocab_size) for _ in range(prompt))
        engine.submit(Asked(names[number % len(names)], ids, sampling, tokenizer, ()), notify)
    begun = time.perf_counter()
    engine.start()
    for _ in range(requests):
        done.acquire()
    seconds = time.perf_counter() - begun
    engine.stop()
    assert all(piece.finish is Finish.LENGTH for piece in ended), {piece.finish for piece in ended}
    return seconds, sum(piece.tokens for piece in ended)


def tokens_as_text(size: int) -> Any:
    """A tokenizer for random tokens: each a word of its own."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
