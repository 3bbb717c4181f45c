"""LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation. Zhou et al. 2024, arXiv:2402.07721.

Section 3:    gᵢ = meanₓ Σ ‖ΔWᵢ xᵢ‖²    (over the positions of a sample that are no padding; s is in ΔW)
              Iᵢ = gᵢ / Σⱼ gⱼ
              keep the fewest sites of largest I with Σ I ≥ T; all others share one adapter for each shape

| symbol   | code                            | shape                     |
|----------|---------------------------------|---------------------------|
| gᵢ, Iᵢ   | `lorafit.importance.importance` | one number a site         |
| T        | `LoRADrop.threshold`            |                           |
| the kept | `LoRADrop.keep`                 | None while it is not known |
| shared   | `BorrowingAdapter`              | no tensors of its own     |

Two phases. With `keep=None` every site has an adapter of its own: that is the trial run, on the share `sample` of the
data. Its adapter is scored by `importance`, thrown away, and attached anew as `method.chosen(scores)`.

Trained: A and B of every kept site, and one pair for all other sites of a shape (`rest="freeze"`: none). Count: that of
LoRA over the kept sites plus one site of each shape of the others (`LoRADrop.count`). Init: the inner method's; an
initialiser that looks at the weight, the inputs or the gradient sees, for a shared pair, those of the first site. The
ranks that EVA moves go from kept site to kept site: each has one at least, and a shared pair keeps its r. Schedule: the
inner one's.

Deviations. The paper's code is not published. `rest="freeze"` is not in the paper: the sites stay as they are, and
backward ends at the lowest kept one. Sites share only what is equal in shape, device and inner method. Around DoRA the
low-rank part is shared and every site has its own m. Another method of the name LoRA-drop (it leaves out layers while
decoding) has nothing to do with this one.
In PEFT's files: plain LoRA (or DoRA); a shared pair stands under every site that uses it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lorafit.delta import Update
from lorafit.errors import ConfigError, DataError, nearest, some
from lorafit.layers import Shape, Site
from lorafit.method import Adapter, Around, Evidence, Method, Sample, Sharing, Spot
from lorafit.methods import fewest, validate
from lorafit.methods.dora import DoRA
from lorafit.methods.evidence import InputDirections
from lorafit.methods.lora import LoRA

REFUSED: Mapping[str, str] = {
    "adalora": "it has a budget of its own, and ranks that it moves between sites: the two choices would fight",
    "delta-lora": "its update of W belongs to one site, and a shared pair has many",
    "intrinsic": "all its sites share one vector already",
    "lora-drop": "the choice is made once",
    "lora-fa": "a frozen A at random says less of a site than a trained one; put LoRA inside",
    "lora-plus": "a rate is no adapter: put LoRA-drop inside of LoRA+ instead",
    "vera": "its pair is shared by all sites already",
}
"""Method → why it is not for the inside. Texts for an error and nothing more."""


class BorrowingAdapter(Sharing):
    """The adapter of a site that uses another site's: it has no tensors, and its gradients add up over there."""

    def __init__(self, owner: Adapter) -> None:
        super().__init__(owner, owner=False)
        self.dropout = owner.dropout

    def update(self, weight: Callable[[], Tensor]) -> Update:
        owner = self.common
        assert isinstance(owner, Adapter)
        return owner.update(weight)

    def extra_repr(self) -> str:
        return "shares an adapter with another site"


def _alike(spot: Spot) -> object:
    """What two sites have in common that may share an adapter."""
    return (spot.shape, spot.device, spot.dtype, spot.method)


