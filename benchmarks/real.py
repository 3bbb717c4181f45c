"""Writes docs/results/compare.md and its pictures from what was kept of runs on real data, and from nothing else."""

from __future__ import annotations

import json
import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import keeping, pictures
from benchmarks.machine import ROOT
from benchmarks.sections import table, wrapped
from benchmarks.stored import say
from lorafit import files
from lorafit.experiments.advice import advise
from lorafit.experiments.ranking import Ranking

NAME = "real"
HELP = "write docs/results/compare.md from the kept results on real data"
PAGE = ROOT / "docs" / "results" / "compare.md"
HEAD = """# Real data

SmolLM2-135M-Instruct in float32 on real records. Budgets are small, hundreds of records and one pass, so that each run
takes a minute on two cores: what is said here holds for such budgets. This page is written by a program from the JSON
files of `benchmarks/results/real`, which have commit, versions, machine, seeds and every test record's loss.

The sentiment data are sentences that at least 20 people have rated, out of the source package of vaderSentiment 0.5
(Hutto and Gilbert 2014); they are fetched, never shipped:

```bash
python scripts/make_sentiment.py sentiment --records 640 --test 500
```
"""

Kept = Mapping[str, Any]


def arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--page", default=str(PAGE), help="the page to write; pictures go into its folder")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures as they are")


def run(options: Namespace) -> Path:
    """Writes the page."""
    kept = read(keeping.FOLDER)
    page = Path(options.page)
    if not options.no_pictures:
        draw(kept, page.parent / "pictures")
    files.write_text(page, text(kept))
    say(f"{page}: written from {', '.join(kept) or 'nothing'}")
    return page


def read(folder: Path) -> dict[str, Kept]:
    """Every kept file, by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def text(kept: Mapping[str, Kept]) -> str:
    """The page."""
    writers = {"comparison": _comparison, "dimension": _dimension, "few-labels": _few_labels}
    parts = [HEAD]
    for kind, write in writers.items():
        parts += [write(name, one) for name, one in kept.items() if one["kind"] == kind]
    parts += [*_runs(kept), _where(kept)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def draw(kept: Mapping[str, Kept], folder: Path) -> None:
    """Takes down the figures; says so where there is no chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        say("no chromium here: the pictures stay as they are")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in kept.items():
        for key, figure in figures(one).items():
            pictures.take(browser, figure, folder / f"{name}-{key}.png")


def figures(one: Kept) -> dict[str, Any]:
    """The figures of a result, by a short name."""
    from lorafit.report import comparison_plots, dimension_page

    found = one["found"]
    if one["kind"] == "comparison" and found["ranking"]:
        hues = comparison_plots.Hues(found["candidates"])
        prices = {plot.key: plot for plot in comparison_plots.prices(found["ranking"], hues)}
        plots = {
            "scores": comparison_plots.scores(found["ranking"]),
            "rates": comparison_plots.rates(
                found["candidates"], hues, comparison_plots.far(found["ranking"]["places"])
            ),
        }
        plots |= {key: plot for key, plot in prices.items() if "trainable" in key}
        framed = {key: pictures.framed(plot.figure) for key, plot in plots.items() if plot is not None}
        for key in framed.keys() & prices.keys():  # the page of `lorafit compare` has this above the plot
            framed[key].update_xaxes(title_text="trained numbers").update_yaxes(
                title_text="accuracy" if found["ranking"]["metric"] == "accuracy" else "test loss, nats"
            )
        return framed
    if one["kind"] == "dimension":
        plot = dimension_page.curve(found)
        return {} if plot is None else {"curve": pictures.framed(plot.figure)}
    return {}


def _intro(title: str, one: Kept) -> str:
    lines = textwrap.wrap(one["command"], 112, break_long_words=False, break_on_hyphens=False)
    command = " \\\n  ".join(lines)
    return f"## {title}\n\n{wrapped(one['data'])}\n\n```bash\n{command}\n```\n"


