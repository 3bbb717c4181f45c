"""Linear layers whose weight is kept by another library: bitsandbytes' 4-bit and 8-bit layers, torchao's tensors.

A model can hold such a layer only if somebody imported its library: it is looked for among what is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorafit.errors import MergeError
from lorafit.kernels.frozen import Frozen
from lorafit.kernels.siblings import Member
from lorafit.layers.packed import PackedSite
from lorafit.layers.site import Acting, BaseForward, apply
from lorafit.quant.modules import ModuleClass
from lorafit.quant.rows import Int8Rows


@final
@dataclass(frozen=True, eq=False)
class Formed(Frozen):
    """A weight (out, in) that another library's function forms from one tensor.

    Attributes:
        tensor: the stored form.
        size: (out, in).
        work: the type in which the layer works.
        function: forms the matrix.
    """

    tensor: Tensor
    size: tuple[int, int]
    work: torch.dtype
    function: Callable[[Tensor], Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.work

    @property
    def addable(self) -> bool:
        return False

    def form(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self.function(tensors[0]).to(dtype)


class ForeignSite(PackedSite):
    """A linear layer over a form that this library reads and does not write."""

    __slots__ = ()

    def unfold(self, matrix: Tensor) -> Tensor:
        return matrix

    def merged(self, change: Tensor) -> dict[str, Tensor]:
        raise MergeError(
            f"{self.kind} keeps its weight in a form that is not written here",
            found=type(self.raw_weight).__name__,
            expected="a plain weight, or int8 rows of lorafit's own",
            fix="lorafit.dequantise(model), then merge: the weights are then plain ones of four times int8's size",
        )

    def unpack(self, weight: Tensor, around: Callable[..., ModuleClass]) -> None:
        self.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self.module.__class__ = around(nn.Linear)


class Bits4Site(ForeignSite):
    """`bitsandbytes.nn.Linear4bit`: NF4 or FP4."""

    __slots__ = ()
    kind = "bitsandbytes 4-bit Linear"

    def stored(self, dtype: torch.dtype) -> Formed:
        module: Any = self.module
        dequantise = sys.modules["bitsandbytes"].functional.dequantize_4bit
        if vars(module.weight.quant_state).get("packing_format_for_cpu", False):
            _rearrange(module)
        state = module.weight.quant_state
        out, inn = state.shape
        return Formed(module.weight, (out, inn), dtype, lambda packed: dequantise(packed, state))

    def frozen(self, x: Tensor) -> Formed:
        module: Any = self.module
        return self.stored(x.dtype if module.compute_dtype is None else module.compute_dtype)

    def objection(self, path: str) -> tuple[str, str] | None:
        if self.raw_weight.quant_state is None:  # type: ignore[attr-defined]
            return ("its weight is not quantised yet", "move the model to its device first: model.to(device)")
        return None

    def member(self, x: Tensor, acting: Sequence[Acting]) -> Member | None:
        return self._member(x, acting) if self.frozen(x).dtype == x.dtype else None

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        return super().forward(x, base, acting).to(x.dtype)  # as the layer itself does after its own type of work


def _rearrange(module: Any) -> None:
    """Puts a 4-bit weight back that the layer itself arranged for a product of its own.

    bitsandbytes does that in evaluation on processors with AVX512-BF16, for good, and rounds the blocks' scales to
    bfloat16 then; its way back knows no scales that were not quantised themselves.
    """
    state = module.weight.quant_state
    state.original_nested = False
    back = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
    module.weight.data, state = back(module.weight.data, state)
    state.absmax = state.absmax.t().reshape(-1).float()
    module.weight.quant_state = state


class Bits8Site(ForeignSite):
    """`bitsandbytes.nn.Linear8bitLt`. It rounds its input, too: its own forward pass stays, adapters add to it."""

    __slots__ = ()
    kind = "bitsandbytes 8-bit Linear"

    def stored(self, dtype: torch.dtype) -> Formed:
        module: Any = self.module
        # Until the first forward pass the weight has the rows' largest numbers, and then the layer.
        top = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        out, inn = module.weight.shape
        return Formed(module.weight, (out, inn), dtype, lambda values: values * (top[:, None] / 127))

    def objection(self, path: str) -> tuple[str, str] | None:
        if self.raw_weight.dtype != torch.int8:
            return (
                "its weight is not quantised yet, or it keeps a float16 copy (has_fp16_weights)",
                "has_fp16_weights=False, and move the model to its device first: model.to(device)",
            )
        return None

    def member(self, x: Tensor, acting: Sequence[Acting]) -> Member | None:
        return None

    def forward(self, x: Tensor, base: BaseForward, acting: Sequence[Acting]) -> Tensor:
        return apply(self, x, base(self.module, x), acting)


class TensorSite(ForeignSite):
    """`torch.nn.Linear` whose weight is one of torchao's tensors."""

    __slots__ = ()
    kind = "torchao Linear"

    def stored(self, dtype: torch.dtype) -> Frozen:
        weight: Any = self.raw_weight
        out, inn = weight.shape
        inner = vars(weight)
        values, scale = inner.get("qdata"), inner.get("scale")
        rowwise = values is not None and values.dtype == torch.int8 and scale is not None and scale.shape == (out, 1)
        if rowwise and _symmetric(inner.get("zero_point")):
            return Int8Rows(values, scale, dtype)
        nf4 = nf4_tensor()
        if nf4 is not None and isinstance(weight, nf4):
            return Formed(weight, (out, inn), dtype, nf4.get_original_weight)
        return Formed(weight, (out, inn), dtype, type(weight).dequantize)

    def objection(self, path: str) -> tuple[str, str] | None:
        inner = vars(self.raw_weight)
        if inner.get("act_quant_kwargs") is not None or inner.get("act_pre_scale") is not None:
            return (
                "it rounds its input, too, and torchao gives that no gradient: what comes before it would not learn",
                "quantise weights alone, such as TorchAoConfig(Int8WeightOnlyConfig())",
            )
        return None


_SYMMETRIC = WeakIdKeyDictionary()
"""Zero points → (their version, whether all of them are zero): a forward pass is not to look at them again."""


def _symmetric(zero_point: Tensor | None) -> bool:
    """Whether integers stand for multiples of their scale, with nothing to take away from them first."""
    if zero_point is None:
        return True
    if zero_point.device.type == "meta":
        return False
    version = 0 if zero_point.is_inference() else zero_point._version
    known: tuple[int, bool] | None = _SYMMETRIC.get(zero_point)  # type: ignore[no-untyped-call]
    if known is None or known[0] != version:
        known = (version, not zero_point.any())
        _SYMMETRIC[zero_point] = known
    return known[1]


def nf4_tensor() -> Any:
    """The class of NF4 tensors of torchao, if it is imported; it moved between versions."""
    for home in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        module = sys.modules.get(home)
        if module is not None:
            return vars(module).get("NF4Tensor")
    return None


def bitsandbytes_layers() -> list[tuple[type, type[ForeignSite]]]:
    """The layer types of bitsandbytes and their sites, if it is imported."""
    module = sys.modules.get("bitsandbytes.nn.modules")
    return [] if module is None else [(module.Linear4bit, Bits4Site), (module.Linear8bitLt, Bits8Site)]


def is_torchao(weight: object) -> bool:
    """Whether a weight is one of torchao's tensors."""
    module = sys.modules.get("torchao.utils")
    base, nf4 = None if module is None else module.TorchAOBaseTensor, nf4_tensor()
    return (base is not None and isinstance(weight, base)) or (nf4 is not None and isinstance(weight, nf4))
