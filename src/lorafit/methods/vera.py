"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko, Blankevoort, Asano 2023 (ICLR 2024), arXiv:2310.11454.

Equation (eq. 2):     h = W₀ x + ΔW x = W₀ x + Λ_b B Λ_d A x,     Λ_b = diag(b), Λ_d = diag(d)

| symbol | code                                    | shape                           |
|--------|-----------------------------------------|---------------------------------|
| A      | `Projection.A`, its first `in` columns  | (r, largest in of all sites)    |
| B      | `Projection.B`, its first `out` rows    | (largest out of all sites, r)   |
| b      | `VeRAAdapter.b`                         | (out,)                          |
| d      | `VeRAAdapter.d`                         | (r,)                            |
| r      | `VeRA.r`                                | one for all sites               |
| d_init | `VeRA.d_init`                           |                                 |

Trained: b and d. A and B are random, frozen, and one pair for all sites. Count: out + r per site. Schedule: none.
Init: b = 0, so ΔW = 0; d = d_init; A ~ U(±√6/√in), B ~ U(±√6/√r) (kaiming uniform), A drawn first, from a generator on
the CPU whose seed is kept: the seed alone gives the pair again. There is no α/r: kaiming keeps the size of B Λ_d A x
the same for every r.

Deviations. The paper adapts layers of one shape. Where shapes differ, the pair has the largest sizes and each site
takes the upper left part, as PEFT does; a site with fewer columns than the largest then starts with a smaller A x.
Layers beyond Linear and HF Conv1D are neither in the paper nor in PEFT: convolutions use A over channels per group ×
kernel, and each of g groups its own r/g rows of A with the first r/g columns of B, which makes B Λ_d A x smaller by
√g; on an Embedding no column of A is zero, so that the row of `padding_idx` changes with all others. A model on
several devices, or of several precisions, has one copy of the pair on each. Dropout is PEFT's `vera_dropout`; the
paper has none.
In PEFT's files: `vera_lambda_b`, `vera_lambda_d`, and `base_model.vera_A`, `base_model.vera_B` unless
`save_projection` is off; the seed is `projection_prng_key`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.delta import LowRank, Update
from lorafit.errors import ConfigError
from lorafit.layers import Shape
from lorafit.method import Adapter, Method, Sharing, Spot
from lorafit.methods import validate
from lorafit.methods.lora import indivisible

_NO_KEY = -(2**63)


class Projection(nn.Module):
    """The one random pair A, B of all sites: buffers, never parameters.

    The seed is a buffer too (`seed`, int64), so that a `state_dict` that brings other values of A and B brings theirs.

    Args:
        a: A (r, in), as large as the largest site needs.
        b: B (out, r).
        key: the seed that `draw` makes this pair from; None when nobody knows one.
    """

    A: Tensor
    B: Tensor
    seed: Tensor

    def __init__(self, a: Tensor, b: Tensor, key: int | None = None) -> None:
        super().__init__()
        self.register_buffer("A", a)
        self.register_buffer("B", b)
        # torch takes seeds from −2⁶³ to 2⁶⁴ − 1, and one above 2⁶³ as the negative number of the same bits.
        kept = _NO_KEY if key is None else (key + 2**63) % 2**64 - 2**63
        self.register_buffer("seed", torch.tensor(kept, dtype=torch.int64, device="cpu"))

    @classmethod
    def draw(cls, key: int, r: int, out: int, inn: int) -> Projection:
        """The pair of a seed, A (r, inn) and B (out, r) in float32 on the CPU: bit for bit what PEFT draws."""
        generator = torch.Generator("cpu").manual_seed(key)
        a = _kaiming_uniform(r, inn, generator)
        return cls(a, _kaiming_uniform(out, r, generator), key)

    @property
    def key(self) -> int | None:
        """The seed of this pair, or None. Reads a tensor: not for the forward pass."""
        kept = int(self.seed)
        return None if kept == _NO_KEY else kept

    def copied(self) -> Projection:
        """The same pair in memory of its own."""
        return Projection(self.A.clone(), self.B.clone(), self.key)

    def extra_repr(self) -> str:
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}"


def _kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    # In the order of PEFT's operations, so that the last bit is the same.
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    drawn = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    return drawn.uniform_(-bound, bound, generator=generator)


