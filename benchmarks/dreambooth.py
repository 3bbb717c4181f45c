"""DreamBooth on the tiny pipeline: five pictures of a subject that it has never seen, several methods, what they keep.

`examples/emoji_diffusion/pretrain.py` makes the pipeline, in half an hour. Then each method is run by `lorafit
dreambooth` at three rates, and at the best one with three seeds; what each draws is measured beside pictures of the
subject that nothing was ever shown, and beside what the pipeline drew before. Each run has a process of its own; what
is done is kept, and the same command goes on after a kill. On two quiet cores about half an hour.
"""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import child, dreambooth_measure, machine, stored, vision_packages
from benchmarks.dreambooth_page import section
from benchmarks.dreambooth_trials import ALONE, CANDIDATES, CLASS, LORA, Candidate, Pretrained, Trials, best
from benchmarks.keeping import short
from benchmarks.machine import ROOT
from benchmarks.stored import ResultsError, say
from lorafit import files

__all__ = ["HELP", "NAME", "arguments", "run", "section"]

NAME = "dreambooth"
HELP = "DreamBooth on the tiny pipeline of the examples: a held-out subject, several methods"
PICTURES = ROOT / "docs" / "results" / "pictures"
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MEASURED = "measured.json"
DEFAULTS: Mapping[str, int] = {"rates": 3, "seeds": 3, "steps": 400}


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(stored.FOLDER / "vision"))
    parser.add_argument(
        "pretrained", nargs="?", default=str(ROOT / "build" / "emoji-diffusion"), help="what the example left"
    )
    parser.add_argument("--subject", default="cat", help="what is taught")
    parser.add_argument("--second", default="monkey", help="another subject, for the sum of two")
    parser.add_argument("--data", default=str(vision_packages.FOLDER), help="folder of packages and of runs")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
    parser.add_argument("--pictures", default=str(PICTURES), help="folder for the page's pictures")
    told = {
        "rates": "learning rates to try for each candidate",
        "seeds": "seeds to report of each",
        "steps": "optimizer steps of a run",
    }
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=told[name])


