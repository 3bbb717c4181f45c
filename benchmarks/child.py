"""A function of this package called in a process of its own, for what one process can measure only once.

`python -m benchmarks.child MODULE:FUNCTION FILE` reads arguments from FILE as JSON and writes the result there.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT


class ChildError(Exception):
    """The other process failed."""


INSTRUCTIONS: dict[str, dict[str, str]] = {
    "all": {},
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
"""Which of the processor's instructions the libraries may use, and how they are told."""


def environment(threads: int, instructions: str = "all") -> dict[str, str]:
    """That of this process, with so many threads for everything that counts them by itself."""
    source = str(ROOT / "src")
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **INSTRUCTIONS[instructions],
    }


def call(function: str, *, threads: int, instructions: str = "all", **arguments: Any) -> Any:
    """The result of `MODULE:FUNCTION` (of this package), in JSON's types."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call.json"
        path.write_text(json.dumps({**arguments, "threads": threads}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.child", function, str(path)],
            cwd=ROOT,
            env=environment(threads, instructions),
            stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL,
        )
        if done.returncode:
            raise ChildError(f"{function} ended with status {done.returncode}: {arguments}")
        return json.loads(path.read_text(encoding="utf-8"))


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError):
        return False


def main(function: str, file: str) -> None:
    """Runs what `call` asked for."""
    from benchmarks.quiet import quiet

    module, _, name = function.partition(":")
    path = Path(file)
    arguments = json.loads(path.read_text(encoding="utf-8"))
    with quiet():
        result = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**arguments)
    path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
