"""Attaching, saving and loading against the number of sites and adapters, and how long imports and --help take."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import child
from benchmarks.statistic import Spread
from benchmarks.stored import Session, say
from benchmarks.variants import PEFT

if TYPE_CHECKING:
    from torch import nn

NAME = "io"
HELP = "attach, save, load, import and --help times"
WIDTH = 64
FURTHER = 9
"""Adapters beside the first one."""

STARTS = {
    "import torch": ["-c", "import torch"],
    "import lorafit": ["-c", "import lorafit"],
    "import lorafit; lorafit.attach": ["-c", "import lorafit; lorafit.attach"],
    "import peft": ["-c", "import peft"],
    "lorafit --help": ["-m", "lorafit", "--help"],
    "lorafit train --help": ["-m", "lorafit", "train", "--help"],
    "trl sft --help": ["-c", "import sys; sys.argv[0] = 'trl'; from trl.cli import main; main()", "sft", "--help"],
}
"""What is started → arguments of Python."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--sites", type=int, nargs="*", default=[100, 1000], help="numbers of adapted layers")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    session = Session(NAME, NAME, options)
    tables = []
    for sites in options.sites:
        found: dict[str, Any] = {"sites": sites, "adapters": 1 + FURTHER}
        sides: dict[str, dict[str, list[float]]] = {"ours": {}, "peft": {}}
        for _ in range(options.repeats):  # alternately, each in a process of its own
            for side, lists in sides.items():
                times = child.call("storing:times", threads=options.threads, side=side, sites=sites, seed=options.seed)
                for key, value in times.items():
                    lists.setdefault(key, []).append(value)
        tables.append({**found, "seconds": sides})
        for key, values in sides["ours"].items():
            ours, theirs = Spread.of(values).median, Spread.of(sides["peft"][key]).median
            print(f"  {sites} sites, {key}: {ours * 1e3:.0f} ms ({PEFT}{theirs * 1e3:.0f} ms)", flush=True)
    return session.write({"width": WIDTH, "tables": tables, "starts": starts(options)})


def starts(options: Namespace) -> dict[str, list[float] | None]:
    """Seconds of processes that do nothing but start; None for what cannot be started here."""
    found: dict[str, list[float] | None] = {name: [] for name in STARTS}
    for _ in range(options.repeats):
        for name, command in STARTS.items():
            seconds = found[name]
            if seconds is None:
                continue
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command], env=child.environment(options.threads), capture_output=True, check=False
            )
            if done.returncode:
                say(f"warning: {name} cannot be started here")
                found[name] = None
                continue
            seconds.append(time.perf_counter() - begun)
    for name, seconds in found.items():
        if seconds:
            print(f"  {name}: {Spread.of(seconds).median * 1e3:.0f} ms", flush=True)
    return found


def times(side: str, sites: int, seed: int, threads: int) -> dict[str, float]:
    """One library's times, in the process that this is called in; importing it is not counted."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        return SIDES[side](lambda: _stack(sites), Path(folder))


def _stack(sites: int) -> nn.Module:
    from torch import nn

    class Stack(nn.Module):
        """Linear layers, one after the other."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(sites))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    return Stack()


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, action: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = action()
        self.seconds[name] = time.perf_counter() - begun
        return result


def _ours(make: Callable[[], nn.Module], folder: Path) -> dict[str, float]:
    import lorafit as lf
    from lorafit import attach, load

    clock, method = _Clock(), lf.LoRA(r=16)
    attach(make(), method)  # what happens once in a process is no part of it
    model = make()
    handle = clock("attach", lambda: attach(model, method))
    clock(f"attach {FURTHER} more", lambda: [attach(model, method, name=f"n{i}") for i in range(FURTHER)])
    clock("save", lambda: handle.save(folder))
    fresh = make()
    clock("load", lambda: load(fresh, folder))
    clock(f"load {FURTHER} more", lambda: [load(fresh, folder, name=f"n{i}") for i in range(FURTHER)])
    return clock.seconds


def _theirs(make: Callable[[], nn.Module], folder: Path) -> dict[str, float]:
    from peft import LoraConfig, PeftModel, get_peft_model

    def config() -> LoraConfig:
        return LoraConfig(r=16, lora_alpha=32, target_modules=r"layers\.\d+")

    clock = _Clock()
    get_peft_model(make(), config())
    model = make()
    wrapped = clock("attach", lambda: get_peft_model(model, config()))
    clock(f"attach {FURTHER} more", lambda: [wrapped.add_adapter(f"n{i}", config()) for i in range(FURTHER)])
    clock("save", lambda: wrapped.save_pretrained(folder, selected_adapters=["default"]))
    fresh = make()
    loaded = clock("load", lambda: PeftModel.from_pretrained(fresh, folder))
    clock(f"load {FURTHER} more", lambda: [loaded.load_adapter(folder, f"n{i}") for i in range(FURTHER)])
    return clock.seconds


SIDES: dict[str, Callable[[Callable[[], Any], Path], dict[str, float]]] = {"ours": _ours, "peft": _theirs}
