"""Which tensors of a model are the same memory, whatever a config says of tied weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorafit.adapted import walk


def shared_memory(model: nn.Module, rows: Iterable[tuple[str, nn.Module, Tensor]]) -> dict[str, list[str]]:
    """Name → names of other modules' parameters and buffers in whose memory a tensor lies, for those that have any.

    What counts is storage: a config that says "tied" may be wrong, and tying need not be by one parameter object.

    Args:
        model: where to look.
        rows: (name, module, tensor of the module).
    """
    holders: dict[int, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
    seen: set[tuple[int, str]] = set()
    for path, module, _ in walk(model):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or is_lazy(tensor) or tensor.numel() == 0 or (id(module), key) in seen:
                continue
            seen.add((id(module), key))
            holders[_memory(tensor)].append((f"{path}.{key}", module, tensor))
    found: dict[str, list[str]] = {}
    for name, module, tensor in rows:
        start, end = _extent(tensor)
        others = [
            other
            for other, holder, held in holders[_memory(tensor)]
            if holder is not module and _extent(held)[0] < end and start < _extent(held)[1]
        ]
        if others:
            found[name] = others
    return found


def _memory(tensor: Tensor) -> int:
    # Tensors on the meta device, and those that stand for others (torchao's), have no memory: each is its own.
    own = tensor.device.type == "meta" or is_traceable_wrapper_subclass(tensor)
    return id(tensor) if own else tensor.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor touches."""
    reach = int(sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (reach + 1) * tensor.element_size()
