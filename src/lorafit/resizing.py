"""Smaller adapters out of trained ones: fewer ranks or fewer layers, from the factors alone.

The best change of rank r for Δ = s B A is the r largest singular values of it (Eckart and Young 1936). They are those
of a small matrix: B = Q₁ R₁ and Aᵀ = Q₂ R₂ make Δ = Q₁ (s R₁ R₂ᵀ) Q₂ᵀ, so that nothing of a weight's size is formed.
Of DoRA the magnitudes are kept, and the direction W + Δ gets the smaller Δ. Every other method is made plain LoRA
first, which is exact where its change is of low rank.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit import store
from lorafit.card import plain_card
from lorafit.compress import relative, squeeze_low_rank
from lorafit.conversion import Pair, Plain, convert, plain_config, read_pairs
from lorafit.delta import LowRank
from lorafit.errors import CheckpointError, ConfigError
from lorafit.layouts.own import OWN
from lorafit.methods import validate
from lorafit.peft_layout import for_file, join
from lorafit.spectrum import Spectrum, spectrum
from lorafit.store import Stored

EVERYTHING = 1 << 30
"""A rank above any layer's: what is dense comes out as it is, in factors."""


@dataclass(frozen=True)
class Layer:
    """One adapted layer of an adapter that may be resized.

    Attributes:
        pair: its A and B.
        spectrum: the singular values of its change.
        fixed: why it keeps its rank; empty where it does not have to.
    """

    pair: Pair
    spectrum: Spectrum
    fixed: str = ""

    @property
    def r(self) -> int:
        """Its rank now."""
        return self.pair.down.shape[0]


@dataclass(frozen=True)
class Source:
    """An adapter that was read to be resized.

    Attributes:
        config: of the plain LoRA, or DoRA, that it is now.
        plain: its factors.
        layers: module path → layer.
        notes: what has to be said of how it came to be one.
    """

    config: dict[str, object]
    plain: Plain
    layers: dict[str, Layer]
    notes: tuple[str, ...] = ()

    @property
    def numbers(self) -> int:
        """How many numbers A and B have."""
        return sum(each.pair.down.numel() + each.pair.up.numel() for each in self.layers.values())


@dataclass(frozen=True)
class Size:
    """What an adapter is to become: module path → rank, 0 for a layer that is to be as in the base.

    Attributes:
        ranks: of every layer.
        energy: the share of Σ σ² that is kept, over all layers.
        error: ‖Δ' − Δ‖ / ‖Δ‖ over all layers.
        numbers: of A and B, in all.
        share: the same as a share of what there was.
    """

    ranks: dict[str, int]
    energy: float
    error: float
    numbers: int
    share: float

    @property
    def layers(self) -> int:
        """How many layers are left."""
        return sum(rank > 0 for rank in self.ranks.values())


def opened(path: str | Path, model: nn.Module | None = None) -> Source:
    """Reads an adapter's folder.

    Args:
        path: written by this library or by PEFT.
        model: the base model; needed where the file alone does not say what the change is (`lorafit.convert`).

    Raises:
        CheckpointError: the adapter cannot be read, or its change depends on the model.
    """
    stored = store.read(Path(path))
    plain, notes = read_pairs(stored), list[str]()
    if plain is None:
        kind = stored.config.get("peft_type")
        with tempfile.TemporaryDirectory() as folder:
            rank = EVERYTHING if model is not None else None
            stored = store.read(convert(path, output=Path(folder) / "plain", model=model, r=rank))
        plain = read_pairs(stored)
        assert plain is not None
        notes.append(f"{kind} is resized as plain LoRA, the same change: of another rank it would be none of its type")
    elif plain.magnitudes:
        notes.append("DoRA: the magnitudes are kept, the direction is resized")
    config = {key: value for key, value in stored.config.items() if key != OWN}
    layers = {path: _layer(pair) for path, pair in plain.pairs.items()}
    fixed = [path for path, each in layers.items() if each.fixed]
    if fixed:
        notes.append(f"{fixed[0]} keeps its rank: {layers[fixed[0]].fixed} ({len(fixed)} such layers)")
    return Source(config, plain, layers, tuple(notes))


def _layer(pair: Pair) -> Layer:
    rank, blocks = pair.down.shape[0], pair.up.shape[1]
    groups = rank // blocks
    if groups == 1:
        return Layer(pair, spectrum(LowRank(pair.up, pair.down, scale=pair.scale)))
    # B has a part for each group, and A, in a file, reads the channels of all: no change of a weight of that shape.
    wide = LowRank(_spread(pair.up, groups), pair.down, scale=pair.scale)
    return Layer(pair, spectrum(wide), f"a grouped convolution in {groups} groups is not cut from its file alone")


def _spread(up: Tensor, groups: int) -> Tensor:
    wide: Tensor = torch.block_diag(*up.view(groups, -1, up.shape[1]))  # type: ignore[no-untyped-call]
    return wide


# What to become


def by_rank(source: Source, r: int) -> Size:
    """Every layer at rank r at most."""
    validate.rank("resize.r", r)
    return sized(source, {path: min(r, each.r) for path, each in source.layers.items()})


