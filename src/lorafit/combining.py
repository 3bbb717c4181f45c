"""Adapter arithmetic: one adapter that is a weighted sum of others, exactly or at a rank of your choice.

"exact" puts the factors side by side: Σ wᵢ sᵢ BᵢAᵢ = [w₁ s₁ B₁ … wₙ sₙ Bₙ] [A₁; …; Aₙ], of rank Σ rᵢ. "svd" is the best
approximation of that sum at rank r (Eckart and Young). "ties" (Yadav et al. 2023, arXiv:2306.01708) and "dare" (Yu et
al. 2023, arXiv:2311.03099) change the summands first, so that they disturb each other less.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafit.adapted import bank_of
from lorafit.compress import NOTICED, Squeezed, TruncationWarning, relative, squeeze_dense, squeeze_low_rank
from lorafit.delta import LowRank, Update
from lorafit.errors import ConfigError, MergeError, StateError, check_attached, some
from lorafit.handle import Handle
from lorafit.inject import check_name, install_all
from lorafit.layers import Site, site_of
from lorafit.ledger import LEDGER
from lorafit.method import Adapter
from lorafit.methods import validate
from lorafit.methods.lora import LoRA, LoRAAdapter
from lorafit.plan import Modules, Planned, check_model

DENSITY = {"ties": 0.2, "dare": 0.1}
"""The share of an adapter's changes that is kept where nothing was said: that of each paper's main experiments."""


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter's share in the sum at one site."""

    name: str
    weight: float
    update: Update


def combine(
    handle: Handle,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "exact",
    r: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Handle:
    """Attaches a new LoRA that is a combination of adapters of the model; it alone is active then.

    An adapter that is absent at a site contributes nothing there. The others stay attached as they are.

    Args:
        handle: of any adapter on the model.
        weights: adapter's name → its factor in the sum, which may be negative.
        name: the name of the new adapter.
        how: "exact": the sum itself, at the sum of the ranks. "svd": its best approximation of rank r. "ties": of each
            adapter only the largest changes are kept, each number follows the sign that weighs more in the sum, and
            those that agree with it are averaged; then rank r. "dare": of each adapter changes are dropped at random
            and the rest is scaled up; then the sum at rank r.
        r: the rank of the new adapter, for all but "exact"; None takes the largest of its summands at each site.
        density: the share of changes that "ties" (0.2) and "dare" (0.1) keep, in (0, 1].
        seed: of what "dare" drops; None draws from torch's own generator.

    Returns:
        The handle of the new adapter, a `LoRA` of scale 1.

    Raises:
        ConfigError: a value out of range, or a setting that this way of combining does not have.
        StateError: an adapter that is not attached, or one that is merged.
        MergeError: an adapter that cannot be combined like this, with the reason and a way that works.

    A `TruncationWarning` says how far the new adapter is from the sum if that is more than 0.001 of it.
    """
    model = handle.model
    check_model(model)
    check_name(model, handle.method, name)
    _check(weights, how, r, density, seed)
    names = vars(model)[LEDGER].names
    for each in weights:
        check_attached(each, names)
    generator = validate.generator("combine.seed", seed)
    made: dict[str, Squeezed] = {}
    sites: dict[str, Site] = {}
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes could never be trained
        for path, site, parts in _sites(model, weights):
            sites[path] = site
            made[path] = _combined(path, site, parts, how, r, density or DENSITY.get(how, 1.0), generator)
    if not made:
        raise StateError("none of these adapters has a site", found=some(map(repr, weights)), fix="choose others")
    _say(made, how)
    with torch.inference_mode(False):
        return _attached(model, sites, made, name)


def _attached(model: torch.nn.Module, sites: Mapping[str, Site], made: Mapping[str, Squeezed], name: str) -> Handle:
    """A LoRA of scale 1 with these factors, at the rank that each site has."""
    most = max(each.r for each in made.values())
    method = LoRA(r=most, alpha=most)
    planned = [
        Planned(path, site, method if made[path].r == most else method.at(r=made[path].r, alpha=made[path].r))
        for path, site in sites.items()
    ]
    adapters: dict[str, Adapter] = {
        path: LoRAAdapter(each.down, each.up, scale=1.0, dropout=0.0, groups=sites[path].shape.groups)
        for path, each in made.items()
    }
    return install_all(model, method, planned, adapters, {}, name)


def _check(weights: Mapping[str, float], how: str, r: int | None, density: float | None, seed: int | None) -> None:
    validate.choice("combine.how", how, WAYS, "adapters cannot be combined like this")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            "weights must map names of adapters to numbers",
            where="combine.weights",
            found=repr(weights),
            expected="at least one name",
            fix="weights={'default': 1.0}",
        )
    for each, weight in weights.items():
        validate.number(f"combine.weights[{each!r}]", weight, fix=f"{{{each!r}: 1.0}}")
    if r is not None:
        validate.rank("combine.r", r)
    if density is not None and not (validate.is_number(density) and 0 < density <= 1):
        raise ConfigError(
            "density is out of range",
            where="combine.density",
            found=repr(density),
            expected="a number greater than 0 and at most 1",
            fix=f"density={DENSITY.get(how, 0.2)}",
        )
    unused = {"r": r is not None and how == "exact", "density": density is not None and how not in DENSITY}
    unused["seed"] = seed is not None and how != "dare"
    for key, given in unused.items():
        if given:
            raise ConfigError(
                f"{key} has no meaning for how={how!r}",
                where=f"combine.{key}",
                found="a value",
                expected="None",
                fix=f"leave {key} out" if key != "r" else 'how="svd"',
            )


