"""How far an adapter has moved the lengths and the directions of a weight's rows. Liu et al. 2024, arXiv:2402.09353,
section 3.2.

With W = m V / ‖V‖_c of the adapted weight at step t and of the base weight at step 0, over the k rows of a site:

    ΔM = Σ |m_t − m_0| / k          ΔD = Σ (1 − cos(V_t, W_0)) / k

Full fine-tuning moves some layers' lengths and other layers' directions (the paper's correlation of ΔM and ΔD over
layers and steps is −0.62), LoRA both together (+0.83), DoRA as full fine-tuning does (−0.31).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.delta import Update
from lorafit.errors import ConfigError
from lorafit.layers import Site
from lorafit.method import Adapter
from lorafit.rownorm import row_norm, row_products, row_squares


@dataclass(frozen=True)
class Anatomy:
    """What became of one site's weight.

    Attributes:
        magnitude: ΔM, the mean change of a row's length, in the weight's own unit.
        direction: ΔD, the mean of 1 − cos of the angle between a row and what it was, in [0, 2]. Rows without a
            direction, zero before or now, are left out; 0 if there are no others.
    """

    magnitude: float
    direction: float


def anatomy(sites: Mapping[str, tuple[Site, Adapter]]) -> dict[str, Anatomy]:
    """ΔM and ΔD of every site, for adapters of any method.

    Args:
        sites: module path → site and its adapter, which must not be merged: W_0 is the weight that is there.

    Returns:
        Module path → anatomy. The change is never formed where it is of low rank. In double precision where the device
        has it.

    Raises:
        MergeError: an adapter that mixes the groups of a convolution changes no weight.
    """
    with torch.no_grad():
        return {path: of_update(site.weight(), adapter.update(site.weight)) for path, (site, adapter) in sites.items()}


@torch.no_grad()
def of_update(weight: Tensor, update: Update) -> Anatomy:
    """ΔM and ΔD of one update of a matrix (out, in)."""
    weight = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    squares = row_squares(weight)
    cross, own = row_products(weight, update.delta)
    before, length = squares.sqrt(), row_norm(weight, update.delta, squares=squares)
    gain = torch.ones_like(length) if update.gain is None else update.gain.to(length.dtype)
    now = gain.abs() * length
    some = (before > 0) & (now > 0)
    direction = _one_minus_cosine(squares, cross, own, length, gain)[some]
    return Anatomy(
        magnitude=(now - before).abs().mean().item(),
        direction=direction.mean().item() if some.any() else 0.0,
    )


def _one_minus_cosine(squares: Tensor, cross: Tensor, own: Tensor, length: Tensor, gain: Tensor) -> Tensor:
    """1 − cos of the angle between W and ± (W + Δ), row by row."""
    both = squares.sqrt() * length
    cosine = ((squares + cross) / both).clamp(-1, 1)
    # sin² does not lose the digits of a small angle: ‖W‖²‖V‖² − ⟨W, V⟩² = ‖W‖²‖Δ‖² − ⟨W, Δ⟩².
    sine = ((squares * own - cross.square()) / both.square()).clamp(0, 1)
    ahead = torch.where(cosine > 0.5, sine / (1 + cosine), 1 - cosine)
    # A negative gain turns the row around.
    return torch.where(gain < 0, 2 - ahead, ahead)


def correlation(found: Iterable[Anatomy]) -> float:
    """Pearson's correlation of ΔM and ΔD, over sites or over sites at several steps.

    Raises:
        ConfigError: fewer than two of them, or all alike in ΔM or in ΔD: there is no correlation then.

    >>> round(correlation([Anatomy(1.0, 0.1), Anatomy(2.0, 0.3), Anatomy(3.0, 0.2)]), 6)
    0.5
    """
    pairs = torch.tensor([(each.magnitude, each.direction) for each in found], dtype=torch.float64).reshape(-1, 2)
    centred = pairs - pairs.mean(dim=0) if len(pairs) else pairs
    spread = centred.square().sum(dim=0).sqrt()
    if len(pairs) < 2 or not (spread > 0).all():
        raise ConfigError(
            "there is no correlation of what does not vary",
            found=f"{len(pairs)} sites, ΔM spread over {spread[0].item():g}, ΔD over {spread[1].item():g}",
            expected="two or more sites that differ in ΔM and in ΔD",
            fix="take all sites of a model, after some training",
        )
    return (centred.prod(dim=1).sum() / spread.prod()).clamp(-1, 1).item()