def run(options: Namespace) -> Path:
    """Runs, measures, draws and stores."""
    chosen = _chosen(options)
    pretrained = Pretrained(Path(options.pretrained).resolve())
    weights = hashlib.sha256(
        (pretrained.pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()
    # The runs of another pipeline are not those of this one.
    work = Path(options.data).resolve() / "dreambooth" / weights[:12]
    try:
        found = Comparison(options, pretrained, work).found(chosen)
    except KeyboardInterrupt:
        say(f"runs that are done stay in {work}: the same command goes on")
        raise
    return _keep(options, found, f"{work}/")


def _chosen(options: Namespace) -> list[Candidate]:
    names = [name.strip() for name in options.candidates.split(",") if name.strip()]
    if strange := [name for name in names if name not in CANDIDATES]:
        raise ResultsError(f"no such candidate: {strange[0]}; there are {', '.join(CANDIDATES)}")
    for name in DEFAULTS:
        if vars(options)[name] < 1:
            raise ResultsError(f"--{name} {vars(options)[name]}: at least 1")
    if LORA not in names:
        raise ResultsError(f"--candidates {options.candidates}: {LORA} has to be among them, others take its rate")
    if options.subject == options.second:
        raise ResultsError(f"--second {options.second}: that is the subject itself")
    return [one for name, one in CANDIDATES.items() if name in names]


class Comparison:
    """All runs of a subject, and what was measured of them."""

    def __init__(self, options: Namespace, pretrained: Pretrained, work: Path) -> None:
        self.options, self.pretrained, self.work = options, pretrained, work
        self.trials = self._trials(options.subject)
        self.seeds = range(options.seed, options.seed + options.seeds)

    def _trials(self, word: str) -> Trials:
        return Trials(
            self.pretrained,
            self.pretrained.subject(word),
            self.work,
            self.options.steps,
            self.options.threads,
            dreambooth_measure.to_keep(self.pretrained.learnt()),
        )

    def found(self, chosen: Sequence[Candidate]) -> dict[str, Any]:
        """Everything, in JSON's types."""
        before = self.work / "before" / self.options.subject
        base = self._measured(before, None)
        reference = self._called("reference", before / "reference.json", word=self.options.subject, base=str(before))
        rates: dict[str, float] = {}
        candidates = []
        for candidate in chosen:
            search = [] if candidate.like else self.trials.search(candidate, self.options.rates, self.options.seed)
            rates[candidate.name] = rates[candidate.like] if candidate.like else best(search, candidate.name)
            candidates.append(self._candidate(candidate, rates[candidate.name], search))
        strengths = self._strengths(rates[LORA])
        found = {
            "about": self.pretrained.about,
            "settings": {
                **{name: vars(self.options)[name] for name in (*DEFAULTS, "subject", "second")},
                "instance_prompt": self.trials.subject.instance_prompt,
                "class_prompt": self.trials.subject.class_prompt,
                "keep_prompts": list(self.trials.keep),
                "pixels": self.pretrained.pixels,
                "diffusers": metadata.version("diffusers"),
            },
            "before": base,
            "reference": reference,
            "candidates": candidates,
            "ranking": ranking(base, candidates),
            "strengths": strengths,
        }
        found["pictures"] = self._pictures(rates, strengths)
        return found

    def _candidate(self, candidate: Candidate, rate: float, search: list[dict[str, Any]]) -> dict[str, Any]:
        seeds = []
        for seed in self.seeds:
            figures = self.trials.ran(candidate, rate, seed)
            place = self.trials.place(candidate, rate, seed)
            measured = self._measured(place / "measured", place)
            file = place / "adapter" / "pytorch_lora_weights.safetensors"
            size = file.stat().st_size if file.is_file() else None
            seeds.append({"seed": seed, **figures, "adapter_bytes": size, **measured})
        return {
            "name": candidate.name,
            "options": list(candidate.options),
            "rate": rate,
            "search": search,
            "seeds": seeds,
        }

    def _measured(self, samples: Path, adapter: Path | None) -> dict[str, Any]:
        base = None if adapter is None else str(self.work / "before" / self.options.subject)
        return self._called(
            "measured",
            samples / MEASURED,
            word=self.options.subject,
            adapter=None if adapter is None else str(adapter),
            samples=str(samples),
            base=base,
        )

    def _strengths(self, rate: float) -> dict[str, Any]:
        """Both subjects by LoRA with the first seed, alone and together."""
        adapters = {}
        for word in (self.options.subject, self.options.second):
            trials = self._trials(word)
            trials.ran(CANDIDATES[LORA], rate, self.options.seed)
            adapters[word] = str(trials.place(CANDIDATES[LORA], rate, self.options.seed))
        place = self.work / "strengths"
        return self._called("strengths", place / MEASURED, adapters=adapters, scales=list(SCALES), samples=str(place))

    def _called(self, function: str, kept: Path, **arguments: Any) -> dict[str, Any]:
        """What a function of `dreambooth_measure` finds in a process of its own; kept, with what it was asked."""
        asked = json.loads(json.dumps({"function": function, "constants": dreambooth_measure.constants(), **arguments}))
        if kept.is_file():
            known: dict[str, Any] = json.loads(kept.read_text())
            if known["asked"] == asked:
                found: dict[str, Any] = known["found"]
                return found
        say(f"measures: {function} {arguments.get('samples', '')}")
        found = child.call(
            f"dreambooth_measure:{function}",
            threads=self.options.threads,
            pretrained=str(self.pretrained.folder),
            data=str(Path(self.options.data).resolve()),
            **arguments,
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(kept, json.dumps({"asked": asked, "found": found}) + "\n")
        return found

    def _pictures(self, rates: Mapping[str, float], strengths: Mapping[str, Any]) -> dict[str, Any]:
        samples = {"before": str(self.work / "before" / self.options.subject)}
        for name, rate in rates.items():
            samples[name] = str(self.trials.place(CANDIDATES[name], rate, self.options.seed) / "measured")
        made: dict[str, Any] = child.call(
            "dreambooth_pictures:drawn",
            threads=self.options.threads,
            pretrained=str(self.pretrained.folder),
            word=self.options.subject,
            samples=samples,
            shown=[name for name in (LORA, CLASS, ALONE) if name in rates],
            strengths=strengths,
            strips=str(self.work / "strengths"),
            folder=str(Path(self.options.pictures).resolve()),
        )
        return made


def ranking(base: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which candidate comes nearest to the subject, and which changes other prompts the least, with intervals.

    Samples are paired: every candidate draws from the same noise.
    """
    from lorafit.experiments.ranking import rank

    side = own(base)
    near = [_entry("before", "base", [{"seed": 0, **base}], lambda one: one["near"]["features"][side])]
    near += [
        _entry(one["name"], "adapter", one["seeds"], lambda each: each["near"]["features"][side]) for one in candidates
    ]
    drift = [_entry(one["name"], "adapter", one["seeds"], lambda each: each["drift"]["features"]) for one in candidates]
    return {"near": rank(near).to_json(), "drift": rank(drift).to_json()}


def own(measured: Mapping[str, Any]) -> str:
    """The pictures of the subject that distances are taken to: those never shown, where there are any."""
    return "unseen" if "unseen" in measured["near"]["features"] else "seen"


def _entry(name: str, kind: str, seeds: Sequence[Mapping[str, Any]], values: Any) -> dict[str, Any]:
    rows = [
        {
            "seed": one["seed"],
            "losses": values(one),
            "counts": [1] * len(values(one)),
            "correct": None,
            "seconds": one.get("train_seconds", 0.0),
            "peak_rss_bytes": one.get("peak_rss_bytes"),
            "trainable": one.get("trainable", 0),
            "adapter_bytes": one.get("adapter_bytes"),
            "failed": None,
        }
        for one in seeds
    ]
    return {"name": name, "kind": kind, "seeds": rows, "failed": None}


def _keep(options: Namespace, found: Mapping[str, Any], work: str) -> Path:
    """Writes the file."""
    kept = {
        "kind": NAME,
        "name": f"{NAME}-{options.subject}",
        "command": command(options),
        **machine.describe(options.threads),
        "seed": options.seed,
        "found": short(json.loads(json.dumps(dict(found))), work),
    }
    path = Path(options.output) / f"{NAME}-{options.subject}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n")
    say(f"{path}: written, {path.stat().st_size / 1024:.0f} KiB")
    return path


def command(options: Namespace) -> str:
    """What measures this again, without the folders of this machine."""
    given = [f"--{name} {vars(options)[name]}" for name, default in DEFAULTS.items() if vars(options)[name] != default]
    if options.candidates != ",".join(CANDIDATES):
        given.append(f"--candidates {options.candidates}")
    if (options.subject, options.second) != ("cat", "monkey"):
        given.append(f"--subject {options.subject} --second {options.second}")
    return " ".join([f"python -m benchmarks {NAME}", *given])
