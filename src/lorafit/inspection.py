"""Whether an adapter learnt anything, where, and what is out of line: from its own numbers, with or without the base's.

An adapter starts as no change at all: B is zero, so that ΔW is. A site with ΔW = 0 has learnt nothing, and one whose
change is far from that of its peers is worth a look before anything else is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from lorafit.anatomy import Anatomy, of_update
from lorafit.delta import LowRank
from lorafit.handle import Handle
from lorafit.spectrum import Likeness, Spectrum, likeness, row_norms, spectrum

FAR = 10.0
"""Times the median of its peers by which a site's change is out of line; and its inverse."""
PEERS = 4
"""Sites that it takes to say what is usual."""
MOST = 0.5
"""The share of all change at which one site does the work of all."""
SPIKE = 30.0
"""Times the median row of a site by which one of its rows is out of line."""


@dataclass(frozen=True)
class Finding:
    """Something out of line.

    Attributes:
        path: where; empty for the adapter as a whole.
        kind: in a word or two.
        detail: with its numbers.
    """

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Place:
    """One site of an adapter.

    Attributes:
        path: of the module.
        out, inn: the sizes of its matrix.
        r: the rank that the adapter has there; None for a change that is no product of two factors.
        spectrum: of ΔW.
        largest_row: the length of the longest row of ΔW, in medians of its rows; None where the median is 0.
        weight: ‖W‖_F; None without the base's weights.
        moved: ΔM and ΔD; None without them.
    """

    path: str
    out: int
    inn: int
    r: int | None
    spectrum: Spectrum
    largest_row: float | None
    weight: float | None
    moved: Anatomy | None

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return self.spectrum.norm

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None without the base's weights."""
        return None if not self.weight else self.norm / self.weight


@dataclass(frozen=True)
class Inspection:
    """An adapter, site by site.

    Attributes:
        places: its sites, in model order.
        findings: what is out of line, the gravest first.
    """

    places: tuple[Place, ...]
    findings: tuple[Finding, ...]

    @property
    def dead(self) -> tuple[str, ...]:
        """The sites without any change."""
        return tuple(place.path for place in self.places if place.norm == 0)

    def verdict(self) -> str:
        """Whether it learnt anything, in a sentence."""
        alive = len(self.places) - len(self.dead)
        if not alive:
            return "it learnt nothing: the change is zero at every site, as before the first step"
        shares = [place.relative for place in self.places if place.relative is not None]
        size = f", by {median(shares):.2%} of ‖W‖ in the median" if shares else ""
        where = f"all {alive:,} sites" if not self.dead else f"{alive:,} of {len(self.places):,} sites"
        odd = len({finding.path for finding in self.findings if finding.path and finding.path not in self.dead})
        rest = f"; {odd} out of line" if odd else ""
        return f"it learnt: {where} changed{size}{rest}"


@torch.no_grad()
def inspect(handle: Handle, *, weights: bool) -> Inspection:
    """Looks at every site of an attached adapter, which must not be merged.

    Args:
        handle: the adapter.
        weights: whether the model's weights are the base's, and not only of its shapes.
    """
    places = []
    for path, site in handle.sites.items():
        update = handle.adapter(path).update(site.weight)
        rows = row_norms(update.delta)
        usual = float(rows.median()) if rows.numel() else 0.0
        base = site.weight().double() if weights else None
        places.append(
            Place(
                path,
                site.shape.out,
                site.shape.inn,
                update.delta.down.shape[0] if isinstance(update.delta, LowRank) else None,
                spectrum(update.delta),
                float(rows.max()) / usual if usual else None,
                None if base is None else float(base.norm()),
                None if base is None else of_update(base, update),
            )
        )
    return Inspection(tuple(places), tuple(findings(places)))


def findings(places: Sequence[Place]) -> list[Finding]:
    """What is out of line among the sites of an adapter, the gravest first."""
    if places and all(place.norm == 0 for place in places):
        return [Finding("", "nothing learnt", "the change is zero at every site")]
    total = sum(place.norm**2 for place in places)
    found: list[tuple[float, Finding]] = []
    for place, usual in zip(places, _usual(places), strict=True):
        if place.norm == 0:
            found.append((float("inf"), Finding(place.path, "dead", "ΔW is zero: nothing was learnt here")))
            continue
        share = place.norm**2 / total
        if len(places) >= PEERS and share > MOST:
            detail = f"{share:.0%} of all change, in one of {len(places):,} sites"
            found.append((share * len(places), Finding(place.path, "does all the work", detail)))
        if usual:
            times = place.norm / usual
            if max(times, 1 / times) > FAR:
                word = "far larger than its peers" if times > 1 else "far smaller than its peers"
                detail = f"‖ΔW‖ is {place.norm:.3g}, {times:.3g} times the median of sites of its kind ({usual:.3g})"
                found.append((max(times, 1 / times), Finding(place.path, word, detail)))
        if place.largest_row is not None and place.largest_row > SPIKE:
            detail = f"the longest row of ΔW is {place.largest_row:.3g} times the median row"
            found.append((place.largest_row, Finding(place.path, "a row sticks out", detail)))
    return [finding for _, finding in sorted(found, key=lambda pair: -pair[0])]


def _usual(places: Sequence[Place]) -> list[float]:
    """For each site the median change of its peers: those of its name, or all where these are few; 0 if unknown."""
    by_name: dict[str, list[float]] = {}
    for place in places:
        if place.norm:
            by_name.setdefault(place.path.rpartition(".")[2], []).append(place.norm)
    every = [norm for norms in by_name.values() for norm in norms]
    result = []
    for place in places:
        own = by_name.get(place.path.rpartition(".")[2], [])
        peers = own if len(own) >= PEERS else every
        result.append(median(peers) if len(peers) >= PEERS else 0.0)
    return result


@torch.no_grad()
def compared(first: Handle, second: Handle) -> Mapping[str, Likeness | None]:
    """How alike two adapters are at the sites that both have, by path; None where one of them changes nothing."""
    both = [path for path in first.sites if path in second.sites]
    return {
        path: likeness(*(each.adapter(path).update(each.sites[path].weight).delta for each in (first, second)))
        for path in both
    }


def mean_likeness(found: Iterable[Likeness | None]) -> Likeness | None:
    """The mean over sites; None if there are none."""
    known = [each for each in found if each is not None]
    if not known:
        return None
    count = len(known)
    return Likeness(
        sum(each.outputs for each in known) / count,
        sum(each.inputs for each in known) / count,
        sum(each.cosine for each in known) / count,
    )