class VeRAAdapter(Sharing):
    """b and d of one site; A and B are in `common`, a `Projection`."""

    def __init__(
        self, projection: Projection, shape: Shape, *, r: int, d_init: float, dropout: float, owner: bool
    ) -> None:
        super().__init__(projection, owner=owner)
        self.b = nn.Parameter(torch.zeros(shape.out, dtype=torch.float32, device="cpu"))
        self.d = nn.Parameter(torch.full((r,), float(d_init), dtype=torch.float32, device="cpu"))
        self.shape = shape
        self.dropout = dropout

    @property
    def groups(self) -> int:
        """How many groups the site's layer has."""
        return self.shape.groups

    def update(self, weight: Callable[[], Tensor]) -> Update:
        projection = self.common
        assert isinstance(projection, Projection)
        out, inn, groups, _ = self.shape
        # A model that was spread over devices after attaching has left A and B with their owner.
        up = projection.B[:out, : projection.B.shape[1] // groups].to(self.b.device)
        down = projection.A[:, :inn].to(self.d.device)
        return Update(LowRank(up, down, mid=self.d, out=self.b, groups=groups))

    def extra_repr(self) -> str:
        return f"r={self.d.shape[0]}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class VeRA(Method):
    """Hyperparameters of VeRA.

    Args:
        r: rank of the one pair A, B, at least 1; it costs r trained numbers a site, so it is large.
        d_init: first value of every entry of d, finite and not 0 (b = 0 too would leave nothing with a gradient).
        save_projection: write A and B into the adapter's file, not their seed alone. The seed gives them again with the
            same generator of torch only.
        dropout: probability of dropping the adapter's own input in training, in [0, 1).

    Raises:
        ConfigError: for a value out of range, or for a rank or alpha of one site.

    >>> VeRA(r=16).num_trainable([(12288, 12288)] * 192)  # GPT-3; "2.8 M" in the literature counts A and B too
    2362368
    >>> 2362368 + 16 * (12288 + 12288)
    2755584
    """

    name = "vera"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    trains = "b, d"
    in_peft = "VeRA, linear layers"
    in_vllm = "export"

    r: int = 256
    d_init: float = 0.1
    save_projection: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        validate.rank("VeRA.r", self.r)
        validate.number("VeRA.d_init", self.d_init, fix="d_init=0.1")
        if self.d_init == 0:
            raise ConfigError(
                "d_init is out of range: with b = 0 and d = 0 neither would ever have a gradient",
                where="VeRA.d_init",
                found=repr(self.d_init),
                expected="a finite number other than 0",
                fix="d_init=0.1",
            )
        validate.flag("VeRA.save_projection", self.save_projection)
        validate.dropout("VeRA.dropout", self.dropout)

    def at(self, *, r: int | None = None, alpha: float | None = None) -> VeRA:
        if r is not None:
            raise ConfigError(
                "a site of VeRA has no rank of its own: all sites share one pair A, B, so they have one rank",
                where="rank_pattern",
                found=f"r = {r!r} for some sites",
                expected="no rank pattern",
                fix=f"VeRA(r={r!r}) for all sites",
            )
        if alpha is not None:
            raise ConfigError(
                "VeRA has no alpha: b and d are its scale",
                where="alpha_pattern",
                found=f"alpha = {alpha!r} for some sites",
                expected="no alpha pattern",
                fix="leave alpha_pattern out; d_init sets how fast b moves the output",
            )
        return self

    def adapter(self, spot: Spot, *, generator: torch.Generator | None = None) -> Adapter:
        return self.adapters([spot], generator=generator)[spot.path]

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, Adapter]:
        if not spots:
            return {}
        key = int(torch.randint(2**31, (), generator=generator, device="cpu"))
        return self.adapters_on(spots, Projection.draw(key, self.r, *_largest(spots)))

    def adapters_on(self, spots: Sequence[Spot], projection: Projection) -> dict[str, Adapter]:
        """Module path → new adapter over a given pair: b = 0, d = d_init.

        The first spot of each device and precision owns the pair there: `projection` itself, or a copy of it.

        Raises:
            ConfigError: the pair has another rank, or is smaller than a spot.
        """
        out, inn = _largest(spots)
        found = tuple(projection.A.shape), tuple(projection.B.shape)
        if found != ((self.r, max(inn, projection.A.shape[1])), (max(out, projection.B.shape[0]), self.r)):
            raise ConfigError(
                "these A and B do not fit the layers",
                where="VeRA",
                found=f"A {found[0]}, B {found[1]}",
                expected=f"A ({self.r}, {inn} or more), B ({out} or more, {self.r})",
                fix="use the pair, the rank and the base model that the adapter was trained with",
            )
        pairs: dict[tuple[torch.device, torch.dtype], Projection] = {}
        made: dict[str, Adapter] = {}
        for spot in spots:
            place = (spot.device, spot.dtype)
            owner = place not in pairs
            if owner:
                pairs[place] = projection.copied() if pairs else projection
            made[spot.path] = VeRAAdapter(
                pairs[place], spot.shape, r=self.r, d_init=self.d_init, dropout=self.dropout, owner=owner
            )
        return made

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        return sum(shape[0] + self.r for shape in shapes)

    def impossible(self, spot: Spot) -> str | None:
        return indivisible(self.r, spot.shape)

    def adapter_settings(self) -> tuple[object, ...]:
        return (self.name, self.r)

    def rate(self, shapes: Iterable[Shape | tuple[int, int]]) -> float:
        """Vectors move the product less than matrices do. Measured: docs/results/household.md."""
        return 50.0

    def settings(self) -> dict[str, object]:
        return {
            "r": self.r,
            "d_init": self.d_init,
            "save_projection": self.save_projection,
            "dropout": self.dropout,
        }


def _largest(spots: Sequence[Spot]) -> tuple[int, int]:
    """The largest out and the largest in of some spots."""
    return max((spot.shape.out for spot in spots), default=0), max((spot.shape.inn for spot in spots), default=0)
