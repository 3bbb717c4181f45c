"""Real pictures and sentences: methods of the household, a linear probe and full fine-tuning, each at its own rate.

EfficientNet-Lite0 on Fashion-MNIST and on the categories of Noto's emoji, and all-MiniLM-L6-v2 on movie sentences, as
classes and as ratings (`lorafit compare`). Each run has a process of its own; what is done is kept, and the same
command goes on after a kill. On two quiet cores about 40 minutes for the pictures and 30 for the sentences.
"""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import child, machine, stored, vision_encoders, vision_packages
from benchmarks.keeping import short
from benchmarks.rates import next_rate
from benchmarks.stored import ResultsError, say
from benchmarks.vision_candidates import CANDIDATES, DEFAULT, PROBE, Candidate
from lorafit import files

NAME = "vision"
HELP = "EfficientNet-Lite0 on pictures, MiniLM on sentences: methods, a probe, all weights"
FOLDER = stored.FOLDER / "vision"
PICTURES = ("fashion-mnist", "emoji")
SETS = (*PICTURES, *vision_encoders.SETS)
DEFAULTS: Mapping[str, int] = {"rates": 3, "seeds": 3, "steps": 128, "batch": 32, "size": 64}
"""What the command's options are; 64 pixels and 128 steps make a run of about 20 seconds on two cores."""

