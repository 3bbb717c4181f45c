"""Writes docs/results/vision.md and its pictures from the stored measurements on images, and from nothing else."""

from __future__ import annotations

import base64
import json
import math
import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.machine import ROOT
from benchmarks.sections import MIB, NOTHING, counted, table, wrapped
from benchmarks.stored import ResultsError, say
from benchmarks.vision import FOLDER, PICTURES, SETS
from lorafit import files
from lorafit.experiments.ranking import Ranking

NAME = "vision-page"
HELP = "write docs/results/vision.md from the stored measurements"
PAGE = ROOT / "docs" / "results" / "vision.md"
HEAD = """# Images and encoders

EfficientNet-Lite0, pre-trained on ImageNet, on Fashion-MNIST and on the categories of Noto's emoji; all-MiniLM-L6-v2
on movie sentences; and a small diffusion model that learns a subject from five pictures. Weights, pictures and
sentences come out of packages; they are fetched, never shipped. Budgets are small, so that a run takes half a minute on
two cores: what is said here holds for such budgets. This page is written by a program from the JSON files of
`benchmarks/results/vision`, which have commit, versions, machine, seeds and every test record's loss. To measure again,
about 40 minutes for the pictures, 30 for the sentences:

```bash
python -m benchmarks vision
python -m benchmarks vision-page
```

`--data FOLDER` says where packages and finished runs are kept; after a kill the same command goes on.
"""
METHOD = """## How the networks are compared

Each candidate has the same records in the same order for a seed, the same steps, and the same number of learning rates
to try. The rate with the lowest validation loss is taken; the test part is measured for the reported seeds alone.
Intervals are over test records and seeds, and differences are called significant after Holm's correction over all
pairs, as `lorafit compare` has it. `=` marks the best and what is not significantly worse. Seconds are those of a run's
steps; memory is the high-water mark of the run's own process, imports included.

On sentences all of this is `lorafit compare`. On pictures it is a loop of a few lines around `attach`: AdamW without
decay, a rate that rises over the first tenth of the steps and then falls to nothing. The first rate tried is a guess,
the next one lies beyond the best so far by √10, or beside it towards its better side. The last layer is new and trained
in full beside every method; it learns at the rate that was best for the probe, which trains it alone. Batch norm keeps
ImageNet's statistics and nothing is dropped, for all candidates alike. Methods sit at all convolutions but the
depthwise ones, `lora-depthwise` at those as well: there the rank is the number of groups, the least that has a part for
each. LoRA-drop's seconds have its trial in them. Adapters are measured folded into the weights.
"""
AGREEMENT = {"mean_absolute_error": "mean error", "spearman": "Spearman"}
"""Figure of a regression → its column."""
FAR = 8
"""A file that is so many times as large as its numbers is told of."""

Kept = Mapping[str, Any]


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(output=str(FOLDER))
    parser.add_argument("--page", default=str(PAGE), help="the page to write; pictures go into its folder")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures as they are")


def run(options: Namespace) -> Path:
    """Writes the page."""
    folder, page = Path(options.output), Path(options.page)
    kept = read(folder)
    page.parent.mkdir(parents=True, exist_ok=True)
    if not options.no_pictures:
        draw(kept, page.parent / "pictures")
    files.write_text(page, text(folder))
    say(f"{page}: written from {', '.join(kept) or 'no comparisons'}")
    return page


def read(folder: Path) -> dict[str, Kept]:
    """The comparisons that were measured, by the name of their set, in the order of the page."""
    found = {}
    for name in SETS:
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ResultsError(f"{path}: {error}") from None
    return found


def text(folder: Path) -> str:
    """The page."""
    from benchmarks import dreambooth

    kept = read(folder)
    absent = [name for name in SETS if name not in kept]
    left = [f"Not measured yet: {', '.join(absent)}."] if absent else []
    parts = [HEAD, *left, METHOD, *(_section(name, one) for name, one in kept.items())]
    parts += ["\n".join(dreambooth.section(folder)), *_where(kept)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part.strip())


