"""What was set out to be reached, and whether it was: the bars, and what the stored measurements say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import train
from benchmarks.statistic import Spread, ratios
from benchmarks.variants import ALIKE, FLOOR, PEFT

Documents = Mapping[str, Mapping[str, Any]]

STEP_BARS = {
    "lora": 1.09,
    "lora dropout 0.05": 1.14,
    "lora dropout 0.1": 1.14,
    "lora-fa": 1.07,
    "lora-plus": 1.10,
    "dora": 1.14,
    "adalora": 1.12,
    "vera r256": 1.25,
    "delta-lora": 1.14,
}
"""Variant → the highest ratio of its step to the floor's, on `six`."""
MEMORY_BAR = 0.75
"""Peak memory by PEFT's."""
TRAIN_BAR = 0.50
"""Seconds of `lorafit train` by those of TRL's SFTTrainer with PEFT."""
NEVER_SLOWER = 1.0
BILLION_BAR = 3.0
"""Gigabytes at the peak of LoRA steps over about a billion parameters."""
PLAN_BAR = 0.15
"""The share by which what `lorafit plan` measures may be off."""
PASSED, MISSED, OPEN = "passed", "missed", "not measured"


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: what is measured, and by what it is divided.
        limit: the ratio that it may have at most.
        measured: None where there is no measurement.
        note: where the figure comes from, if that needs saying.
    """

    what: str
    limit: float
    measured: Spread | None
    note: str = ""
    strict: bool = False

    @property
    def verdict(self) -> str:
        """The median decides, unrounded."""
        if self.measured is None:
            return OPEN
        middle = self.measured.median
        return PASSED if middle < self.limit or (middle == self.limit and not self.strict) else MISSED


def bars(documents: Documents) -> list[Bar]:
    """All of them, in the order of the page."""
    return [
        *_steps(documents),
        *_memory(documents),
        _slower(documents),
        *_train(documents),
        *_planned(documents),
        _billion(documents),
    ]


def group_with(document: Mapping[str, Any] | None, *names: str) -> Mapping[str, Sequence[float]] | None:
    """The seconds of the process in which all these variants took turns; None if there is none."""
    groups = [] if document is None else document["results"]["groups"]
    return next((one["seconds"] for one in groups if all(name in one["seconds"] for name in names)), None)


def _steps(documents: Documents) -> Iterator[Bar]:
    for key in ("six", "six-avx2"):
        for name, limit in STEP_BARS.items():
            seconds = group_with(documents.get(f"steps-{key}"), name, FLOOR)
            measured = None if seconds is None else Spread.of(ratios(seconds, name, FLOOR))
            yield Bar(f"step of {name} / floor, `{key}`", limit, measured)


def peak_ratio(document: Mapping[str, Any] | None, name: str, to: str) -> Spread | None:
    """Peak memory of one variant by another one's, over the repeats."""
    peaks = {} if document is None else document["results"]["peaks"]
    if name not in peaks or to not in peaks:
        return None
    return Spread.of([own["peak"] / other["peak"] for own, other in zip(peaks[name], peaks[to], strict=True)])


def _memory(documents: Documents) -> Iterator[Bar]:
    for case in ("six", "smollm2"):
        document = documents.get(f"memory-{case}")
        for name in ("lora", "lora dropout 0.05", "lora-fa", "dora", "vera r256", "adalora"):
            yield Bar(f"peak memory of {name} / PEFT's, `{case}`", MEMORY_BAR, peak_ratio(document, name, PEFT + name))
        less = peak_ratio(document, "lora-fa", "lora")
        yield Bar(f"peak memory of lora-fa / lora, `{case}`", 1.0, less, "less than", strict=True)


