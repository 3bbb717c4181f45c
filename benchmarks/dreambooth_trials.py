"""Runs of `lorafit dreambooth` on the tiny pipeline: what is compared, at which rates, and that none is run twice."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import ChildError, environment
from benchmarks.machine import ROOT
from benchmarks.rates import next_rate
from benchmarks.stored import ResultsError, say
from lorafit import files

BATCH = 5
CLASS_PICTURES = 64
DONE = "benchmark.json"
"""What a finished run's folder has: what the command said of it."""
FIGURES = (
    "eval_loss_before",
    "eval_loss_after",
    "prior_loss_before",
    "prior_loss_after",
    "train_seconds",
    "steps",
    "peak_rss_bytes",
)


class DivergedError(ChildError):
    """A run's loss or gradients were not finite: its rate is too high."""


@dataclass(frozen=True)
class Candidate:
    """One of those that are compared.

    Attributes:
        name: its own.
        options: of `lorafit dreambooth`.
        rate: the first one that is tried.
        like: a candidate whose rate it takes instead of a search of its own.
        prior: whether pictures of the class are trained on, too.
        kept: whether pictures of other things are among those.
    """

    name: str
    options: tuple[str, ...]
    rate: float = 1e-3
    like: str | None = None
    prior: bool = True
    kept: bool = True


LORA = "lora"
CLASS = "lora-class-alone"
ALONE = "lora-no-prior"
CANDIDATES: Mapping[str, Candidate] = {
    one.name: one
    for one in (
        Candidate(LORA, ("--method", "lora", "--r", "8")),
        Candidate("lora-convolutions", ("--method", "lora", "--r", "8", "--targets", "convolutions")),
        Candidate("dora", ("--method", "dora", "--r", "8")),
        Candidate("vera", ("--method", "vera", "--r", "64"), rate=3e-2),
        Candidate("adalora", ("--method", "adalora", "--init-r", "12", "--target-r", "8"), rate=3e-3),
        Candidate("lora-text", ("--method", "lora", "--r", "8", "--train-text-encoder"), like=LORA),
        Candidate(CLASS, ("--method", "lora", "--r", "8"), like=LORA, kept=False),
        Candidate(ALONE, ("--method", "lora", "--r", "8"), like=LORA, prior=False),
    )
}


@dataclass(frozen=True)
class Subject:
    """What is taught.

    Attributes:
        word: "cat".
        instance_prompt: with the identifier.
        class_prompt: without.
        seen: folder of the pictures to learn from.
        unseen: folder of further pictures of the same; empty where there are none.
    """

    word: str
    instance_prompt: str
    class_prompt: str
    seen: Path
    unseen: Path


