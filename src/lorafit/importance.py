"""How much each site's update contributes to what its layer puts out, on data: the score of LoRA-drop.

gᵢ = meanₓ Σ ‖ΔWᵢ xᵢ‖² over the positions of a sample that are no padding, and Iᵢ = gᵢ / Σⱼ gⱼ (Zhou et al. 2024,
arXiv:2402.07721). ΔW is W' − W, with the scale and the gain that the adapter has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapted import plain_class
from lorafit.errors import DataError, StateError, some
from lorafit.handle import Handle
from lorafit.layers import Acting, Site, apply
from lorafit.method import Adapter, Batch, check_batches
from lorafit.methods.evidence import moved
from lorafit.rest import at_rest

MASK = "attention_mask"

ROUNDING = 1e-6
"""An update that is less than this beside what its layers put out is what rounding leaves of B A − B₀ A₀ = 0."""


def importance(
    handle: Handle,
    batches: Iterable[Batch],
    *,
    forward: Callable[[nn.Module, Batch], object] | None = None,
    mask: Callable[[Batch], Tensor | None] | None = None,
) -> dict[str, float]:
    """The share of each site in the squared output of an adapter's updates.

    The model runs without dropout and gradients, with the adapters that are active, and is left as it was.

    Args:
        handle: a trained adapter that is active and not merged.
        batches: mappings of keyword arguments, tuples of arguments, or tensors; one row is one sample. They are moved
            to the model's device.
        forward: runs the model on one batch; None calls it with the batch.
        mask: gives of a batch what is no padding, (batch, positions), or None where all of it counts. By default the
            batch's own "attention_mask", where it is a mapping that has one.

    Returns:
        Module path → Iᵢ, in model order; their sum is 1. A layer that no batch reaches has 0.

    Raises:
        ConfigError: `batches` is no iterable of batches.
        DataError: no batches, an adapter that changes nothing yet, outputs that are not finite, or a mask that leaves
            nothing or does not fit what a layer sees.
        StateError: the adapter is not active, merged, or a layer was replaced.
    """
    check_batches(batches, "importance.batches", "importance(handle, [batch])")
    handle.check_sites("score")
    if handle.merged or handle.name not in handle.active:
        raise StateError(
            f"adapter {handle.name!r} is {'merged' if handle.merged else 'not active'}",
            expected="an active adapter that is not merged",
            fix="handle.unmerge()" if handle.merged else f"handle.activate({handle.name!r})",
        )
    model = handle.model
    meter = _Meter(handle)
    count = left = 0
    with at_rest(model), meter:
        for batch in batches:
            count += 1
            ready = moved(batch, next(model.parameters()).device)
            meter.mask = _mask_of(ready) if mask is None else mask(ready)
            left += meter.mask is None or bool(meter.mask.any())
            (_call if forward is None else forward)(model, ready)
    if count == 0:
        raise DataError(
            "there is nothing to score the sites on", found="no batches", expected="at least one", fix="give batches"
        )
    if left == 0:
        raise DataError(
            "the mask leaves nothing to score the sites on: all of it is padding",
            found=f"{count} batches whose mask is 0 everywhere",
            expected="positions that count",
            fix="look at the batches' attention_mask, or give mask=lambda batch: None to count all positions",
        )
    return _shares(meter.sums, math.fsum(meter.outputs.values()))


def _shares(sums: Mapping[str, float], output: float) -> dict[str, float]:
    """Each site's share of the sum; `output` is what all sites put out, squared, and says what rounding may leave."""
    wrong = [path for path, value in sums.items() if not math.isfinite(value)]
    if wrong:
        raise DataError(
            "the output of an update is not finite",
            where=some(wrong, 3),
            found=sums[wrong[0]],
            expected="finite numbers",
            fix="lower the learning rate with which the adapter was trained",
        )
    total = math.fsum(sums.values())
    if total == 0 or total < ROUNDING**2 * output:
        size = "zero" if total == 0 else "no more than rounding"
        raise DataError(
            f"the adapter learnt nothing: its output is {size} at every site",
            found=f"{len(sums)} sites"
            + (f", {math.sqrt(total / output):.1g} of what their layers put out" if total else ""),
            expected="a trained adapter",
            fix="train it for longer or at a higher rate",
        )
    # The mean over samples divides every g by the same number, which falls away here.
    return {path: value / total for path, value in sums.items()}


