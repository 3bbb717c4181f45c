"""Loading a model into int8 rows tensor by tensor, so that the whole of it is never in memory in any other form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorafit.adapted import walk
from lorafit.errors import CheckpointError, nearest, some
from lorafit.layers import Site, site_of
from lorafit.plan import Modules
from lorafit.quant.convert import Quantised, Tally, put
from lorafit.quant.modules import SCALE, Int8Layer
from lorafit.quant.reading import tensors
from lorafit.quant.rows import Rows, pack
from lorafit.quant.selecting import select
from lorafit.targets import ALL_LINEAR, Targets

Source = str | Path | Iterable[tuple[str, Tensor]]


class _Unfilled(TorchFunctionMode):
    """Within it `torch.empty` gives tensors without memory. Layers make their weights of it; what is computed is real.

    Under the meta device buffers that no checkpoint holds (a table of angles) would be lost as well.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:  # where one is named, the memory is wanted
            given["device"] = "meta"
        return func(*args, **given)


def load_quantised(
    build: Callable[[], nn.Module],
    source: Source,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: Targets = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Quantised]:
    """Makes a model whose linear layers are int8 rows from a checkpoint, one tensor at a time.

    It ends as `quantise` on the loaded model would. At no time is more in memory than the int8 model and one tensor.

    Args:
        build: makes the model, such as ``lambda: AutoModelForCausalLM.from_config(config)``. Its weights get no memory.
        source: a folder with ``model.safetensors`` or shards and their index, one such file, or pairs (key, tensor),
            where each tensor may have the memory of the one before. Keys are those of the model's ``state_dict``;
            weights that are int8 rows already are taken as they are.
        targets: as for `quantise`.
        exclude: as for `quantise`.
        dtype: of all that is not quantised; None leaves it as the checkpoint has it.
        device: where the model will be.

    Returns:
        The model, and which layers were packed at which error (those packed already are not counted).

    Raises:
        TargetError: a pattern matches nothing, or a layer cannot be quantised.
        CheckpointError: a file cannot be read, or does not fit the model.
        ConfigError: a weight is not finite.
    """
    with _Unfilled():
        model = build()
    filling = _Filling.of(model, select(model, targets, exclude), dtype, torch.device(device))
    origin = str(source) if isinstance(source, str | Path) else "the pairs given"
    tally = Tally()
    with torch.inference_mode(False), torch.no_grad():
        for key, tensor in tensors(Path(source)) if isinstance(source, str | Path) else source:
            filling.take(key, tensor, tally, origin)
        filling.finish(origin)
    return model.to(device), tally.result()