def by_energy(source: Source, share: float) -> Size:
    """Every layer at the least rank that keeps so much of its own Σ σ², and at 1 at least.

    Raises:
        ConfigError: a share that is none.
    """
    _share("energy", share, whole=True)
    return sized(source, {path: max(1, each.spectrum.rank_for(share)) for path, each in source.layers.items()})


def by_importance(source: Source, scores: Mapping[str, float], share: float) -> Size:
    """Without the layers that count least, so large a share of them; the others stay as they are.

    Args:
        source: the adapter.
        scores: module path → importance (`lorafit.importance.importance`).
        share: of the layers that go, less than 1: at least one stays.
    """
    _share("drop", share, whole=False)
    gone = min(round(share * len(source.layers)), len(source.layers) - 1)
    least = set(sorted(source.layers, key=lambda path: scores[path])[:gone])
    return sized(source, {path: 0 if path in least else each.r for path, each in source.layers.items()})


def sized(source: Source, ranks: Mapping[str, int]) -> Size:
    """What these ranks keep."""
    own = {path: each.r if each.fixed and ranks[path] else ranks[path] for path, each in source.layers.items()}
    numbers = kept = total = 0.0
    for path, each in source.layers.items():
        numbers += own[path] * (each.pair.down.numel() + each.pair.up.numel()) / each.r
        values = each.spectrum.values if each.fixed and own[path] else each.spectrum.values[: own[path]]
        kept += sum(value * value for value in values)
        total += sum(value * value for value in each.spectrum.values)
    share = kept / total if total else 1.0
    return Size(own, share, relative(total - kept, total), round(numbers), numbers / source.numbers)


def _share(name: str, value: float, *, whole: bool) -> None:
    if not (0 < value < 1 or (whole and value == 1)):
        raise ConfigError(
            f"{name} is a share",
            where=f"resize.{name}",
            found=value,
            expected=f"a number above 0 and {'at most' if whole else 'below'} 1",
            fix=f"{name}={0.95 if whole else 0.5}",
        )


# Writing


def resize(source: Source, size: Size, output: str | Path) -> Path:
    """Writes the smaller adapter in PEFT's layout, in one step that a kill cannot split.

    Args:
        source: the adapter.
        size: what it becomes.
        output: the folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: nothing would be left, or the folder cannot be written.
    """
    if not size.layers:
        raise CheckpointError("no layer would be left of the adapter", where=output, fix="keep more of it")
    pairs = cut(source, size.ranks)
    magnitudes, whole = source.plain.magnitudes, source.plain.rest
    tensors = dict(whole)
    for path, pair in pairs.items():
        ones = (1,) * len(pair.kernel)
        tensors[join(path, pair.keys[0])] = pair.down.reshape(pair.down.shape[0], -1, *pair.kernel)
        tensors[join(path, pair.keys[1])] = pair.up.reshape(*pair.up.shape, *ones)
        if path in magnitudes:
            key, value = magnitudes[path]
            tensors[join(path, key)] = value
    config = plain_config({**source.config, "use_rslora": False}, pairs)
    config |= {"use_dora": bool(magnitudes), "lora_dropout": source.config.get("lora_dropout", 0.0)}
    if len(pairs) < len(source.layers):
        config |= {"target_modules": sorted(pairs), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    store.write_parts(Path(output), config, for_file(tensors), plain_card(config))
    return Path(output)


@torch.no_grad()
def cut(source: Source, ranks: Mapping[str, int]) -> dict[str, Pair]:
    """A and B of the layers that stay: as they were, or the best ones of their rank, with a scale of 1."""
    pairs = {}
    for path, each in source.layers.items():
        rank, pair = ranks[path], each.pair
        if rank == 0:
            continue
        if rank >= each.r:
            pairs[path] = pair
            continue
        made = squeeze_low_rank(pair.up * pair.scale, pair.down, rank)
        pairs[path] = replace(pair, up=made.up, down=made.down, scale=1.0)
    return pairs


def difference(source: Source, size: Size, written: Stored) -> float:
    """The largest difference of a number of Δ between what was to be written and what is there, of all layers."""
    found = read_pairs(written)
    wanted = cut(source, size.ranks)
    if found is None or set(found.pairs) != set(wanted):
        return float("inf")
    return max(apart(wanted[path], found.pairs[path]) for path in wanted)


@torch.no_grad()
def apart(one: Pair, other: Pair, rows: int = 4096) -> float:
    """The largest difference of a number of two changes of a layer, formed a few rows at a time."""
    groups = (one.down.shape[0] // one.up.shape[1], other.down.shape[0] // other.up.shape[1])
    ups = [
        (each.up if group == 1 else _spread(each.up, group)) * each.scale
        for each, group in zip((one, other), groups, strict=True)
    ]
    worst = 0.0
    for start in range(0, ups[0].shape[0], rows):
        mine, theirs = (up[start : start + rows] for up in ups)
        worst = max(worst, float((mine @ one.down - theirs @ other.down).abs().max()))
    return worst
