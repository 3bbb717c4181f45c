"""The page of `lorafit few-labels`: did the pseudo-labels help, what were they, and how much are they worth?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.report import tables
from lorafit.report.anatomy import SYMBOLS
from lorafit.report.document import Document, Section, table, write_document
from lorafit.report.figures import SMALL, TALL, Plot, blank
from lorafit.report.palette import LIGHT
from lorafit.report.scales import padded
from lorafit.report.text import escape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = Mapping[str, Any]
SHOWN = 20
MARKS = 8
"""So many symbols the style sheet knows."""


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
        _difference(verdict, found["seeds"]),
        _runs(found["seeds"]),
        _labels(found["seeds"]),
        *_classes(found["seeds"]),
        _calibrations(found["seeds"], wanted["confidence"]),
        *_warnings(found["warnings"]),
        _settings(found),
    ]
    return Document("Few labels", lead, facts, [one for one in sections if one is not None], source)


def _difference(verdict: Row, seeds: Sequence[Row]) -> Section | None:
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
    plot = _paired(seeds, verdict["metrics"][0]["metric"])
    return Section("Did pseudo-labels help?", table(header, rows), [plot], note=note)


def _paired(seeds: Sequence[Row], metric: str) -> Plot:
    """The runs of each seed, joined."""
    figure = blank(SMALL + 60)
    places = ["supervised", *(f"round {number + 1}" for number in range(max(len(seed["rounds"]) for seed in seeds)))]
    known: list[float] = []
    spoken = []
    for at, seed in enumerate(seeds):
        results = [seed["supervised"], *(one["result"] for one in seed["rounds"])]
        scores = [_score(result, metric) for result in results]
        if not (finite := [score for score in scores if score is not None]):
            continue
        known += finite
        spoken.append(f"seed {seed['seed']}: {' → '.join(_number(metric, score) for score in finite)}")
        _line(
            figure, at, f"seed {seed['seed']}", places[: len(scores)], scores, ".1%" if metric == "accuracy" else ".4f"
        )
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(type="category", range=[-0.25, len(places) - 0.75], showgrid=False)
    figure.update_yaxes(range=padded(known, 0.12), tickformat=".1~%" if metric == "accuracy" else "~g")
    note = "A line is one seed: both runs start from the same first values."
    return Plot("paired", f"{metric.capitalize()} on the test part", "; ".join(spoken) + ".", (note,), figure)


def _line(figure: Figure, at: int, name: str, x: Sequence[Any], y: Sequence[Any], form: str) -> None:
    hue, mark = at % len(LIGHT.hues), (at + at // len(LIGHT.hues)) % MARKS
    figure.add_scatter(
        x=list(x),
        y=list(y),
        name=name,
        meta=f"hue-{hue} mark-{mark}",
        mode="lines+markers",
        cliponaxis=False,
        line={"color": LIGHT.hues[hue], "width": 1.8},
        marker={"color": LIGHT.hues[hue], "size": 8, "symbol": SYMBOLS[mark]},
        hovertemplate=f"{name}, %{{x}}: %{{y:{form}}}<extra></extra>",
    )


def _score(result: Row, metric: str) -> float | None:
    if result["failed"] is not None:
        return None
    if metric == "accuracy":
        return float(sum(result["correct"]) / len(result["correct"]))
    return float(sum(result["losses"]) / sum(result["counts"]))


def _runs(seeds: Sequence[Row]) -> Section:
    rows = []
    for seed in seeds:
        runs = [("supervised", seed["supervised"])]
        runs += [(f"pseudo-labels, round {one['round']}", one["result"]) for one in seed["rounds"]]
        for name, result in runs:
            loss = _score(result, "loss")
            right = None if loss is None or result["correct"] is None else _score(result, "accuracy")
            rows.append(
                (
                    f"{seed['seed']}",
                    name,
                    result["failed"] if loss is None else f"{loss:.4f}",
                    "" if right is None else f"{right:.1%}",
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


def _calibrations(seeds: Sequence[Row], asked: float) -> Section:
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
    return Section("What confidences are worth", table(header, rows), _reliability(seeds, asked), note=note)


def _reliability(seeds: Sequence[Row], asked: float) -> list[Plot]:
    """The share of right answers by confidence, of the last round."""
    figure = blank(TALL)
    spoken = []
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, layer="below", line={"color": LIGHT.muted, "width": 1.2, "dash": "dash"}
    )
    figure.add_shape(
        type="line", yref="paper", x0=asked, x1=asked, y0=0, y1=1, layer="below",
        line={"color": LIGHT.held, "width": 1.5},
    )  # fmt: skip
    for at, seed in enumerate(seeds):
        if not seed["rounds"]:
            continue
        bins = seed["rounds"][-1]["calibration"]["bins"]
        name = f"seed {seed['seed']}"
        _line(figure, at, name, [one["confidence"] for one in bins], [one["right"] for one in bins], ".0%")
        figure.data[-1].update(
            customdata=[one["records"] for one in bins],
            hovertemplate=f"{name}, confidence %{{x:.2f}}: %{{y:.0%}} of %{{customdata}} right<extra></extra>",
        )
        told = ", ".join(f"{one['confidence']:.2f}: {one['right']:.0%} of {one['records']}" for one in bins)
        spoken.append(f"{name}: {told}")
    if not spoken:
        return []
    lowest = min(min(line.x) for line in figure.data)
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(range=[max(0.0, lowest - 0.06), 1.02], title={"text": "confidence", "standoff": 6})
    figure.update_xaxes(title_font_size=12, tickformat="~g")
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%")
    notes = (
        "Dashed: confidences that are the shares of right answers; below it the model is too sure. "
        f"Upright: the confidence asked for, {asked:g}.",
    )
    return [
        Plot(
            "reliability", "Right answers by confidence, on the validation part", "; ".join(spoken) + ".", notes, figure
        )
    ]


def _warnings(said: Sequence[str]) -> list[Section]:
    items = "".join(f"<li>{escape(one)}</li>" for one in said)
    return [Section("Warnings", f"<ul>{items}</ul>")] if said else []


def _settings(found: Row) -> Section:
    given = {**found["settings"], **found["wanted"]}
    told = f"<details><summary>{len(given)} values</summary>{tables.facts(given)}</details>"
    return Section("Settings", told, note=found["command"])


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if metric == "accuracy" else f"{value:{sign}.4f}"