@dataclass(frozen=True)
class Pretrained:
    """What `examples/emoji_diffusion/pretrain.py` left in its folder."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "pipeline" / "model_index.json").is_file():
            raise ResultsError(
                f"{self.folder}: no pipeline in it; python examples/emoji_diffusion/pretrain.py --output {self.folder}"
            )

    @property
    def pipeline(self) -> Path:
        """The pipeline's directory."""
        return self.folder / "pipeline"

    @property
    def about(self) -> dict[str, Any]:
        """How it was trained, and with which sizes."""
        plan, done = (json.loads((self.folder / name).read_text()) for name in ("plan.json", "pretraining.json"))
        return {**done, "plan": plan}

    @property
    def pixels(self) -> int:
        """Of a picture each way."""
        return int(json.loads((self.folder / "plan.json").read_text())["sizes"]["pixels"])

    def subject(self, word: str) -> Subject:
        """A subject that was held out.

        Raises:
            ResultsError: there is none of this word.
        """
        about = json.loads((self.folder / "data" / "subjects.json").read_text())
        if word not in about:
            raise ResultsError(f"no such subject: {word}; there are {', '.join(about)}")
        place = self.folder / "data" / "subjects" / word
        one = about[word]
        return Subject(word, one["instance_prompt"], one["class_prompt"], place / "seen", place / "unseen")

    def learnt(self) -> list[dict[str, Any]]:
        """The pictures that the pipeline was trained on: their captions, and `path`."""
        lines = (self.folder / "data" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [{**row, "path": self.folder / "data" / "pictures" / f"{row['file']}.png"} for row in rows]


@dataclass(frozen=True)
class Trials:
    """The runs of a subject.

    Attributes:
        pretrained: what they start from.
        subject: what they learn.
        folder: where they are kept.
        steps: of each.
        threads: of torch.
        keep: what is to stay as it is beside the class.
    """

    pretrained: Pretrained
    subject: Subject
    folder: Path
    steps: int
    threads: int
    keep: tuple[str, ...]

    def place(self, candidate: Candidate, rate: float, seed: int) -> Path:
        """The folder of a run; of one with other steps or prompts it is another."""
        shared = hashlib.sha256(json.dumps([self.steps, BATCH, CLASS_PICTURES, self.keep]).encode()).hexdigest()
        of_it = self.folder / f"runs-{shared[:8]}" / self.subject.word / candidate.name
        return of_it / f"rate-{rate:.2g}" / f"seed-{seed}"

    def ran(self, candidate: Candidate, rate: float, seed: int) -> dict[str, Any]:
        """What became of a run; it is run where it was not, and goes on from its checkpoint after a kill.

        Raises:
            DivergedError: its loss was not finite, now or when it was run.
            ChildError: it ended with another error.
        """
        place = self.place(candidate, rate, seed)
        path = place / DONE
        if not path.is_file():
            say(f"{self.subject.word}: {candidate.name}, rate {rate:.2g}, seed {seed}")
            command = self.command(candidate, rate, seed)
            done = subprocess.run(
                [sys.executable, "-m", "lorafit", *command],
                cwd=ROOT,
                env=environment(self.threads),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                told = "\n".join(done.stderr.strip().splitlines()[-8:])
                if diverged(place / "records.jsonl"):
                    files.write_text(path, json.dumps({"diverged": told}) + "\n")
                    raise DivergedError(told)
                raise ChildError(f"lorafit {' '.join(command)} ended with status {done.returncode}:\n{told}")
            said = json.loads(done.stdout.strip().splitlines()[-1])
            kept = {**{key: said[key] for key in FIGURES}, "trainable": trained(place / "records.jsonl")}
            files.write_text(path, json.dumps(kept) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        if "diverged" in found:
            raise DivergedError(found["diverged"])
        return found

    def loss(self, candidate: Candidate, rate: float, seed: int) -> float | None:
        """The loss on the subject and on the class that a run came to; None where it was not finite."""
        try:
            return together(self.ran(candidate, rate, seed))
        except DivergedError:
            say(f"{self.subject.word}: {candidate.name}, rate {rate:.2g}: the loss is not finite")
            return None

    def command(self, candidate: Candidate, rate: float, seed: int) -> list[str]:
        """The command of a run. All runs that keep the same share its pictures, which are drawn once."""
        keep = self.keep if candidate.kept else ()
        drawn = self.folder / ("class-and-others" if keep else "class") / re.sub(r"\W+", "-", self.subject.class_prompt)
        prior = (
            *("--class-prompt", self.subject.class_prompt, "--class-images", str(drawn)),
            *("--num-class-images", str(CLASS_PICTURES)),
            *(word for prompt in keep for word in ("--keep-prompt", prompt)),
        )
        return [
            *("dreambooth", "--pipeline", str(self.pretrained.pipeline), "--instance-images", str(self.subject.seen)),
            *("--instance-prompt", self.subject.instance_prompt, *(prior if candidate.prior else ())),
            *("--resolution", str(self.pretrained.pixels), "--batch-size", str(BATCH)),
            *("--max-steps", str(self.steps), "--learning-rate", f"{rate:.3g}", "--seed", str(seed)),
            *("--sample-every", "0", "--sample-count", "0", "--sample-steps", "25", "--guidance", "4"),
            *("--evaluate-every", "0", "--evaluation-draws", "16", "--save-every", "0"),
            *(*candidate.options, "--output-dir", str(self.place(candidate, rate, seed)), "--json"),
        ]

    def search(self, candidate: Candidate, rates: int, seed: int) -> list[dict[str, Any]]:
        """Each rate that is tried, and the loss on the subject and on the class together that it came to.

        The loss is of the pictures that are trained on, under noise that training never draws: no test picture has a
        part in the choice.
        """
        tried: list[tuple[float, float | None]] = []
        for _ in range(rates):
            rate = next_rate(tried, candidate.rate)
            tried.append((rate, self.loss(candidate, rate, seed)))
        return [{"rate": rate, "loss": loss} for rate, loss in tried]


def trained(records: Path) -> int:
    """How many numbers a run has trained, as its records have it."""
    for line in records.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["event"] == "config":
            return int(row["resolved"]["trainable"])
    raise ResultsError(f"{records}: no line on the run's settings")


def diverged(records: Path) -> bool:
    """Whether a run ended because its loss or gradients were not finite."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    said = str(last.get("message", ""))
    return last.get("event") == "end" and said.startswith("TrainingError") and "not finite" in said


def together(figures: Mapping[str, Any]) -> float | None:
    """The loss after training, on the subject and on the class; None where there is no finite one.

    >>> together({"eval_loss_after": 0.25, "prior_loss_after": 0.5})
    0.75
    """
    parts = [figures["eval_loss_after"], figures["prior_loss_after"]]
    return None if any(part is None or not math.isfinite(part) for part in parts) else math.fsum(parts)


def best(search: Sequence[Mapping[str, Any]], name: str) -> float:
    """The rate with the lowest loss.

    Raises:
        ResultsError: no rate came to a finite one.
    """
    whole = [one for one in search if one["loss"] is not None]
    if not whole:
        raise ResultsError(f"{name}: the loss was finite at no rate of {[one['rate'] for one in search]}")
    return float(min(whole, key=lambda one: one["loss"])["rate"])
