"""Where in a model a module is, read from its path: which kind of module, and in which layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_LAYER: Final = "*"
"""Stands for the layer's number in the path of a kind."""


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Attributes:
        kind: what modules of several layers have in common: as many last components of the path as tell kinds apart.
        layer: the first number in the path; None where there is none.
    """

    kind: str
    layer: int | None


def places(paths: Iterable[str]) -> Mapping[str, Place]:
    """The place of each module.

    Args:
        paths: module paths, in the order of the model.

    >>> places(["h.0.attn.out", "h.0.mlp.out", "h.11.attn.in", "head"])["h.11.attn.in"]
    Place(kind='in', layer=11)
    >>> [place.kind for place in places(["h.0.attn.out", "h.0.mlp.out", "h.0.attn.in", "head"]).values()]
    ['attn.out', 'mlp.out', 'in', 'head']
    """
    parted = {path: _parted(path) for path in paths}
    labels = _labels(kind for kind, _ in parted.values())
    return {path: Place(labels[kind], layer) for path, (kind, layer) in parted.items()}


def _parted(path: str) -> tuple[str, int | None]:
    """The path with a star for its first number, and that number."""
    parts = path.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdecimal() and part == str(int(part))), None)
    if at is None:
        return path, None
    return ".".join((*parts[:at], _LAYER, *parts[at + 1 :])), int(parts[at])


def _labels(kinds: Iterable[str]) -> Mapping[str, str]:
    """A short name for each kind: its last component, and before it those in which it differs from others so named."""
    ends = {kind: kind.split(".")[::-1] for kind in kinds}
    chosen = {kind: [0, 1] if end[0] == _LAYER and len(end) > 1 else [0] for kind, end in ends.items()}
    for depth in range(1, max(map(len, ends.values()), default=0)):
        alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for kind, depths in chosen.items():
            alike[tuple(ends[kind][at] for at in depths)].append(kind)
        for group in alike.values():
            if len({tuple(ends[kind][depth : depth + 1]) for kind in group}) > 1:
                for kind in group:
                    if depth < len(ends[kind]) and depth not in chosen[kind]:
                        chosen[kind].append(depth)
    labels = {kind: _label(ends[kind], depths) or kind for kind, depths in chosen.items()}
    uses = Counter(labels.values())
    labels = {kind: label if uses[label] == 1 else kind for kind, label in labels.items()}
    return labels if len(set(labels.values())) == len(labels) else {kind: kind for kind in labels}


def _label(end: Sequence[str], depths: Iterable[int]) -> str:
    """The components at these depths, and an ellipsis where some between them are left out."""
    label, outer = "", 0
    for depth in depths:
        if end[depth] != _LAYER:
            label = end[depth] + ("" if not label else "." if depth == outer + 1 else "…") + label
            outer = depth
    return label
