"""Layers that multiply vectors: `torch.nn.Linear` and transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.delta import Dense, LowRank
from lorafit.kernels.dense import dense_linear, summable
from lorafit.kernels.frozen import Frozen, Plain
from lorafit.kernels.scratch import transformed
from lorafit.kernels.siblings import Member
from lorafit.kernels.vectors import upward
from lorafit.layers.site import Acting, BaseForward, Shape, Site, apply


class VectorSite(Site):
    """A layer that multiplies vectors in the last dimension of its input by a matrix."""

    __slots__ = ()
    all_linear = True

    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        return F.linear(F.dropout(x, dropout) if dropout else x, matrix)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        return F.linear(h, up)

    def channel(self, v: Tensor) -> Tensor:
        return v

    def frozen(self, x: Tensor) -> Frozen:
        """The weight as the kernels take it, for an input like x."""
        return Plain(self.weight())

    def _trained(self) -> bool:
        weight = self.module.weight  # no parameter in the replicas of DataParallel
        assert isinstance(weight, Tensor)
        return weight.requires_grad

    def _fused(self, acting: Sequence[Acting]) -> bool:
        bias = self.bias()
        frozen = not self._trained() and (bias is None or not bias.requires_grad)
        return len(acting) == 1 and frozen and not transformed()

    def member(self, x: Tensor, acting: Sequence[Acting]) -> Member | None:
        return self._member(x, acting)

    def _member(self, x: Tensor, acting: Sequence[Acting]) -> Member | None:
        if not self._fused(acting):
            return None
        update, dropout = acting[0]
        delta = update.delta
        if not isinstance(delta, LowRank):
            return None
        return Member(self.frozen(x), self.bias(), delta.down, upward(delta), delta.scale, update.gain, dropout)

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        member = self._member(x, acting)
        if member is not None:
            return member.alone(x)
        if self._fused(acting):
            (update, dropout), bias, frozen = acting[0], self.bias(), self.frozen(x)
            delta = update.delta
            if isinstance(delta, Dense) and not dropout and update.gain is None and summable(x, frozen, delta.matrix):
                return dense_linear(x, frozen, bias, delta.matrix)
        return apply(self, x, base(self.module, x), acting)


class LinearSite(VectorSite):
    """`torch.nn.Linear`: weight (out, in), y = x Wᵀ + b."""

    __slots__ = ()
    kind = "Linear"
    module: nn.Linear

    @property
    def shape(self) -> Shape:
        out, inn = self.module.weight.shape
        return Shape(out, inn)

    def weight(self) -> Tensor:
        return self.module.weight

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix

    def bias(self) -> Tensor | None:
        return self.module.bias


class Conv1DSite(VectorSite):
    """`transformers.pytorch_utils.Conv1D` (GPT-2): a linear layer whose weight is stored (in, out)."""

    __slots__ = ()
    kind = "HF Conv1D"

    @property
    def shape(self) -> Shape:
        inn, out = self.raw_weight.shape
        return Shape(out, inn)

    def weight(self) -> Tensor:
        weight = self.module.weight  # no parameter in the replicas of DataParallel
        assert isinstance(weight, Tensor)
        return weight.t()

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None
