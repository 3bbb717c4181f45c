"""Keeps what a command of lorafit found on real data: its JSON, short of what nobody reads again, with its commit.

The result of `lorafit compare`, `dimension`, `few-labels` or `train` is read from the folder that it was left in.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, describe
from benchmarks.stored import ResultsError, say
from lorafit import files

NAME = "keep"
HELP = "keep the result of a command on real data, for docs/results/compare.md"
FOLDER = ROOT / "benchmarks" / "results" / "real"
FOUND = {
    "comparison": "comparison.json",
    "dimension": "dimension.json",
    "few-labels": "few-labels.json",
    "run": "result.json",
}
"""Kind of a result → its file in the folder of the command."""
DIGITS = 5


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", help="of the kept file")
    parser.add_argument("folder", type=Path, help="where the command left its result")
    parser.add_argument("--commit", help="of the code that ran; by default that of this checkout")
    parser.add_argument("--data", required=True, help="a sentence on the data")
    parser.add_argument("--ran", help="the command, where the result does not tell it")


def run(options: Namespace) -> Path:
    """Writes the kept file."""
    kind = next((kind for kind, file in FOUND.items() if (options.folder / file).is_file()), None)
    if kind is None:
        raise ResultsError(f"{options.folder}: none of {', '.join(FOUND.values())}")
    found = json.loads((options.folder / FOUND[kind]).read_text(encoding="utf-8"))
    about = describe(options.threads)
    commit = about["commit"] if options.commit is None else {"hash": options.commit, "changed": False}
    kept = {
        "kind": kind,
        "data": options.data,
        "command": options.ran or found.get("command", ""),
        **about,
        "commit": commit,
        "found": short(found, f"{options.folder.resolve()}/"),
    }
    path = FOLDER / f"{options.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n")
    say(f"{path}: written, {path.stat().st_size / 1024:.0f} KiB")
    return path


def short(value: Any, folder: str) -> Any:
    """The same with numbers of a few digits, and paths as they are seen from the folder.

    >>> short({"losses": [0.123456789, 2], "test": "/here/data/test.jsonl"}, "/here/")
    {'losses': [0.12346, 2], 'test': 'data/test.jsonl'}
    """
    if isinstance(value, dict):
        return {key: short(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [short(each, folder) for each in value]
    if isinstance(value, str):
        return value.replace(folder, "")
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
