"""The page of `lorafit compare`: which method is best on the user's own data, how sure that is, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.report import comparison_plots as plots
from lorafit.report import tables, text
from lorafit.report.columns import Cell, table
from lorafit.report.document import Document, Section, write_document
from lorafit.report.records import AGREEMENT
from lorafit.report.scales import short
from lorafit.report.text import escape

Row = Mapping[str, Any]


def write_comparison(comparison: Row, path: Path | str, *, source: str = "comparison.json") -> Path:
    """Draw a comparison as one self-contained HTML file, also one that is under way.

    Args:
        comparison: what comparison.json holds.
        path: the HTML file; its folder is created when missing, a former file is replaced.
        source: where the comparison was read from, which the page's foot names.

    Raises:
        MissingExtraError: plotly is not installed.
        ConfigError: it cannot be written there.
    """
    return write_document(document(comparison, source), path)


def document(comparison: Row, source: str) -> Document:
    """What stands on the page."""
    ranking = comparison.get("ranking")
    candidates = comparison["candidates"]
    hues = plots.Hues(candidates)
    ranked = ranking if ranking is not None and ranking["places"] else None
    sections = [
        _words("In words", ranking["sentences"] if ranking is not None else ()),
        _words("What to do next", comparison.get("advice") or ()),
        *(() if ranked is None else _ranked(ranked, candidates, hues)),
        _agreement(candidates),
        *_course(candidates, hues, () if ranked is None else plots.far(ranked["places"])),
        _spent(comparison),
        _options(candidates),
        *_facts(comparison),
    ]
    return Document(
        title=_title(comparison),
        lead=_lead(ranking),
        facts=_tiles(comparison, ranked),
        sections=[section for section in sections if section.html or section.plots],
        source=source,
    )


def _title(comparison: Row) -> str:
    count = sum(each["kind"] != plots.BASE for each in comparison["candidates"])
    what = "One way" if count == 1 else f"{count} ways"
    name = (comparison.get("data") or {}).get("name")
    return f"{what} to fine-tune, compared" + (f" on {name}" if name else "")


def _lead(ranking: Row | None) -> str:
    """The best, and what to pick."""
    if ranking is None:
        return "The comparison is under way: nothing can be ranked yet."
    told: list[str] = ranking["sentences"]
    picked = [one for one in told[1:] if one.startswith("Pick ")]
    return " ".join([*told[:1], *picked])


def _tiles(comparison: Row, ranking: Row | None) -> list[tuple[str, str]]:
    tiles = []
    if ranking is not None:
        best = ranking["places"][0]
        base = next((place for place in ranking["places"] if place["kind"] == plots.BASE), None)
        word = "accuracy" if ranking["metric"] == "accuracy" else "loss"
        tiles.append(("best", best["name"]))
        tiles.append((f"its {word}", _score(ranking, best["score"])))
        if base is not None and base is not best:
            tiles.append((f"{word} untrained", _score(ranking, base["score"])))
        tiles.append(("share its place", f"{sum(place['tied'] for place in ranking['places']) - 1:,}"))
    seeds = max((len(each["seeds"]) for each in comparison["candidates"] if each["kind"] != plots.BASE), default=0)
    records = "" if ranking is None else f"{ranking['records']:,} \N{MULTIPLICATION SIGN} "
    tiles.append(("records \N{MULTIPLICATION SIGN} seeds" if records else "seeds", f"{records}{seeds:,}"))
    tiles.append(("time spent", text.duration(math.fsum(_total(each) for each in comparison["candidates"]))))
    return tiles


def _score(ranking: Row, value: float) -> str:
    return text.percent(value) if ranking["metric"] == "accuracy" else text.loss(value)


def _words(title: str, told: Sequence[str]) -> Section:
    return Section(title, f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in told)}</ul>" if told else "")


def _ranked(ranking: Row, candidates: Sequence[Row], hues: plots.Hues) -> Iterable[Section]:
    note = (
        "The intervals come from drawing the test records anew, the same ones for every candidate, and from how far "
        "the seeds of all candidates lie apart (Student's t). A difference is significant if its probability, "
        "corrected for all pairs (Holm), is below "
        f"{1 - ranking['level']:.2g}."
    )
    drawn = [plots.scores(ranking), plots.differences(ranking)]
    yield Section("Ranking", _table(ranking, candidates), [plot for plot in drawn if plot is not None], note)
    if worth := plots.prices(ranking, hues):
        yield Section(
            "Score against price",
            _prices(ranking, candidates),
            worth,
            note="The line joins those for which no other one is both cheaper and better; its small steps may be luck.",
        )


def _table(ranking: Row, candidates: Sequence[Row]) -> str:
    by = {each["name"]: each for each in candidates}
    rows: list[list[Cell]] = [_line(ranking, place, by[place["name"]]) for place in ranking["places"]]
    for at, (name, reason) in enumerate(ranking["failed"], len(rows) + 1):
        rows.append([("", float(at)), name, *[text.NONE] * 5, f"failed: {reason}"])
    word = "accuracy" if ranking["metric"] == "accuracy" else "loss"
    level = f"{ranking['level'] * 100:.0f} %"
    return table(
        ("place", "candidate", word, f"{level} interval", "to the best", "p, corrected", "rate", "verdict"), rows
    )


def _line(ranking: Row, place: Row, candidate: Row) -> list[Cell]:
    best, rate = place["to_best"], candidate["rate"]
    return [
        (f"{place['place']}{'=' if place['tied'] and not _alone(ranking) else ''}", float(place["place"])),
        place["name"],
        (_score(ranking, place["score"]), place["score"]),
        (f"{_score(ranking, place['low'])} to {_score(ranking, place['high'])}", place["low"]),
        (text.NONE, 0.0) if best is None else (plots.number(ranking, best["value"], "+"), best["value"]),
        (text.NONE, None) if best is None else (_chance(best, ranking["resamples"]), best["adjusted"]),
        (text.NONE, None) if rate is None else (short(rate), rate),
        _verdict(place),
    ]


def _prices(ranking: Row, candidates: Sequence[Row]) -> str:
    by = {each["name"]: each for each in candidates}
    rows: list[list[Cell]] = []
    for place in ranking["places"]:
        if place["kind"] == plots.BASE:
            continue
        cost, total = place["cost"], _total(by[place["name"]])
        rows.append(
            [
                place["name"],
                (_score(ranking, place["score"]), place["score"]),
                (text.duration(cost["seconds"]), cost["seconds"]),
                (text.size(cost["memory"]), cost["memory"]),
                (text.NONE, None) if cost["trainable"] is None else (f"{cost['trainable']:,.0f}", cost["trainable"]),
                (text.size(cost["file"]), cost["file"]),
                (text.duration(total), total),
            ]
        )
    word = "accuracy" if ranking["metric"] == "accuracy" else "loss"
    return table(
        ("candidate", word, "training", plots.memory(ranking).lower(), "trained numbers", "file", "with its search"),
        rows,
    )


def _alone(ranking: Row) -> bool:
    return [place["tied"] for place in ranking["places"]].count(True) == 1


def _chance(difference: Row, resamples: int) -> str:
    """A corrected probability; where no draw lay on the other side, as what it is at most."""
    value = difference["adjusted"]
    sign = "\N{LESS-THAN OR EQUAL TO} " if difference["probability"] <= 2 / (resamples + 1) else ""
    return f"{sign}{value:.3f}" if value >= 0.001 else "< 0.001"


def _verdict(place: Row) -> str:
    """In words that stay on one line, so that rows stay low on a narrow screen."""
    lost = f"; {len(place['lost'])} of {len(place['lost']) + len(place['seeds'])} seeds failed" if place["lost"] else ""
    word = "best" if place["to_best"] is None else f"{'not ' if place['tied'] else ''}significantly worse"
    return f"{word}{lost}".replace(" ", "\N{NO-BREAK SPACE}")


def _course(candidates: Sequence[Row], hues: plots.Hues, left: Sequence[str]) -> Iterable[Section]:
    if (plot := plots.rates(candidates, hues, left)) is not None:
        note = "Rates are chosen on the validation part; the scores are of the test part, which no choice saw."
        yield Section("Learning rates", plots=[plot], note=note)
    if (plot := plots.curves(candidates, hues, left)) is not None:
        yield Section("Held-out loss in training", plots=[plot])


def _agreement(candidates: Sequence[Row]) -> Section:
    """Of a regression: how well each candidate's numbers agree with the right ones, over its seeds."""
    rows: list[list[Cell]] = []
    for each in candidates:
        known = [one["agreement"] for one in each["seeds"] if one.get("agreement")]
        if known:
            rows.append([each["name"], *(_agreed(known, key) for key in AGREEMENT)])
    note = "Means over the seeds; in brackets those of the ends of each seed's 95 % interval over the test records."
    head = ("candidate", "mean absolute error", "Pearson", "Spearman")
    return Section("Predicted and right numbers", table(head, rows) if rows else "", note=note if rows else "")


