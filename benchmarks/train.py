"""Whole runs on chat data: `lorafit train` beside TRL's SFTTrainer with PEFT, to the same held-out loss.

The same base model (the embedded SmolLM2-135M-Instruct), data (the embedded questions on Python), rank, learning rate,
schedule, records in a step and number of steps; the loss on the answers alone. Each run is a process of its own, and
the sides take turns. Adapters are saved on the way, and one program measures the held-out loss of them all. Times are
from the beginning of the first step to the end of the last one; the whole process is given beside.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.machine import ROOT
from benchmarks.statistic import Spread
from benchmarks.stored import Session

NAME = "train"
HELP = "whole runs beside TRL's SFTTrainer with PEFT, to the same held-out loss"
PLAIN = {"bf16": False, "gradient_checkpointing": False}
"""TRL's defaults compute in bfloat16, and compute activations twice to save memory."""
PACKED = 512
"""Tokens of a packed row of TRL's: about eight records."""


@dataclass(frozen=True)
class Side:
    """One way to run: a library, and what is given beside the common settings.

    Attributes:
        trl: options of SFTConfig; None for lorafit.
        flags: of `lorafit train`.
        about: what it is, for the page.
    """

    about: str
    trl: dict[str, Any] | None = None
    flags: tuple[str, ...] = field(default=())


SIDES = {
    "lorafit": Side("`lorafit train`, float32 as by default"),
    "lorafit bf16": Side("the same under bfloat16 autocast", flags=("--bf16", "--use-cpu")),
    "trl": Side("SFTTrainer, float32, activations kept", PLAIN),
    "trl packing": Side(
        f"the same with packing, one row of {PACKED} tokens a step",
        {**PLAIN, "packing": True, "max_length": PACKED, "per_device_train_batch_size": 1},
    ),
    "trl bf16": Side("as trl, under bfloat16 autocast", {"bf16": True, "gradient_checkpointing": False}),
    "trl defaults": Side("SFTTrainer's defaults: bfloat16 autocast, activations computed twice", {}),
}
SINGLE = ("lorafit", "trl", "trl packing")
"""Those that compute in float32."""


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--saves", type=int, default=4, help="adapters saved on the way, for the curve of the loss")
    parser.add_argument("--r", type=int, default=16, help="rank")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--batch", type=int, default=8, help="records in a step")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES), default=list(SIDES), help="what runs")
    parser.add_argument(
        "--with",
        dest="flags",
        default="",
        help="further flags of `lorafit train` for a side of its own: 'lorafit with'",
    )
    parser.add_argument("--eval-limit", type=int, default=0, help="held-out records at most; 0 is all")


def run(options: Namespace) -> Path:
    """Measures, shows and stores."""
    from lorafit.training.embedded import embedded_model_path
    from lorafit.training.embedded_data import embedded_data_path

    model = str(embedded_model_path())
    sides = {name: SIDES[name] for name in options.sides}
    if options.flags:
        flags = tuple(shlex.split(options.flags))
        sides["lorafit with"] = Side(f"`lorafit train` with {options.flags}", flags=flags)
    session = Session(NAME, NAME, options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats):
            for name, side in sides.items():
                place = Path(folder) / f"{number}-{name.replace(' ', '-')}"
                place.mkdir()
                one = (_ours if side.trl is None else _theirs)(side, place, options, model, embedded_data_path("train"))
                one["losses"] = losses(place, options, model, str(embedded_data_path("eval")))
                runs[name].append(one)
                last = one["losses"][-1]
                print(
                    f"  {name:14} {one['ends'][-1]:7.1f} s, {one['process']:6.1f} s in all, "
                    f"{one['peak'] / 2**20:6.0f} MiB, held-out loss {last[1]:.4f} after step {last[0]}",
                    flush=True,
                )
    return session.write(
        {
            "steps": options.steps,
            "r": options.r,
            "rate": options.rate,
            "batch": options.batch,
            "about": {name: side.about for name, side in sides.items()},
            "single": [name for name in sides if name in SINGLE],
            "runs": runs,
        }
    )


