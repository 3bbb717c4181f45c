"""Layers that look rows of their weight up: `torch.nn.Embedding`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.delta import LowRank
from lorafit.kernels.lookup import lookup
from lorafit.kernels.scratch import transformed
from lorafit.kernels.vectors import upward
from lorafit.layers.site import Acting, BaseForward, Shape, Site, apply


class EmbeddingSite(Site):
    """`torch.nn.Embedding`: weight (num, dim), seen as the matrix (dim, num) that meets one-hot vectors.

    Dropout drops a token's whole one-hot vector: A's column for it is either used (times 1 / (1 − p)) or not.
    """

    __slots__ = ()
    kind = "Embedding"
    module: nn.Embedding

    @property
    def shape(self) -> Shape:
        num, dim = self.module.weight.shape
        return Shape(dim, num, lookup=True)

    def weight(self) -> Tensor:
        return self.module.weight.t()

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        m = self.module
        h = F.embedding(x, matrix.t(), m.padding_idx, scale_grad_by_freq=m.scale_grad_by_freq)
        return h * F.dropout(h.new_ones(*x.shape, 1), dropout) if dropout else h

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        return F.linear(h, up)

    def channel(self, v: Tensor) -> Tensor:
        return v

    def bias(self) -> Tensor | None:
        return None

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        m = self.module
        if len(acting) != 1 or m.weight.requires_grad or m.max_norm is not None or transformed():
            return apply(self, x, base(m, x), acting)
        update, dropout = acting[0]
        delta = update.delta
        if not isinstance(delta, LowRank):
            return apply(self, x, base(m, x), acting)
        return lookup(
            x,
            m.weight,
            delta.down,
            upward(delta),
            delta.scale,
            gain=update.gain,
            dropout=dropout,
            padding_idx=m.padding_idx,
            by_frequency=m.scale_grad_by_freq,
        )

    def objection(self, path: str) -> tuple[str, str] | None:
        if self.module.max_norm is not None:
            return (
                "an Embedding with max_norm rewrites its own weight in every forward pass",
                f"set max_norm = None on the layer, or leave it out with exclude=[{path!r}]",
            )
        return None


def sparse(module: nn.Module) -> bool:
    """Whether a module, or one inside of it, gives its weight a sparse gradient, which no fused optimizer takes."""
    return any(isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse for each in module.modules())
