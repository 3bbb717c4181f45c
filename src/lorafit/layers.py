"""Everything the library knows about a layer type: one `Site` class each, and how an `Update` acts inside it.

A site sees its layer as a matrix W (out, in) that is applied to something: vectors (Linear, HF Conv1D), one-hot
vectors (Embedding) or patches (convolutions, whose "in" is channels per group × kernel). Nothing else in the core names
a layer type.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.delta import Dense, LowRank, Update
from lorafit.errors import MergeError
from lorafit.kernels import low_rank_linear

BaseForward = Callable[[nn.Module, Tensor], Tensor]


class Shape(NamedTuple):
    """The matrix of one site: `out` rows, `inn` columns (of one group), `groups`; `lookup`: one-hot input."""

    out: int
    inn: int
    groups: int = 1
    lookup: bool = False


class Acting(NamedTuple):
    """An update and the probability with which it drops its own input (0 outside training)."""

    update: Update
    dropout: float


class Site(ABC):
    """One layer of a model, seen as a matrix. Final subclasses know one layer type each."""

    __slots__ = ("module",)
    kind: ClassVar[str]
    all_linear: ClassVar[bool] = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """The sizes of the matrix."""

    @property
    def raw_weight(self) -> nn.Parameter:
        """The layer's own parameter, in its own shape."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as a matrix (out, in): a view where that is possible."""

    @abstractmethod
    def unfold(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape and layout of the layer's own weight."""

    @abstractmethod
    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        """The layer's operation on x with `matrix` (rows, in) for a weight, no bias; x dropped with `dropout`."""

    @abstractmethod
    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        """`up` (out, r / groups) applied to h, which has r channels where the layer has its channels."""

    @abstractmethod
    def channel(self, v: Tensor) -> Tensor:
        """A vector over channels, shaped to broadcast over the layer's output."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """The layer's bias (out,), if it has one."""

    def down_to_file(self, down: Tensor) -> Tensor:
        """A as the ecosystem's files hold it."""
        return down

    def down_from_file(self, stored: Tensor, r: int) -> Tensor:
        """A as this site uses it; the inverse of `down_to_file`. Raises ValueError for a shape that cannot be."""
        return _exactly(stored, (r, self.shape.inn))

    def up_to_file(self, up: Tensor) -> Tensor:
        """B as the ecosystem's files hold it."""
        return up

    def up_from_file(self, stored: Tensor, r: int) -> Tensor:
        """B as this site uses it; the inverse of `up_to_file`. Raises ValueError for a shape that cannot be."""
        return _exactly(stored, (self.shape.out, r))

    def objection(self) -> tuple[str, str] | None:
        """Why this layer cannot be adapted, and what mends it; None when it can."""
        return None

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        """The layer's output with its updates applied."""
        return apply(self, x, base(self.module, x), acting)


def _exactly(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(stored.shape) != shape:
        raise ValueError(str(shape))
    return stored


def apply(site: Site, x: Tensor, y: Tensor, acting: Sequence[Acting]) -> Tensor:
    """The plain twin of every fused path: y plus what each update changes of it.

    Args:
        site: the layer.
        x: its input.
        y: its own output for x, bias included.
        acting: the updates; several add up, each relative to the base weight: W + Σ (W'ᵢ − W).

    Returns:
        A tensor like y. Updates are cast to y's dtype, so that a bf16 model keeps bf16 activations only.
    """
    result = y
    for update, dropout in acting:
        z = _delta(site, x, y.dtype, update, dropout)
        if update.gain is None:
            result = result + z
            continue
        # (g − 1) y + g z instead of g (y + z): the difference from y must survive rounding. The bias has no gain.
        # In the gain's own precision: in bf16 a gain of 1.003 is 1.
        gain = site.channel(update.gain)
        bias = site.bias()
        linear = y if bias is None else y - site.channel(bias.to(y.dtype))
        result = result + (gain - 1).to(y.dtype) * linear + gain.to(y.dtype) * z
    return result


def _delta(site: Site, x: Tensor, dtype: torch.dtype, update: Update, dropout: float) -> Tensor:
    delta = update.delta.to(dtype)
    if isinstance(delta, Dense):
        return site.project(x, delta.matrix, dropout).to(dtype)
    assert isinstance(delta, LowRank)
    h = site.project(x, delta.down, dropout)
    if delta.mid is not None:
        h = h * site.channel(delta.mid)
    z = site.expand(h, delta.up)
    if delta.out is not None:
        z = z * site.channel(delta.out)
    return (z * delta.scale).to(dtype)


def _plain_low_rank(acting: Sequence[Acting]) -> LowRank | None:
    """The one update of the plainest kind (a LowRank without vectors, gain or dropout), or None."""
    if len(acting) != 1:
        return None
    update, dropout = acting[0]
    delta = update.delta
    if dropout or update.gain is not None or not isinstance(delta, LowRank):
        return None
    return None if delta.mid is not None or delta.out is not None else delta


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

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        delta = _plain_low_rank(acting)
        weight, bias = self.weight(), self.bias()
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if delta is None or trained:
            return apply(self, x, base(self.module, x), acting)
        delta = delta.to(weight.dtype)
        return low_rank_linear(x, weight, bias, delta.down, delta.up, delta.scale)


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
        return self.raw_weight.t()

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None


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

    def objection(self) -> tuple[str, str] | None:
        if self.module.max_norm is not None:
            return (
                "an Embedding with max_norm rewrites its own weight in every forward pass",
                "set max_norm = None on the layer, or leave it out with exclude=",
            )
        return None


class ConvSite(Site):
    """`torch.nn.Conv1d/2d/3d`: weight (out, in / groups, *kernel), seen as (out, in / groups · kernel).

    A is a convolution down to r channels with the layer's own kernel, stride, padding mode, dilation and groups;
    B is a 1 × 1 convolution up, with the same groups. B A is then exactly a change of the layer's weight.
    """

    __slots__ = ()
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @staticmethod
    @abstractmethod
    def convolve(*args: Any, **options: Any) -> Tensor:
        """The convolution of torch in the layer's number of dimensions."""

    @property
    def shape(self) -> Shape:
        weight = self.module.weight
        return Shape(weight.shape[0], weight[0].numel(), self.module.groups)

    def weight(self) -> Tensor:
        return self.module.weight.flatten(1)

    def unfold(self, matrix: Tensor) -> Tensor:
        weight = self.module.weight
        if matrix.numel() != weight.numel():
            raise MergeError(
                "this adapter mixes the groups of a grouped convolution, which no change of its weight can do",
                found=f"a change with {matrix.shape[1]} columns",
                expected=f"{self.shape.inn} columns: the channels of one group times the kernel",
                fix="use it unmerged, or train it again here: then each group has its own part of A",
            )
        return matrix.view_as(weight)

    def project(self, x: Tensor, matrix: Tensor, dropout: float = 0.0) -> Tensor:
        m = self.module
        x = F.dropout(x, dropout) if dropout else x
        padding: int | str | tuple[int, ...] = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        channels = matrix.shape[1] // m.weight[0, 0].numel()
        kernel = matrix.view(-1, channels, *m.kernel_size)
        # PEFT's A of a grouped convolution sees all channels; one made here sees those of its own group.
        return self.convolve(x, kernel, None, m.stride, padding, m.dilation, m.in_channels // channels)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        pointwise = up.view(*up.shape, *(1 for _ in self.module.kernel_size))
        return self.convolve(h, pointwise, groups=self.module.groups)

    def channel(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1 for _ in self.module.kernel_size))

    def bias(self) -> Tensor | None:
        return self.module.bias

    def down_to_file(self, down: Tensor) -> Tensor:
        m, r = self.module, down.shape[0]
        if down.shape[1] != self.shape.inn or m.groups == 1:
            return down.view(r, m.in_channels, *m.kernel_size)
        # The file's A sees all channels: group g's rows get zeros for the channels of every other group.
        full = down.new_zeros(m.groups, r // m.groups, m.groups, self.shape.inn)
        own = torch.arange(m.groups, device=down.device)
        full[own, :, own] = down.view(m.groups, r // m.groups, self.shape.inn)
        return full.view(r, m.in_channels, *m.kernel_size)

    def down_from_file(self, stored: Tensor, r: int) -> Tensor:
        m = self.module
        full = _exactly(stored, (r, m.in_channels, *m.kernel_size)).flatten(1)
        if m.groups == 1 or r % m.groups:
            return full
        blocks = full.view(m.groups, r // m.groups, m.groups, self.shape.inn)
        own = torch.arange(m.groups, device=stored.device)
        mixed = blocks.clone()
        mixed[own, :, own] = 0
        return full if mixed.any() else blocks[own, :, own].reshape(r, self.shape.inn)

    def up_to_file(self, up: Tensor) -> Tensor:
        return up.view(*up.shape, *(1 for _ in self.module.kernel_size))

    def up_from_file(self, stored: Tensor, r: int) -> Tensor:
        shape = (self.shape.out, r // self.module.groups, *(1 for _ in self.module.kernel_size))
        return _exactly(stored, shape).flatten(1)


class Conv1dSite(ConvSite):
    """`torch.nn.Conv1d`."""

    __slots__ = ()
    kind = "Conv1d"
    convolve = staticmethod(F.conv1d)


class Conv2dSite(ConvSite):
    """`torch.nn.Conv2d`."""

    __slots__ = ()
    kind = "Conv2d"
    convolve = staticmethod(F.conv2d)


class Conv3dSite(ConvSite):
    """`torch.nn.Conv3d`."""

    __slots__ = ()
    kind = "Conv3d"
    convolve = staticmethod(F.conv3d)


SITES: dict[type[nn.Module], type[Site]] = {
    nn.Linear: LinearSite,
    nn.Embedding: EmbeddingSite,
    nn.Conv1d: Conv1dSite,
    nn.Conv2d: Conv2dSite,
    nn.Conv3d: Conv3dSite,
}


def _known() -> Iterator[tuple[type[nn.Module], type[Site]]]:
    yield from SITES.items()
    # A model can hold HF's Conv1D only if somebody imported it: then it is here without importing transformers.
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None:
        yield transformers.Conv1D, Conv1DSite


def site_class(kind: type[nn.Module]) -> type[Site] | None:
    """The site class for modules of type `kind`, or None for a type that the library does not know."""
    for base, site in _known():
        if issubclass(kind, base):
            return site
    return None


def bypass(parent: nn.Module) -> tuple[str, str] | None:
    """Why a layer directly inside `parent` would be read without its forward being called, and what mends it."""
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "torch.nn.MultiheadAttention reads this layer's weight and never calls its forward: "
            "an adapter would do nothing",
            'leave it out with exclude=["out_proj"]',
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "torch.nn.TransformerEncoderLayer reads this layer's weight directly on its inference fast path: "
            "an adapter would act in training and do nothing in evaluation",
            "call torch.backends.mha.set_fastpath_enabled(False) before attaching",
        )
    return None


def own_forward(kind: type[nn.Module]) -> str | None:
    """The name of the class that gives `kind` a forward other than its known base's, or None.

    Such a layer computes something else than its base type, so a low-rank path built for the base would not follow it.
    """
    for base, _ in _known():
        if issubclass(kind, base):
            for method in ("forward", "_conv_forward"):
                owner = next((c for c in kind.__mro__ if method in vars(c)), None)
                if owner is not None and not issubclass(base, owner):
                    return owner.__qualname__
            return None
    return None
