"""Products that several layers in a row would compute alike: VeRA's x Aᵀ of the layers that read the same x.

One product is remembered for each thread, for as long as its x lives and neither factor is written to. A layer that
comes back for it, in the next pass, gets a new one: what was written to x through `.data` shows in no version.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lorafit.kernels.scratch import recorded


class _Known(NamedTuple):
    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    product: Tensor
    users: set[int]


class _Last(threading.local):
    """The last product of one thread."""

    def __init__(self) -> None:
        self.known: _Known | None = None


_LAST = _Last()


def shared_product(x: Tensor, rows: Tensor, down: Tensor, user: Tensor) -> Tensor:
    """The product rows downᵀ, (n, r), for rows (n, k), which are x in the layer's type, and a frozen `down` (r, k).

    The same tensor is returned as before where x and down are those of the call before, and `user` (a layer's weight)
    has not had it yet: nobody may write to it.
    """
    if recorded() or torch.is_inference_mode_enabled() or x.is_inference() or down.is_inference():
        return rows @ down.to(rows.dtype).t()
    # The memory itself and not its address: another adapter's matrix may come to lie where this one was.
    memory = StorageWeakRef(down.untyped_storage())  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(x.device).stream_id if x.is_cuda else 0
    layout = (down.storage_offset(), down.shape, down.stride(), down.dtype)
    state = (x._version, down._version, memory, *layout, rows.dtype, stream)
    last, own = _LAST.known, user.data_ptr()
    if last is not None and last.x() is x and last.state == state and own not in last.users:
        last.users.add(own)
        return last.product
    product = rows @ down.to(rows.dtype).t()
    _LAST.known = _Known(weakref.ref(x, _forget), state, product, {own})
    return product


def _forget(reference: weakref.ref[Tensor]) -> None:
    last = _LAST.known
    if last is not None and last.x is reference:
        _LAST.known = None