def _sites(model: torch.nn.Module, weights: Mapping[str, float]) -> list[tuple[str, Site, list[Part]]]:
    """Every layer that one of the adapters changes, in model order, with the adapters that do."""
    found = []
    for path, module in Modules.of(model).by_path.items():
        bank = bank_of(module)
        named = [name for name in weights if bank is not None and name in bank]
        if bank is None or not named:
            continue
        whole = [name for name in named if not isinstance(bank[name], Adapter)]
        if whole:
            raise MergeError(
                "a module that an adapter replaces in full cannot be combined with others",
                where=path,
                found=f"a trained copy of adapter {whole[0]!r} (modules_to_save)",
                expected="adapters that change layers",
                fix="combine adapters without modules_to_save, or average the copies yourself",
            )
        site, parts = site_of(module), []
        for name in named:
            adapter = bank[name]
            assert isinstance(adapter, Adapter)
            parts.append(Part(name, float(weights[name]), _whole(adapter.update(site.weight))))
        found.append((path, site, parts))
    return found


def _whole(update: Update) -> Update:
    """The update in at least single precision, on the CPU or wherever it is."""
    delta = update.delta
    if isinstance(delta, LowRank):
        dtype = torch.promote_types(torch.promote_types(delta.up.dtype, delta.down.dtype), torch.float32)
        return replace(update, delta=delta.to(dtype))
    return update


def _combined(
    path: str,
    site: Site,
    parts: Sequence[Part],
    how: str,
    r: int | None,
    density: float,
    generator: torch.Generator | None,
) -> Squeezed:
    if how == "exact":
        return _exact(path, site, parts)
    groups = site.shape.groups
    ranks = [part.update.delta.down.shape[0] for part in parts if isinstance(part.update.delta, LowRank)]
    if r is None and not ranks:
        raise ConfigError(
            "these adapters have no rank of their own to go by",
            where="combine.r",
            found="None",
            expected="a rank",
            fix="r=16",
        )
    rank = r or max(ranks)
    if rank % groups:
        raise ConfigError(
            "the rank does not fit the layer",
            where=f"combine.r, {path}",
            found=f"r = {rank} in {groups} groups",
            expected="a multiple of the number of groups",
            fix=f"r={-(-rank // groups) * groups}",
        )
    plain = all(part.update.gain is None and isinstance(part.update.delta, LowRank) for part in parts)
    if how == "svd" and plain and not any(_mixed(site, part) for part in parts):
        stacked = _exact(path, site, parts)
        return squeeze_low_rank(stacked.up, stacked.down, rank, groups)
    changes = [_change(path, site, part) for part in parts]
    return squeeze_dense(WAYS[how](changes, [part.weight for part in parts], density, generator), rank, groups)


