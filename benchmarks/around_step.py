"""What an adapter costs around the optimizer step, and once per step, apart from the layers' own products.

    python benchmarks/around_step.py                    # all parts, 30 layers of SmolLM2-135M's shapes
    python benchmarks/around_step.py dora delta --layers 6 --repeats 50

Each line is the median of interleaved repeats: its parts take turns, so that other work on the machine meets all alike.
Nothing but torch and lorafit is needed, and no model: the layers have random weights, the gradients random numbers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import lorafit as lf
from lorafit.fastfood import Fastfood

SMOLLM2 = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
"""(out, in) of the linear layers of one block of SmolLM2-135M, which has 30."""
Work = Callable[[], object]


class Linears(nn.Module):
    """The linear layers of some blocks, without what is between them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(inn, out, bias=False) for name, (out, inn) in SMOLLM2.items()})
            for _ in range(layers)
        )


def attached(method: lf.Method, layers: int) -> lf.Handle:
    """An adapter at every layer, away from its start, with gradients."""
    torch.manual_seed(0)
    handle = lf.attach(Linears(layers), method, targets=list(SMOLLM2), seed=0)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if not name.endswith(".m"):
                parameter.normal_(std=0.01)
            parameter.grad = torch.randn_like(parameter) * 1e-3
    return handle


def measure(works: dict[str, Work], repeats: int, unit: float = 1e3, name: str = "ms", per: int = 1) -> None:
    """Prints the median time of each piece of work; they take turns."""
    # One thread's own time leaves out what other programs take of the processor.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {label: [] for label in works}
    for turn in range(repeats + 2):
        for label, work in works.items():
            started = clock()
            work()
            if turn >= 2:
                times[label].append(clock() - started)
    for label, each in times.items():
        low = min(each) * unit / per
        print(f"  {label:<58}{statistics.median(each) * unit / per:>10.3f} {name}   (least {low:.3f})")


def optimizers(layers: int, repeats: int) -> None:
    """zero_grad, clipping and a step of AdamW over all tensors of LoRA r=16, by the kind of loop."""
    handle = attached(lf.LoRA(r=16), layers)
    parameters = handle.parameters()
    print(f"AdamW over {len(parameters)} tensors, {handle.num_trainable:,} numbers")
    flat = nn.Parameter(torch.randn(handle.num_trainable))
    flat.grad = torch.randn_like(flat)
    works: dict[str, Work] = {}
    for label, what, options in (
        ("one by one", parameters, {"foreach": False}),
        ("foreach", parameters, {"foreach": True}),
        ("fused", parameters, {"fused": True}),
        ("fused, one flat tensor", [flat], {"fused": True}),
    ):
        works[f"step, {label}"] = torch.optim.AdamW(what, lr=1e-6, **options).step
    works["clip_grad_norm_"] = lambda: nn.utils.clip_grad_norm_(parameters, 1.0)
    works["clip_grad_norm_, foreach"] = lambda: nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    works["clip_grad_norm_, one flat tensor"] = lambda: nn.utils.clip_grad_norm_([flat], 1.0)
    measure(works, repeats)


def hooks(layers: int, repeats: int) -> None:
    """What binding an adapter adds to a step of an optimizer that does nothing."""

    class Nothing(torch.optim.Optimizer):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, {"lr": 0.0})

        def step(self, closure: object = None) -> None:
            return None

    works: dict[str, Work] = {}
    for method in (lf.LoRA(r=2), lf.DeltaLoRA(r=2, start=10**9), lf.LoRAFA(r=2, correction=False)):
        handle = attached(method, layers)
        optimizer = Nothing(handle.parameters())
        works[f"step, {method.name}, not bound"] = Nothing(handle.parameters()).step
        works[f"step, {method.name}, bound"] = handle.bind(optimizer).step
    print(f"hooks over {layers * len(SMOLLM2)} sites")
    measure(works, repeats)


def updates(layers: int, repeats: int) -> None:
    """What it takes to say a site's update in a forward pass, and to differentiate what is said."""
    count = layers * len(SMOLLM2)
    print(f"Adapter.update, per site (of {count})")
    works: dict[str, Work] = {}
    for label, method in (
        ("LoRA", lf.LoRA(r=16)),
        ("DoRA", lf.DoRA(lf.LoRA(r=16))),
        ("AdaLoRA", lf.AdaLoRA(init_r=12, target_r=8, total_steps=100)),
        ("Delta-LoRA before its start", lf.DeltaLoRA(r=16, start=10**6)),
        ("Delta-LoRA after its start", lf.DeltaLoRA(r=16, start=0)),
    ):
        handle = attached(method, layers)
        if isinstance(method, lf.DeltaLoRA):
            handle.optimizer(torch.optim.SGD, lr=0.0)
        pairs = [(handle.adapter(path), site.weight) for path, site in handle.sites.items()]

        def say(pairs: list = pairs) -> list:
            return [adapter.update(weight) for adapter, weight in pairs]

        works[label] = say
    measure(works, repeats, 1e6, "us", count)


