"""Storing the linear layers of a model as int8 rows, and turning stored forms back into plain weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.activation import check_settled
from lorafit.adapted import adapted, bank_of, banks, walk
from lorafit.errors import ConfigError, StateError
from lorafit.layers import Conv1DSite, PackedSite, Site, Stored, site_of
from lorafit.ledger import LEDGER, Ledger
from lorafit.plan import Modules
from lorafit.quant.modules import SCALE, install
from lorafit.quant.rows import Rows, pack
from lorafit.quant.selecting import select
from lorafit.targets import ALL_LINEAR, Targets


@dataclass(frozen=True)
class Quantised:
    """What was stored as int8 rows, and what that cost.

    Attributes:
        layers: module path → ‖W − W_stored‖ / ‖W‖ of that layer.
        error: the same for all of them taken together.
        before, after: bytes of these weights.
    """

    layers: Mapping[str, float]
    error: float
    before: int
    after: int

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest error, and that error; None where nothing was packed."""
        return max(self.layers.items(), key=lambda row: row[1], default=None)

    def __str__(self) -> str:
        if self.worst is None:
            return "no layer packed"
        path, error = self.worst
        return (
            f"{len(self.layers)} layers as int8 rows: {self.before / 1e6:,.1f} MB → {self.after / 1e6:,.1f} MB; "
            f"relative error {self.error:.2%}, at worst {error:.2%} ({path})"
        )


class Tally:
    """Adds up what packing costs, layer by layer."""

    def __init__(self) -> None:
        self._layers: dict[str, float] = {}
        self._squares = self._lost = 0.0
        self._before = self._after = 0

    def add(self, path: str, rows: Rows, width: int) -> None:
        """One layer whose numbers had `width` bytes each.

        Raises:
            ConfigError: its weight was not finite.
        """
        check_finite(path, math.isfinite(rows.squares))
        self._layers[path] = rows.error
        self._squares += rows.squares
        self._lost += rows.lost
        self._before += rows.values.numel() * width
        self._after += rows.values.numel() + 4 * rows.scale.numel()

    def result(self) -> Quantised:
        """All of it."""
        error = math.sqrt(self._lost / self._squares) if self._squares else 0.0
        return Quantised(dict(self._layers), error, self._before, self._after)


def check_finite(path: str, finite: bool) -> None:
    """Raises `ConfigError` for a weight that is not finite."""
    if not finite:
        raise ConfigError(
            "a weight is not finite, so its rows have no scale",
            where=f"{path}.weight" if path else "weight",
            found="infinite values, values that are not numbers, or beyond float32",
            expected="finite values",
            fix="look for a damaged checkpoint, or leave the layer out with exclude=",
        )


def quantise(model: nn.Module, targets: Targets = ALL_LINEAR, *, exclude: Targets = ()) -> Quantised:
    """Stores linear layers of `model` as 8-bit integers, in place: a quarter of float32's memory.

    Every module stays the object it was and an instance of its own class. Its `weight` is then int8, and a buffer
    `weight_scale` holds one number for each output. Such layers are frozen; adapters are trained over them. One layer
    at a time is converted, and no second model is made.

    Args:
        model: any PyTorch model on any device, without adapters.
        targets: "all-linear" (every linear layer but the output layer), a regular expression for whole module paths, or
            a list of path suffixes.
        exclude: a regular expression or a list of suffixes to leave out.

    Returns:
        Which layers, and the relative error of each and of all.

    Raises:
        TargetError: a pattern matches nothing, or a layer cannot be quantised. The model is as it was.
        ConfigError: a weight is not finite. The model is as it was.
        StateError: the model has adapters. The order is quantise, attach, shard, compile.
    """
    modules = {path: model.get_submodule(path) for path in select(model, targets, exclude)}
    for path, module in modules.items():
        weight = module._parameters["weight"]
        assert weight is not None
        if weight.device.type == "meta":
            raise ConfigError(
                "a weight has no values yet",
                where=f"{path}.weight" if path else "weight",
                found="the meta device",
                expected="a loaded model",
                fix="load the weights first, or use load_quantised",
            )
        check_finite(path, bool(torch.stack(torch.aminmax(weight.detach())).float().isfinite().all()))
    tally = Tally()
    with torch.inference_mode(False), torch.no_grad():
        for path, module in modules.items():
            site = site_of(module)
            width = site.raw_weight.element_size()
            rows = pack(site.weight().detach())
            tally.add(path, rows, width)
            put(site, rows)
    return tally.result()


def dequantise(model: nn.Module, *, dtype: torch.dtype | None = None) -> list[str]:
    """Turns every quantised linear layer of `model` into a plain one with the weight that it stood for, in place.

    Adapters stay attached and compute what they did; merging them is then exact to rounding.

    Args:
        model: a model with int8 rows, or with layers of bitsandbytes or torchao.
        dtype: of the new weights. None is the type in which the model works: that of the layer's bias, or of most of
            the model's other parameters; float32 where there are none.

    Returns:
        The paths of the layers that were changed.

    Raises:
        StateError: an adapter is merged into the weights, which could then not be unmerged, or `disabled` has taken
            a merged one out for a while.
        ConfigError: `dtype` is not of floating-point numbers.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(
            "a weight needs a floating-point type", found=str(dtype), expected="torch.float32", fix="dtype=None"
        )
    for _, module, _ in walk(model):
        ledger = vars(module).get(LEDGER)
        check_settled(ledger.lifted if isinstance(ledger, Ledger) else None)
    for bank in banks(model):
        if bank.merged:
            raise StateError(
                "an adapter is merged into the weights now",
                found=f"adapter {bank.merged[0]!r}, merged",
                expected="the base model's own weights",
                fix="unmerge it first, or merge_and_detach() to keep it in the weights for good",
            )
    modules = Modules.of(model)
    usual = _working(modules)
    changed = []
    with torch.inference_mode(False), torch.no_grad():
        for path in modules.known():
            module = modules.by_path[path]
            site = modules.sites([path])[0]
            if isinstance(site, PackedSite):
                bias = site.bias()
                kind = dtype or (usual if bias is None else bias.dtype)
                matrix = Stored(site.stored(torch.promote_types(kind, torch.float32)))()
                weight = site.unfold(matrix.to(kind)).contiguous()
                site.unpack(weight, _same if bank_of(module) is None else adapted)
                changed.append(path)
    return changed


def _working(modules: Modules) -> torch.dtype:
    """The type of most of the model's floating-point numbers, or float32; what is packed says nothing of it."""
    counts: dict[torch.dtype, int] = {}
    for module in modules.by_path.values():
        kept: list[Tensor | None] = [*module._parameters.values()]
        kept += [buffer for name, buffer in module._buffers.items() if name != SCALE]
        for tensor in kept:
            if tensor is not None and tensor.is_floating_point():
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__, default=torch.float32)


def _same(kind: type[nn.Module]) -> type[nn.Module]:
    return kind


def put(site: Site, rows: Rows) -> None:
    """Gives a plain layer packed rows for its weight, in its own layout."""
    transposed = isinstance(site, Conv1DSite)
    values, scale = (site.unfold(each).contiguous() for each in (rows.values, rows.scale))
    install(site.module, values, scale, transposed=transposed)