# Pictures of the page ----------------------------------------------------------------


def draw(kept: Mapping[str, Kept], folder: Path) -> None:
    """Puts sheets of pictures into the folder, and takes down the figures; says so where there is no chromium."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in kept.items():
        if "examples" in one:
            written = base64.b64decode(one["examples"]["png"])
            files.commit(
                files.stage(folder / _file(name, "examples"), lambda path, png=written: path.write_bytes(png)),
                folder / _file(name, "examples"),
            )
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        say("no chromium here: the figures stay as they are")
        return
    for name, one in kept.items():
        for key, figure in figures(one["found"]).items():
            pictures.take(browser, figure, folder / _file(name, key))


def _file(name: str, key: str) -> str:
    return f"vision-{name}-{key}.png"


def figures(found: Kept) -> dict[str, Any]:
    """The figures of a comparison, by a short name."""
    from lorafit.report import comparison_plots

    if not found["ranking"]["places"]:
        return {}
    hues = comparison_plots.Hues(found["candidates"])
    prices = {plot.key: plot for plot in comparison_plots.prices(found["ranking"], hues)}
    score = "accuracy" if found["ranking"]["metric"] == "accuracy" else "test loss"
    for key, title in PRICES.items():
        if key in prices:  # a report has these as headings
            axes = {"title_font_size": 12, "title_standoff": 6}
            prices[key].figure.update_xaxes(title_text=title, **axes).update_yaxes(title_text=score, **axes)
    plots = {
        "scores": comparison_plots.scores(found["ranking"]),
        "rates": comparison_plots.rates(
            found["candidates"], hues, comparison_plots.far(found["ranking"]["places"])
        ),
        **{key.removeprefix("price-"): prices.get(key) for key in PRICES},
    }  # fmt: skip
    return {key: pictures.framed(plot.figure) for key, plot in plots.items() if plot is not None}


PRICES = {"price-trainable": "trained numbers", "price-memory": "peak memory, GiB"}
"""Key of a figure of the ranking → what it is drawn against."""
SHOWN = {
    "scores": "{} and interval of each candidate",
    "trainable": "{} against trained numbers",
    "memory": "{} against peak memory",
    "rates": "Validation loss of each rate that was tried",
}
"""Key of a figure → what it shows, of a score by its name."""


# A comparison --------------------------------------------------------------------------


def _section(name: str, one: Kept) -> str:
    found = one["found"]
    accuracy = found["ranking"]["metric"] == "accuracy"
    by = {each["name"]: each for each in found["candidates"]}
    count = math.fsum(found["counts"])
    rows = [_row(place, by[place["name"]], accuracy, count) for place in found["ranking"]["places"]]
    header = ["", "method", "rate", "accuracy" if accuracy else "test loss", "95 %", "less the best's"]
    header += [*(["test loss"] if accuracy else AGREEMENT.values()), "numbers", "seconds", "peak, MiB", "file, MiB"]
    # Told anew from the numbers that were kept: not in the words of the day on which they were measured.
    told = Ranking.from_json(found["ranking"]).sentences()
    said = [f"{line.rstrip('.')}." for line in [*told, *_notes(found)]]
    drawn = figures(found)
    score = "Accuracy" if accuracy else "Test loss"
    shown = [f"![{what.format(score)}](pictures/{_file(name, key)})\n" for key, what in SHOWN.items() if key in drawn]
    return "\n".join(
        [
            f"## {name.capitalize().replace('mnist', 'MNIST')}",
            "",
            wrapped(_about(name, one)),
            "",
            *_sheet(name, one),
            _commands(one),
            table(header, rows),
            "",
            *map(_bullet, said),
            "",
            *shown,
        ]
    )


def _about(name: str, one: Kept) -> str:
    data, budget = one["data"], one["found"]["budget"]
    common = (
        f"{counted(budget['rates'], 'rate', 'rates')} tried for each candidate with one seed, then "
        f"{counted(len(budget['seeds']), 'seed', 'seeds')} with the best."
    )
    parts = f"{data['train_records']:,} to learn from, {data['validation_records']:,} to choose rates by"
    if name not in PICTURES:
        told = f"{data['about']} From {data['source']}. {parts}, {data['test_records']:,} to report on;"
        return f"{told} {budget['steps']:,} steps. {common}"
    families = (
        f" of {data['test_records']:,} families (pictures that differ in skin tone, gender or direction alone; a "
        "family is in one part, and one record)"
    )
    records = "" if data["test_records"] == data["test_pictures"] else families
    twice = f" Left out as another one's dot for dot: {data['twice']:,}." if data.get("twice") else ""
    return (
        f"Pictures of {data['source']}: {parts}, {data['test_pictures']:,}{records} to report on, in "
        f"{len(data['classes'])} classes ({', '.join(data['classes'])}), of which the largest has "
        f"{data['majority']:.0%} of the test.{twice} {budget['steps']:,} steps of {budget['batch']} pictures at "
        f"{budget['size']} × {budget['size']} pixels; the head learns at {budget['head_rate']:g}. {common}"
    )


def _sheet(name: str, one: Kept) -> list[str]:
    if "examples" not in one:
        return []
    what = f"{one['examples']['columns']} test pictures of each class, in the order of their names"
    return [f"![{what}](pictures/{_file(name, 'examples')})\n"]


def _commands(one: Kept) -> str:
    lines = [one["command"], *([one["ran"]] if "ran" in one else [])]
    folded = [textwrap.wrap(line, 112, break_long_words=False, break_on_hyphens=False) for line in lines]
    shown = "\n".join(" \\\n  ".join(line) for line in folded)
    which = (
        "The second command is the one that the first one runs, in the folder of its data.\n\n" if "ran" in one else ""
    )
    return f"{which}```bash\n{shown}\n```\n"


def _row(place: Kept, candidate: Kept, accuracy: bool, count: float) -> list[str]:
    best, cost = place["to_best"], place["cost"]
    digits = ".1%" if accuracy else ".4f"
    trained = cost["trainable"]
    loss = [math.fsum(one["losses"]) / count for one in candidate["seeds"] if one["losses"]]
    beside = [_mean(loss, ".4f")] if accuracy else [_mean(_agreed(candidate, key), ".3f") for key in AGREEMENT]
    return [
        "=" if place["tied"] else str(place["place"]),
        f"`{place['name']}`" if place["kind"] == "adapter" else place["name"],
        NOTHING if candidate["rate"] is None else f"{candidate['rate']:.2g}",
        f"{place['score']:{digits}}",
        f"{place['low']:{digits}}–{place['high']:{digits}}",
        NOTHING if best is None else f"{best['value']:+{digits}} ({best['low']:+{digits}} to {best['high']:+{digits}})",
        *beside,
        f"{trained:,.0f}" if trained else NOTHING,
        f"{cost['seconds']:.1f}" if cost["seconds"] else NOTHING,
        NOTHING if cost["memory"] is None else f"{cost['memory'] / MIB:,.0f}",
        f"{cost['file'] / MIB:.3g}" if cost["file"] else NOTHING,
    ]


def _agreed(candidate: Kept, key: str) -> list[float]:
    """One figure of how well numbers were predicted, of the seeds that have it."""
    found = [one.get("agreement") or {} for one in candidate["seeds"]]
    return [one[key] for one in found if key in one]


def _mean(values: Sequence[float], digits: str) -> str:
    return f"{math.fsum(values) / len(values):{digits}}" if values else NOTHING


def _bullet(line: str) -> str:
    return textwrap.fill(f"- {line}", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _notes(found: Kept) -> Iterator[str]:
    """What the ranking does not say."""
    candidates = found["candidates"]
    yield from _edges(candidates)
    halves = [
        (high - low) / 2
        for each in candidates
        for low, high in zip(*(_agreed(each, f"mean_absolute_error_{end}") for end in ("low", "high")), strict=True)
    ]
    if halves:
        yield (
            "The mean error is in the labels' own unit, Spearman's rho is that of ranks; both are means over seeds. Of "
            f"one seed, records alone leave the error uncertain by ±{max(halves):.3f} at most (95 %)"
        )
    apart = [one["apart"] for each in candidates for one in each["seeds"] if "apart" in one]
    if apart:
        yield f"Folding an adapter into the weights moved the outputs by {max(apart):.0e} of their size at most"
    for each in candidates:
        kept = sorted({(len(one["kept"]), one["sites"]) for one in each["seeds"] if "kept" in one})
        if kept:
            said = ", ".join(f"{own} of {sites}" for own, sites in kept)
            yield f"{each['name']} kept own adapters at {said} layers, seed by seed; the others of a shape share one"
    for each in candidates:
        sizes = [(one["adapter_bytes"], one["trainable"]) for one in each["seeds"] if one["adapter_bytes"]]
        if each["options"].get("depthwise") and sizes and sizes[0][0] > FAR * 4 * sizes[0][1]:
            yield (
                f"The file of {each['name']} is {sizes[0][0] / MIB:,.0f} MiB for {sizes[0][1]:,} numbers: in PEFT's "
                "layout the A of a grouped convolution sees all channels, and is zero but for its own group's"
            )
        for why in sorted({one["unsaved"] for one in each["seeds"] if "unsaved" in one}):
            yield f"{each['name']} has no file: {why}"
    yield from _told(candidates)
    if len(found.get("commits", ())) > 1:
        yield f"The runs are of {len(found['commits'])} commits: {', '.join(one[:9] for one in found['commits'])}"
    if found.get("others"):
        yield (
            f"Up to {counted(found['others'], 'other process or thread was', 'other processes or threads were')} at "
            "work when a run began: its seconds may be too many"
        )


def _told(candidates: Sequence[Kept]) -> Iterator[str]:
    """What was said when adapters were saved, once, with those of which it was said."""
    said: dict[str, list[str]] = {}
    for each in candidates:
        for line in dict.fromkeys(line for one in each["seeds"] for line in one.get("told", ())):
            said.setdefault(line, []).append(each["name"])
    for line, names in said.items():
        yield f"Said when {', '.join(names)} {'was' if len(names) == 1 else 'were'} saved: {line}"


def _edges(candidates: Sequence[Kept]) -> Iterator[str]:
    """The candidates whose best rate is the highest or the lowest that was tried."""
    for end, pick, beyond in (("highest", max, "higher"), ("lowest", min, "lower")):
        own = [
            f"{each['name']} ({each['rate']:.2g})"
            for each in candidates
            if len(each["search"]) > 1 and each["rate"] == pick(one["rate"] for one in each["search"])
        ]
        if own:
            yield f"The {end} rate that was tried was the best for {', '.join(own)}; a {beyond} one may be better still"


def _where(kept: Mapping[str, Kept]) -> list[str]:
    if not kept:
        return []
    rows = []
    for name, one in kept.items():
        at, versions = one["machine"], one["versions"]
        commit = (one["commit"]["hash"] or "unknown")[:9] + (", changed" if one["commit"]["changed"] else "")
        minutes = one["found"].get("minutes")
        took = NOTHING if minutes is None else f"{minutes:.0f}"
        where = f"{at['processor']}, {at['cores']} cores, {at['threads']} threads"
        packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        rows.append((f"`{name}`", commit, one["date"][:10], took, where, packages))
    return [f"## Where\n\n{table(('result', 'commit', 'date', 'minutes', 'machine', 'versions'), rows)}\n"]