def dora(layers: int, repeats: int) -> None:
    """The norms of all rows, once per optimizer step."""
    handle = attached(lf.DoRA(lf.LoRA(r=16)), layers)
    pairs = [(handle.adapter(path), site.weight) for path, site in handle.sites.items()]
    weights = [weight() for _, weight in pairs]
    factors = [(adapter.inner.A.detach(), adapter.inner.B.detach()) for adapter, _ in pairs]

    def renewed() -> None:
        for adapter, weight in pairs:
            adapter._lengths.clear()
            adapter.update(weight)

    def anew() -> None:
        for adapter, weight in pairs:
            adapter.forget()
            adapter.update(weight)

    def held() -> None:
        for adapter, weight in pairs:
            adapter.update(weight)

    def product() -> None:
        for weight, (a, _) in zip(weights, factors, strict=True):
            weight.detach() @ a.t()

    def formed() -> None:
        with torch.no_grad():
            for weight, (a, b) in zip(weights, factors, strict=True):
                torch.addmm(weight, b, a).norm(dim=1)

    print(f"DoRA's norms over {len(pairs)} sites")
    measure(
        {
            "all sites, first pass after a step": renewed,
            "all sites, first pass of all": anew,
            "all sites, every further pass": held,
            "for comparison: W A^T alone": product,
            "for comparison: W + B A formed, and its norm": formed,
        },
        repeats,
    )


def adalora(layers: int, repeats: int) -> None:
    """The schedule of AdaLoRA around one step, before its last pruning."""
    works: dict[str, Work] = {}
    for label, options in (
        ("scores and penalty", {}),
        ("scores alone", {"orthogonality": 0.0}),
        ("pruning in each step", {"warmup": 0, "final": 0, "interval": 2}),
    ):
        method = lf.AdaLoRA(**{"init_r": 12, "target_r": 8, "total_steps": 10**6, "interval": 10**5, **options})
        handle = attached(method, layers)
        optimizer = handle.optimizer(torch.optim.SGD, lr=0.0)
        schedule = handle.schedule
        works[f"before_step, {label}"] = lambda schedule=schedule, optimizer=optimizer: schedule.before_step(optimizer)
        works[f"after_step, {label}"] = lambda schedule=schedule, optimizer=optimizer: schedule.after_step(optimizer)
    print(f"AdaLoRA's schedule over {layers * len(SMOLLM2)} sites, init_r=12")
    measure(works, repeats)


def fa(layers: int, repeats: int) -> None:
    """The correction of LoRA-FA's gradients."""
    handle = attached(lf.LoRAFA(r=16), layers)
    optimizer = handle.optimizer(torch.optim.SGD, lr=0.0)
    schedule = handle.schedule
    print(f"LoRA-FA's correction over {len(handle.sites)} sites")
    measure({"before_step": lambda: schedule.before_step(optimizer)}, repeats)


def delta(layers: int, repeats: int) -> None:
    """Forward and backward of all layers on 1,024 tokens: Delta-LoRA beside LoRA of its rank and of twice its rank."""
    works: dict[str, Work] = {}
    for label, method in (
        ("LoRA r=16", lf.LoRA(r=16)),
        ("LoRA r=32", lf.LoRA(r=32)),
        ("Delta-LoRA r=16 before its start", lf.DeltaLoRA(r=16, start=10**6)),
        ("Delta-LoRA r=16 after its start", lf.DeltaLoRA(r=16, start=0)),
    ):
        handle = attached(method, layers)
        if isinstance(method, lf.DeltaLoRA):
            handle.optimizer(torch.optim.SGD, lr=0.0)
        sites = [site.module for site in handle.sites.values()]
        rows = {inn: torch.randn(1024, inn, requires_grad=True) for _, inn in SMOLLM2.values()}

        def run(sites: list = sites, rows: dict = rows) -> None:
            for module in sites:
                module(rows[module.in_features]).backward(torch.ones(1024, module.out_features))

        works[label] = run
    print(f"forward and backward of {layers * len(SMOLLM2)} layers, 1,024 tokens")
    measure(works, repeats)


def subspace(layers: int, repeats: int) -> None:
    """P v and its adjoint for all numbers of the layers, and what a machine takes to do less than that."""
    size = layers * sum(out * inn for out, inn in SMOLLM2.values())
    operator = Fastfood.draw(size, 1000, 0)
    v, u = torch.randn(1000), torch.randn(size)
    buffer = torch.zeros(operator.length)
    print(f"Fastfood, D = {size:,}, L = {operator.length:,}")
    measure(
        {
            "P v": lambda: operator.project(v),
            "adjoint, in a buffer that is used up": lambda: operator.adjoint_(buffer),
            "adjoint": lambda: operator.adjoint(u),
            "for comparison: a copy of L numbers": buffer.clone,
            "for comparison: L normal numbers": lambda: buffer.normal_(),
        },
        repeats,
    )


PARTS = {
    "optimizers": optimizers,
    "hooks": hooks,
    "updates": updates,
    "dora": dora,
    "adalora": adalora,
    "lora-fa": fa,
    "delta": delta,
    "subspace": subspace,
}


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--layers", type=int, default=30, help="blocks of seven linear layers each")
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for name in given.parts or PARTS:
        PARTS[name](given.layers, given.repeats)
        gc.collect()


if __name__ == "__main__":
    main()