KEPT = (
    *("seed", "losses", "correct", "steps", "extra_steps", "seconds", "total_seconds", "peak_rss_bytes", "trainable"),
    *("adapter_bytes", "validation", "failed", "apart", "unsaved", "told", "sites", "kept"),
)
"""What the file has of a run."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(FOLDER))
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=f"of {', '.join(SETS)}")
    parser.add_argument(
        "--data", default=str(vision_packages.FOLDER), help="folder of packages, of what is made of them, and of runs"
    )
    parser.add_argument(
        "--candidates", default=",".join(DEFAULT), help=f"on pictures, the probe always: of {', '.join(CANDIDATES)}"
    )
    told = {
        "rates": "learning rates to try for each candidate",
        "seeds": "seeds to report of each",
        "steps": "optimizer steps of a run on pictures",
        "batch": "pictures in a step",
        "size": "pixels of a picture each way",
    }
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=told[name])


def run(options: Namespace) -> list[Path]:
    """Measures the sets, one after the other; each has its file as soon as all of it is done."""
    _check(options)
    written = []
    for name in dict.fromkeys(options.sets):
        try:
            if name in PICTURES:
                facts, found = Comparison(name, options).found()
            else:
                facts, found = vision_encoders.measured(name, options)
        except KeyboardInterrupt:
            say(f"runs that are done stay in {options.data}: the same command goes on")
            raise
        written.append(_keep(name, options, facts, found))
    say("python -m benchmarks vision-page writes the page")
    return written


def _check(options: Namespace) -> None:
    for what, given, known in (
        ("set", options.sets, SETS),
        ("candidate", _listed(options.candidates), tuple(CANDIDATES)),
    ):
        if strange := [one for one in given if one not in known]:
            raise ResultsError(f"no such {what}: {strange[0]}; there are {', '.join(known)}")
    for name in DEFAULTS:
        least = 3 if name == "seeds" else 1
        if vars(options)[name] < least:
            raise ResultsError(f"--{name} {vars(options)[name]}: at least {least}")


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _keep(name: str, options: Namespace, facts: Mapping[str, Any], found: Mapping[str, Any]) -> Path:
    """Writes the file of a set."""
    about = machine.describe(options.threads)
    facts, found = (json.loads(json.dumps(dict(one))) for one in (facts, found))  # lists for tuples, as files have them
    folder = f"{Path(options.data).resolve()}/"
    kept = {
        "kind": "comparison",
        "name": name,
        "command": command(name, options),
        **about,
        "seed": options.seed,
        **short(facts, folder),
        "found": short(found, folder),
    }
    path = Path(options.output) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n")
    say(f"{path}: written, {path.stat().st_size / 1024:.0f} KiB")
    return path


def command(name: str, options: Namespace) -> str:
    """What measures a set again, without the folders of this machine."""
    given = [f"--{key} {vars(options)[key]}" for key, default in DEFAULTS.items() if vars(options)[key] != default]
    if name in PICTURES and _listed(options.candidates) != list(DEFAULT):
        given.append(f"--candidates {','.join(_listed(options.candidates))}")
    if options.seed:
        given.append(f"--seed {options.seed}")
    return " ".join(["python -m benchmarks vision", name, *given])


@dataclass
class Standing:
    """Where a candidate stands: its rates with their losses, and its seeds."""

    candidate: Candidate
    rate: float | None = None
    search: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    @property
    def tried(self) -> list[tuple[float, float | None]]:
        """(rate, validation loss) in order."""
        return [(one["rate"], one["validation"]) for one in self.search]

    def choose(self) -> None:
        """Takes the rate with the lowest loss on the validation part."""
        finite = [(loss, rate) for rate, loss in self.tried if loss is not None]
        self.rate = min(finite)[1] if finite else None
        self.failed = None if finite else f"it failed at each rate: {self.search[-1]['failed']}"

    def as_json(self) -> dict[str, Any]:
        """As comparison.json has it."""
        keys = ("rate", "validation", "total_seconds", "failed")
        search = [{key.removeprefix("total_"): one[key] for key in keys} for one in self.search]
        chosen = self.candidate
        return {
            "name": chosen.name,
            "kind": chosen.kind,
            "options": {"method": chosen.method, "depthwise": chosen.depthwise, **chosen.options},
            "rate": self.rate,
            "search": search,
            "seeds": self.seeds,
            "failed": self.failed,
        }


class Comparison:
    """The comparison on one set of pictures."""

    def __init__(self, name: str, options: Namespace) -> None:
        self.name, self.options = name, options
        names = dict.fromkeys([PROBE, *_listed(options.candidates)])
        self.standings = [Standing(CANDIDATES[each]) for each in names]
        self._done = 0

    def found(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is said of the data, and the comparison; runs whatever is not done yet.

        Raises:
            ResultsError: the probe failed, whose rate every head has.
            ChildError: a run ended without a result.
        """
        from benchmarks import vision_data
        from benchmarks.vision_sheet import sheet

        pictures = vision_data.pictures(self.name, Path(self.options.data))
        probe, *others = self.standings
        self._search(probe, head_rate=None)
        if probe.rate is None:
            raise ResultsError(f"{self.name}: {PROBE}: {probe.failed}")
        for one in others:
            self._search(one, head_rate=probe.rate)
        seeds = [self.options.seed + number for number in range(1, self.options.seeds + 1)]
        for seed in seeds:
            for one in self.standings:
                if one.rate is not None:
                    one.seeds.append(self._trial(one, one.rate, probe.rate, seed, test=True))
        facts = {"data": {**pictures.facts, "classes": list(pictures.classes)}, "examples": sheet(pictures)}
        return facts, self._compared(seeds, probe.rate)

    def _search(self, one: Standing, head_rate: float | None) -> None:
        for _ in range(self.options.rates):
            rate = next_rate(one.tried, one.candidate.rate)
            one.search.append(self._trial(one, rate, head_rate or rate, self.options.seed, test=False))
        one.choose()

    def _trial(self, one: Standing, rate: float, head_rate: float, seed: int, *, test: bool) -> dict[str, Any]:
        """A run, or what it came to before."""
        self._done += 1
        asked = {
            "name": self.name,
            "candidate": one.candidate.name,
            "rate": rate,
            "head_rate": rate if one.candidate.kind == PROBE else head_rate,
            "seed": seed,
            "test": test,
            **{key: vars(self.options)[key] for key in ("steps", "batch", "size")},
        }
        settings = json.loads(json.dumps({**asked, "threads": self.options.threads, **_settings(one.candidate)}))
        known = finished(self._path(asked), settings)
        total = len(self.standings) * (self.options.rates + self.options.seeds)
        label = f"{self.name} {self._done}/{total}: {one.candidate.name} at {rate:g}, seed {seed}"
        if known is not None:
            say(f"{label}: done before")
            return known
        result: dict[str, Any] = child.call(
            "vision_trial:run", threads=self.options.threads, data=str(Path(self.options.data).resolve()), **asked
        )
        result["commit"] = machine.commit()["hash"]
        path = self._path(asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps({"asked": settings, "result": result}, allow_nan=False) + "\n")
        loss = result["validation"]
        told = result["failed"] or f"validation loss {loss:.4f}"
        say(f"{label}: {told}, {result['total_seconds']:.0f} s")
        return result

    def _path(self, asked: Mapping[str, Any]) -> Path:
        what = "test" if asked["test"] else "search"
        folder = Path(self.options.data) / "trials" / self.name / str(asked["candidate"])
        return folder / f"{what}-rate-{asked['rate']:.2e}-seed-{asked['seed']}.json"

    def _compared(self, seeds: Sequence[int], head_rate: float) -> dict[str, Any]:
        from lorafit.experiments.ranking import rank

        candidates = [one.as_json() for one in self.standings]
        ranking = rank(candidates, metric="accuracy", seed=self.options.seed).to_json()
        counts = next((one["counts"] for each in candidates for one in each["seeds"] if one["counts"]), [])
        runs = [run for one in self.standings for run in (*one.search, *one.seeds)]
        for each in candidates:
            each["seeds"] = [{key: one[key] for key in KEPT if key in one} for one in each["seeds"]]
        return {
            "budget": {key: vars(self.options)[key] for key in DEFAULTS} | {"head_rate": head_rate, "seeds": seeds},
            "counts": counts,
            "candidates": candidates,
            "ranking": ranking,
            "commits": sorted({str(one["commit"]) for one in runs}),
            "others": max((one["others"] or 0 for one in runs), default=0),
            "minutes": math.fsum(one["total_seconds"] for one in runs) / 60,
        }


def _settings(candidate: Candidate) -> dict[str, Any]:
    """What of a candidate a result depends on."""
    return {"method": candidate.method, "options": dict(candidate.options), "depthwise": candidate.depthwise}


def finished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a run that is done, of these very settings; None if there is none."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        asked, result = kept["asked"], kept["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: damaged ({error}); remove it, and the run is done again") from None
    if asked != settings:
        say(f"{path.name}: of other settings, and done again")
        return None
    return dict(result)
