"""What initialisers learn from a few batches of data before training: EVA the inputs of each layer, LoRA-GA the first
gradients of its weight. Paischer et al. 2024, arXiv:2410.07170; Wang et al. 2024, arXiv:2407.05000.

Both leave the model as it was, also when they fail: parameters, gradients, buffers, training modes and random state.
The model runs in evaluation mode, so that the evidence has no dropout noise in it (LoRA-GA's published code runs in
training mode). Batches are moved to the model's device; a mapping reaches the model as a `dict`.

EVA: input directions
    V Σ² Vᵀ = Σ_x (x − x̄)(x − x̄)ᵀ         A = rows 1 … r' of Vᵀ, B = 0
    ξ_j = σ_j² / Σ_x |x − x̄|²              each of the Σ r largest ξ over all sites brings its site one rank

| symbol | code                         | shape    |
|--------|------------------------------|----------|
| x      | rows of a layer's input      | (in,)    |
| Vᵀ     | `Directions.components`      | (k, in)  |
| σ      | `Directions.singular`        | (k,)     |
| ξ      | `Directions.explained()`     | k floats |
| ρ      | `InputDirections.rho`        | 2: k ≤ ρ r |
| τ      | `InputDirections.tau`        | 0.99     |

The SVD is incremental (Ross et al. 2008), of centred inputs, as in the authors' code and in PEFT. A site is left alone
as soon as each direction that it would get now has a cosine of at least τ with what it was a batch before. A site whose
directions explain least may get rank 0: it then has no adapter. The scale s of a site does not change with its rank.
Rows that a batch's ``attention_mask`` (batch, sequence) marks as padding do not count, in linear layers whose input has
those leading sizes, or is flattened to that many rows; the positions of ``labels`` play no part (PEFT leaves out
unsupervised ones). One pass over the sample, where PEFT repeats it until all sites have converged.

LoRA-GA: first gradients
    G = ∂L/∂W, the mean over the batches, in float32 or better and in the CPU's memory.
A weight that two layers share gives each layer the gradient of its own use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError, DataError
from lorafit.layers import Site, VectorSite
from lorafit.method import Around, Batch, Evidence, Method, Sample, Spot
from lorafit.methods.directions import Directions, share_out

RHO, TAU = 2.0, 0.99
"""The published values of ρ and τ."""


@runtime_checkable
class HasLoss(Protocol):
    """What a model of transformers returns when it is given labels."""

    loss: Any


@runtime_checkable
class Ranked(Protocol):
    """A method with LoRA's rank and scale."""

    r: int

    @property
    def scale(self) -> float:
        """S."""


@dataclass(frozen=True)
class InputDirections(Evidence):
    """EVA's evidence: for each site the directions in which its inputs vary most, and the rank that these earn it.

    Args:
        rho: ρ, at least 1: no site's rank becomes more than ρ times what it was. With 1 all ranks stay.
        tau: τ, the cosine at which a direction has converged.
        fixed: paths of sites that keep their rank, and neither give to the others nor take from them.
        least: the rank that each of the others gets before the rest is shared out, 0 or 1.

    Raises:
        ConfigError: ρ or τ is out of range.
    """

    rho: float = RHO
    tau: float = TAU
    fixed: frozenset[str] = frozenset()
    least: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise ConfigError("rho is out of range", found=self.rho, expected="a number of at least 1", fix="rho=2.0")
        if not 0 < self.tau <= 1:
            raise ConfigError("tau is out of range", found=self.tau, expected="a cosine in (0, 1]", fix="tau=0.99")

    def gather(self, model: nn.Module, sites: Mapping[str, Site], spots: Sequence[Spot], sample: Sample) -> list[Spot]:
        """The spots with rank r' and the first r' directions as `evidence`; those with r' = 0 are left out.

        Raises:
            DataError: no batches, a site without inputs, inputs that are not finite, or too few directions in all.
        """
        ranks = [_ranked(spot.path, spot.method).r for spot in spots]
        watches = {
            spot.path: _Watch(spot.path, sites[spot.path], Directions(self._limit(spot, r)))
            for spot, r in zip(spots, ranks, strict=True)
        }
        found = [watch.directions for watch in watches.values()]
        shares: list[int] = []
        with undisturbed(model), torch.no_grad(), ExitStack() as hooks:
            for watch in watches.values():
                # A handle of a hook is a context manager that removes it.
                hooks.enter_context(watch.site.module.register_forward_pre_hook(watch, with_kwargs=True))
            device, seen = _device(model), 0
            for seen, raw in enumerate(sample.batches, start=1):  # noqa: B007 (whether there was one is asked below)
                batch = moved(raw, device)
                for watch in watches.values():
                    watch.mask = _mask(batch)
                _ = _call(model, batch) if sample.loss is None else sample.loss(model, batch)
                shares = self._shares(spots, ranks, [each.explained() for each in found])
                for watch, share in zip(watches.values(), shares, strict=True):
                    watch.open = not watch.directions.converged(share, self.tau)
                if not any(watch.open for watch in watches.values()):
                    break
            _need_batches(seen)
        if not any(each.count for each in found) and any(watch.reached for watch in watches.values()):
            raise _nothing_left("saw an input", "positions that the attention_mask leaves", 'the "attention_mask"')
        return self._spots(spots, ranks, found, shares)

    def _limit(self, spot: Spot, r: int) -> int:
        most = r if spot.path in self.fixed else round(self.rho * r)
        return min(most, spot.shape.out, spot.shape.inn)

    def _shares(self, spots: Sequence[Spot], ranks: Sequence[int], explained: Sequence[Sequence[float]]) -> list[int]:
        shares = [min(r, len(row)) for r, row in zip(ranks, explained, strict=True)]
        free = [place for place, spot in enumerate(spots) if spot.path not in self.fixed]
        budget = sum(ranks[place] for place in free)
        for place, share in zip(free, share_out([explained[each] for each in free], budget, self.least), strict=True):
            shares[place] = share
        return shares

    def _spots(
        self, spots: Sequence[Spot], ranks: Sequence[int], found: Sequence[Directions], shares: Sequence[int]
    ) -> list[Spot]:
        for spot, directions in zip(spots, found, strict=True):
            if not directions.count:
                raise _unseen(spot.path, "saw no input", "an input for each layer with an adapter")
        if sum(shares) < sum(ranks):
            raise DataError(
                "the inputs in the sample have fewer directions than the adapters have ranks",
                found=f"{sum(shares)} directions in {len(spots)} layers",
                expected=f"at least {sum(ranks)}, the sum of the ranks",
                fix="give the sample more rows, or use a smaller r",
            )
        gathered = []
        for spot, directions, r in zip(spots, found, shares, strict=True):
            if r:
                # A copy: a slice would keep the directions alive that were not chosen.
                evidence = directions.components[:r].clone()
                gathered.append(replace(spot, method=_with_rank(spot, r), evidence=evidence))
        return gathered