@dataclass(frozen=True)
class ChosenEvidence(Evidence):
    """The evidence of the sites that get an adapter of their own or own a shared one; the others have no part in it.

    Args:
        inner: what is learnt.
        method: the choice of sites.
    """

    inner: Evidence
    method: LoRADrop

    def gather(self, model: nn.Module, sites: Mapping[str, Site], spots: Sequence[Spot], sample: Sample) -> list[Spot]:
        """All spots; those of kept sites with evidence and ranks, those that own a shared pair with evidence.

        Raises:
            ConfigError: a kept path that is none of the spots'.
            DataError: as the inner evidence, or a kept site with nothing to learn from.
        """
        self.method.check_keep([spot.path for spot in spots])
        kept = set(self.method.keep or ())
        first = dict[object, str]()
        if self.method.rest == "share":
            for spot in spots:
                if spot.path not in kept:
                    first.setdefault(_alike(spot), spot.path)
        owners = frozenset(first.values())
        looked = [spot for spot in spots if spot.path in kept or spot.path in owners]
        inner = self.inner
        if isinstance(inner, InputDirections):
            inner = replace(inner, fixed=owners, least=1)
        learnt = {spot.path: spot for spot in inner.gather(model, sites, looked, sample)} if looked else {}
        absent = [spot.path for spot in looked if spot.path not in learnt]
        if absent:
            raise DataError(
                "a layer that is to have an adapter learns nothing from this sample: its inputs never vary",
                where=absent[0],
                found=f"{len(absent)} such layers: {some(absent, 3)}",
                expected="inputs that differ",
                fix="give the sample other batches, or leave the layer out of keep",
            )
        return [learnt.get(spot.path, spot) for spot in spots]


