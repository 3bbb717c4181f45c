"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al. 2024 (ICML), arXiv:2402.09353.

Equation (eq. 5):        W' = m · V / ‖V‖_c with V = W₀ + ΔV, ΔV = B A (or the change of any inner method)
Gradient (section 4.3):  ∂L/∂V = (m / C) ∂L/∂W' with C = ‖V‖_c held constant; ∂L/∂m = Σ (∂L/∂W' ∘ V / ‖V‖_c), exact

| symbol     | code                                | shape                                       |
|------------|-------------------------------------|---------------------------------------------|
| m          | `DoRAAdapter.m`                     | (out,)                                      |
| ΔV         | the inner adapter's `update`.delta  | (out, in)                                   |
| ‖·‖_c, C   | `rownorm.row_norm`                  | (out,)                                      |
| m / C      | `Update.gain`                       | (out,)                                      |

The paper speaks of columns of a W (d, k), its code takes the norm over dim 1 of torch's (out, in): one m per output of
Linear and HF Conv1D, per output channel of a convolution (the norm runs over all but dim 0), and per embedding
dimension of an Embedding (as PEFT has it).

Trained: m and what the inner method trains. Count: the inner method's + out per site. Schedule: the inner method's.
Init: m = ‖W₀‖_c, by the same arithmetic as C, so that the gain of a new adapter is exactly 1 wherever ΔV is exactly 0.

No W + ΔV is formed for the norm, but for rows that cancel: see `rownorm`. It is computed once per optimizer step, kept
until a tensor that it depends on changes, or the module changes between training and evaluation. In compiled programs
it is computed in each forward pass, without looking at values. A row whose norm is 0 has no direction: it has gain 1,
and its m no gradient, until its ΔV has moved (a row of zeros thus starts as the zeros it was, and can learn).

