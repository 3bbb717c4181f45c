"""Type LORAFIT_LORA: LoRA and its kin where PEFT's type LORA has no place for them, or one that is nearly all zeros.

Keys and settings are those of PEFT's type LORA, of another name, for two reasons:

- PEFT has no adapter for transposed convolutions. Of A (r, in / groups, *kernel) alone nobody could tell that its
  layer's weight is (in, out / groups, *kernel), and a reader that took it for a convolution's would add to the wrong
  numbers.
- PEFT's A of a convolution in groups sees all channels, (r, in, *kernel), with zeros for those of other groups. Of a
  depthwise convolution with a rank for each group that is `groups` times as many numbers as there are. Here every A of
  a convolution in groups is (r, in / groups, *kernel), and files that are PEFT's otherwise are of this type where it
  pays: see `mostly_zeros`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorafit.errors import LorafitWarning, some
from lorafit.layers import Site, TransposedSite
from lorafit.layouts.lora import PairLayout, factors
from lorafit.peft_layout import Placed

TIMES = 16
"""PEFT's form is left where it has more than so many times the bytes of A and B ..."""
LEAST = 64 * 2**20
"""... and more than so many."""
MIB = 2**20


class OwnPairLayout(PairLayout):
    """This library's own type for low-rank updates, and for whatever PEFT could hold beside those that it cannot."""

    peft_type = "LORAFIT_LORA"

    def tell(self, sites: Mapping[str, Placed], dora: Sequence[str]) -> None:
        if transposed(sites):
            return  # PEFT has no adapter for them, in whatever form
        own, zeros = _bytes(sites)
        grouped = [path for path, placed in sites.items() if placed.site.shape.groups > 1]
        warnings.warn(
            f"this adapter is saved as type {self.peft_type}, which lorafit reads and PEFT does not: in PEFT's form A "
            f"of the convolutions in groups ({some(grouped)}) would be {zeros / MIB:.0f} MiB of zeros beside "
            f"{own / MIB:.1f} MiB of numbers. lorafit.convert(folder, model=model) writes that form",
            LorafitWarning,
            stacklevel=2,
        )

    def down_to_file(self, site: Site, down: Tensor) -> Tensor:
        if site.shape.groups > 1 and down.shape[1] == site.shape.inn:
            return down.reshape(_narrow(site, down.shape[0]))
        return site.down_to_file(down)  # an A of PEFT's that mixes the groups is no smaller

    def down_from_file(self, site: Site, stored: Tensor, r: int) -> Tensor:
        if site.shape.groups > 1 and tuple(stored.shape) == _narrow(site, r):
            return stored.flatten(1)
        return site.down_from_file(stored, r)


def transposed(sites: Mapping[str, Placed]) -> list[str]:
    """The paths of transposed convolutions."""
    return [path for path, placed in sites.items() if isinstance(placed.site, TransposedSite)]


def mostly_zeros(sites: Mapping[str, Placed]) -> bool:
    """Whether PEFT's form of these is large, and nearly all of it zeros."""
    if all(placed.site.shape.groups == 1 for placed in sites.values()):
        return False
    own, zeros = _bytes(sites)
    return own + zeros > LEAST and own + zeros > TIMES * own


def _narrow(site: Site, r: int) -> tuple[int, ...]:
    """The shape of an A that sees the channels of its own group."""
    kernel = tuple(site.raw_weight.shape[2:])
    return (r, site.shape.inn // math.prod(kernel), *kernel)


def _bytes(sites: Mapping[str, Placed]) -> tuple[int, int]:
    """How many A and B have, and how many zeros PEFT's form has beside them."""
    own = zeros = 0
    for path, placed in sites.items():
        pair, shape = factors(placed, path), placed.site.shape
        down, size = pair.down, pair.down.element_size()
        own += (down.numel() + pair.up.numel()) * size
        if down.shape[1] == shape.inn:
            zeros += (shape.groups - 1) * down.numel() * size
    return own, zeros