@dataclass(frozen=True)
class LoRADrop(Around):
    """Hyperparameters of LoRA-drop.

    Args:
        inner: the method at each site: LoRA with any initialiser, or DoRA around it.
        threshold: T, the share of the importance that the kept sites have together, in (0, 1]; 1 keeps all.
        sample: share of the training data that the trial run sees, in (0, 1].
        rest: the sites that are not kept "share" one adapter for each shape, or "freeze" as they are.
        per_kind: choose among the sites of each kind (the last part of the path) apart, as the paper does for query and
            value; all together, kinds whose inputs are large (the down projections of Llama types) would take all.
        keep: paths of the sites that have adapters of their own; None while that is not known.

    Raises:
        ConfigError: for a value out of range; the message names the field and one fix.

    >>> method = LoRADrop(LoRA(r=8), threshold=0.8, per_kind=False)
    >>> method.chosen({"a.q": 0.5, "a.v": 0.1, "b.q": 0.3, "b.v": 0.1}).keep
    ('a.q', 'b.q')
    """

    name = "lora-drop"
    paper = "Zhou et al. 2024, arXiv:2402.07721"
    trains = "A, B where it matters; elsewhere one pair per shape"

    inner: Method = field(default_factory=LoRA)
    threshold: float = 0.9
    sample: float = 0.1
    rest: Literal["share", "freeze"] = "share"
    per_kind: bool = True
    keep: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        _share_of_one("LoRADrop.threshold", self.threshold, "threshold=0.9")
        _share_of_one("LoRADrop.sample", self.sample, "sample=0.1")
        validate.choice("LoRADrop.rest", self.rest, ("share", "freeze"), "the other sites can be shared or frozen")
        validate.flag("LoRADrop.per_kind", self.per_kind)
        names = self.keep or ()
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                "keep is no tuple of module paths",
                where="LoRADrop.keep",
                found=repr(self.keep),
                expected="a tuple of module paths, or None while they are not known",
                fix="method.chosen(scores), with the scores of lorafit.importance",
            )

    @property
    def within(self) -> Method:
        return self.inner

    def around(self, inner: Method) -> LoRADrop:
        return replace(self, inner=inner)

    def adapters(self, spots: Sequence[Spot], *, generator: torch.Generator | None = None) -> dict[str, Adapter]:
        if self.keep is None:
            return super().adapters(spots, generator=generator)
        self.check_keep([spot.path for spot in spots])
        kept, owners, made = set(self.keep), dict[object, Adapter](), dict[str, Adapter]()
        for spot in map(self.inside, spots):
            alike = _alike(spot)
            if spot.path in kept:
                made[spot.path] = spot.method.adapter(spot, generator=generator)
            elif alike in owners:
                made[spot.path] = _borrowed(spot, owners[alike])
            elif self.rest == "share":
                owners[alike] = made[spot.path] = spot.method.adapter(spot, generator=generator)
        return made

    def evidence(self) -> Evidence | None:
        inner = self.within.evidence()
        return inner if inner is None or self.keep is None else ChosenEvidence(inner, self)

    def check_keep(self, paths: Sequence[str]) -> None:
        """Raises `ConfigError` for a kept path that is none of these."""
        strange = [path for path in self.keep or () if path not in set(paths)]
        if strange:
            raise ConfigError(
                "keep names layers that no adapter is put on",
                where="LoRADrop.keep",
                found=some(map(repr, strange), 3),
                expected=f"paths among {some(paths, 5)}",
                near=nearest(strange[0], paths),
                fix="score and choose with the same targets as here",
            )

    def chosen(self, scores: Mapping[str, float]) -> LoRADrop:
        """This method with the sites to keep, by their importance.

        Args:
            scores: module path → Iᵢ, as `lorafit.importance.importance` gives them; of equal ones the first is kept.

        Raises:
            DataError: a score that is negative or not finite, a sum that is not 1, or scores of an adapter that learnt
                nothing.
        """
        fewest.check(scores)
        groups = defaultdict[str, dict[str, float]](dict)
        for path, score in scores.items():
            groups[path.rpartition(".")[2] if self.per_kind else ""][path] = score
        kept = {path for group in groups.values() for path in fewest.fewest(group, self.threshold)}
        return replace(self, keep=tuple(path for path in scores if path in kept))

    def num_trainable(self, shapes: Iterable[Shape | tuple[int, int]]) -> int:
        if self.keep is not None:
            raise ConfigError(
                "with a choice of sites the count depends on their paths",
                where="LoRADrop.num_trainable",
                found="shapes alone",
                fix="LoRADrop.count({path: shape})",
            )
        return super().num_trainable(shapes)

    def count(self, sites: Mapping[str, Shape | tuple[int, int]]) -> int:
        """The paper's count of trained numbers for sites of these shapes, by path."""
        if self.keep is None:
            return super().num_trainable(sites.values())
        kept = set(self.keep)
        own = [shape for path, shape in sites.items() if path in kept]
        rest = [] if self.rest == "freeze" else [Shape(*shape) for path, shape in sites.items() if path not in kept]
        shared = set(rest)
        total = self.within.num_trainable([*own, *shared])
        if isinstance(self.within, DoRA):  # the borrowers' own magnitudes
            total += sum(shape.out for shape in rest) - sum(shape.out for shape in shared)
        return total

    def adapter_settings(self) -> tuple[object, ...]:
        return self.within.adapter_settings()

    def settings(self) -> dict[str, object]:
        kept = {} if self.keep is None else {"kept": len(self.keep)}
        choice = {"threshold": self.threshold, "sample": self.sample, "rest": self.rest, "per_kind": self.per_kind}
        return {**super().settings(), **choice, **kept}


def _borrowed(spot: Spot, owner: Adapter) -> Adapter:
    """An adapter for `spot` that uses the low-rank part of another site's."""
    method = spot.method
    if isinstance(method, DoRA):
        return method.wrap(spot, BorrowingAdapter(method.unwrapped(owner)))
    return BorrowingAdapter(owner)


def _check_inner(inner: object) -> None:
    low_rank = inner.within if isinstance(inner, DoRA) else inner
    if type(low_rank) is LoRA:
        return
    reason = REFUSED.get(low_rank.name) if isinstance(low_rank, Method) else None
    raise ConfigError(
        f"LoRADrop cannot be put around {type(low_rank).__name__}" + (f": {reason}" if reason else ""),
        where="LoRADrop.inner",
        found=repr(inner),
        expected="LoRA, or DoRA around LoRA",
        fix="LoRADrop(inner=LoRA(...))",
    )


def _share_of_one(where: str, value: object, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(
            f"{where.rpartition('.')[2]} is out of range",
            where=where,
            found=repr(value),
            expected="a number greater than 0 and at most 1",
            fix=fix,
        )