def _every(options: Namespace) -> int:
    return max(1, int(options.steps) // int(options.saves))


def _run(command: list[str], threads: int, log: Path) -> tuple[float, str]:
    """Runs a process; gives its seconds and what it printed."""
    begun = time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            command, env=child.environment(threads), cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    passed = time.perf_counter() - begun
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise child.ChildError(f"{shlex.join(command)} ended with status {done.returncode}\n{tail}")
    return passed, done.stdout


def _ours(side: Side, place: Path, options: Namespace, model: str, data: Path) -> dict[str, Any]:
    settings = {
        "model": model,
        "data": data,
        "eval-split": 0,
        "method": "lora",
        "r": options.r,
        "learning-rate": options.rate,
        "lr-scheduler-type": "linear",
        "warmup-steps": 0,
        "per-device-train-batch-size": options.batch,
        "max-steps": options.steps,
        "save-strategy": "steps",
        "save-steps": _every(options),
        "save-total-limit": 1000,
        "samples": 0,
        "seed": options.seed,
        "output-dir": place,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "lorafit", "train", *flags, *side.flags]
    seconds, _ = _run(command, options.threads, place.with_name(place.name + ".log"))
    records = [json.loads(line) for line in (place / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    begun = steps[0]["elapsed"] - steps[0]["seconds"]
    return {
        "process": seconds,
        "ends": [step["elapsed"] - begun for step in steps],
        "tokens": sum(step["tokens"] for step in steps),
        "peak": max(step["peak_rss_bytes"] for step in steps),
    }


def _theirs(side: Side, place: Path, options: Namespace, model: str, data: Path) -> dict[str, Any]:
    wanted = {
        "model": model,
        "data": str(data),
        "steps": options.steps,
        "r": options.r,
        "rate": options.rate,
        "batch": options.batch,
        "seed": options.seed,
        "save": _every(options),
        "folder": str(place),
        "options": side.trl,
    }
    file = place.with_name(place.name + ".json")
    file.write_text(json.dumps(wanted), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.sft", str(file)]
    seconds, printed = _run(command, options.threads, place.with_name(place.name + ".log"))
    return {"process": seconds, **json.loads(printed.splitlines()[-1])}


def losses(place: Path, options: Namespace, model: str, data: str) -> list[tuple[int, float]]:
    """(step, held-out loss) of every adapter that a run saved, by one program for both sides."""
    found = sorted((int(path.name.rpartition("-")[2]), str(path)) for path in place.glob("checkpoint-*"))
    values = child.call(
        "train:evaluate",
        threads=options.threads,
        model=model,
        data=data,
        adapters=[path for _, path in found],
        limit=options.eval_limit,
    )
    return [(step, value) for (step, _), value in zip(found, values, strict=True)]


def evaluate(model: str, data: str, adapters: Sequence[str], limit: int, threads: int) -> list[float]:
    """Mean loss per answer token of each adapter on held-out questions; plain transformers computes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import lorafit as lf

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = Path(data).read_text(encoding="utf-8").splitlines()
    rows = [_encoded(tokenizer, json.loads(line)) for line in lines[: limit or None]]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    values = []
    for path in adapters:
        handle = lf.load(base, path)
        values.append(_mean_loss(base, rows))
        handle.detach()
    return values


def _encoded(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], int]:
    """The tokens of a conversation up to the answer's last one, and how many of them are the question's."""
    asked = [{"role": "user", "content": record["question"]}]
    answered = [*asked, {"role": "assistant", "content": record["answer"]}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False).rstrip("\n")
    assert whole.startswith(before), "the chat template writes a question otherwise once it is answered"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(before, add_special_tokens=False)["input_ids"])


def _mean_loss(model: Any, rows: Sequence[tuple[list[int], int]], size: int = 16) -> float:
    import torch

    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    with torch.no_grad():
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            longest = max(len(ids) for ids, _ in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
            for row, (tokens, asked) in enumerate(part):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
                labels[row, asked : len(tokens)] = torch.tensor(tokens[asked:])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            wanted = labels[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(logits[wanted != -100], wanted[wanted != -100], reduction="sum")
            )
            count += int((wanted != -100).sum())
    return total / count


def target(runs: dict[str, list[dict[str, Any]]], sides: Sequence[str]) -> float:
    """The lowest held-out loss that every run of these sides reached."""
    return max(min(float(loss) for _, loss in one["losses"]) for name in sides for one in runs[name])


def seconds_to(one: dict[str, Any], loss: float) -> float:
    """Seconds of training until a run's held-out loss was down to `loss`, by straight lines between its adapters.

    >>> seconds_to({"ends": [1.0, 2.0, 3.0, 4.0], "losses": [[2, 3.0], [4, 2.0]]}, 2.5)
    3.0
    """
    before: tuple[float, float] | None = None
    for step, value in one["losses"]:
        now = (float(one["ends"][step - 1]), float(value))
        if value <= loss:
            if before is None or before[1] == value:
                return now[0]
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (now[0] - before[0])
        before = now
    raise ValueError(f"the run did not reach {loss}")


def compared(runs: dict[str, list[dict[str, Any]]], ours: str, theirs: str) -> tuple[float, Spread]:
    """The loss that both reached, and the ratio of the seconds to it, over the repeats in turn."""
    loss = target(runs, (ours, theirs))
    pairs = zip(runs[ours], runs[theirs], strict=True)
    return loss, Spread.of([seconds_to(one, loss) / seconds_to(other, loss) for one, other in pairs])
