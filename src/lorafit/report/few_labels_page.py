"""The page of `lorafit few-labels`: did the pseudo-labels help, what were they, and how much are they worth?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.report.document import Document, Section, table, write_document
from lorafit.report.text import escape

Row = Mapping[str, Any]
SHOWN = 20


def write_few_labels(found: Row, path: Path | str, *, source: str) -> Path:
    """Write the page.

    Args:
        found: what few-labels.json holds.
        path: the HTML file.
        source: the path of few-labels.json.

    Raises:
        MissingExtraError: plotly is not installed.
        ConfigError: it cannot be written there.
    """
    return write_document(document(found, source), path)


def document(found: Row, source: str) -> Document:
    """What stands on the page."""
    data, wanted, verdict = found["data"], found["wanted"], found["verdict"]
    lead = (
        f"A model was trained on {data['train_records']:,} labelled records of {data['name']}. It then answered "
        f"{data['unlabelled_records']:,} records without labels, and was trained anew with those answers of which it "
        f"was sure ({wanted['confidence']:g} or more), for as many steps. Result: {verdict['sentence']}."
    )
    facts = [
        ("Labelled", f"{data['train_records']:,}"),
        ("Unlabelled", f"{data['unlabelled_records']:,}"),
        ("Confidence", f"{wanted['confidence']:g}"),
        ("Steps of each run", f"{found['steps']:,}"),
        ("Kept", verdict["kept"] or "nothing"),
    ]
    sections = [
        _difference(verdict),
        _runs(found["seeds"]),
        _labels(found["seeds"]),
        *_classes(found["seeds"]),
        _calibrations(found["seeds"]),
        *_warnings(found["warnings"]),
        _settings(found),
    ]
    return Document("Few labels", lead, facts, [one for one in sections if one is not None], source)


def _difference(verdict: Row) -> Section | None:
    if not verdict["metrics"]:
        return None
    rows = [
        (
            one["metric"],
            _number(one["metric"], one["before"]),
            _number(one["metric"], one["after"]),
            _number(one["metric"], one["value"], "+"),
            f"{_number(one['metric'], one['low'], '+')} to {_number(one['metric'], one['high'], '+')}",
            f"{one['records']:,}",
            f"{one['seeds']}",
        )
        for one in verdict["metrics"]
    ]
    header = ("test part", "supervised", "with pseudo-labels", "difference", "95 % interval", "records", "seeds")
    tokens = verdict["tokens"]
    note = (
        "The first row decides. All runs took the same number of steps; on average "
        f"{tokens[0]:,.0f} tokens supervised, "
        f"{tokens[1]:,.0f} with pseudo-labels. The interval is that of the paired differences, over records and seeds. "
        f"{verdict['kept_sentence'].capitalize()}: {verdict['adapter']}"
    )
    return Section("Did pseudo-labels help?", table(header, rows), note=note)


def _runs(seeds: Sequence[Row]) -> Section:
    rows = []
    for seed in seeds:
        runs = [("supervised", seed["supervised"])]
        runs += [(f"pseudo-labels, round {one['round']}", one["result"]) for one in seed["rounds"]]
        for name, result in runs:
            failed = result["failed"] is not None
            loss = None if failed else sum(result["losses"]) / sum(result["counts"])
            right = result["correct"]
            rows.append(
                (
                    f"{seed['seed']}",
                    name,
                    result["failed"] if failed or loss is None else f"{loss:.4f}",
                    "" if failed or right is None else f"{sum(right) / len(right):.1%}",
                    "" if result["validation"] is None else f"{result['validation']:.4f}",
                    f"{result['steps']:,}",
                    f"{result['tokens']:,}",
                )
            )
    header = ("seed", "run", "test loss", "test accuracy", "validation loss", "steps", "tokens")
    return Section("Every run", table(header, rows))


def _labels(seeds: Sequence[Row]) -> Section:
    rows = [
        (
            f"{seed['seed']}",
            f"{one['round']}",
            f"{one['answered']:,}",
            f"{one['sure']:,}",
            f"{one['taken']:,}",
            "" if one["right"] is None else f"{one['right']:.1%} of {one['known']:,}",
        )
        for seed in seeds
        for one in seed["rounds"]
    ]
    header = ("seed", "round", "answered", "sure enough", "trained on", "right, where known")
    note = "Where the unlabelled records have an answer of their own, it was not trained on, only compared."
    return Section("Pseudo-labels", table(header, rows), note=note)


def _classes(seeds: Sequence[Row]) -> list[Section]:
    last = [seed["rounds"][-1] for seed in seeds if seed["rounds"] and seed["rounds"][-1]["shares"]]
    if not last:
        return []
    names = list(last[0]["shares"])
    rows = []
    for name in names[:SHOWN]:
        means = [sum(one["shares"][name][place] for one in last) / len(last) for place in range(3)]
        rows.append((name, *(f"{each:.1%}" for each in means)))
    header = ("class", "of the labelled", "of the sure answers", "of those trained on")
    note = (
        "Last round, mean of the seeds. If the middle column runs away from the first, the model confirms its own bias."
    )
    return [Section("Classes", table(header, rows), note=note)]


def _calibrations(seeds: Sequence[Row]) -> Section:
    rows = []
    for seed in seeds:
        for one in seed["rounds"]:
            found = one["calibration"]
            held = "none" if found["right"] is None else f"{found['right']:.0%} of {found['above']:,}"
            ends = "" if found["low"] is None else f"{found['low']:.0%} to {found['high']:.0%}"
            rows.append(
                (
                    f"{seed['seed']}",
                    f"{one['round']}",
                    f"{found['temperature']:.2f}",
                    f"{found['error_before']:.3f}",
                    f"{found['error']:.3f}",
                    held,
                    ends,
                    f"{found['records']:,}",
                )
            )
    header = (
        "seed",
        "round",
        "temperature",
        "error before",
        "error after",
        "right at this confidence",
        "95 % interval",
        "records",
    )
    note = (
        "On the validation part. The error is the expected calibration error over ten bins: 0 where confidences are "
        "the shares of right answers. A temperature above 1 says that the model was too sure."
    )
    return Section("What confidences are worth", table(header, rows), note=note)


def _warnings(said: Sequence[str]) -> list[Section]:
    items = "".join(f"<li>{escape(one)}</li>" for one in said)
    return [Section("Warnings", f"<ul>{items}</ul>")] if said else []


def _settings(found: Row) -> Section:
    given = {**found["settings"], **found["wanted"]}
    rows = [
        (name, f"{value}") for name, value in given.items() if value not in (None, [], {}, "") and name != "training"
    ]
    rows += [(name, f"{value}") for name, value in found["settings"]["training"].items()]
    return Section("Settings", table(("setting", "value"), rows, sortable=False), note=found["command"])


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if metric == "accuracy" else f"{value:{sign}.4f}"
