"""One run on pictures, in a process of its own: its peak memory is its own, and what breaks stays there."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine


def run(
    *,
    threads: int,
    data: str,
    name: str,
    candidate: str,
    rate: float,
    head_rate: float,
    seed: int,
    steps: int,
    batch: int,
    size: int,
    test: bool,
) -> dict[str, Any]:
    """Trains a candidate, measures it on the validation part, and if it is asked on the test part.

    Args:
        threads: of torch.
        data: the folder of packages and pictures.
        name: of the pictures.
        candidate: by its name.
        rate: its learning rate.
        head_rate: that of the head beside it.
        seed: of its first values and the order of pictures.
        steps: of the optimizer.
        batch: pictures in a step.
        size: pixels each way.
        test: whether to measure on the test part, and the size of the file.

    Returns:
        As a seed of comparison.json, with `others` and what else the fit tells. What diverged has `failed`.
    """
    begun, others = time.perf_counter(), machine.load()["others"]
    import torch

    from benchmarks import vision_candidates, vision_data, vision_fits

    torch.set_num_threads(threads)
    chosen = vision_candidates.CANDIDATES[candidate]
    folder = Path(data)
    pictures = vision_data.pictures(name, folder)
    model = vision_candidates.network(folder, len(pictures.classes), size, seed)
    task = vision_fits.Task(chosen, rate, head_rate, steps, batch, size, seed, vision_candidates.HEAD)
    found: dict[str, Any] = {
        "seed": seed,
        "rate": rate,
        "head_rate": head_rate,
        "steps": steps,
        "others": others,
        "validation": None,
        "losses": [],
        "counts": [],
        "correct": None,
        "adapter_bytes": None,
        "failed": None,
    }
    try:
        fit = vision_fits.WAYS[chosen.kind](model, task, pictures.parts["train"])
        found |= {"trainable": fit.trainable, "extra_steps": fit.extra_steps}
        found["seconds"] = fit.seconds + vision_fits.train(model, fit, pictures.parts["train"], task)
    except vision_fits.DivergedError as error:
        return _ended(found, str(error), begun)
    found["peak_rss_bytes"] = machine.resident()["peak"]
    found["validation"] = float(vision_fits.measure(model, pictures.parts["validation"], size)[0].mean())
    if not math.isfinite(found["validation"]):
        return _ended(found | {"validation": None}, "the validation loss is not finite at the end", begun)
    if test:
        _report(found, model, fit, pictures.parts["test"], size)
    return _ended(found | fit.facts, found["failed"], begun)


def _report(found: dict[str, Any], model: Any, fit: Any, part: Any, size: int) -> None:
    """Measures what would be used, an adapter folded in, and sizes its file."""
    from benchmarks import vision_candidates, vision_fits

    fit.merge(vision_candidates.ready(part.pixels[:32], size))
    losses, right = vision_fits.measure(model, part, size)
    sums = [vision_fits.by_family(each, part.families).tolist() for each in (losses, right)]
    if all(map(math.isfinite, sums[0])):
        found["losses"] = sums[0]
        found["correct"] = [int(each) for each in sums[1]]
        found["counts"] = part.families.bincount().tolist()
    else:
        found["failed"] = "the loss of a test picture is not finite"
    with tempfile.TemporaryDirectory() as folder:
        found["adapter_bytes"] = fit.stored_bytes(Path(folder) / "adapter")


def _ended(found: dict[str, Any], failed: str | None, begun: float) -> dict[str, Any]:
    """With what a run has that ended too early as well."""
    left = {"trainable": 0, "extra_steps": 0, "seconds": 0.0, "peak_rss_bytes": machine.resident()["peak"]}
    return left | found | {"failed": failed, "total_seconds": time.perf_counter() - begun}
