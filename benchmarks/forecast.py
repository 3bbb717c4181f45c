"""How near `lorafit plan` comes: its memory and time beside what the same run then takes.

Plan and run take turns. Run it on a quiet machine: times of a busy one say nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.child import ChildError, environment
from benchmarks.machine import ROOT
from benchmarks.statistic import Spread
from benchmarks.stored import Session

NAME = "plan"
HELP = "memory and time that `lorafit plan` says beside what the run takes"
KEYS = ("peak_bytes", "train_seconds", "evaluation_seconds", "seconds")
KINDS = ("formula", "measured")
"""How plan comes to its figures: by counting, and by a few real steps."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--max-steps", default="24", help="optimizer steps of the run")
    parser.add_argument("--repeats", type=int, default=3, help="plans and runs")
    parser.add_argument("--flags", default="", help="further flags of `lorafit train`")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    session = Session(NAME, NAME, options)
    flags = ["--max-steps", options.max_steps, *options.flags.split()]
    pairs = [compared(flags, options.threads) for _ in range(options.repeats)]
    results = {"flags": flags, "pairs": pairs}
    for key in KEYS:
        took = Spread.of([one["took"][key] for one in pairs]).median
        shares = ", ".join(f"{kind} {off(results, kind, key).median:.3f}" for kind in KINDS)
        print(f"  {key}: {took:,.4g}; plan / run: {shares}", flush=True)
    return session.write(results)


def off(results: dict[str, Any], kind: str, key: str) -> Spread:
    """What plan said by what the run took."""
    return Spread.of([one["planned"][kind][key] / one["took"][key] for one in results["pairs"]])


def compared(flags: list[str], threads: int) -> dict[str, Any]:
    """Plans a run, does it, and sets the two side by side."""
    planned = lorafit("plan", flags, threads)
    with tempfile.TemporaryDirectory() as folder:
        ran = lorafit("train", [*flags, "--output-dir", f"{folder}/run"], threads)
        lines = Path(folder, "run", "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    took = {
        "peak_bytes": ran["peak_rss_bytes"],
        "train_seconds": ran["train_seconds"],
        "evaluation_seconds": sum(one["seconds"] for one in records if one["event"] == "evaluation"),
        "seconds": ran["seconds"],
    }
    return {"planned": {kind: {key: planned[kind][key] for key in KEYS} for kind in KINDS}, "took": took}


def lorafit(command: str, flags: list[str], threads: int) -> dict[str, Any]:
    """What one command says under --json."""
    line = [sys.executable, "-m", "lorafit", command, *flags, "--json"]
    done = subprocess.run(line, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ChildError(f"lorafit {command} ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