def beside_peft(documents: Documents) -> list[tuple[str, Spread]]:
    """(where, ratio of our step to PEFT's) wherever both were measured."""
    found = []
    for key in ("steps-six", "steps-six-avx2", "steps-smollm2"):
        for group in documents[key]["results"]["groups"] if key in documents else []:
            seconds = group["seconds"]
            for name in seconds:
                if PEFT + name in seconds:
                    found.append(
                        (f"{name}, `{key.removeprefix('steps-')}`", Spread.of(ratios(seconds, name, PEFT + name)))
                    )
    for point in documents["sweep"]["results"]["points"] if "sweep" in documents else []:
        for name in ALIKE:
            if name in point["seconds"]:
                where = f"{name}, {setting(point['point'])}"
                found.append((where, Spread.of(ratios(point["seconds"], name, PEFT + name))))
    return found


def setting(point: Mapping[str, Any]) -> str:
    """A setting of the sweep in words.

    >>> setting({"hidden": 576, "tokens": 1024, "r": 16, "sites": "all", "dropout": 0.0})
    'hidden 576, 1,024 tokens, rank 16, sites: all'
    """
    dropout = f", dropout {point['dropout']:g}" if point["dropout"] else ""
    return f"hidden {point['hidden']}, {point['tokens']:,} tokens, rank {point['r']}, sites: {point['sites']}{dropout}"


def _slower(documents: Documents) -> Bar:
    found = beside_peft(documents)
    what = "step / PEFT's, the worst of all that were measured"
    if not found:
        return Bar(what, NEVER_SLOWER, None)
    where, worst = max(found, key=lambda one: one[1].median)
    slower = [one for _, one in found if one.median > NEVER_SLOWER]
    beyond = sum(one.low > NEVER_SLOWER for one in slower)
    note = f"{where}; slower at {len(slower)} of {len(found)} comparisons, by more than the spread at {beyond}"
    return Bar(what, NEVER_SLOWER, worst, note)


def _planned(documents: Documents) -> Iterator[Bar]:
    for key, about in (("peak_bytes", "peak memory"), ("train_seconds", "seconds of training")):
        measured = None
        if "plan" in documents:
            pairs = documents["plan"]["results"]["pairs"]
            measured = Spread.of([abs(one["planned"]["measured"][key] / one["took"][key] - 1) for one in pairs])
        yield Bar(f"error of `lorafit plan`: {about}", PLAN_BAR, measured)


def _billion(documents: Documents) -> Bar:
    what = "gigabytes at the peak of LoRA steps over a base of a billion parameters"
    if "billion" not in documents:
        return Bar(what, BILLION_BAR, None)
    ways = documents["billion"]["results"]["ways"]
    held = {way: found["peak_bytes"] / 1e9 for way, found in ways.items()}
    note = f"int8 rows; {held['float32']:.2f} in float32" if "float32" in held else "int8 rows"
    return Bar(what, BILLION_BAR, Spread.of([held["int8-rows"]]), note)


def _train(documents: Documents) -> Iterator[Bar]:
    """Beside the fastest way in which TRL computes in float32, and beside its fastest of all."""
    results = documents["train"]["results"] if "train" in documents else {"runs": {}, "single": []}
    kinds = {"in float32": results["single"], "in any precision": list(results["runs"])}
    for kind, names in kinds.items():
        what = f"seconds of `lorafit train` / TRL with PEFT, both at their fastest {kind}"
        chosen = fastest(results, names)
        if chosen is None:
            yield Bar(what, TRAIN_BAR, None)
            continue
        loss, spread = train.compared(results["runs"], *chosen)
        yield Bar(what, TRAIN_BAR, spread, f"{chosen[0]} / {chosen[1]}, to a held-out loss of {loss:.3f}")


def fastest(results: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str] | None:
    """Of these sides the fastest of ours and of TRL's, by seconds to the loss that all of them reached."""
    runs = results["runs"]
    if not names:
        return None
    loss = train.target(runs, names)
    middle = {name: Spread.of([train.seconds_to(one, loss) for one in runs[name]]).median for name in names}
    ours = [name for name in names if not name.startswith("trl")]
    theirs = [name for name in names if name.startswith("trl")]
    return (min(ours, key=middle.__getitem__), min(theirs, key=middle.__getitem__)) if ours and theirs else None
