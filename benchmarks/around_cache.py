"""What a token costs with the server's cache, with transformers' growing one, and in transformers' continuous batching.

    python -m benchmarks.around_cache                   # the architecture of SmolLM2-135M, random weights
    python -m benchmarks.around_cache tokens --rows 8

`tokens`: rows of as many cached tokens each get further ones; the time of one token of all rows. `portions`: rows write
their answers while a long prompt is read; the longest time between two of their tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.quiet import quiet
from benchmarks.throughput import tokens_as_text
from lorafit.serve.apart import apart


def model_of(name: str) -> Any:
    """A model that generates, with random weights."""
    model = CASES[name].model(0).eval()
    model.config.use_cache = True
    model.generation_config.eos_token_id = None
    return model


def growing(model: Any, cache: Any, ids: torch.Tensor, steps: int, more: Callable[[int], None]) -> float:
    """Seconds of a token, by passes over a cache of transformers' interface; `more` is told of each pass before it."""
    token = ids[:, :1]
    seconds = []
    with torch.inference_mode():
        for _ in range(steps):
            more(1)
            begun = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - begun)
            more(0)
    return statistics.median(seconds)


def ours(model: Any, ids: torch.Tensor, steps: int) -> float:
    """The server's cache."""
    from lorafit.serve.cache import RowCache

    rows, columns = ids.shape
    cache = RowCache([None] * model.config.num_hidden_layers, rows=rows, columns=columns)

    def more(number: int) -> None:
        if number:
            cache.reserve(number)
        else:
            cache.advance(1)

    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.advance(columns)
    return growing(model, cache, ids, steps, more)


def dynamic(model: Any, ids: torch.Tensor, steps: int) -> float:
    """Transformers' DynamicCache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return growing(model, cache, ids, steps, lambda _: None)


def continuous(model: Any, ids: torch.Tensor, steps: int) -> float:
    """Transformers' continuous batching: the time of many tokens less that of few, by their number."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def seconds(length: int) -> float:
        config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0)
        blocks = -(-ids.numel() // 256) + 8 * len(ids)
        begun = time.perf_counter()
        made = model.generate_batch(
            inputs=ids.tolist(),
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=ids.numel()),
        )
        passed = time.perf_counter() - begun
        assert {len(each.generated_tokens) for each in made.values()} == {length}
        return passed

    few = seconds(2)
    return (seconds(2 + steps) - few) / steps


WAYS: dict[str, Callable[[Any, torch.Tensor, int], float]] = {
    "the server's": ours,
    "DynamicCache": dynamic,
    "generate_batch": continuous,
}


def tokens(options: argparse.Namespace) -> None:
    """Times of a token."""
    model = apart(lambda: model_of(options.case))
    for rows in options.rows:
        ids = torch.randint(model.config.vocab_size, (rows, options.cached))
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(options.repeats):
            for name, way in WAYS.items():
                try:
                    found[name].append(apart(partial(way, model, ids, options.steps)))
                except Exception as error:
                    print(f"  {rows} rows, {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        for name, seconds in found.items():
            if seconds:
                print(
                    f"  {rows:3} rows of {options.cached}, {name:16} {statistics.median(seconds) * 1e3:8.1f} ms a token"
                )


def portions(options: argparse.Namespace) -> None:
    """The longest wait of those who are answered, while a long prompt is read in portions and at once."""
    from lorafit.serve.bank import AdapterBank
    from lorafit.serve.engine import Engine
    from lorafit.serve.limits import Limits
    from lorafit.serve.requests import Asked, Piece, Sampling

    model = apart(lambda: model_of(options.case))
    text, chance = tokens_as_text(model.config.vocab_size), random.Random(0)
    for chunk in (512, options.prompt):
        engine = Engine(model, AdapterBank(model), Limits(chunk=chunk))
        times: list[float] = []
        done = threading.Semaphore(0)

        def short(piece: Piece, times: list[float] = times, done: threading.Semaphore = done) -> None:
            times.append(time.perf_counter())
            if piece.finish is not None:
                done.release()

        def long(piece: Piece, done: threading.Semaphore = done) -> None:
            if piece.finish is not None:
                done.release()

        def asked(length: int, answer: int) -> Asked:
            ids = tuple(chance.randrange(model.config.vocab_size) for _ in range(length))
            return Asked(None, ids, Sampling(max_tokens=answer, temperature=0), text, ())

        engine.start()
        engine.submit(asked(16, 96), short)
        time.sleep(1.0)
        engine.submit(asked(options.prompt, 1), long)
        done.acquire()
        done.acquire()
        engine.stop()
        waits = [later - earlier for earlier, later in pairwise(times)]
        print(
            f"  a prompt of {options.prompt} tokens in portions of {chunk}: longest wait {max(waits) * 1e3:.0f} ms, "
            f"median {statistics.median(waits) * 1e3:.0f} ms"
        )


PARTS = {"tokens": tokens, "portions": portions}


def main() -> None:
    """Runs the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all without one")
    parser.add_argument("--case", choices=list(CASES), default="smollm2")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--cached", type=int, default=512, help="tokens of each row before the ones that count")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=1920, help="tokens of the long prompt")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with quiet():
        for name in options.parts or PARTS:
            PARTS[name](options)


if __name__ == "__main__":
    main()
