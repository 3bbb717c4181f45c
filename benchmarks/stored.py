"""The JSON files of results: written whole, read strictly."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from lorafit import files

FOLDER = Path(__file__).parent / "results"
SCHEMA = 1
KEYS: Mapping[str, type | tuple[type, ...]] = {
    "schema": int,
    "kind": str,
    "name": str,
    "command": str,
    "date": str,
    "commit": dict,
    "versions": dict,
    "machine": dict,
    "seed": int,
    "load": dict,
    "warnings": list,
    "seconds": float,
    "results": dict,
}
"""Key → type of every file; `results` is the kind's own."""


class ResultsError(Exception):
    """A file of results is not one of these."""


def checked(document: Any, where: str) -> dict[str, Any]:
    """The document, if it is one of these; else `ResultsError`."""
    if not isinstance(document, dict):
        raise ResultsError(f"{where}: not an object")
    for key, kind in KEYS.items():
        if key not in document:
            raise ResultsError(f"{where}: {key} is missing")
        if not isinstance(document[key], kind):
            raise ResultsError(f"{where}: {key} is a {type(document[key]).__name__}")
    if document["schema"] != SCHEMA:
        raise ResultsError(f"{where}: schema {document['schema']}, and {SCHEMA} is what this program reads")
    return document


class Session:
    """One measurement from its beginning to its file: notes the load before, says what is wrong, times the whole."""

    def __init__(self, kind: str, name: str, options: Namespace) -> None:
        import time

        self._clock = time.perf_counter
        self._begun = self._clock()
        self.options = options
        self._head = {"schema": SCHEMA, "kind": kind, "name": name, "command": command()}
        self._load = machine.load()
        self._warnings = machine.warnings_of(self._load)
        say(f"{name}: {options.threads} threads, load {self._load['averages']}")
        for warning in self._warnings:
            say(f"warning: {warning}")

    def write(self, results: Mapping[str, Any]) -> Path:
        """Writes the file; gives its path."""
        document = {
            **self._head,
            **machine.describe(self.options.threads),
            "seed": self.options.seed,
            "load": self._load,
            "warnings": self._warnings,
            "seconds": self._clock() - self._begun,
            "results": dict(results),
        }
        path = Path(self.options.output) / f"{self._head['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(checked(document, str(path)), indent=1, ensure_ascii=False) + "\n")
        say(f"{path}: written after {document['seconds']:.0f} s")
        return path


def command() -> str:
    """The command line of this process, as one would type it."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])


def read(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Every file of a folder, by its name."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResultsError(f"{path}: {error}") from error
        found[path.stem] = checked(document, str(path))
    return found


def say(message: str) -> None:
    """A line for people, at once."""
    print(message, file=sys.stderr, flush=True)
