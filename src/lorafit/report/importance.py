"""Which sites LoRA-drop gave adapters of their own: a map of each site's share of the importance of its kind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from lorafit.report import sitemap, tables, text
from lorafit.report.places import places
from lorafit.report.records import Drop, Run
from lorafit.report.sitemap import Cell, Column
from lorafit.report.text import escape

OWN: Final = "an adapter of its own"
LOST: Final = "not a finite number"


@dataclass(frozen=True)
class Shares:
    """The scores, by kind.

    Attributes:
        kinds: kind → its share of all; None where no site of it has a score.
        within: module path → its share of its kind; None where that is not known.
    """

    kinds: Mapping[str, float | None]
    within: Mapping[str, float | None]


def _shares(scores: Mapping[str, float | None]) -> Shares:
    found = places(scores)
    known: defaultdict[str, list[float]] = defaultdict(list)
    for path, score in scores.items():
        if score is not None:
            known[found[path].kind].append(score)
    sums = {kind: math.fsum(group) for kind, group in known.items()}
    within = {path: _over(score, sums.get(found[path].kind)) for path, score in scores.items()}
    return Shares({place.kind: sums.get(place.kind) for place in found.values()}, within)


def _over(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def section(run: Run) -> str:
    """The part of the page with the map and the numbers behind it; empty for a run that made no choice."""
    drop = run.drop
    if drop is None or not drop.scores:
        return ""
    shares = _shares(drop.scores)
    last = Column("of all", {kind: text.percent(share) for kind, share in shares.kinds.items()})
    table = sitemap.table(_cells(drop, shares), "Importance of each site within its kind, in percent", last)
    caption = escape(" ".join(_notes(run, drop)))
    figure = f"<figure>{_legend(drop)}{table}<figcaption>{caption}</figcaption></figure>"
    return tables.section("Importance of the sites", figure + _numbers(drop, shares), kind="full")


def _cells(drop: Drop, shares: Shares) -> Mapping[str, Cell]:
    kept = set(drop.kept)
    # One site may have nearly all of a kind: by the root, the shades of the others can still be told apart.
    most = max((share for share in shares.within.values() if share is not None), default=0) or 1
    return {
        path: Cell(
            shown=_whole(share),
            shade=math.sqrt(max(share or 0, 0) / most),
            told=f"{path}: {_told(share)}, {_became(drop, path)}",
            is_marked=path in kept,
        )
        for path, share in shares.within.items()
    }


def _whole(share: float | None) -> str:
    """A share in whole percents, in as little room as a cell has."""
    if share is None:
        return text.NONE
    if 0 < share < 0.01:
        return "<1"
    return ">99" if 0.99 < share < 1 else f"{share:.0%}".removesuffix("%")


def _told(share: float | None) -> str:
    return "no known share of its kind" if share is None else f"{text.percent(share)} of its kind"


def _became(drop: Drop, path: str) -> str:
    return OWN if path in drop.kept else _rest(drop)


def _rest(drop: Drop) -> str:
    return "left as it is" if drop.rest == "freeze" else "shares an adapter"


def _legend(drop: Drop) -> str:
    marks = [("own", OWN)] if drop.kept else []
    if drop.scores.keys() - set(drop.kept):
        marks.append(("rest", _rest(drop)))
    items = "".join(f'<li class="{kind}">{name}</li>' for kind, name in marks)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


def _notes(run: Run, drop: Drop) -> list[str]:
    known = {path: score for path, score in drop.scores.items() if score is not None}
    notes = [f"{len(drop.kept):,} of {len(drop.scores):,} sites have an adapter of their own" + _together(drop, known)]
    others = len(drop.scores) - len(drop.kept)
    if others and drop.rest == "freeze":
        notes.append(f"The other {others:,} are left as they are.")
    elif others:
        shapes = ", ".join(f"{shape} ({count:,})" for shape, count in drop.shared.items())
        notes.append(f"The other {others:,} share one adapter for each shape{': ' if shapes else ''}{shapes}.")
    if drop.sample_records is not None and drop.steps is not None:
        notes.append(f"Measured after a trial of {drop.steps:,} steps on {drop.sample_records:,} records.")
    notes.append(
        "In the cells: a site's share of the importance of its kind, in percent; in the last column: the kind's share "
        "of the importance of all sites."
    )
    among = run.resolved.get("per_kind")
    if among is True:
        notes.append("The choice was made apart among the sites whose paths end in the same name.")
    elif among is False:
        notes.append("The choice was made among all sites together.")
    if lost := len(drop.scores) - len(known):
        many = "1 site is" if lost == 1 else f"{lost:,} sites are"
        notes.append(f"{many} left out of the shares, since what was measured is {LOST}.")
    return [*notes, *sitemap.notes(drop.scores)]


def _together(drop: Drop, known: Mapping[str, float]) -> str:
    """The end of the sentence on the sites that were kept: what they have together."""
    if not known:
        return "."
    share = math.fsum(known[path] for path in drop.kept if path in known)
    return f", and with it {text.percent(share)} of the importance."


def _numbers(drop: Drop, shares: Shares) -> str:
    rows = [
        (escape(path), text.percent(drop.scores[path]), text.percent(shares.within[path]), _became(drop, path))
        for path in _ranked(drop.scores)
    ]
    return (
        f"<details><summary>Importance as numbers ({len(rows)})</summary>"
        + tables.numbers(("site", "of all", "of its kind", "what it got"), rows)
        + "</details>"
    )


def _ranked(scores: Mapping[str, float | None]) -> Iterable[str]:
    """The paths, that of the largest score first; those without one at the end."""

    def order(path: str) -> tuple[bool, float]:
        score = scores[path]
        return score is None, -(score or 0)

    return sorted(scores, key=order)