Deviations. Dropout acts on the input of ΔV alone. The published code (and PEFT at dropout > 0) also multiplies the base
weight with the dropped input: y = W x + (m/C − 1) W drop(x) + (m/C) s B A drop(x), a second base product, and noise in
the base path; without dropout both are the same function. The published code forms W + s B A in every forward pass; it
has Linear layers alone, can train m by itself (`Wdecompose_target_modules`), has the norm in the graph if
`dora_simple=False`, divides by norms of zero, and has code that merges without a way back. PEFT's norm for grouped
convolutions is not that of the weight which its forward pass stands for; here each group has its own part of A.
In PEFT's files: `lora_magnitude_vector` beside the inner method's tensors, with `use_dora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafit.delta import Delta, LowRank, Update
from lorafit.layers import Made, Shape
from lorafit.memo import STEPS, Memo, state
from lorafit.method import Adapter, Around, Method, Sharing, Spot
from lorafit.methods import validate
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_fa import LoRAFA
from lorafit.methods.vera import VeRA
from lorafit.rownorm import row_norm, row_squares


class _Lengths(NamedTuple):
    """‖W + ΔV‖ of each row, and the gain m / ‖W + ΔV‖ as `idle` + m / `divisor`, with 1 for rows without a direction.

    Such a row has the divisor ∞, by which m counts nothing and gets no gradient.
    """

    norm: Tensor
    idle: Tensor
    divisor: Tensor

    @classmethod
    def of(cls, norm: Tensor) -> _Lengths:
        norm = norm.detach()  # forward mode takes derivatives without asking whether gradients are wanted
        idle = ~(norm > 0)
        return cls(norm, idle.to(norm.dtype), norm.masked_fill(idle, torch.inf))


class DoRAAdapter(Adapter):
    """The magnitudes m of one site, and the adapter that changes its directions.

    Args:
        m: first magnitudes, (out,).
        inner: an adapter without a gain.
    """

    def __init__(self, m: Tensor, inner: Adapter) -> None:
        super().__init__()
        self.m = nn.Parameter(m)
        self.inner = inner
        self.dropout = inner.dropout
        self._lengths: Memo[_Lengths] = Memo()
        self._squares: Memo[Tensor] = Memo()

    def update(self, weight: Callable[[], Tensor]) -> Update:
        delta = self.inner.update(weight).delta
        lengths = self._found(weight, delta)
        # One operation for autograd. A quotient and not a product with 1 / C: m / C is exactly 1 where m is C.
        return Update(delta, torch.addcdiv(lengths.idle, self.m, lengths.divisor))

    def norm(self, weight: Tensor, delta: Delta) -> Tensor:
        """‖W + ΔV‖ of each row, (out,), without a gradient: a new one, or that of the last time if it still holds."""
        return self._found(lambda: weight, delta).norm

    def _found(self, weight: Callable[[], Tensor], delta: Delta) -> _Lengths:
        if torch.compiler.is_compiling():
            return _Lengths.of(row_norm(weight(), delta, branch=False))
        # A weight that has to be made is, where what it is made of has changed.
        kept = weight.tensors if isinstance(weight, Made) else (weight(),)
        tensors = [*kept, *_tensors(self.inner)]
        also = (STEPS.now, delta.scale, delta.groups) if isinstance(delta, LowRank) else (STEPS.now,)
        known = self._lengths.held(tensors, *also)
        if known is not None:
            return known
        now = state(tensors, *also)

        def anew() -> _Lengths:
            matrix = weight() if isinstance(weight, Made) else kept[0]
            squares = self._row_squares(matrix, kept)
            return _Lengths.of(row_norm(matrix, delta, squares=squares, branch=now is not None and not matrix.is_meta))

        return self._lengths.get(now, anew)

    def _row_squares(self, weight: Tensor, kept: Sequence[Tensor]) -> Tensor:
        # Who trains the base weight too may do so with a fused optimizer.
        now = state(kept, STEPS.now if weight.requires_grad else None)
        return self._squares.get(now, lambda: row_squares(weight))

    def forget(self) -> None:
        """Drops what is remembered of the weights. Needed only where one was written to through `.data`."""
        self._lengths.clear()
        self._squares.clear()

    def train(self, mode: bool = True) -> DoRAAdapter:
        # Averages of weights are often swapped in for evaluation through `.data`, which no version shows.
        if mode != self.training:
            self.forget()
        super().train(mode)
        return self

    def _replicate_for_data_parallel(self) -> DoRAAdapter:
        # What torch asks of a module that a thread of its own will run, with copies of its tensors.
        replica: DoRAAdapter = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._lengths, replica._squares = Memo(), Memo()
        return replica

    def resize(self, shapes: Mapping[str, torch.Size]) -> None:
        inside = {key.removeprefix("inner."): size for key, size in shapes.items() if key.startswith("inner.")}
        if any(key not in ("m", *(f"inner.{each}" for each in inside)) for key in shapes):
            raise ValueError("an adapter of DoRA has m and the tensors of its inner adapter")
        if shapes.get("m", self.m.shape) != self.m.shape:
            raise ValueError("m has one number per row of the weight")
        if inside:
            self.inner.resize(inside)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor of an adapter, those that it only refers to included."""
    found = [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]
    if not module._parameters:  # parameters are plain attributes in replicas, and where others keep them elsewhere
        found += [each for each in vars(module).values() if isinstance(each, Tensor)]
    for child in module._modules.values():
        if child is not None:
            found += _tensors(child)
    if isinstance(module, Sharing):
        found += _tensors(module.common)
    return found


REFUSED: Mapping[str, str] = {
    "delta-lora": "it moves the base weight, and with it the direction that DoRA starts from",
    "dora": "it has magnitudes already",
    "intrinsic": "its change is dense, so the norm would cost a pass over all weights in each step",
    "lora-drop": "it chooses between sites: put it around DoRA, LoRADrop(inner=DoRA(...))",
    "lora-plus": "a rate is no adapter: put LoRA+ around DoRA, LoRAPlus(inner=DoRA(...))",
}
"""Method → why it is not for the inside. Texts for an error and nothing more."""


@dataclass(frozen=True)
class DoRA(Around):
    """Hyperparameters of DoRA: those of the method inside.

    Args:
        inner: the method that changes the directions: `LoRA`, `VeRA`, `AdaLoRA` or `LoRAFA`.

    Raises:
        ConfigError: for a method that DoRA cannot be put around; the message says why.

    >>> llama_7b = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]  # q, k, v, up, down
    >>> DoRA(LoRA(r=32)).num_trainable(llama_7b * 32), LoRA(r=32).num_trainable(llama_7b * 32)
    (56975360, 56098816)
    """

    name = "dora"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    trains = "m; A, B or what the inner method trains"
    in_peft = "DoRA"
    in_vllm = "merge, or export --r"

    inner: Method = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        reason = REFUSED.get(self.inner.name) if isinstance(self.inner, Method) else None
        refusals = {} if reason is None else {type(self.inner): reason}
        validate.inner("DoRA.inner", self.inner, (LoRA, VeRA, AdaLoRA, LoRAFA), refusals)

    @property
    def within(self) -> Method:
        return self.inner

    def around(self, inner: Method) -> DoRA:
        return replace(self, inner=inner)

    def unwrapped(self, adapter: Adapter) -> Adapter:
        assert isinstance(adapter, DoRAAdapter)
        return adapter.inner

    def wrap(self, spot: Spot, inner: Adapter) -> DoRAAdapter:
        """Magnitudes of a spot's own around an adapter, which may be one that others use too.

        Args:
            spot: the spot as this method sees it.
            inner: an adapter of the inner method.
        """
        return DoRAAdapter(row_norm(spot.weight()).to(spot.dtype), inner)

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> DoRAAdapter:
        return self.wrap(spot, super().adapter(spot, generator=generator))

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, Adapter]:
        inner = super().adapters(spots, generator=generator)
        return {spot.path: self.wrap(spot, inner[spot.path]) for spot in spots if spot.path in inner}

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        known = [Shape(*shape) for shape in shapes]
        return super().num_trainable(known) + sum(shape.out for shape in known)
