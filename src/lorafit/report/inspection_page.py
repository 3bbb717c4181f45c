"""The page of `lorafit inspect`: whether an adapter learnt anything, where, how, and what is out of line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lorafit.report import anatomy, sitemap, text
from lorafit.report.document import Cell, Document, Section, table
from lorafit.report.figures import Plot, blank
from lorafit.report.likeness import beside
from lorafit.report.palette import LIGHT
from lorafit.report.text import escape

LEADING: Final = 8
"""Sites whose spectra are drawn."""
TALL: Final = 380

Site = Mapping[str, Any]


def document(found: Mapping[str, Any], source: str) -> Document:
    """The page of what `lorafit inspect --json` says.

    Args:
        found: that object.
        source: the adapter's folder.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    sites: Mapping[str, Site] = found["sites"]
    sections = [
        _verdict(found),
        _findings(found),
        _map(found),
        _table(found),
        *_spectra(sites),
        *_ranks(sites),
        *_moved(sites),
    ]
    if found["other"] is not None:
        sections += beside(found["other"])
    return Document(f"The {found['method']} adapter in {source}", _lead(found), _facts(found), sections, source)


def _lead(found: Mapping[str, Any]) -> str:
    """In plain language: what an adapter is, whether this one learnt anything, and what to look at first."""
    count, dead = len(found["sites"]), len(found["dead"])
    sentences = [
        f"An adapter is a small change beside a model's weights; this one can change {_sites(count)}, each a layer of "
        "the model."
    ]
    if dead == count:
        sentences.append("It learnt nothing: no layer is changed at all.")
    else:
        size = found["median_relative"]
        share = "" if size is None else f", typically by {text.percent(size)} of the size of a layer's weights"
        if share and any(site["rescaled"] for site in found["sites"].values()):
            share += " before the rows of the weights get their lengths"
        sentences.append(f"It learnt something: {count - dead:,} of {count:,} are changed{share}.")
    if found["logits"] is not None:
        effect, largest = found["logits"]["effect"], found["logits"]["largest"]
        sentences.append(f"On a fixed text it moves an output of the model by up to {effect:.3g}, of {largest:.3g}.")
    elif not found["base"]:
        sentences.append(
            "Only its own files were read, so that it is not known how large the changes are beside the weights."
        )
    if dead != count:
        first = found["findings"][:1]
        sentences += [f"Look first at {one['path']}: {one['kind']}." for one in first] or ["No site is out of line."]
    return " ".join(sentences)


def _sites(count: int) -> str:
    return f"{count:,} site{'' if count == 1 else 's'}"


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    sites: Sequence[Site] = list(found["sites"].values())
    alive = [site for site in sites if site["norm"]]
    mean = sum(site["effective_rank"] for site in alive) / len(alive) if alive else None
    facts = [
        ("Method", found["method"]),
        ("Sites", f"{len(sites):,}"),
        ("Without change", f"{len(found['dead']):,} ({found['dead_share']:.1%})"),
        ("Out of line", f"{len({one['path'] for one in found['findings']} - set(found['dead'])):,}"),
    ]
    if found["median_relative"] is not None:
        facts.append(("‖ΔW‖ of ‖W‖, median", text.percent(found["median_relative"])))
    facts.append(("Effective rank, mean", text.rough(mean)))
    if found["logits"] is not None:
        facts.append(("Largest move of an output", f"{found['logits']['effect']:.3g}"))
    return facts


def _verdict(found: Mapping[str, Any]) -> Section:
    verdict = found["verdict"]
    return Section("Verdict", f"<p>{escape(verdict[:1].upper() + verdict[1:])}.</p>")


def _findings(found: Mapping[str, Any]) -> Section:
    rows = [(one["path"] or "the adapter", one["kind"], one["detail"]) for one in found["findings"]]
    if not rows:
        return Section("What is out of line", '<p class="fine">Nothing: no site is far from its peers.</p>')
    return Section(
        "What is out of line",
        table(("site", "what", "in numbers"), rows),
        note="A site without any change has learnt nothing. One that is more than ten times larger or smaller than its "
        "peers, the sites of its name, is worth a look before anything else is.",
    )


def _map(found: Mapping[str, Any]) -> Section:
    """‖ΔW‖ of each site by kind and layer: beside ‖W‖ where that is known, beside the largest otherwise."""
    sites: Mapping[str, Site] = found["sites"]
    related = all(site["relative"] is not None for site in sites.values()) and bool(sites)
    most = max((site["norm"] for site in sites.values()), default=0.0) or 1.0
    shares = {path: site["relative"] if related else site["norm"] / most for path, site in sites.items()}
    odd = {one["path"] for one in found["findings"]}
    # What is out of line would leave all others pale.
    top = max((share for path, share in shares.items() if path not in odd), default=0.0) or 1.0
    cells = {
        # By the root, the shades of small changes can still be told apart.
        path: sitemap.Cell(_short(share), min(1.0, math.sqrt(share / top)), _told(path, sites[path]), path in odd)
        for path, share in shares.items()
    }
    of = "of ‖W‖" if related else "of the largest"
    notes = [
        f"‖ΔW‖ in percent {of}; a stronger shade is more. A border marks what is out of line.",
        *sitemap.notes(sites),
    ]
    return Section("Where it learnt", sitemap.table(cells, f"‖ΔW‖ of each site in percent {of}"), note=" ".join(notes))


def _short(share: float) -> str:
    """A share in percent, in as little room as a cell has."""
    number = 100 * share
    if number == 0:
        return "0"
    if number < 0.095:
        return "<.1"
    return f"{number:.0f}" if number >= 9.5 else f"{number:.1f}".removeprefix("0")


