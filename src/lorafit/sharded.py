"""Parameters of which every process keeps a part (FSDP2), and the one place that knows of them.

Between two passes a sharded parameter is a `DTensor`: an operation of it and a plain tensor raises. What works on
adapters outside of a pass, a schedule or a file, is therefore given whole ones for a moment: `whole` puts plain tensors
in the place of the parts, gathered from all processes, and takes them out again; `rewritten` also carries home what
became of them, each process its own part. So every process computes the same from the same numbers, as one would alone,
and nobody else has to ask what kind a tensor is. A model that is not sharded pays a look at its parameters.

All of this is collective: every process has to come here, and in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorafit.errors import LorafitError, StateError

T = TypeVar("T")
_HOME = "torch.distributed.tensor"


def is_part(tensor: Tensor) -> bool:
    """Whether this process keeps no more than a part of a tensor."""
    home = sys.modules.get(_HOME)  # there is no such tensor before somebody has imported its class
    return home is not None and isinstance(tensor, home.DTensor)


def in_parts(module: nn.Module) -> bool:
    """Whether some parameter of a module, or of what is inside of it, is kept in parts."""
    return _HOME in sys.modules and any(map(is_part, module.parameters()))


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, as a plain one, without a gradient; a plain one is itself."""
    if not is_part(tensor):
        return tensor
    with torch.no_grad():
        part: Any = tensor.detach()
        full: Tensor = part.full_tensor()
        return full


def put(tensor: Tensor, value: Tensor) -> None:
    """Writes a whole value into a tensor, sharded or not: each process its own part, and none waits for another."""
    with torch.no_grad():
        if not is_part(tensor):
            tensor.copy_(value)
            return
        part: Any = tensor.detach()
        part.to_local().copy_(_parted(value, tensor).to_local())


def _parted(value: Tensor, like: Tensor) -> Any:
    from torch.distributed.tensor import distribute_tensor

    # From this process' own copy of the value, which all of them have: nothing is sent.
    kept: Any = like
    with torch.no_grad():
        return distribute_tensor(value.detach(), kept.device_mesh, kept.placements, src_data_rank=None)


@dataclass(frozen=True, eq=False)
class _Swapped:
    """One place of a parameter: what is kept there, and what stands there for the moment."""

    owner: nn.Module
    name: str
    part: nn.Parameter
    full: nn.Parameter


@contextmanager
def whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it every parameter of these modules, and of what is inside of them, is whole; for reading alone."""
    swapped = _swap(modules, gradients=False)
    try:
        yield
    finally:
        _restore(swapped)


@contextmanager
def rewritten(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The same with gradients, and what is written to parameters and gradients within it stays.

    A parameter keeps its shape: it cannot be sharded anew. After an error nothing of it stays.
    """
    swapped = _swap(modules, gradients=True)
    try:
        yield
        for part, full in {id(each.part): (each.part, each.full) for each in swapped}.values():
            _carry_home(part, full)
    finally:
        _restore(swapped)


def _swap(modules: Iterable[nn.Module], *, gradients: bool) -> list[_Swapped]:
    swapped: list[_Swapped] = []
    if _HOME not in sys.modules:
        return swapped
    seen: set[int] = set()
    made: dict[int, nn.Parameter] = {}
    try:
        for module in (inner for outer in modules for inner in outer.modules()):
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, part in list(module._parameters.items()):
                if part is None or not is_part(part):
                    continue
                if id(part) not in made:
                    made[id(part)] = _full(part, gradients)
                module._parameters[name] = made[id(part)]
                swapped.append(_Swapped(module, name, part, made[id(part)]))
    except BaseException:
        _restore(swapped)
        raise
    return swapped


def _full(part: nn.Parameter, gradients: bool) -> nn.Parameter:
    full = nn.Parameter(gathered(part), requires_grad=part.requires_grad)
    if gradients and part.grad is not None:
        full.grad = gathered(part.grad)
    return full


def _restore(swapped: Iterable[_Swapped]) -> None:
    for each in swapped:
        each.owner._parameters[each.name] = each.part


def _carry_home(part: nn.Parameter, full: nn.Parameter) -> None:
    if full.shape != part.shape:
        raise StateError(
            "a sharded parameter cannot get another shape",
            found=tuple(full.shape),
            expected=tuple(part.shape),
            fix="load values of another rank before the model is sharded",
        )
    put(part, full)
    if full.grad is None:
        part.grad = None
    elif part.grad is None:
        part.grad = _parted(full.grad, part)
    else:
        put(part.grad, full.grad)


def alike(tensors: Iterable[Tensor]) -> bool:
    """Whether all of these are sharded, or none: one operation cannot take both kinds."""
    return len({is_part(tensor) for tensor in tensors}) < 2


def by_one(job: Callable[[], T]) -> T:
    """Has the first process do a job that is to be done once, while all others wait for what it comes to.

    Raises:
        LorafitError: in every process, what the job raised in the first one.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return job()
    if distributed.get_rank() == 0:
        try:
            result = job()
        except Exception as error:
            distributed.broadcast_object_list([None, error if isinstance(error, LorafitError) else _told(error)], src=0)
            raise
        distributed.broadcast_object_list([result, None], src=0)
        return result
    outcome: list[Any] = [None, None]
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    found: T = outcome[0]
    return found


def _told(error: Exception) -> StateError:
    return StateError(
        "the first process of this run failed in what it does for all",
        found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        fix="see what it said itself",
    )


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` with every sharded tensor whole: a file of it is that of one process."""
    held = {
        index: {key: gathered(value) if isinstance(value, Tensor) else value for key, value in each.items()}
        for index, each in state["state"].items()
    }
    return {**state, "state": held}


def share_state(optimizer: torch.optim.Optimizer) -> None:
    """Leaves of whole tensors that were loaded into an optimizer's state this process' part, as of its parameters."""
    for parameter, held in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not is_part(parameter):
            continue
        for key, value in held.items():
            if isinstance(value, Tensor) and not is_part(value) and value.shape == parameter.shape:
                held[key] = _parted(value, parameter)
    for group in optimizer.param_groups:
        if group.get("fused") and not alike(group["params"]):
            group["fused"] = False  # as it was saved; here one kernel would get both kinds
