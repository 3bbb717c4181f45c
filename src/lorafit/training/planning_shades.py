"""Tensors that have a shape and no memory, and a ledger of what they would take: a step can be priced without doing it.

A `Shade` says that it is on the CPU, so that layers, autograd and kernels take the ways that they take there, and holds
a tensor on the meta device, on which every operation is done. While a `Ledger` is open, large new tensors are shades;
small ones, such as token ids and masks, stay real, so that what looks at their values still can. The ledger adds up the
bytes of the memory that is alive, and keeps for every operation its floating-point operations and the bytes it moves.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

MOST = 200_000
"""Operations of a step that is still priced; it takes about a minute then."""
REAL = 2**14
"""Numbers of the largest new tensor that is real; a mask of 128 x 128 still is."""


@final
class Shade(Tensor):
    """A tensor without memory; `meta` has its shape and its aliases.

    Its values are not known, but where they came from is: two with one `origin` would be equal.
    """

    meta: Tensor
    origin: object

    @staticmethod
    def __new__(cls, meta: Tensor, origin: object = None) -> Shade:
        make: Any = Tensor._make_wrapper_subclass
        layout = {"strides": meta.stride(), "storage_offset": meta.storage_offset()}
        made: Shade = make(cls, meta.shape, dtype=meta.dtype, device=torch.device("cpu"), **layout)
        made.meta = meta
        made.origin = object() if origin is None else origin
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shade({tuple(self.shape)}, {self.dtype})"

    def untyped_storage(self) -> Any:
        """The memory that it stands for, with an address of its own: what looks for shared tensors compares those."""
        return _Storage(self.meta.untyped_storage())

    def data_ptr(self) -> int:
        """As of its memory."""
        address: int = self.untyped_storage().data_ptr()
        return address + int(self.meta.storage_offset()) * self.meta.element_size()

    def tolist(self) -> Any:
        """Zeros: nobody knows its values."""
        return torch.zeros(self.shape).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own: Any = self  # a parameter is of this class and says that it is one
        made: Any = Shade(torch.empty_like(self.meta))
        memo[id(self)] = nn.Parameter(made, own.requires_grad) if isinstance(own, nn.Parameter) else made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return shaded(func, args, dict(kwargs or {}))


@final
class _Storage:
    """What is asked of a storage: an address, which is that of the object that stands for it, and a size."""

    def __init__(self, of: torch.UntypedStorage) -> None:
        self._of = of

    def data_ptr(self) -> int:
        return id(self._of)

    def _weak_ref(self) -> Any:
        """As torch's own references to storages ask for it."""
        return self._of._weak_ref()

    def nbytes(self) -> int:
        return self._of.nbytes()


class Work(NamedTuple):
    """One operation: its floating-point operations, and the bytes that it reads and writes."""

    flops: int
    moved: int


