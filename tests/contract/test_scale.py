"""Many sites and many adapters: work that grows with their number and not with its square, files read once.

Calls are counted, not seconds. The few bars of time have about five times the room that they need.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafit as lf
from lorafit import store

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "v_proj")})
        self.mlp = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("up_proj", "down_proj")})
        self.norm = nn.LayerNorm(WIDTH)


class Deep(nn.Module):
    """Four sites a block, at paths as deep as those of a language model."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(blocks)])


def linear(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if type(module) is nn.Linear]


def calls(work: Callable[[], object]) -> int:
    """How many functions are called, those of C too."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what other tests left behind is not what is counted
    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def plain(model: nn.Module) -> dict[str, object]:
    return {"method": lf.LoRA(r=2)}


def listed(model: nn.Module) -> dict[str, object]:
    return {"method": lf.LoRA(r=2), "targets": linear(model)[::2]}


def patterns(model: nn.Module) -> dict[str, object]:
    return {"method": lf.LoRA(r=2), "rank_pattern": {path: 1 + at % 4 for at, path in enumerate(linear(model))}}


def copies(model: nn.Module) -> dict[str, object]:
    return {"method": lf.LoRA(r=2), "targets": ["embed"], "modules_to_save": ["mlp", "norm"]}


def dora(model: nn.Module) -> dict[str, object]:
    return {"method": lf.DoRA(lf.LoRA(r=2))}


def vera(model: nn.Module) -> dict[str, object]:
    return {"method": lf.VeRA(r=2)}


def adalora(model: nn.Module) -> dict[str, object]:
    return {"method": lf.AdaLoRA(init_r=3, target_r=2)}


def own_layout(model: nn.Module) -> dict[str, object]:
    return {"method": lf.DoRA(lf.VeRA(r=2))}


def life(blocks: int, settings: Callable[[nn.Module], dict[str, object]], folder: Path) -> dict[str, int]:
    """The calls of each stage of an adapter's life on a model of so many blocks."""
    model, handles = Deep(blocks), []
    found = {"attach": calls(lambda: handles.append(lf.attach(model, seed=0, **settings(model))))}
    handle = handles.pop()
    found["optimizer"] = calls(lambda: handle.optimizer(torch.optim.SGD, lr=0.1, total_steps=10))
    found["activate"] = calls(lambda: handle.activate("default"))
    found["save"] = calls(lambda: handle.save(folder))
    found["merge"] = calls(handle.merge)
    found["unmerge"] = calls(handle.unmerge)
    found["detach"] = calls(handle.detach)
    found["load"] = calls(lambda: handles.append(lf.load(model, folder)))
    found["merge_and_detach"] = calls(handles.pop().merge_and_detach)
    return found


@pytest.mark.parametrize(
    "settings", [plain, listed, patterns, copies, dora, vera, adalora, own_layout], ids=lambda each: each.__name__
)
def test_calls_grow_with_the_number_of_sites(settings, tmp_path):
    life(2, settings, tmp_path / "warm")  # classes, caches
    few, many = life(5, settings, tmp_path / "few"), life(20, settings, tmp_path / "many")
    assert {stage: many[stage] / few[stage] for stage in few if many[stage] > 4.4 * few[stage]} == {}


def test_calls_grow_with_the_number_of_adapters():
    def stages(number: int) -> dict[str, int]:
        model = Deep(6)
        for at in range(number - 1):
            lf.attach(model, lf.LoRA(r=1), name=f"a{at}", seed=0)
        handles = []
        found = {"attach": calls(lambda: handles.append(lf.attach(model, lf.LoRA(r=1), name="last", seed=0)))}
        every = [f"a{at}" for at in range(number - 1)]
        found["activate all"] = calls(lambda: handles[0].activate(every))
        found["activate one"] = calls(lambda: handles[0].activate("last"))
        found["detach"] = calls(handles[0].detach)
        return found

    stages(2)
    few, many = stages(5), stages(20)
    assert many["attach"] < 1.5 * few["attach"] and many["detach"] < 1.5 * few["detach"]
    assert many["activate all"] < 4.4 * few["activate all"] and many["activate one"] < 4.4 * few["activate one"]


# Files ------------------------------------------------------------------------


def test_loading_opens_the_weights_once_and_takes_each_tensor_once(tmp_path, monkeypatch):
    model = Deep(3)
    handle = lf.attach(model, lf.LoRA(r=2), seed=0)
    handle.save(tmp_path)
    handle.detach()
    opened, taken = [], Counter()
    real = store.safe_open

    class Watched:
        def __init__(self, path: Path, **options: object) -> None:
            opened.append(Path(path).name)
            self.file = real(path, **options)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *raised: object) -> None:
            self.file.__exit__(*raised)

        def metadata(self) -> dict[str, str]:
            return self.file.metadata()

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, key: str) -> torch.Tensor:
            taken[key] += 1
            return self.file.get_tensor(key)

    monkeypatch.setattr(store, "safe_open", Watched)
    lf.load(model, tmp_path)
    assert opened == [store.WEIGHTS] and len(taken) == 2 * 12 and set(taken.values()) == {1}