def _mixed(site: Site, part: Part) -> bool:
    """Whether a grouped convolution's A sees the channels of all groups, as PEFT's can."""
    delta = part.update.delta
    return isinstance(delta, LowRank) and delta.down.shape[1] != site.shape.inn


def _exact(path: str, site: Site, parts: Sequence[Part]) -> Squeezed:
    groups = site.shape.groups
    wide = any(_mixed(site, part) for part in parts)
    ups, downs = [], []
    for part in parts:
        delta = part.update.delta
        if part.update.gain is not None or not isinstance(delta, LowRank):
            what = "rescales the rows of W + Δ (DoRA)" if part.update.gain is not None else "is a dense change"
            raise MergeError(
                f"the sum has no exact low-rank form: adapter {part.name!r} {what}",
                where=path,
                found=f"how='exact' with {part.name!r}",
                expected="low-rank adapters",
                fix='how="svd", r=...: the best low-rank approximation of the whole change',
            )
        up, down = delta.fold()
        if wide and down.shape[1] == site.shape.inn:
            down = site.down_to_file(down).flatten(1)
        ups.append(up * part.weight)
        downs.append(down.reshape(groups, -1, down.shape[1]))
    up, down = torch.cat(ups, dim=1), torch.cat(downs, dim=1).flatten(0, 1)
    return Squeezed(up, down, norm=0.0, lost=0.0)


def _change(path: str, site: Site, part: Part) -> Tensor:
    if _mixed(site, part):
        raise MergeError(
            f"adapter {part.name!r} mixes the groups of a grouped convolution, which no change of its weight can do",
            where=path,
            found="an A that sees the channels of all groups",
            expected="each group with its own part of A",
            fix='how="exact"',
        )
    return part.update.change(site.weight())


def _sum(changes: Sequence[Tensor], weights: Sequence[float], density: float, _: torch.Generator | None) -> Tensor:
    return sum((change * weight for change, weight in zip(changes, weights, strict=True)), torch.zeros_like(changes[0]))


def _ties(changes: Sequence[Tensor], weights: Sequence[float], density: float, _: torch.Generator | None) -> Tensor:
    """Trim, elect, disjoint mean (the paper's algorithm 1, site by site, on weighted changes).

    A number's sign is that of the sum of what is left of it, and the mean is over the adapters that agree with it. One
    adapter alone, or adapters that change different numbers, come out as they went in, up to the trimming.
    """
    trimmed = torch.stack([_largest(change, density) * w for change, w in zip(changes, weights, strict=True)])
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(change: Tensor, density: float) -> Tensor:
    """The change with all but the `density` largest numbers at zero."""
    kept = max(1, round(density * change.numel()))
    if kept == change.numel():
        return change
    flat = change.flatten()
    index = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).scatter(0, index, flat[index]).view_as(change)


def _dare(
    changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator | None
) -> Tensor:
    """Drop each number with probability 1 − density, scale the rest by 1 / density, and sum (the paper's eq. 2)."""
    thinned = []
    for change in changes:
        drawn = torch.rand(change.shape, generator=generator).to(change.device)
        thinned.append(torch.where(drawn < density, change / density, 0.0))
    return _sum(thinned, weights, density, generator)


Way = Callable[[Sequence[Tensor], Sequence[float], float, "torch.Generator | None"], Tensor]
WAYS: Mapping[str, Way] = {"exact": _sum, "svd": _sum, "ties": _ties, "dare": _dare}
"""Name → how dense changes are combined ("exact" never forms them)."""


def _say(made: Mapping[str, Squeezed], how: str) -> None:
    overall = relative(sum(each.lost for each in made.values()), sum(each.norm for each in made.values()))
    if overall > NOTICED:
        errors = {path: each.error for path, each in made.items()}
        worst = max(errors, key=errors.__getitem__)
        message = (
            f"the rank leaves out a part of what how={how!r} gives: relative error {overall:.3g} over all sites, "
            f"{errors[worst]:.3g} at {worst}; a larger r keeps more"
        )
        warnings.warn(TruncationWarning(message, overall, errors), stacklevel=3)