@dataclass(frozen=True)
class FirstGradients(Evidence):
    """LoRA-GA's evidence: for each site the gradient of its weight, as a matrix (out, in)."""

    def gather(self, model: nn.Module, sites: Mapping[str, Site], spots: Sequence[Spot], sample: Sample) -> list[Spot]:
        """The spots with the mean gradient over the batches as `evidence`.

        Raises:
            DataError: no batches, a loss or gradient that is not finite, or a site without gradient.
            ConfigError: what the model or `sample.loss` returns is no loss.
        """
        sums: dict[str, Tensor] = {}
        used = {spot.path: sites[spot.path] for spot in spots}
        with undisturbed(model), torch.enable_grad(), _standing_in(used, sums):
            device, seen = _device(model), 0
            for seen, raw in enumerate(sample.batches, start=1):  # noqa: B007 (the mean needs the count)
                batch = moved(raw, device)
                result = _call(model, batch) if sample.loss is None else sample.loss(model, batch)
                _loss(result, given=sample.loss is not None).backward()  # type: ignore[no-untyped-call]
            _need_batches(seen)
            if sums and not any(bool(total.any()) for total in sums.values()):
                raise _nothing_left(
                    "got a gradient", "a loss that depends on the layers", 'the "labels" (-100 is none), the mask'
                )
            return [replace(spot, evidence=_mean(spot.path, used[spot.path], sums, seen)) for spot in spots]


class _Watch:
    """A forward pre-hook that hands a layer's inputs to its `Directions`."""

    def __init__(self, path: str, site: Site, directions: Directions) -> None:
        self.path, self.site, self.directions = path, site, directions
        self.mask: Tensor | None = None
        self.open = True
        self.reached = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.open:
            return
        self.reached = True
        named = dict(kwargs)
        x, *more = args or (named.pop(next(iter(named))),)
        site = self.site.beside(tuple(more), named)
        kind = x.device.type
        # The model may run under autocast; its inputs' directions are wanted in full precision.
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            rows = self._rows(site, x.detach())
            if len(rows) == 0:
                return
            if not rows.isfinite().all():
                raise _not_finite("an input of a layer", self.path)
            self.directions.add(rows)

    def _rows(self, site: Site, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(site, VectorSite):
            mask, rows = self.mask, x.reshape(-1, x.shape[-1])
            if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
                rows = rows[mask.reshape(-1).to(x.device)]
            return rows.to(dtype)
        # The layer's own operation with one row per input of a patch: its channels are the patch's entries.
        eye = torch.eye(site.shape.inn, dtype=x.dtype, device=x.device)
        patches = site.project(x, eye)
        return patches.movedim(-site.channel(eye[0]).dim(), -1).flatten(0, -2).to(dtype)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with all parameters frozen; afterwards everything is as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module, _ in modes
        for name, buffer in module._buffers.items()
    ]
    devices = sorted(
        {p.device.index for p, _, _ in parameters if p.device.type == "cuda" and p.device.index is not None}
    )
    try:
        with torch.random.fork_rng(devices=devices):
            for module, _ in modes:
                module.training = False  # not eval(): some models override that to do more
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required, grad in parameters:
            parameter.requires_grad_(required)
            parameter.grad = grad
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)


