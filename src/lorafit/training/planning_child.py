"""The run itself for a few steps, in a process of its own and a folder that is thrown away: what it takes is measured.

Run as a module it reads settings as JSON from stdin, and trains. The process has to be another one: memory that a
process once had is not told apart from memory that it has, and one that takes too much is ended by the system.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lorafit.errors import TrainingError
from lorafit.training.callbacks import terminated
from lorafit.training.config import UNRECORDED, Settings

STEPS = 3
"""Optimizer steps: the longest batch, and two others, of which the second is timed with everything warmed up."""
TOKENS = 8
"""Length of the answers."""
ENDED = "the system ended it for want of memory"
PACKED, PADDED = "packing", "padding"
"""How the sentence begins that says how batches are laid out."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "MemoryError")
"""What torch and Python say in that case, where the system leaves it to them."""
SHORT: dict[str, Any] = {
    **UNRECORDED,
    "max_steps": STEPS,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "warmup_steps": 0,
}
"""What differs from the run's training arguments; its batches are the same, as they depend on data and seed alone."""


@final
@dataclass(frozen=True)
class Measured:
    """What a few steps took.

    Attributes:
        peak: bytes at most: of the process, or of the GPU if there is one.
        seconds: of each step.
        evaluation: seconds of one over `evaluated` records, None without held-out data.
        evaluated: how many those were at most.
        answers: seconds of the answers before training, of `TOKENS` tokens.
        rest: seconds of everything else: start, data, model, files.
        layout: how the run laid its batches out, in a sentence; empty where nothing was to be decided.
        watched: seconds that the general text took before training, of `watched_tokens` tokens.
    """

    peak: int
    seconds: tuple[float, ...]
    evaluation: float | None
    evaluated: int
    answers: float
    rest: float
    layout: str = ""
    watched: float = 0.0
    watched_tokens: int = 0


def measure(settings: Settings) -> Measured | str:
    """Trains for `STEPS` steps elsewhere; a sentence where that ended early.

    Raises:
        TrainingError: the run fails for another reason than memory.
    """
    batch = int(settings.training.get("per_device_eval_batch_size", 8))
    limit = min(batch, settings.eval_limit or batch)
    with tempfile.TemporaryDirectory(prefix="lorafit-plan-") as folder:
        short = settings.model_copy(
            update={
                "output_dir": str(Path(folder) / "run"),
                "eval_limit": limit,
                "target": None,  # by the formula, as it may be long
                "max_new_tokens": min(TOKENS, settings.max_new_tokens),
                "training": {**settings.training, **SHORT},
            }
        )
        paths = os.pathsep.join(path for path in sys.path if path)
        with terminated():  # the child and the folder go with this process
            done = subprocess.run(
                [sys.executable, "-m", "lorafit.training.planning_child"],
                input=short.model_dump_json(),
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                check=False,
            )
        if done.returncode == -signal.SIGKILL or any(text in done.stderr for text in _NO_MEMORY):
            return ENDED
        if done.returncode:
            raise TrainingError(
                "the steps that were to be measured failed",
                found=_last(done.stderr),
                expected="a run that can start",
                fix="lorafit train with the same settings shows where; --dry plans without a step",
            )
        told = json.loads(done.stdout.splitlines()[-1])
        return _read(Path(folder) / "run" / "records.jsonl", limit, told["layout"])


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]


def _read(path: Path, limit: int, layout: str) -> Measured:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [one for one in records if one["event"] == "step"]
    looks = [one for one in records if one["event"] == "evaluation"]
    before = [one for one in records if one["event"] == "sample" and one["phase"] == "before"]
    end = records[-1]
    text = next((one for one in records if one["event"] == "watched"), None)
    # The general text follows the first evaluation, or the facts of the data; the first answers follow that.
    since = max(one["elapsed"] for one in records if one["event"] in ("data", "evaluation") and one not in looks[1:])
    watched = 0.0 if text is None else text["elapsed"] - since
    answers = before[0]["elapsed"] - since - watched if before else 0.0
    looked = sum(one["seconds"] for one in looks)
    peak = end["peak_device_bytes"] or end["peak_rss_bytes"] or 0
    rest = max(0.0, end["seconds"] - end["train_seconds"] - looked - 2 * (watched + answers))
    return Measured(
        peak,
        tuple(one["seconds"] for one in steps),
        looks[0]["seconds"] if looks else None,
        limit,
        answers,
        rest,
        layout,
        watched,
        0 if text is None else int(sum(text["counts"])) + len(text["counts"]),
    )


def _main() -> None:
    import warnings

    from rich.console import Console
    from transformers.utils import logging

    from lorafit.training.run import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # the run itself will say them
    settings = Settings.model_validate_json(sys.stdin.read())
    said = Console(stderr=True)
    lines: list[str] = []
    train(settings, command="lorafit plan", notify=lines.append, console=said)
    layout = next((line for line in lines if line.startswith((PACKED, PADDED))), "")
    sys.stdout.write(json.dumps({"layout": layout}) + "\n")


if __name__ == "__main__":
    _main()
