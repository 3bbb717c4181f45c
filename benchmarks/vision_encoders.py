"""All-MiniLM-L6-v2 on movie sentences, as two classes and as ratings: `lorafit compare`, and what it found."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks import vision_packages as packages
from benchmarks.child import ChildError
from benchmarks.machine import ROOT
from benchmarks.stored import ResultsError, say

METHODS = ("lora", "dora", "vera", "adalora", "lora-drop")
REFERENCES = ("base", "probe", "full")
TRAIN, VALIDATION, TEST = 1024, 256, 1000
"""Sentences in each part."""
SOURCE = "vaderSentiment 0.5 (MIT; Hutto and Gilbert 2014): movie sentences, each rated by at least 20 people"


@dataclass(frozen=True)
class Sentences:
    """How sentences become records.

    Attributes:
        form: of `scripts/make_sentiment.py`.
        clear: the least rating either way that a sentence must have to be taken.
        task: what is learnt.
        about: a sentence on them.
    """

    form: str
    clear: float
    task: str
    about: str


SETS: Mapping[str, Sentences] = {
    "sentiment": Sentences(
        "classes", 0.5, "classification", "Movie sentences that people rated clearly, as positive or negative."
    ),
    "rating": Sentences(
        "ratings",
        0.0,
        "regression",
        "Movie sentences with the mean of their ratings, from -4 to 4, as a number. The loss is the squared error "
        "divided by the variance of the training labels: 1 is what their mean alone comes to.",
    ),
}
"""Name of a set → what it is made of."""


def measured(name: str, options: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of the data, and the comparison; goes on where it was stopped.

    Raises:
        ChildError: the command failed.
        ResultsError: packages cannot be fetched, or the command left nothing.
    """
    folder = Path(options.data).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    words = asked(name, options, packages.minilm(folder).relative_to(folder), records(name, folder).relative_to(folder))
    _run([sys.executable, "-m", "lorafit", *words], folder, options.threads)
    path = folder / output(name) / "comparison.json"
    if not path.is_file():
        raise ResultsError(f"{path}: lorafit compare did not leave it")
    found = json.loads(path.read_text(encoding="utf-8"))
    facts = {
        "data": {
            "source": SOURCE,
            "about": SETS[name].about,
            **{key: found["data"][key] for key in ("train_records", "validation_records", "test_records")},
        },
        "ran": f"lorafit {' '.join(words)}",
    }
    return facts, compared(found)


def output(name: str) -> str:
    """The folder of a comparison, as seen from that of the data."""
    return f"runs/{name}"


def asked(name: str, options: Namespace, model: Path, data: Path) -> list[str]:
    """The words of the command after `lorafit`, paths as seen from the folder of the data."""
    seed = ["--seed", str(options.seed)] if options.seed else []
    return [
        "compare",
        *("--model", model.as_posix()),
        *("--data", (data / "movie.jsonl").as_posix()),
        *("--eval-data", (data / "movie-test.jsonl").as_posix()),
        *("--eval-split", str(VALIDATION)),
        *("--eval-limit", str(TEST)),
        *("--task", SETS[name].task),
        *("--methods", ",".join(METHODS)),
        *("--reference", ",".join(REFERENCES)),
        *("--rates", str(options.rates)),
        *("--seeds", str(options.seeds)),
        *seed,
        *("--output-dir", output(name)),
    ]


def records(name: str, folder: Path) -> Path:
    """The folder with the files of sentences; they are made where there are none."""
    own = SETS[name]
    place = folder / "sentences" / name
    if not all((place / file).is_file() for file in ("movie.jsonl", "movie-test.jsonl")):
        script = ROOT / "scripts" / "make_sentiment.py"
        given = ["--form", own.form, "--clear", str(own.clear)]
        sizes = ["--records", str(TRAIN + VALIDATION), "--test", str(TEST)]
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".make-") as inside:
            made = Path(inside) / name
            _run([sys.executable, str(script), str(made), *given, *sizes], folder, 1)
            made.replace(place)  # in one step: a kill leaves all files there or none
    return place


def _run(words: Sequence[str], folder: Path, threads: int) -> None:
    say(" ".join(["python", *words[1:]]))
    done = subprocess.run(words, cwd=folder, env=child.environment(threads))
    if done.returncode:
        raise ChildError(f"{' '.join(words[1:4])} ended with status {done.returncode}")


def compared(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a comparison: ranked by accuracy where there are classes, without what a table does not need."""
    from lorafit.experiments.ranking import rank

    candidates = found["candidates"]
    runs = [one for each in candidates for one in each["seeds"] if one["failed"] is None and one["losses"]]
    classes = bool(runs) and all(one["correct"] for one in runs)
    left_out = ("curve", "counts", "trial", "tokens", "pairs")
    kept = [
        {**each, "seeds": [{key: one[key] for key in one if key not in left_out} for one in each["seeds"]]}
        for each in candidates
    ]
    unit = (found.get("ranking") or {}).get("unit")
    ranking = rank(candidates, metric="accuracy" if classes else "loss").to_json()
    return {
        "budget": dict(found["budget"]),
        "counts": runs[0]["counts"] if runs else [],
        "candidates": kept,
        "ranking": ranking if unit is None else {**ranking, "unit": unit},
        "minutes": sum(_seconds(each) for each in candidates) / 60,
    }


def _seconds(candidate: Mapping[str, Any]) -> float:
    """What all runs of a candidate took, from their beginning to their end."""
    searched = math.fsum(one["seconds"] for one in candidate["search"])
    return searched + math.fsum(one["total_seconds"] for one in candidate["seeds"])
