"""Type LORA: what LoRA, rsLoRA and DoRA are in PEFT, and what every low-rank update without a type of its own becomes.

Nothing here is written method by method: an adapter is asked for its update, and whatever vectors and scale the update
has are folded into two matrices and one α. Reading is the other way: α and r give the scale, and the matrices are
taken apart again for adapters that keep more than two.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafit.delta import LowRank
from lorafit.errors import CheckpointError, LorafitWarning, some
from lorafit.layers import EmbeddingSite, OwnSite, Site
from lorafit.layouts.base import ContradictionError, Layout, Place, Record, Slot, Undrawn, anchored, blank, exactly, put
from lorafit.method import Adapter, Method
from lorafit.methods.delta_lora import DeltaLoRAAdapter
from lorafit.methods.dora import DoRA, DoRAAdapter
from lorafit.methods.lora import AnchoredAdapter, LoRA, LoRAAdapter
from lorafit.methods.lora_drop import BorrowingAdapter
from lorafit.methods.lora_fa import LoRAFAAdapter
from lorafit.peft_config import Parsed, Reader
from lorafit.peft_layout import Description, Placed, exact_pattern, join, whole

PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base weight alone. The others put a residual into it when PEFT loads."""

MATRIX = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


@dataclass(frozen=True, eq=False)
class Factors:
    """An update as a file of this type has it: s · up down, and the magnitudes of the rows of W + Δ, if it has any."""

    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank."""
        return self.down.shape[0]


def factors(placed: Placed, path: str) -> Factors:
    """The update of an adapter as this type of file has it.

    Raises:
        CheckpointError: the update is no low-rank one.
    """
    adapter: Adapter = placed.adapter
    magnitude: Tensor | None = None
    if isinstance(adapter, DoRAAdapter):
        magnitude, adapter = adapter.m.detach(), adapter.inner
    with torch.no_grad():
        update = adapter.update(placed.site.weight)
        delta = update.delta
        if update.gain is not None or not isinstance(delta, LowRank):
            raise CheckpointError(
                f"the update of {placed.method.name} is none that a file of PEFT's can hold",
                where=path,
                found="an update with a gain" if update.gain is not None else f"a {type(delta).__name__} update",
                expected="a low-rank update s · B A",
                fix="merge it: handle.merge_and_detach(), then save the model",
            )
        if delta.mid is None and delta.out is None:
            return Factors(delta.up, delta.down, delta.scale, magnitude)
        up, down = replace(delta, scale=1.0).fold()
    return Factors(up if delta.out is not None else delta.up, down, delta.scale, magnitude)


def alpha_for(scale: float, r: int, rslora: bool) -> float:
    """The α whose α / r (or α / √r) is `scale` to the last bit: the one with the fewest digits.

    Where no number does that, the nearest one.

    >>> alpha_for(2.0, 8, False), alpha_for(0.3 / 7, 7, False), alpha_for(5 / 3**0.5, 3, True)
    (16, 0.3, 5)
    """
    divisor = math.sqrt(r) if rslora else r
    exact = scale * divisor
    for digits in range(1, 18):
        short = float(f"{exact:.{digits}g}")
        for alpha in (short, math.nextafter(short, math.inf), math.nextafter(short, 0)) if digits == 17 else (short,):
            if alpha / divisor == scale:
                return whole(alpha)
    return whole(exact)


class PairLayout(Layout):
    """A, B and perhaps magnitudes of each site, with the settings of PEFT's type LORA."""

    mathematics = frozenset(
        {
            "alpha_pattern",
            "init_lora_weights",
            "lora_alpha",
            "lora_dropout",
            "r",
            "rank_pattern",
            "use_dora",
            "use_rslora",
        }
    )
    must_be: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType(
        {
            "alora_invocation_tokens": (None,),
            "arrow_config": (None,),
            "bias": ("none",),
            "ensure_weight_tying": (False,),
            "kasa_config": (None,),
            "layer_replication": (None, []),
            "lora_bias": (False,),
            "megatron_config": (None,),
            "monteclora_config": (None,),
            "target_parameters": (None, []),
            "trainable_token_indices": (None, [], {}),
            "use_bdlora": (None, False),
            "use_qalora": (False,),
            "velora_config": (None,),
        }
    )
    ignored = frozenset(
        {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size"}
    )

    # Writing

    @abstractmethod
    def tell(self, sites: Mapping[str, Placed], dora: Sequence[str]) -> None:
        """Says what other readers make of such sites; `dora` are those with magnitudes."""

    def down_to_file(self, site: Site, down: Tensor) -> Tensor:
        """A as files of this type hold it."""
        return site.down_to_file(down)

    def down_from_file(self, site: Site, stored: Tensor, r: int) -> Tensor:
        """The inverse of `down_to_file`. Raises ValueError for a shape that cannot be."""
        return site.down_from_file(stored, r)

    def tensors(self, description: Description) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, placed in description.sites.items():
            site, own = placed.site, factors(placed, path)
            down, up = _keys(site)
            found[join(path, down)] = self.down_to_file(site, own.down)
            found[join(path, up)] = site.up_to_file(own.up)
            if own.magnitude is not None:
                found[join(path, MAGNITUDES[0])] = _channels(site, own.magnitude)
        return found

    def config(self, description: Description) -> dict[str, Any]:
        settings = description.method.settings()
        rslora = settings.get("rslora") is True
        own = {path: factors(placed, path) for path, placed in description.sites.items()}
        alphas = {path: alpha_for(each.scale, each.r, rslora) for path, each in own.items()}
        ranks = {path: each.r for path, each in own.items()}
        usual = [path for path, placed in description.sites.items() if placed.method == description.method]
        r, alpha = Counter((ranks[path], alphas[path]) for path in usual or own).most_common(1)[0][0]
        paths = list(own)
        dora = [path for path, each in own.items() if each.magnitude is not None]
        _check_dora(description, dora)
        self.tell(description.sites, dora)
        return {
            "alpha_pattern": exact_pattern({p: each for p, each in alphas.items() if each != alpha}, paths),
            "exclude_modules": None,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_dropout": max(placed.adapter.dropout for placed in description.sites.values()),
            "r": r,
            "rank_pattern": exact_pattern({p: each for p, each in ranks.items() if each != r}, paths),
            "use_dora": bool(dora),
            "use_rslora": rslora,
        }

    def record(self, description: Description) -> dict[str, Any]:
        moved = [each.adapter for each in description.sites.values() if isinstance(each.adapter, DeltaLoRAAdapter)]
        return {"lam": float(moved[0].lam)} if moved else {}

    # Reading

    def method(self, reader: Reader) -> Method:
        get = reader.config.get
        init = get("init_lora_weights", True)
        if init not in PLAIN_INITS:
            raise reader.error(
                "init_lora_weights",
                "this initialisation keeps a part of the base weight in the adapter: the file alone is not the change",
                init,
                f"one of {', '.join(map(repr, PLAIN_INITS))}",
                fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            )
        dora = get("use_dora", False)
        if not isinstance(dora, bool):
            raise reader.error("use_dora", "use_dora must be true or false", dora, "true or false")
        alpha = reader.present("lora_alpha", 8)
        keys = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
        plain = reader.made(
            lambda: LoRA(r=get("r", 8), alpha=alpha, dropout=get("lora_dropout", 0.0), rslora=get("use_rslora", False)),
            keys,
        )
        return DoRA(inner=plain) if dora else plain

    def rank(self, reader: Reader) -> int:
        r: int = reader.config.get("r", 8)
        return r

    def ranks(self, reader: Reader) -> dict[str, int]:
        return reader.pattern("rank_pattern", int)

    def alphas(self, reader: Reader) -> dict[str, float]:
        return reader.pattern("alpha_pattern", float)

    def slots(self, site: Site, parsed: Parsed) -> tuple[Slot, ...]:
        down, up = _keys(site)
        pair = (
            Slot("A", down, self.down_from_file, ranked=True),
            Slot("B", up, lambda site, b, r: site.up_from_file(b, r)),
        )
        return (*pair, *(Slot("m", key, _magnitude) for key in MAGNITUDES)) if _dora(parsed) else pair

    def keys(self, parsed: Parsed) -> tuple[str, ...]:
        return (*MATRIX, *EMBEDDING, *MAGNITUDES) if _dora(parsed) else (*MATRIX, *EMBEDDING)

    def at(self, parsed: Parsed, path: str) -> Method:
        return _at(parsed, path)

    def plain(self, parsed: Parsed, path: str, site: Site, values: Mapping[str, Tensor]) -> LowRank | None:
        if "m" in values:
            return None
        return LowRank(values["B"], values["A"], scale=scale_at(parsed, path), groups=site.shape.groups)

    def adapters(
        self, method: Method, places: Sequence[Place], shared: Mapping[str, Tensor], parsed: Parsed, record: Record
    ) -> dict[str, Adapter]:
        with Undrawn():
            made = blank(method, places)
        if anchored(method):
            done: dict[Adapter, Adapter] = {}
            made = {path: _anchored(adapter, done) for path, adapter in made.items()}
        for place in places:
            _pour(made[place.path], place.values, record)
        for place in places:
            _check(made[place.path], place, scale_at(parsed, place.path), parsed)
        return made


class LoraLayout(PairLayout):
    """PEFT's type LORA."""

    peft_type = "LORA"

    def tell(self, sites: Mapping[str, Placed], dora: Sequence[str]) -> None:
        grouped = [path for path in dora if sites[path].site.shape.groups > 1]
        if grouped:
            warnings.warn(
                f"PEFT cannot compute DoRA on grouped convolutions ({some(grouped)}). lorafit can",
                LorafitWarning,
                stacklevel=2,
            )
        own = [path for path, placed in sites.items() if isinstance(placed.site, OwnSite)]
        if own:
            warnings.warn(
                f"PEFT has no adapter that goes through a forward of a layer's own ({some(own)}): it takes such a "
                "layer for torch's, so that what it computes there can be another thing, or fail. lorafit follows "
                "them; merged, both change the same weight",
                LorafitWarning,
                stacklevel=2,
            )


def _at(parsed: Parsed, path: str) -> Method:
    # A file gives every site its alpha: where no pattern says otherwise it is the config's own, whatever the rank.
    r, alpha = parsed.rank_pattern.find(path), parsed.alpha_pattern.find(path)
    return parsed.method if r is None and alpha is None else parsed.method.at(r=r, alpha=alpha)


def scale_at(parsed: Parsed, path: str) -> float:
    """The scale that the settings give a site."""
    own = _at(parsed, path)
    plain = own.inner if isinstance(own, DoRA) else own
    assert isinstance(plain, LoRA)
    return plain.scale


def _keys(site: Site) -> tuple[str, str]:
    return EMBEDDING if isinstance(site, EmbeddingSite) else MATRIX


def _dora(parsed: Parsed) -> bool:
    return isinstance(parsed.method, DoRA)


def _magnitude(site: Site, stored: Tensor, r: int) -> Tensor:
    wanted = tuple(_channels(site, torch.empty(site.shape.out, device="meta")).shape)
    return exactly(stored, wanted).reshape(-1)


def _channels(site: Site, v: Tensor) -> Tensor:
    """One number a channel as the file has them: (out,), and (1, out, 1, …) for convolutions."""
    shaped = site.channel(v)
    return shaped if shaped.dim() == 1 else shaped.unsqueeze(0)


def _check_dora(description: Description, dora: Sequence[str]) -> None:
    if dora and len(dora) < len(description.sites):
        raise CheckpointError(
            "some sites have magnitudes and others have none: a file of PEFT's has them at all sites or at none",
            found=some(dora),
            expected="one method for all sites",
            fix="attach the two methods as two adapters, by two names",
        )


# From a file's two matrices to what an adapter keeps


def _anchored(adapter: Adapter, done: dict[Adapter, Adapter]) -> Adapter:
    """The adapter with A₀ and B₀ where it has A and B; `done` says what became of those that others may use too."""
    if isinstance(adapter, DoRAAdapter):
        adapter.inner = _anchored(adapter.inner, done)
        return adapter
    if isinstance(adapter, BorrowingAdapter):
        owner = adapter.common
        assert isinstance(owner, Adapter)
        return BorrowingAdapter(_anchored(owner, done))
    if not isinstance(adapter, LoRAAdapter):
        return adapter
    if adapter not in done:
        a, b = adapter.A.detach(), adapter.B.detach()
        done[adapter] = AnchoredAdapter(a, b, scale=adapter.scale, dropout=adapter.dropout, groups=adapter.groups)
    return done[adapter]


def _pour(adapter: Adapter, values: Mapping[str, Tensor], record: Record) -> None:
    """Puts a file's values into an adapter. Raises `ContradictionError` for another kind of adapter."""
    if isinstance(adapter, DoRAAdapter):
        if "m" not in values:
            raise ContradictionError("the file has no magnitudes")
        put(adapter, "m", values["m"])
        adapter = adapter.inner
    elif "m" in values:
        raise ContradictionError("the file has magnitudes")
    for kind, fill in _FILL.items():
        if type(adapter) is kind:
            fill(adapter, values["A"], values["B"], record)
            return
    raise ContradictionError(f"values of {type(adapter).__name__} are not kept in files of this type")


def _pair(adapter: Adapter, down: Tensor, up: Tensor, record: Record) -> None:
    _same_rank(adapter, down)
    put(adapter, "A", down)
    put(adapter, "B", up)


def _same_rank(adapter: Adapter, down: Tensor) -> None:
    r = adapter.state_dict()["A"].shape[0]
    if down.shape[0] != r:
        raise ContradictionError(f"its rank is {r}, that of the file {down.shape[0]}")


def _halves(down: Tensor, up: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(down₁, up₁, down₂, up₂) of a sum of two products of equal rank, stacked group by group."""
    if down.shape[0] % (2 * groups):
        raise ContradictionError(f"the rank in the file is {down.shape[0]}, no sum of two for each group")
    first, second = down.reshape(groups, 2, -1, down.shape[1]).unbind(1)
    up1, up2 = up.chunk(2, dim=1)
    return first.flatten(0, 1), up1, second.flatten(0, 1), up2


def _both(adapter: Adapter, down: Tensor, up: Tensor, record: Record) -> None:
    assert isinstance(adapter, AnchoredAdapter)
    a, b, a0, b0 = _halves(down, up, adapter.groups)
    _same_rank(adapter, a)
    for name, value in (("A", a), ("B", b), ("A0", a0), ("B0", -b0)):
        put(adapter, name, value)


def _telescoped(adapter: Adapter, down: Tensor, up: Tensor, record: Record) -> None:
    assert isinstance(adapter, DeltaLoRAAdapter)
    lam = record.get("lam")
    if not isinstance(lam, float | int):
        raise ContradictionError(f"lam is {lam!r}, no number")
    if not lam and down.shape[0] == adapter.A.shape[0]:  # W has not moved yet: the file holds one product
        a, b, a_k, b_k = down, up, down, up
    else:
        a, b, a_k, b_k = _halves(down, up, adapter.groups)
    _same_rank(adapter, a)
    # A comes back bit for bit, B and B_K up to the rounding of (1 + λ) B and λ B_K.
    values = {"A": a, "B": b / (1 + lam), "A_K": a_k, "B_K": b_k / -lam if lam else b, "lam": torch.tensor(float(lam))}
    for name, value in values.items():
        put(adapter, name, value)


def _nothing(adapter: Adapter, down: Tensor, up: Tensor, record: Record) -> None:
    """A site that uses another's adapter; that the values are the same is checked afterwards."""


_FILL: Mapping[type[Adapter], Callable[[Adapter, Tensor, Tensor, Record], None]] = {
    LoRAAdapter: _pair,
    LoRAFAAdapter: _pair,
    AnchoredAdapter: _both,
    DeltaLoRAAdapter: _telescoped,
    BorrowingAdapter: _nothing,
}


def _unwrapped(adapter: Adapter) -> Adapter:
    return adapter.inner if isinstance(adapter, DoRAAdapter) else adapter


def _same(mine: Tensor, file: Tensor) -> bool:
    # Nearly always to the bit, which is much the quicker question.
    return torch.equal(mine, file) or torch.allclose(mine, file, rtol=1e-5, atol=0.0)


def _check(adapter: Adapter, place: Place, scale: float, parsed: Parsed) -> None:
    """Raises `ContradictionError` unless the adapter computes what file and settings say."""
    own = factors(Placed(place.site, adapter, place.spot.method), place.path)
    if not math.isclose(own.scale, scale, rel_tol=1e-12):
        raise ContradictionError(f"its scale at {place.path} is {own.scale:g}, the settings' is {scale:g}")
    dropout = parsed.config.get("lora_dropout", 0.0)
    if adapter.dropout != dropout:
        raise ContradictionError(f"its dropout is {adapter.dropout:g}, the settings' is {dropout:g}")
    if _FILL.get(type(_unwrapped(adapter))) is _pair:
        return  # A and B are the file's, as they stand
    for what, mine, file in (("A", own.down, place.values["A"]), ("B", own.up, place.values["B"])):
        if mine.shape != file.shape or not _same(mine, file.to(mine)):
            raise ContradictionError(f"the file's {what} at {place.path} is none of such an adapter")
