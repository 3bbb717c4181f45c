"""The subspace that `intrinsic` trains in: θ_d, λ, P by its key, and P θ_d once for all sites."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.errors import CheckpointError
from lorafit.fastfood import WITNESSES, Fastfood, Part, parts_of
from lorafit.memo import state


class _Made(NamedTuple):
    """Matrices, and what they were made from."""

    state: tuple[object, ...]
    values: tuple[Tensor, ...]
    matrices: tuple[Tensor, ...]


class _Kept:
    """What is kept between two passes; copies of it have the tables, which nobody changes, and nothing else."""

    def __init__(self, operator: Fastfood | None = None) -> None:
        self.operator = operator
        self.checked: tuple[object, ...] | None = None
        self.made: _Made | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept(self.operator)

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


class _Passed:
    """Runs in each backward pass: after one, θ_d may change unseen (through `.data`), unless values are compared."""

    def __init__(self, kept: _Kept) -> None:
        self._kept = weakref.ref(kept)

    def __call__(self) -> None:
        kept = self._kept()
        if kept is not None and kept.made is not None and not kept.made.values:
            kept.made = None


class Subspace(nn.Module):
    """θ_d, λ and P for all sites, and the matrices that they make.

    P is tables that are drawn from `key`: the seed, D, and some of the numbers that it drew. Should another version of
    torch draw others, it is noticed. Writing another key, in whatever way, draws the tables anew.

    Args:
        parts: the place of each site's matrix in θ.
        d: how many numbers are trained, λ included.
        m: how many layers have a λ; 0 for none.
        seed: of P.
    """

    key: Tensor
    lam: nn.Parameter | None

    def __init__(self, parts: Sequence[Part], d: int, m: int, seed: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.size = sum(part.out * part.inn for part in parts)
        self.theta = nn.Parameter(torch.zeros(d - m))
        self.register_parameter("lam", nn.Parameter(torch.ones(m)) if m else None)
        self.register_buffer("key", torch.tensor([seed, self.size, *[0] * 2 * WITNESSES]))  # zeros: nothing drawn yet
        self._kept = _Kept()

    def matrices(self) -> tuple[Tensor, ...]:
        """The change of each site's weight, (out, in); made again only when θ_d, λ or P changed."""
        operator, kept = self.operator(), self._kept
        if torch.compiler.is_compiling():
            return parts_of(self.theta, self.lam, operator, self.parts, None)
        graph, trained = torch.is_grad_enabled(), tuple(self.parameters())
        now = state(trained, graph, *((id(each), each.requires_grad) for each in trained))
        if now is None:
            return parts_of(self.theta, self.lam, operator, self.parts, None)
        # Versions miss what is written through `.data`: values are compared too, where no device has to be waited for.
        values = [_bits(each) for each in trained if each.device.type == "cpu"]
        made = kept.made
        if made is None or made.state != now or not all(map(torch.equal, made.values, values)):
            made = kept.made = None  # frees the old ones before the new ones take their room
            # Made in inference mode they could not be used in training.
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                found = parts_of(self.theta, self.lam, operator, self.parts, _Passed(kept))
            made = kept.made = _Made(now, tuple(each.clone() for each in values), found)
        return made.matrices

    def operator(self) -> Fastfood:
        """P for the key as it is, on the device of θ_d."""
        kept = self._kept
        if torch.compiler.is_compiling():
            assert kept.operator is not None  # drawn when this module was moved to its place, loaded or unpickled
            return kept.operator
        now = state([self.key])
        if kept.operator is None or now is None or kept.checked != now:
            operator = self._drawn(kept.operator).to(self.theta.device)
            if operator is not kept.operator:
                kept.operator, kept.made = operator, None
            kept.checked = state([self.key])
        return kept.operator

    def _drawn(self, operator: Fastfood | None) -> Fastfood:
        seed, size, *witness = self.key.tolist()
        if size != self.size:
            raise CheckpointError(
                "the subspace lies in other layers than these",
                where="key",
                found=f"D = {size}",
                expected=f"D = {self.size}, the numbers in the adapted layers",
                fix="load the base model that the adapter was trained on",
            )
        if operator is None or operator.seed != seed:
            operator = Fastfood.draw(self.size, self.theta.shape[0], seed)
        if not any(witness):
            with torch.no_grad():
                self.key[2:] = torch.tensor(operator.witness)
        elif max(abs(a - b) for a, b in zip(witness, operator.witness, strict=True)) > 8:  # 8: rounding of processors
            raise CheckpointError(
                "this version of torch draws other random numbers than the one that trained the adapter",
                where="key",
                found=operator.witness,
                expected=witness,
                fix=f"use the version that it was trained with; this is {torch.__version__}",
            )
        return operator

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.key.device.type != "meta":
            self.operator()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Subspace:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self._ready()

    def __setstate__(self, values: dict[str, Any]) -> None:
        super().__setstate__(values)  # type: ignore[no-untyped-call]
        self._ready()

    def _ready(self) -> Subspace:
        """Forgets the matrices, and draws P now: a graph that is compiled before the first pass cannot."""
        kept = self._kept = _Kept(self._kept.operator)
        if self.theta.device.type != "meta":
            operator = self._drawn(None) if kept.operator is None else kept.operator
            kept.operator = operator.to(self.theta.device)
        return self

    def extra_repr(self) -> str:
        layers = "" if self.lam is None else f", m={self.lam.shape[0]}"
        return f"D={self.size}, d={self.theta.shape[0]}{layers}"


def _bits(tensor: Tensor) -> Tensor:
    """The memory of a vector, in which something that is not a number equals itself."""
    return tensor.detach().view(torch.uint8)