@contextmanager
def _standing_in(sites: Mapping[str, Site], sums: dict[str, Tensor]) -> Iterator[None]:
    """Gives each layer a parameter of its own over the same memory, whose gradients are added up in `sums`.

    The model's own parameters then get no gradient, and a weight that two layers share has one for each of them. Each
    gradient leaves the device as soon as it is complete, so that one at a time is there.
    """
    own = {path: site.raw_weight for path, site in sites.items()}

    def collect(path: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            grad = grad.to_dense() if grad.layout != torch.strided else grad
            grad = grad.to(device="cpu", dtype=torch.promote_types(grad.dtype, torch.float32))
            sums[path] = sums[path].add_(grad) if path in sums else grad

        return hook

    try:
        for path, site in sites.items():
            stand_in = nn.Parameter(own[path].detach())
            stand_in.register_post_accumulate_grad_hook(collect(path))  # type: ignore[no-untyped-call]
            site.module._parameters["weight"] = stand_in
        yield
    finally:
        for path, site in sites.items():
            site.module._parameters["weight"] = own[path]


def _mean(path: str, site: Site, sums: dict[str, Tensor], batches: int) -> Tensor:
    total = sums.pop(path, None)
    if total is None or not total.any():
        raise _unseen(path, "got no gradient", "a loss that depends on each layer with an adapter")
    if not total.isfinite().all():
        raise _not_finite("the first gradient of a layer", path)
    # `unfold` only rearranges a matrix into the layer's own layout, so that its derivative is the way back.
    matrix = torch.zeros(site.shape.out, site.shape.inn, dtype=total.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(site.unfold(matrix), matrix, total)
    return gradient.div_(batches)


def _loss(result: object, *, given: bool) -> Tensor:
    """The scalar loss in what a model or `Sample.loss` returned."""
    loss = result.loss if isinstance(result, HasLoss) and not given else result
    if not isinstance(loss, Tensor) or loss.dim():
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ConfigError(
            "this is no loss",
            where="what Sample.loss returned" if given else "what the model returned for a batch of the sample",
            found=f"{type(result).__name__}{shape}" if loss is result else f"loss = {type(loss).__name__}{shape}",
            expected="a scalar tensor" if given else "a scalar tensor, or something whose attribute `loss` is one",
            fix="return loss.mean()" if given else "put labels into the batches, or give Sample(batches, loss=...)",
        )
    if not loss.isfinite():
        raise _not_finite("the loss", "a batch of the sample", "; labels that are all -100 have no mean")
    if not loss.requires_grad:
        raise ConfigError(
            "the loss depends on none of the adapted layers",
            found="a loss without gradient",
            expected="a loss computed by the model from the batch",
            fix="remove torch.no_grad() or .detach() from what computes it",
        )
    return loss


def _call(model: nn.Module, batch: Batch) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return (tuple if isinstance(batch, tuple) else list)(moved(value, device) for value in batch)
    return batch


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _ranked(path: str, method: Method) -> Ranked:
    """The innermost method, which has the rank."""
    while isinstance(method, Around):
        method = method.within
    if not isinstance(method, Ranked):
        raise ConfigError(
            "ranks cannot be shared out over a method that has none",
            where=path,
            found=type(method).__name__,
            expected="LoRA, or a method around it",
            fix='init="default"',
        )
    return method


def _with_rank(spot: Spot, r: int) -> Method:
    """The spot's method with another rank and the alpha that keeps its scale."""
    now = _ranked(spot.path, spot.method)
    if r == now.r:
        return spot.method
    # The scale is linear in alpha, by a factor that is the method's own (1 / r, or 1 / √r for rsLoRA).
    reference = _ranked(spot.path, spot.method.at(r=r, alpha=float(r)))
    alpha = now.scale * r / reference.scale
    return spot.method.at(r=r, alpha=int(alpha) if alpha.is_integer() else alpha)


def _need_batches(seen: int) -> None:
    if not seen:
        raise DataError(
            "the sample has no batches",
            where="Sample.batches",
            found="an iterable that ended at once",
            expected="a few dozen batches",
            fix="Sample(list(itertools.islice(loader, 32))), which can also be read twice",
        )


def _unseen(path: str, what: str, expected: str) -> DataError:
    return DataError(
        f"a layer {what} in the whole sample",
        where=path,
        found="a layer that no batch reached, such as an expert that no token chose",
        expected=expected,
        fix=f"give the sample more batches, or leave the layer out with exclude=[{path!r}]",
    )


def _nothing_left(what: str, expected: str, suspects: str) -> DataError:
    return DataError(
        f"not one of the layers {what} in the whole sample: the mask or the labels of its batches leave nothing",
        where="Sample.batches",
        found="batches that count nowhere",
        expected=expected,
        fix=f"look at {suspects} and the loss of these batches",
    )


def _not_finite(what: str, where: str, hint: str = "") -> DataError:
    fix = f"check the sample and the model{hint}"
    return DataError(f"{what} is not finite", where=where, found="inf or nan", fix=fix)