class _Meter:
    """Adds up ‖ΔW x‖² of every site, and the square of what it puts out, while it is entered."""

    def __init__(self, handle: Handle) -> None:
        self.mask: Tensor | None = None
        self.sums = dict.fromkeys(handle.sites, 0.0)
        self.outputs = dict.fromkeys(handle.sites, 0.0)
        self._handle = handle
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as hooks:
            for path, site in self._handle.sites.items():
                hook = site.module.register_forward_hook(self._hook(path, site), with_kwargs=True)
                hooks.callback(hook.remove)
            self._hooks = hooks.pop_all()

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _hook(self, path: str, site: Site) -> Callable[..., None]:
        adapter = self._handle.adapter(path)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            more, named = args[1:], {key: value for key, value in kwargs.items() if args or key != "input"}
            # In full precision: squares of small numbers would vanish in float16, and sums would stall.
            with torch.autocast(x.device.type, enabled=False):
                squares = _change(site.beside(more, named), adapter, x, output, more, named).square()
                axis = squares.dim() - site.channel(squares.new_empty(site.shape.out)).dim()
                self.sums[path] += float(_kept(squares.sum(axis), self.mask, path).sum())
                whole = output.detach().to(squares.dtype).square().sum(axis)
                self.outputs[path] += float(_kept(whole, self.mask, path).sum())

        return add


def _change(
    site: Site, adapter: Adapter, x: Tensor, output: Tensor, more: tuple[Any, ...], named: Mapping[str, Any]
) -> Tensor:
    """What an adapter's update changes of a layer's output for x, in at least single precision.

    Args:
        site: the layer in that call.
        adapter: its adapter.
        x: its input.
        output: what it gave.
        more: what it was given beside x.
        named: the same, by name.
    """
    update = adapter.update(site.weight)
    dtype = torch.promote_types(output.dtype, torch.float32)
    if update.gain is None:
        y = torch.zeros_like(output, dtype=dtype)
    else:
        weight = site.raw_weight
        base = x.to(weight.dtype) if x.is_floating_point() else x
        y = plain_class(site.module).forward(site.module, base, *more, **named).to(dtype)
    return apply(site, x.to(dtype) if x.is_floating_point() else x, y, [Acting(update, 0.0)]) - y


def _kept(values: Tensor, mask: Tensor | None, path: str) -> Tensor:
    """`values` (batch, positions), in whatever way a layer sees them, with zeros for padding."""
    if mask is None or bool(mask.all()):
        return values
    if values.shape == mask.shape:
        return torch.where(mask.to(values.device, torch.bool), values, 0)
    if values.dim() == 1 and values.shape[0] == mask.numel():  # all positions in one row, as some models have them
        return torch.where(mask.to(values.device, torch.bool).flatten(), values, 0)
    if values.dim() == 1 and values.shape[0] == mask.shape[0]:  # one vector for a whole sample
        return values
    raise DataError(
        "the mask does not fit what this layer sees, so padding cannot be told from text there",
        where=path,
        found=f"outputs at {tuple(values.shape)} positions, a mask of shape {tuple(mask.shape)}",
        expected=f"{tuple(mask.shape)} or ({mask.numel()},) positions",
        fix="score on batches without padding (batch size 1), or give mask=lambda batch: None to count all positions",
    )


def _mask_of(batch: Batch) -> Tensor | None:
    found = batch.get(MASK) if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _call(model: nn.Module, batch: Batch) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