def _agreed(found: Sequence[Row], key: str) -> Cell:
    known = [each for each in found if f"{key}_low" in each]
    if not known:
        return (text.NONE, None)
    names = (key, f"{key}_low", f"{key}_high")
    value, low, high = (math.fsum(each[name] for each in known) / len(known) for name in names)
    return (f"{value:.3f} ({low:.3f} to {high:.3f})", value)


def _total(candidate: Row) -> float:
    known = [one["seconds"] for one in candidate["search"]] + [one["total_seconds"] for one in candidate["seeds"]]
    return math.fsum(seconds for seconds in known if seconds is not None)


def _spent(comparison: Row) -> Section:
    rows: list[list[Cell]] = []
    for each in comparison["candidates"]:
        searching = math.fsum(one["seconds"] or 0.0 for one in each["search"])
        last = each["seeds"][-1] if each["seeds"] else {}
        rows.append(
            [
                each["name"],
                f"{len(each['search']):,}",
                (text.duration(searching), searching) if each["search"] else (text.NONE, None),
                f"{len(each['seeds']):,}",
                (text.duration(_total(each) - searching), _total(each) - searching)
                if each["seeds"]
                else (text.NONE, None),
                text.count(last.get("steps")),
                text.count(last.get("extra_steps") or None),
                text.count(last.get("tokens")),
                each["failed"] or text.NONE,
            ]
        )
    said = (comparison.get("budget") or {}).get("said") or ()
    told = f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in said)}</ul>" if said else ""
    head = (
        "candidate",
        "rates tried",
        "their time",
        "seeds",
        "time of seeds",
        "steps",
        "further ones",
        "tokens",
        "failed",
    )
    note = "Further steps are those that a method takes beside training, as LoRA-drop does to choose its layers."
    further = any(one.get("extra_steps") for each in comparison["candidates"] for one in each["seeds"])
    said_of_any = [at for at in range(len(head)) if any(row[at] != text.NONE for row in rows)]
    shown = table([head[at] for at in said_of_any], [[row[at] for at in said_of_any] for row in rows]) if rows else ""
    return Section("What was spent", told + shown, note=note if further else "")


def _options(candidates: Sequence[Row]) -> Section:
    """How each candidate was set."""
    rows: list[list[Cell]] = [
        [each["name"], ", ".join(f"{text.words(key)} {text.plain(value)}" for key, value in each["options"].items())]
        for each in candidates
        if each["options"]
    ]
    return Section("Options of each candidate", table(("candidate", "options"), rows) if rows else "")


def _facts(comparison: Row) -> Iterable[Section]:
    """Data, settings and environment as tables, the long ones folded."""
    data, settings, environment = (comparison.get(key) or {} for key in ("data", "settings", "environment"))
    yield Section("Data", tables.facts(data) if data else "")
    for title, found in (("Settings", settings), ("Environment", environment)):
        folded = f"<details><summary>{len(found)} values</summary>{tables.facts(found)}</details>"
        yield Section(title, folded if found else "")
