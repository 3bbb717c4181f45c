"""Writes docs/results/serving.md and its picture from the stored measurements, and from nothing else."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import pictures, sections, stored
from benchmarks.machine import ROOT
from benchmarks.mixed import FLOOR, OURS, PEFT
from benchmarks.report import where
from benchmarks.sections import NOTHING, counted, ratio, table, wrapped
from benchmarks.statistic import Spread, ratios
from benchmarks.stored import say
from lorafit import files
from lorafit.report.palette import LIGHT

NAME = "serving"
HELP = "write docs/results/serving.md from the stored measurements"
FOLDER = stored.FOLDER / "serving"
PAGE = ROOT / "docs" / "results" / "serving.md"
PICTURE = "serving-throughput.png"
BARS: tuple[tuple[str, int, float], ...] = (
    ("prefill", 1, 1.2),
    ("prefill", 4, 1.2),
    ("prefill", 8, 1.2),
    ("prefill", 32, 1.2),
    ("decode", 1, 1.25),
    ("decode", 4, 1.4),
    ("decode", 8, 1.5),
    ("decode", 32, 1.8),
)
"""Phase, adapters of the batch, and what it may cost beside the base model."""
ADDING = 0.05
"""Seconds that bringing an adapter into memory may take."""

HEAD = """# Serving

What it costs that the rows of a batch have different adapters, beside the base model and beside PEFT's `adapter_names`;
how many tokens a second the engine writes with up to 1,000 adapters; and how the server behaves under 64 clients. This
page is written by a program from the stored measurements. To measure again:

```bash
python -m benchmarks mixed
python -m benchmarks throughput
python -m benchmarks load
python -m benchmarks serving
```
"""

Documents = Mapping[str, Mapping[str, Any]]


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(FOLDER))
    parser.add_argument("--page", default=str(PAGE), help="the page to write; the picture goes into its folder")
    parser.add_argument("--no-pictures", action="store_true", help="leave the picture as it is")


def run(options: Namespace) -> Path:
    """Writes the page."""
    documents = stored.read(Path(options.output))
    page = Path(options.page)
    page.parent.mkdir(parents=True, exist_ok=True)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    for name, document in documents.items():
        if name.startswith("throughput") and browser is not None and not options.no_pictures:
            (page.parent / "pictures").mkdir(exist_ok=True)
            pictures.take(browser, figure(document["results"]), page.parent / "pictures" / PICTURE)
    files.write_text(page, text(documents))
    say(f"{page}: written from {', '.join(documents) or 'no measurements'}")
    return page


def text(documents: Documents) -> str:
    """The page."""
    absent = [prefix for prefix in WRITERS if not any(name.startswith(prefix) for name in documents)]
    left = [f"Not measured yet: {', '.join(absent)}."] if absent else []
    parts = [HEAD, *left, *_parts(documents), where(documents)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _parts(documents: Documents) -> Iterator[str]:
    for prefix, write in WRITERS.items():
        for name, document in documents.items():
            if name.startswith(prefix):
                yield write(document)


def mixed(document: Mapping[str, Any]) -> str:
    """The cost of mixed batches, with the bars."""
    found = document["results"]
    rows = []
    for phase, count, limit in BARS:
        ours, theirs = (_ratio(found[phase], f"{side}, {count}") for side in (OURS, PEFT))
        verdict = NOTHING if ours is None else "passed" if ours.median <= limit else "missed"
        rows.append(
            (
                f"{phase}, {counted(count, 'adapter', 'adapters')}",
                f"≤ {limit:g}",
                ratio(ours, 2),
                verdict,
                ratio(theirs, 2),
            )
        )
    adding = {side: Spread.of(seconds) for side, seconds in found["added"].items()}
    verdict = "passed" if adding[OURS].median <= ADDING else "missed"
    theirs_adding = _seconds(adding[PEFT]) if PEFT in adding else NOTHING
    rows.append(("adding an adapter", f"≤ {ADDING:g} s", _seconds(adding[OURS]), verdict, theirs_adding))
    base = {phase: Spread.of(found[phase][FLOOR]).median for phase in ("prefill", "decode")}
    apart = max(found["apart"].values(), default=None)
    said = (
        f"{found['rows']} rows over the architecture of SmolLM2-135M in float32 with random weights, rank "
        f"{found['rank']} on all linear layers but the head. Prefill reads {found['prompt']} tokens of each row, "
        "decode one token after them. Each row has one of so many adapters, as many rows each, in an order drawn once. "
        "Times are divided by the base model's of the same round; given are medians and, in brackets, quartiles. The "
        f"base takes {base['prefill'] * 1e3:.0f} ms for the prefill, {base['decode'] * 1e3:.0f} ms for one token each. "
        "Both sides read the same files"
        + ("." if apart is None else f", and their logits are at most {apart:.0e} of an adapter's own change apart.")
    )
    header = ("what", "at most", "lorafit", "verdict", "PEFT")
    return f"## A batch of different adapters\n\n{wrapped(said)}\n\n{table(header, rows)}\n"


def _ratio(seconds: Mapping[str, list[float]], name: str) -> Spread | None:
    return Spread.of(ratios(seconds, name, FLOOR)) if name in seconds else None


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} s ({spread.low:.3f}–{spread.high:.3f})"


def throughput(document: Mapping[str, Any]) -> str:
    """Tokens a second against the number of adapters."""
    found = document["results"]
    rows = []
    alone = Spread.of(found["points"][0]["tokens_per_second"]).median
    for point in found["points"]:
        rate = Spread.of(point["tokens_per_second"])
        rows.append(
            (
                f"{point['adapters']:,}" if point["adapters"] else "the base alone",
                f"{rate.median:.0f} ({rate.low:.0f}–{rate.high:.0f})",
                f"{rate.median / alone:.2f}",
                f"{point['resident_bytes'] / sections.MIB:.0f} MiB",
                f"{point['process_bytes'] / sections.MIB:.0f} MiB",
            )
        )
    said = (
        f"{found['requests']} requests, all there at once, of {found['prompt']} tokens each, are answered with "
        f"{found['answer']} tokens, at most 32 at a time; each asks for one of so many registered adapters of rank "
        f"{found['rank']}, in turn. Memory has room for {found['resident']} of them: of more, each is read from its "
        "file when it is asked for, and the one that was used longest ago goes. No HTTP is in this."
    )
    header = ("adapters", "tokens/s", "of the base's", "adapters in memory", "process")
    picture = f"![Tokens a second against the number of adapters](pictures/{PICTURE})"
    return f"## Throughput\n\n{wrapped(said)}\n\n{table(header, rows)}\n\n{picture}\n"


def figure(found: Mapping[str, Any]) -> Any:
    """Tokens a second against how many adapters are registered."""
    from plotly.graph_objects import Figure, Scatter

    alone, *points = found["points"]
    places = [f"{point['adapters']:,}" for point in points]
    spreads = [Spread.of(point["tokens_per_second"]) for point in points]
    above = [spread.high - spread.median for spread in spreads]
    below = [spread.median - spread.low for spread in spreads]
    made: Figure = Figure()
    base = Spread.of(alone["tokens_per_second"]).median
    made.add_trace(
        Scatter(x=places, y=[base] * len(places), name="the base alone", line={"color": LIGHT.muted, "dash": "dot"})
    )
    made.add_trace(
        Scatter(
            x=places,
            y=[spread.median for spread in spreads],
            error_y={"type": "data", "array": above, "arrayminus": below},
            name="each request its adapter",
            line={"color": LIGHT.hues[0], "width": 2},
        )
    )
    made.update_xaxes(title_text="registered adapters", type="category", gridcolor=LIGHT.grid)
    made.update_yaxes(title_text="tokens/s", rangemode="tozero", gridcolor=LIGHT.grid)
    return pictures.framed(made)


def load(document: Mapping[str, Any]) -> str:
    """The server under many clients."""
    found = document["results"]
    done, memory = found["done"], found["memory"]
    first, whole = found["first_token"], found["whole_answer"]
    rows = [
        ("clients", f"{found['clients']} for {found['duration']:g} s"),
        ("adapters", f"{found['adapters']} of three methods, and the base"),
        ("streams", f"{done.get('stream', 0):,}"),
        ("whole answers", f"{done.get('answer', 0) + done.get('several', 0):,}"),
        ("clients that went away", f"{done.get('leave', 0):,}"),
        ("bad requests", f"{done.get('wrong', 0):,}"),
        ("loads and unloads", f"{done.get('load', 0):,}"),
        ("answers that were wrong", f"{done.get('mistaken', 0):,}"),
        ("requests left at the end", f"{found['left']['lorafit_requests_running']:g} running, "
         f"{found['left']['lorafit_requests_waiting']:g} waiting"),
        ("time to the first token", f"p50 {first['p50']:.2f} s, p95 {first['p95']:.2f} s"),
        ("whole answer", f"p50 {whole['p50']:.2f} s, p95 {whole['p95']:.2f} s"),
        ("tokens of whole answers", f"{found['tokens_per_second']:.0f}/s"),
        ("memory before, and after each third", ", ".join(f"{size / sections.MIB:.0f} MiB" for size in memory)),
    ]  # fmt: skip
    said = (
        f"`lorafit serve` on loopback with {found['model']}, answers of at most {found['tokens']} tokens. The clients "
        "are on the same cores. Every greedy answer is compared with what transformers' `generate` gives for its "
        "prompt with its adapter alone."
    )
    return f"## Many clients\n\n{wrapped(said)}\n\n{table(('what', 'measured'), rows)}\n"


WRITERS = {"mixed": mixed, "throughput": throughput, "load": load}
"""How the name of a measurement begins → what writes its part."""