def _told(path: str, site: Site) -> str:
    share = "" if site["relative"] is None else f", {text.percent(site['relative'])} of ‖W‖"
    return f"{path}: ‖ΔW‖ {site['norm']:.3g}{share}, effective rank {site['effective_rank']:.1f}"


COLUMNS: Final[Sequence[tuple[str, str, bool]]] = (
    ("‖ΔW‖", "norm", False),
    ("of ‖W‖", "relative", True),
    ("of its start", "grown", True),
    ("rank", "r", False),
    ("in use", "rank_in_use", False),
    ("stable rank", "stable_rank", False),
    ("effective rank", "effective_rank", False),
    ("longest row", "largest_row", False),
    ("ΔM", "magnitude", False),
    ("ΔD", "direction", False),
)
"""Columns of the table of sites: title, key, whether it is a share. Those that no site has are left out."""


def _table(found: Mapping[str, Any]) -> Section:
    sites: Mapping[str, Site] = found["sites"]
    columns = [each for each in COLUMNS if any(site[each[1]] is not None for site in sites.values())]
    rows = [
        [
            path,
            (f"{site['out']:,} × {site['in']:,}", site["out"] * site["in"]),
            *(_number(site[key], is_share) for _, key, is_share in columns),
        ]
        for path, site in sites.items()
    ]
    start = " Of its start: ‖ΔW‖ beside ‖s B₀ A₀‖, with which the initialiser began and which is no part of ΔW."
    return Section(
        "Sites",
        table(("site", "size", *(title for title, _, _ in columns)), rows),
        note="Stable rank: Σσ² / σ₁². Effective rank: the exponential of the entropy of σ / Σσ. In use: singular "
        "values that are not zero. Longest row: of ΔW, beside its median row."
        + (start if any(title == "of its start" for title, _, _ in columns) else ""),
    )


def _number(value: float | None, is_share: bool) -> Cell:
    if value is None:
        return text.NONE, None
    if isinstance(value, int):
        return f"{value:,}", value
    return (text.percent(value) if is_share else text.rough(value)), value


def _spectra(sites: Mapping[str, Site]) -> list[Section]:
    """The singular values of the sites that moved most, each beside its largest."""
    ordered = sorted((path for path, site in sites.items() if site["norm"]), key=lambda path: -sites[path]["norm"])
    leading = ordered[:LEADING]
    if not leading:
        return []
    figure = blank(TALL)
    shared = _shared(leading)
    for at, path in enumerate(leading):
        site = sites[path]
        values = site["singular_values"][: site["rank_in_use"]]
        figure.add_scatter(
            x=list(range(1, len(values) + 1)),
            y=[value / values[0] for value in values],
            customdata=values,
            name=path.removeprefix(shared),
            meta=f"hue-{at} mark-{at}",
            mode="lines+markers",
            cliponaxis=False,
            line={"color": LIGHT.hues[at], "width": 1.6},
            marker={"color": LIGHT.hues[at], "symbol": anatomy.SYMBOLS[at], "size": 7},
            hovertemplate=f"{escape(path)}<br>σ%{{x}} = %{{customdata:.3g}}, %{{y:.3f}} of σ₁<extra></extra>",
        )
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(title={"text": "place i", "standoff": 6}, tickformat=",d", showgrid=False, showline=True)
    figure.update_yaxes(title={"text": "σᵢ / σ₁", "standoff": 8}, rangemode="tozero", tickformat="~g")
    longest = max(sites[path]["rank_in_use"] for path in leading)
    figure.update_xaxes(range=[0.7, longest + 0.3], **({"dtick": 1} if longest <= LEADING else {}))
    flat = max(leading, key=lambda path: sites[path]["effective_rank"])
    notes = (
        f"The {len(leading)} sites that moved most." if len(ordered) > len(leading) else "All sites that changed.",
        "A curve that stays high uses its whole rank; one that falls at once would do with less of it.",
    )
    spoken = f"Singular values of {_sites(len(leading))}; {flat} uses the most, {sites[flat]['effective_rank']:.1f}."
    title = "Singular values of the changes"
    return [Section(title, plots=[Plot("spectra", title, spoken, notes, figure)])]


def _shared(paths: Sequence[str]) -> str:
    """What all paths begin with, in whole components; nothing for a single one."""
    first = paths[0].split(".")[:-1] if len(paths) > 1 else []
    while first and not all(path.startswith(".".join((*first, ""))) for path in paths):
        first.pop()
    return ".".join((*first, "")) if first else ""


def _ranks(sites: Mapping[str, Site]) -> list[Section]:
    """The map of ranks, where they differ: AdaLoRA leaves more where more is to be learnt."""
    ranks = {path: site["rank_in_use"] for path, site in sites.items()}
    if len({rank for rank in ranks.values() if rank}) < 2:
        return []
    most = max(ranks.values())
    cells = {path: sitemap.Cell(f"{rank}", rank / most, f"{path}: rank {rank}") for path, rank in ranks.items()}
    total = sum(ranks.values())
    told = f"{total:,} ranks in use at {_sites(len(ranks))}, {total / len(ranks):.2f} on average."
    note = " ".join([told, *sitemap.notes(ranks)])
    return [Section("Ranks of the sites", sitemap.table(cells, "Rank in use at each site"), note=note)]


def _moved(sites: Mapping[str, Site]) -> list[Section]:
    """ΔM over ΔD, with the base's weights."""
    moved = {
        path: (site["magnitude"], site["direction"])
        for path, site in sites.items()
        if site["magnitude"] is not None and site["direction"] is not None
    }
    if not any(map(any, moved.values())):
        return []
    plot = anatomy.of_sites(moved)
    return [Section(plot.title, plots=[plot]), Section("By kind of module", anatomy.by_kind(moved))]
