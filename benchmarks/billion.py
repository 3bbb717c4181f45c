"""A model of about a billion parameters fine-tuned in little memory: LoRA over int8 rows, made layer by layer.

One process for each way to hold the base, since a process's peak is that of its whole life. The weights are random:
nothing is downloaded, and what is measured is memory and time. int8-rows: `load_quantised`, so that no layer but one
ever exists in float32. float32: the same model as it is. quantised-later: float32 first, then `quantise`, whose peak is
that of float32.
"""

from __future__ import annotations

import resource
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import child
from benchmarks.stored import Session

NAME = "billion"
HELP = "peak memory of LoRA over a base of a billion parameters, int8 and float32"
WAYS = ("int8-rows", "float32", "quantised-later")
SIZES = ("hidden", "layers", "intermediate", "vocabulary", "tokens", "steps", "r", "seed")
STANDARD = 0.02
"""Standard deviation of the random weights, that of Llama's own initialisation."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=128, help="of the one sequence in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS[:2]))


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    session = Session(NAME, NAME, options)
    sizes = {name: vars(options)[name] for name in SIZES}
    results = {}
    for way in options.ways:
        results[way] = found = child.call("billion:measure", threads=options.threads, way=way, **sizes)
        step = median(found["seconds_of_steps"][1:] or found["seconds_of_steps"])
        print(
            f"  {way}: {found['parameters'] / 1e9:.2f} billion parameters, peak {found['peak_bytes'] / 2**30:.2f} GiB "
            f"({found['peak_bytes_with_the_base'] / 2**30:.2f} with the base alone), {step:.2f} s a step",
            flush=True,
        )
        if "packed" in found:
            print(f"    {found['packed']}", flush=True)
    return session.write({"sizes": sizes, "ways": results})


def peak() -> int:
    """The most memory that this process had, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def build(options: Namespace) -> Any:
    """The model; its weights are those of its class's own initialisation, or none where nothing fills memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        intermediate_size=options.intermediate,
        vocab_size=options.vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(2048, options.tokens),
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def random_tensors(options: Namespace) -> Iterator[tuple[str, Any]]:
    """(key, tensor) for every weight, one at a time: what a checkpoint on a disk would give."""
    import torch

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build(options).state_dict().items()}
    memory = torch.empty(max(shape.numel() for shape in shapes.values()))
    for key, shape in shapes.items():
        tensor = memory[: shape.numel()].view(shape)
        yield key, tensor.fill_(1) if len(shape) == 1 else tensor.normal_(std=STANDARD)


def base(way: str, options: Namespace) -> tuple[Any, dict[str, Any]]:
    """The base model held in one way, and what is to be told of it."""
    import lorafit as lf

    if way == "int8-rows":
        model, report = lf.load_quantised(lambda: build(options), random_tensors(options))
    else:
        model, report = build(options), None
        if way == "quantised-later":
            report = lf.quantise(model)
    told = {} if report is None else {"relative_error": report.error, "worst": report.worst, "packed": str(report)}
    return model, told


def measure(way: str, threads: int, **sizes: int) -> dict[str, Any]:
    """Trains for some steps in this process."""
    import torch

    import lorafit as lf
    from lorafit.training.loss import SupervisedLoss

    options = Namespace(**sizes)
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    imported, begun = peak(), time.perf_counter()
    model, told = base(way, options)
    built = peak()
    handle = lf.attach(model, lf.LoRA(r=options.r), seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-4)
    loss = SupervisedLoss.prepare(model)
    model.train()
    tokens = torch.randint(options.vocabulary, (1, options.tokens))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    ready, seconds, losses = time.perf_counter() - begun, [], []

    def step() -> None:
        total = loss(model, batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))

    for _ in range(options.steps):
        seconds.append(timed(step))
    return {
        "parameters": parameters(options),
        "trainable": handle.num_trainable,
        "peak_bytes_after_imports": imported,
        "peak_bytes_with_the_base": built,
        "peak_bytes": peak(),
        "seconds_to_build": ready,
        "seconds_of_steps": seconds,
        "losses": losses,
        **told,
    }


def parameters(options: Namespace) -> int:
    """Numbers in the base model."""
    import torch

    with torch.device("meta"):
        return sum(each.numel() for each in build(options).parameters())


def timed(function: Callable[[], None]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