@final
class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open: the bytes alive among what was made since, the most there were, and the work that was done."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen = 0
        self.work: Counter[Work] = Counter()
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        tensors = [one for one in _leaves((args, given)) if isinstance(one, Tensor)]
        if any(isinstance(one, Shade) for one in tensors):
            out = shaded(func, args, given)
        else:
            out = self._small_or_shaded(func, args, given, tensors)
        made = [one for one in _leaves(out) if isinstance(one, Tensor)]
        for one in made:
            self._count(one)
        if not func.is_view:
            moved = sum(one.numel() * one.element_size() for one in (*tensors, *made))
            self.work[Work(_flops(func, args, made), moved)] += 1
            self._seen += 1
            if self._seen > MOST:
                raise RuntimeError(f"it takes more than {MOST:,} operations")
        return out

    def known(self, tensor: Tensor) -> None:
        """Takes a tensor's memory for counted elsewhere: that of a weight."""
        self._known.add(_storage(tensor))

    def _count(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size

    def _small_or_shaded(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """An operation on real tensors, or one that makes a tensor of nothing."""
        if func._schema.is_mutable or not _large(func, args, kwargs, tensors):
            return func(*args, **kwargs)
        return shaded(func, args, kwargs)


def shades(module: nn.Module) -> None:
    """Replaces every parameter and buffer of a module on the meta device by a shade; what is shared stays shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    shade = Shade(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        made[id(tensor)] = nn.Parameter(shade, tensor.requires_grad)
                    else:
                        made[id(tensor)] = shade
                held[name] = made[id(tensor)]


def held_bytes(tensors: Any) -> int:
    """Bytes of the memory behind some tensors, shared memory once."""
    return sum({id(storage): storage.nbytes() for storage in map(_storage, tensors)}.values())


def shaded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation on the meta device, its results as shades."""
    if func is aten._local_scalar_dense.default:
        return 0  # nobody knows: what branches on a value takes the way of zero
    if func is aten.equal.default:
        return args[0].shape == args[1].shape and _origin(args[0]) == _origin(args[1])
    if func is aten.index.Tensor:
        args = (args[0], [part for one in args[1] for part in _places(one)])
    inner = {name: value for name, value in kwargs.items() if name != "generator"}
    if inner.get("device") is not None:
        inner["device"] = torch.device("meta")
    shape = _SHAPED.get(func._schema.name, func)
    out = shape(*_mapped(_meta, args), **_mapped(_meta, inner))
    # An operation in place gives back what it was given.
    known = {id(one.meta): one for one in _leaves((args, kwargs)) if isinstance(one, Shade)}
    origin = _made_by(func, args, kwargs)
    if func._schema.is_mutable:
        for one in known.values():
            one.origin = origin  # of which it was changed nobody asks: that it is another now is enough
    several = isinstance(out, list | tuple)
    places = iter(range(len(_leaves(out))))

    def shade(one: Any) -> Any:
        place = next(places)
        if not isinstance(one, Tensor):
            return one
        return known[id(one)] if id(one) in known else Shade(one, (origin, place) if several else origin)

    return _mapped(shade, out)


def _made_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> object:
    """What tells a result from all others: the operation and what went in; nothing of the kind for random ones."""
    if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
        return object()
    if func in (aten.detach.default, aten.alias.default):
        return _origin(args[0])
    given = [_origin(one) if isinstance(one, Tensor) else repr(one) for one in _leaves((args, dict(kwargs)))]
    # The order of the two factors of a product changes no bit of it.
    return hash((func, *(sorted(given, key=hash) if func is aten.mul.Tensor else given)))


def _origin(one: Tensor) -> object:
    """Of a real tensor its values, which are few."""
    if isinstance(one, Shade):
        return one.origin
    return hash((one.dtype, tuple(one.shape), repr(one.tolist()))) if one.device.type != "meta" else object()


def _leaves(tree: Any) -> list[Any]:
    """What stands in nested lists, tuples and mappings; torch's own way takes longer than the operations do."""
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in (_leaves(part) if isinstance(part, list | tuple | dict) else (part,))]
    return _leaves(list(tree.values())) if isinstance(tree, dict) else [tree]


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same lists, tuples and mappings with every leaf changed."""
    if isinstance(tree, list | tuple):
        parts = [_mapped(change, part) for part in tree]
        return tuple(parts) if isinstance(tree, tuple) else parts
    if isinstance(tree, dict):
        return {name: _mapped(change, part) for name, part in tree.items()}
    return change(tree)


def _places(index: Any) -> list[Any]:
    """An index of truths whose values are known, as indices of numbers: how many there are decides a shape."""
    if isinstance(index, Tensor) and not isinstance(index, Shade) and index.dtype == torch.bool:
        return list(index.nonzero(as_tuple=True))
    return [index]


def _meta(one: Any) -> Any:
    if isinstance(one, Shade):
        return one.meta
    return one.to("meta") if isinstance(one, Tensor) and one.device.type != "meta" else one


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.meta.untyped_storage() if isinstance(tensor, Shade) else tensor.untyped_storage()


def _large(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether a result has more numbers than a real tensor is to have; what cannot be told on meta is small."""
    inner = {name: value for name, value in kwargs.items() if name != "generator"}
    if "device" in inner or not tensors:
        inner["device"] = torch.device("meta")
    try:
        out = func(*_mapped(_meta, args), **_mapped(_meta, inner))
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return any(one.numel() > REAL for one in _leaves(out) if isinstance(one, Tensor))


def _flops(func: Any, args: Any, made: list[Tensor]) -> int:
    count = _FLOPS.get(func._schema.name)
    return 0 if count is None else count(args, made)


def _product(first: int, second: int) -> Callable[[Any, list[Tensor]], int]:
    """Of matrix products: twice the numbers of the first factor times the columns of the second."""
    return lambda args, made: 2 * math.prod(args[first].shape) * int(args[second].shape[-1])


def _attention(first: int, products: int) -> Callable[[Any, list[Tensor]], int]:
    """Of fused attention whose queries, keys and values are the arguments from `first` on."""
    return lambda args, made: 2 * products * args[first].numel() * int(args[first + 1].shape[-2])


def _convolution(args: Any, made: list[Tensor]) -> int:
    return 2 * made[0].numel() * int(args[1][0].numel())


_FLOPS: Mapping[str, Callable[[Any, list[Tensor]], int]] = {
    "aten::mm": _product(0, 1),
    "aten::bmm": _product(0, 1),
    "aten::addmm": _product(1, 2),
    "aten::addmm_": _product(1, 2),
    "aten::baddbmm": _product(1, 2),
    "aten::baddbmm_": _product(1, 2),
    "aten::_grouped_mm": _product(0, 1),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention(0, 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention(1, 5),
    "aten::convolution": _convolution,
}
"""Floating-point operations of what takes most of the time; everything else is priced by the bytes it moves."""


def _grouped(left: Tensor, right: Tensor, groups: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The shape of a product of groups, which torch tells for bfloat16 alone."""
    rows, columns = left.shape[-2], right.shape[-1]
    both = left.dim() == right.dim() == 2
    batch = [groups.shape[0]] if both and groups is not None else [left.shape[0]] if left.dim() == 3 else []
    return left.new_empty(*batch, rows, columns)


_SHAPED: Mapping[str, Callable[..., Any]] = {"aten::_grouped_mm": _grouped}
"""What stands for an operation that the meta device does not have."""