@dataclass
class _Filling:
    """A model that gets its tensors one after the other."""

    model: nn.Module
    places: dict[str, list[tuple[nn.Module, str]]]
    """Key → the modules, and their attributes, that are to hold this one tensor."""
    paths: frozenset[str]
    aliases: Mapping[str, str]
    """Every path → the first one of the same module."""
    dtype: torch.dtype | None
    device: torch.device
    filled: set[int] = field(default_factory=set)
    halves: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    taken: set[str] = field(default_factory=set)
    packed: set[str] = field(default_factory=set)
    """The layers that were packed here, from weights without a scale."""

    @classmethod
    def of(cls, model: nn.Module, paths: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> _Filling:
        """Reads a model."""
        holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        keys: dict[str, int] = {}
        for path, module, _ in walk(model):
            kept = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for name, tensor in [*module._parameters.items(), *kept.items()]:
                if tensor is not None:
                    holders[id(tensor)].append((module, name))
                    keys[_key(path, name)] = id(tensor)
        places = {key: holders[each] for key, each in keys.items()}
        return cls(model, places, frozenset(paths), Modules.of(model).aliases, dtype, device)

    def take(self, key: str, tensor: Tensor, tally: Tally, origin: str) -> None:
        """Puts one tensor where it belongs."""
        if key in self.taken:
            raise _twice(key, "twice", origin)
        self.taken.add(key)
        path, _, name = key.rpartition(".")
        path = self.aliases.get(path, path)
        if path in self.paths and name in ("weight", SCALE):
            self._pack(path, name, key, tensor, tally, origin)
            return
        if key not in self.places:
            raise CheckpointError(
                "the checkpoint has a tensor that the model has not",
                where=f"{key} in {origin}",
                expected="keys of the model's state_dict",
                near=nearest(key, self.places),
                fix="build the model that the checkpoint was made of, or load it as usual and call quantise(model)",
            )
        places = self.places[key]
        before = self._tensor(*places[0])
        self._check(key, tensor, before.shape, origin)
        kind = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if id(places) in self.filled:  # one tensor under two names
            _check_same(key, before, tensor.to(self.device, kind), origin)
            return
        # A copy: the memory is that of the next tensor, too.
        value: Tensor = torch.empty(tensor.shape, dtype=kind, device=self.device).copy_(tensor)
        if isinstance(before, nn.Parameter):
            value = nn.Parameter(value, requires_grad=before.requires_grad and value.is_floating_point())
        for module, attribute in places:
            setattr(module, attribute, value)
        self.filled.add(id(places))

    def _pack(self, path: str, name: str, key: str, tensor: Tensor, tally: Tally, origin: str) -> None:
        module = self.model.get_submodule(path)
        site = site_of(module)
        filled, half = id(self.places[_key(path, "weight")]) in self.filled, self.halves.get(path, {})
        if name == "weight" and tensor.is_floating_point():
            self._check(key, tensor, site.raw_weight.shape, origin)
            if half or (filled and path not in self.packed):
                raise _unscaled(key, tensor, origin)
            rows = pack(site.unfold(tensor).to(self.device))
            if filled:
                _check_same(key, self._tensor(module, "weight"), site.unfold(rows.values), origin)
                _check_same(key, self._tensor(module, SCALE), site.unfold(rows.scale), origin)
                return
            tally.add(path, rows, tensor.element_size())
            self.packed.add(path)
        elif path in self.packed:
            raise _unscaled(key, tensor, origin)
        elif filled or name in half:
            _check_same(key, half[name] if name in half else self._tensor(module, name), tensor, origin)
            return
        else:  # packed already: the values and their scale come one after the other, in any order
            half = self.halves[path]
            half[name] = torch.empty_like(tensor, device=self.device).copy_(tensor)
            if len(half) < 2:
                return
            del self.halves[path]
            rows = self._rows(path, site, half["weight"], half[SCALE], origin)
        put(site, rows)
        self.filled.add(id(self.places[_key(path, "weight")]))

    def _check(self, key: str, tensor: Tensor, shape: torch.Size, origin: str) -> None:
        if tensor.shape != shape:
            raise CheckpointError(
                "a tensor of the checkpoint has another shape than the model's",
                where=f"{key} in {origin}",
                found=str(tuple(tensor.shape)),
                expected=str(tuple(shape)),
                fix="build the model that the checkpoint was made of",
            )

    def _rows(self, path: str, site: Site, values: Tensor, scale: Tensor, origin: str) -> Rows:
        self._check(_key(path, "weight"), values, site.raw_weight.shape, origin)
        shape = site.unfold(torch.empty(site.shape.out, 1, device="meta")).shape
        self._check(_key(path, SCALE), scale, shape, origin)
        if values.dtype != torch.int8 or scale.dtype != torch.float32:
            raise CheckpointError(
                "these are not int8 rows",
                where=f"{path} in {origin}",
                found=f"weight {values.dtype}, {SCALE} {scale.dtype}",
                expected=f"weight {torch.int8}, {SCALE} {torch.float32}",
                fix=f"exclude=[{path!r}], or a checkpoint of plain weights",
            )
        return Rows(site.unfold(values), site.unfold(scale), 0.0, 0.0)

    def finish(self, origin: str) -> None:
        """Raises `CheckpointError` if a tensor is missing."""
        halved = {id(self.places[_key(path, "weight")]) for path in self.halves}
        missing = [key for key, places in self.places.items() if id(places) not in self.filled | halved]
        for path, half in self.halves.items():
            missing.append(_key(path, SCALE if "weight" in half else "weight"))
        for path, module, _ in walk(self.model):
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta" and not isinstance(module, Int8Layer):
                    missing.append(_key(path, name))
        if missing:
            raise CheckpointError(
                "the checkpoint does not have all that the model needs",
                where=origin,
                found=f"no {some(dict.fromkeys(missing), 4)}",
                expected=f"{len(self.places)} tensors",
                fix="build the model that the checkpoint was made of, or load it as usual and call quantise(model)",
            )

    @staticmethod
    def _tensor(module: nn.Module, name: str) -> Tensor:
        tensor = {**module._buffers, **module._parameters}[name]
        assert tensor is not None
        return tensor


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_same(key: str, before: Tensor, tensor: Tensor, origin: str) -> None:
    """Raises `CheckpointError` unless a tensor that was given under another name is the same here."""
    if before.dtype != tensor.dtype or not torch.equal(before.to(tensor.device), tensor):
        raise _twice(key, "with different numbers under different names of it", origin)


def _twice(key: str, found: str, origin: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint has a tensor of the model more than once",
        where=f"{key} in {origin}",
        found=found,
        expected="every tensor once, or the same numbers for each of its names",
        fix="leave out the ones that are not meant",
    )


def _unscaled(key: str, tensor: Tensor, origin: str) -> CheckpointError:
    return CheckpointError(
        "a floating-point weight has a scale beside it",
        where=f"{key} in {origin}",
        found=f"{tensor.dtype}, beside the other of the two",
        expected=f"weight {torch.int8} with {SCALE} {torch.float32}, or a plain weight alone",
        fix="give int8 rows as they were saved (never cast them), or plain weights multiplied by their scale",
    )