def run(script: str, *arguments: object) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loading_reads_no_file_twice(tmp_path):
    """By Python's own record of opened files, and by the system's count of bytes that were read and not mapped."""
    model = Deep(3)
    lf.attach(model, lf.LoRA(r=2), seed=0).save(tmp_path)
    opened = run(
        """
        import sys
        import torch
        from torch import nn
        import lorafit as lf

        folder = sys.argv[1]
        model = nn.Module()
        model.layers = nn.ModuleList()
        for _ in range(3):
            block = nn.Module()
            block.attn = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q_proj", "v_proj")})
            block.mlp = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("up_proj", "down_proj")})
            model.layers.append(block)
        lf.load(model, folder).detach()  # what is imported on the way is not what is counted
        names, watching = [], True
        sys.addaudithook(lambda event, args: event == "open" and watching and names.append(str(args[0])))
        lf.load(model, folder)
        watching = False
        print(*[name for name in names if name.startswith(folder)], sep="\\n")
        """,
        tmp_path,
    ).split()
    assert len(opened) == len(set(opened)) and str(tmp_path / store.CONFIG) in opened


@pytest.mark.parametrize("method", [lf.LoRA(r=2), lf.DoRA(lf.LoRA(r=2)), lf.AdaLoRA(init_r=3, target_r=2)])
def test_loading_draws_no_random_numbers(method, tmp_path, monkeypatch):
    """They would be overwritten: at real sizes they are a good part of the time."""
    model = Deep(2)
    handle = lf.attach(model, method, seed=0)
    handle.save(tmp_path)
    handle.detach()
    state = torch.get_rng_state()
    ran = Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        lf.load(model, tmp_path)
    assert ran and not ran["uniform_"] and not ran["normal_"] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_loading_takes_memory_of_about_the_files_size(tmp_path):
    grown, size = map(
        int,
        run(
            """
            import sys, threading
            from pathlib import Path
            import torch
            from torch import nn
            import lorafit as lf

            def peak():  # of memory that is no page of a file
                lines = Path("/proc/self/status").read_text().splitlines()
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

            torch.set_num_threads(1)
            folder = Path(sys.argv[1])
            model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)])
            small = lf.attach(model, lf.LoRA(r=1), seed=0)
            small.save(folder / "small")
            small.detach()
            lf.load(model, folder / "small").detach()
            handle = lf.attach(model, lf.LoRA(r=512), seed=0)
            handle.save(folder / "large")
            handle.detach()
            del handle
            import gc
            gc.collect()
            seen, stop = [], threading.Event()
            before = peak()


            def watch():
                while not stop.wait(0.001):
                    seen.append(peak())

            watcher = threading.Thread(target=watch)
            watcher.start()
            handle = lf.load(model, folder / "large")
            seen.append(peak())
            stop.set()
            watcher.join()
            print(max(seen) - before, (folder / "large" / "adapter_model.safetensors").stat().st_size)
            """,
            tmp_path,
        ).split(),
    )
    assert size > 30e6 and grown < 1.6 * size


# Seconds, with room ------------------------------------------------------------


def test_importing_is_quick_and_imports_no_torch():
    script = """
        import sys, time
        before = time.perf_counter()
        import lorafit
        print(time.perf_counter() - before)
        heavy = {"torch", "numpy", "transformers", "pydantic", "rich", "typer", "safetensors"} & set(sys.modules)
        assert not heavy, heavy
        """
    assert min(float(run(script)) for _ in range(3)) < 0.1


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["check", "--help"], ["merge", "--help"]]
)
def test_help_is_quick_and_imports_no_torch(words):
    pytest.importorskip("typer")
    script = """
        import contextlib, io, sys, time
        before = time.perf_counter()
        from lorafit.cli.main import main
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(sys.argv[1:])
        print(time.perf_counter() - before)
        heavy = {"torch", "numpy", "transformers", "datasets", "plotly", "safetensors"} & set(sys.modules)
        assert status == 0 and not heavy, (status, heavy)
        """
    assert min(float(run(script, *words)) for _ in range(3)) < 1.5


def test_a_thousand_sites_are_quick(tmp_path):
    script = """
        import sys, time, torch
        from torch import nn
        import lorafit as lf

        torch.set_num_threads(1)
        model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(1000)])
        best = {}

        def timed(what, work):
            before = time.process_time()
            result = work()
            best[what] = min(best.get(what, 9e9), time.process_time() - before)
            return result

        for _ in range(3):
            handle = timed("attach", lambda: lf.attach(model, lf.LoRA(r=16), seed=0))
            timed("save", lambda: handle.save(sys.argv[1]))
            timed("detach", handle.detach)
            timed("load", lambda: lf.load(model, sys.argv[1])).detach()
        print(max(best, key=best.get), max(best.values()))
        """
    slowest, seconds = run(script, tmp_path).split()
    assert float(seconds) < 2.5, slowest