def _bullet(line: str) -> str:
    return textwrap.fill(f"- {line}", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _shown(name: str, one: Kept, key: str, what: str) -> str:
    return f"![{what}](pictures/{name}-{key}.png)\n" if key in figures(one) else ""


def _titled(name: str) -> str:
    return name.replace("-", " ").capitalize()


def _comparison(name: str, one: Kept) -> str:
    found = one["found"]
    ranking, data, budget = found["ranking"], found["data"], found["budget"]
    by = {each["name"]: each for each in found["candidates"]}
    rows = [_row(place, by[place["name"]]) for place in ranking["places"]]
    header = [
        "",
        "method",
        "rate",
        "test loss",
        "95 %",
        "less the best's",
        "accuracy",
        "numbers",
        "file, MiB",
        "seconds",
    ]
    classifies = any(each["correct"] for candidate in found["candidates"] for each in candidate["seeds"])
    if not classifies:
        rows = [[*row[:6], *row[7:]] for row in rows]
        header.remove("accuracy")
    said = (
        f"{data['train_records']:,} records to train on, {data['validation_records']:,} to choose rates by, "
        f"{data['test_records']:,} to report on; {budget['steps']:,} steps; {budget['rates']} rates tried for each "
        f"method, then {len(budget['seeds'])} seeds with the best. `=` marks the best and what is not significantly "
        "worse (Holm over all pairs). Seconds are those of a run's steps, on a machine that did other work, too."
    )
    failed = [f"{one}: {why}." for one, why in ranking["failed"]]
    # Told anew from the numbers that were kept: not in the words of the day on which they were measured.
    told = [*Ranking.from_json(ranking).sentences(), *advise(found)]
    lines = [f"{sentence.rstrip('.')}." for sentence in told]
    bullets = "\n".join(map(_bullet, lines))
    drawn = "\n".join(
        _shown(name, one, key, what)
        for key, what in (
            ("scores", "Test loss and interval of each candidate"),
            ("price-trainable", "Test loss against trained numbers"),
            ("rates", "Validation loss of each rate that was tried"),
        )
    )
    return "\n".join(
        [_intro(_titled(name), one), wrapped(said), "", table(header, rows), "", *failed, bullets, "", drawn]
    )


def _row(place: Kept, candidate: Kept) -> list[str]:
    seeds = [each for each in candidate["seeds"] if each["losses"]]
    right = [sum(each["correct"]) / sum(each["counts"]) for each in seeds if each["correct"]]
    best, cost = place["to_best"], place["cost"]
    seconds = [each["seconds"] for each in seeds if each["steps"]]
    return [
        "=" if place["tied"] else str(place["place"]),
        f"`{place['name']}`" if place["kind"] == "adapter" else place["name"],
        "–" if candidate["rate"] is None else f"{candidate['rate']:.2g}",
        f"{place['score']:.4f}",
        f"{place['low']:.4f}–{place['high']:.4f}",
        "–" if best is None else f"{best['value']:+.4f} ({best['low']:+.4f} to {best['high']:+.4f})",
        f"{sum(right) / len(right):.1%}" if right else "–",
        "–" if not cost["trainable"] else f"{cost['trainable']:,.0f}",
        "–" if not cost["file"] else f"{cost['file'] / 2**20:.3g}",
        f"{sum(seconds) / len(seconds):.0f}" if seconds else "–",
    ]


def _dimension(name: str, one: Kept) -> str:
    found = one["found"]
    rows = [
        [
            f"{point['d']:,}",
            "–" if point["rate"] is None else f"{point['rate']:.2g}",
            "–" if point["score"] is None else f"{point['score']:.4f}",
            "–" if point["kept"] is None else f"{point['kept']:.0%}",
            str(len(point["seeds"])),
        ]
        for point in found["points"]
    ]
    share = "of the gain" if found["definition"] == "gain" else f"of the {found['metric']}"
    header = ["d", "rate", found["metric"], share, "seeds"]
    said = [found["verdict"], *found["said"], *found["advice"]]
    bullets = "\n".join(_bullet(line) for line in said)
    ends = (
        f"Untrained {found['base']:.4f}, {found['reference']['told']} {found['full']:.4f}, threshold "
        f"{found['threshold']:.4f}."
    )
    drawn = _shown(name, one, "curve", "Score against d, with the threshold, d90 and its interval")
    return "\n".join([_intro(_titled(name), one), wrapped(ends), "", table(header, rows), "", bullets, "", drawn])


def _few_labels(name: str, one: Kept) -> str:
    verdict = one["found"]["verdict"]
    rows = [
        [
            each["metric"],
            f"{each['before']:.4f}",
            f"{each['after']:.4f}",
            f"{each['value']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})",
        ]
        for each in verdict["metrics"]
    ]
    header = ["test part", "labels alone", "with pseudo-labels", "difference (95 %)"]
    said = [verdict["sentence"], *one["found"]["warnings"]]
    bullets = "\n".join(_bullet(line) for line in said)
    return "\n".join([_intro(_titled(name), one), table(header, rows), "", bullets, ""])


def _runs(kept: Mapping[str, Kept]) -> list[str]:
    """A part for each set of runs that differ in their seed alone: their names end in it."""
    sets: dict[str, dict[str, Kept]] = {}
    for name, one in kept.items():
        if one["kind"] == "run":
            title, _, seed = name.rpartition("-")
            sets.setdefault(title, {})[seed] = one
    return [_shifts(title, several) for title, several in sets.items()]


def _shifts(title: str, several: Mapping[str, Kept]) -> str:
    """Runs that were measured on another domain as well, a row for each seed."""
    rows = []
    for seed, one in several.items():
        shift = one["found"]["findings"]["shift"]
        loss, right = shift["loss"], shift["accuracy"]
        sides = [_moved(loss[side], ".3f") for side in ("on_source", "on_target")]
        shares = [_moved(right[side], ".1%") for side in ("on_source", "on_target")] if right else []
        gap = f"{loss['gap']['change']:+.3f} ± {loss['gap']['change_margin']:.3f}"
        rows.append([seed, *sides, gap, *shares])
    one = next(iter(several.values()))
    header = ["seed", "loss on the source", "on the target", "change of the gap"]
    header += ["accuracy on the source", "on the target"] if len(rows[0]) > len(header) else []
    told = [one["found"]["findings"]["shift"]["sentence"] for one in several.values()]
    bullets = "\n".join(_bullet(line) for line in told)
    return "\n".join([_intro(_titled(title), one), table(header, rows), "", bullets, ""])


def _moved(side: Kept, digits: str) -> str:
    margin = "" if side["margin"] is None else f" ± {side['margin']:{digits}}"
    return f"{side['before']:{digits}} → {side['after']:{digits}} ({side['change']:+{digits}}{margin})"


def _where(kept: Mapping[str, Kept]) -> str:
    rows: list[Sequence[str]] = []
    for name, one in kept.items():
        at, versions = one["machine"], one["versions"]
        packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        rows.append(
            (f"`{name}`", (one["commit"]["hash"] or "unknown")[:9], one["date"][:10], at["processor"], packages)
        )
    return f"## Where\n\n{table(('result', 'commit', 'date', 'machine', 'versions'), rows)}\n"
