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
from lorafit.errors import ConfigError
from lorafit.handle import Handle
from lorafit.method import Adapter
from lorafit.methods.lora import AnchoredAdapter
from lorafit.spectrum import Likeness, Spectrum, likeness, principal_cosines, row_norms, spectrum

FAR = 10.0
"""Times the median of its peers by which a site's change is out of line; and its inverse."""
PEERS = 4
"""Sites that it takes to say what is usual."""
MOST = 0.5
"""The share of all change at which one site does the work of all."""
ROUNDING = 1e-7
"""The share of what an anchored adapter began with up to which B A − B₀ A₀ is zero, rounded."""
SPIKE = 30.0
"""Times the median row of a site by which one of its rows is out of line."""
STILL = 1e-5
"""The share of a weight's mean row up to which a change of lengths is rounding."""


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
        start: ‖s B₀ A₀‖_F of what an initialiser such as PiSSA began with, which is no part of ΔW; None where A and B
            began without a change.
        rescaled: whether the rows of W + ΔW are brought to lengths of their own after that, as DoRA does.
    """

    path: str
    out: int
    inn: int
    r: int | None
    spectrum: Spectrum
    largest_row: float | None
    weight: float | None
    moved: Anatomy | None
    start: float | None = None
    rescaled: bool = False

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return self.spectrum.norm

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None without the base's weights."""
        return None if not self.weight else self.norm / self.weight

    @property
    def grown(self) -> float | None:
        """‖ΔW‖ / ‖s B₀ A₀‖; None where there is no such start."""
        return None if not self.start else self.norm / self.start

    @property
    def is_dead(self) -> bool:
        """Whether nothing was learnt here: ΔW is zero, and no length of a row of W has moved as far as is known."""
        if self.norm:
            return False
        # DoRA's lengths may be learnt where its ΔW is zero.
        return self.moved is None or self.moved.magnitude <= STILL * (self.weight or 0.0) / self.out**0.5


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
        return tuple(place.path for place in self.places if place.is_dead)

    @property
    def dead_share(self) -> float:
        """The share of such sites; 0 of no sites."""
        return len(self.dead) / max(1, len(self.places))

    @property
    def median_relative(self) -> float | None:
        """The median of ‖ΔW‖ / ‖W‖; None without the base's weights."""
        shares = [place.relative for place in self.places if place.relative is not None]
        return median(shares) if shares else None

    @property
    def before(self) -> str:
        """What a size of ΔW leaves out where rows are rescaled; empty elsewhere."""
        return ", before the rows get their lengths" if any(place.rescaled for place in self.places) else ""

    def verdict(self) -> str:
        """Whether it learnt anything, in a sentence."""
        alive = len(self.places) - len(self.dead)
        if not alive:
            return "it learnt nothing: the change is zero at every site, as before the first step"
        share = self.median_relative
        size = "" if share is None else f", by {share:.2%} of ‖W‖ in the median{self.before}"
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
        seen, start = spectrum(update.delta), _start(handle.adapter(path))
        if start is not None and seen.norm <= ROUNDING * start:
            seen, rows = Spectrum((0.0,) * len(seen.values)), torch.zeros_like(rows)
        usual = float(rows.median()) if rows.numel() else 0.0
        base = site.weight().double() if weights else None
        places.append(
            Place(
                path,
                site.shape.out,
                site.shape.inn,
                update.delta.down.shape[0] if isinstance(update.delta, LowRank) else None,
                seen,
                float(rows.max()) / usual if usual else None,
                None if base is None else float(base.norm()),
                None if base is None else of_update(base, update),
                start,
                update.gain is not None,
            )
        )
    return Inspection(tuple(places), tuple(findings(places)))


def _start(adapter: Adapter) -> float | None:
    """‖s B₀ A₀‖_F of an anchored adapter, also inside of another one."""
    found = (module for module in adapter.modules() if isinstance(module, AnchoredAdapter))
    for each in found:
        return spectrum(LowRank(each.B0, each.A0, scale=each.scale, groups=each.groups)).norm
    return None


def findings(places: Sequence[Place]) -> list[Finding]:
    """What is out of line among the sites of an adapter, the gravest first."""
    if places and all(place.is_dead for place in places):
        return [Finding("", "nothing learnt", "the change is zero at every site")]
    total = sum(place.norm**2 for place in places)
    found: list[tuple[float, Finding]] = []
    for place, usual in zip(places, _usual(places), strict=True):
        if place.is_dead:
            found.append((float("inf"), Finding(place.path, "dead", "ΔW is zero: nothing was learnt here")))
        if not place.norm:
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


@dataclass(frozen=True)
class Alike:
    """How alike two adapters are at one site.

    Attributes:
        likeness: in three numbers.
        outputs: the cosines of the principal angles between the spaces that they write, largest first.
        inputs: those between the spaces that they read.
    """

    likeness: Likeness
    outputs: tuple[float, ...]
    inputs: tuple[float, ...]


@torch.no_grad()
def compared(first: Handle, second: Handle) -> Mapping[str, Likeness | None]:
    """How alike two adapters are at the sites that both have, by path; None where one of them changes nothing."""
    return {path: None if one is None else one.likeness for path, one in by_angles(first, second).items()}


@torch.no_grad()
def by_angles(first: Handle, second: Handle) -> Mapping[str, Alike | None]:
    """The same with all principal angles.

    Raises:
        ConfigError: a site has another size in the second.
    """
    found: dict[str, Alike | None] = {}
    for path in first.sites:
        if path not in second.sites:
            continue
        sizes = [tuple(each.sites[path].shape[:2]) for each in (first, second)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                "the two adapters are of different models",
                where=path,
                found=" and ".join(f"{out} × {inn}" for out, inn in sizes),
                expected="layers of the same size",
                fix="compare adapters of one base model",
            )
        one, other = (each.adapter(path).update(each.sites[path].weight).delta for each in (first, second))
        like, cosines = likeness(one, other), principal_cosines(one, other)
        found[path] = None if like is None or cosines is None else Alike(like, *cosines)
    return found


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
