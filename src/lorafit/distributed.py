"""Sharding an adapted model over processes with torch's `fully_shard` (FSDP2): attach → shard → optimizer.

Each block of the model is one unit, whose parameters are gathered for its passes and then freed; what is left, the
embeddings and the output layer among it, is the last unit. An adapter lies in its layer, so it is sharded with its
block, and its optimizer's state with it. Two kinds of trained parameters are not sharded but kept whole in every
process, their gradients averaged: those that sites of several blocks share (the subspace of `intrinsic`, LoRA-drop's
pair for the rest), since no block could gather them for another one, and single numbers, which have no rows.

What a method does between passes, and what is saved, sees whole adapters: `lorafit.sharded`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lorafit.activation import check_apart
from lorafit.adapted import banks, plain_class, walk
from lorafit.errors import ConfigError, StateError, nearest, some
from lorafit.handle import Handle
from lorafit.layers import packed
from lorafit.method import Sharing
from lorafit.plan import check_model
from lorafit.sharded import in_parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

START = "torchrun --nproc-per-node 2 script.py, with torch.distributed.init_process_group() at its head"


@runtime_checkable
class NamesBlocks(Protocol):
    """A model that names the classes of its blocks, as those of transformers do."""

    _no_split_modules: Collection[str] | None


def shard(
    handle: Handle,
    mesh: DeviceMesh | None = None,
    blocks: Sequence[str] | None = None,
    *,
    reshard_after_forward: bool = True,
    **options: Any,
) -> list[str]:
    """Shards the model of an adapter over the processes of a run. Call it in every process, before `handle.optimizer`.

    What the adapters of the first process hold is what all of them begin with, as with DistributedDataParallel. The
    base weights have to be the same everywhere: every process loads the same files.

    Args:
        handle: of an adapter that is attached; its whole model is sharded, other adapters with it.
        mesh: of torch; None is all processes, on their accelerators if they have any.
        blocks: names of the classes of the blocks; None is those that the model names (`_no_split_modules`), or else
            the members of its outermost lists of modules.
        reshard_after_forward: whether a block is freed after its forward pass and gathered again in the backward pass.
        options: more for `fully_shard`: `mp_policy`, `offload_policy`.

    Returns:
        The paths of the blocks.

    Raises:
        StateError: no processes, a sharded or merged model, or an optimizer that was made before.
        TargetError: the model is compiled or wrapped.
        ConfigError: blocks that are not there, or parameters that cannot be sharded.
    """
    from torch.distributed.fsdp import fully_shard

    model = handle.model
    _check_order(handle)
    _check_parameters(model)
    units = _blocks(model, blocks)
    mesh = _everybody() if mesh is None else mesh
    apart = _kept_whole(model)
    trained = [parameter for parameter in apart if parameter.requires_grad]
    device = _device(mesh)
    for parameter in apart:
        parameter.data = parameter.data.to(device)
    _equalise(model, [mesh.get_group(dim) for dim in range(mesh.ndim)], device)
    common: dict[str, Any] = {"mesh": mesh, "ignored_params": set(apart), **options}
    for path in units:
        fully_shard(model.get_submodule(path), reshard_after_forward=reshard_after_forward, **common)
    fully_shard(model, **common)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(partial(_average, mesh))  # type: ignore[no-untyped-call]
    model.register_forward_hook(_free)
    return units


def _check_order(handle: Handle) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise StateError("there are no processes to shard the model over", expected="a process group", fix=START)
    handle.check_sites("shard")
    check_apart(handle.name, merged=handle.merged)
    if in_parts(handle.model):
        raise StateError("the model is sharded already", expected="a model that is sharded once", fix="shard it once")
    check_model(handle.model)
    if len(handle._bound):
        raise StateError(
            "an optimizer was made before the model was sharded: it holds parameters that will be none of the model's",
            found=f"{len(handle._bound)} bound to adapter {handle.name!r}",
            expected="attach, shard, then handle.optimizer",
            fix="make the optimizer after shard(handle)",
        )


def _check_parameters(model: nn.Module) -> None:
    """Raises `ConfigError` for what `fully_shard` would stumble over in the midst of its work, or would not shard."""
    rows = next((path for path, module, _ in walk(model) if packed(module)), None)
    if rows is not None:
        raise ConfigError(
            "a quantised base cannot be sharded",
            where=rows,
            found="weights in another form than numbers that can be trained",
            expected="a base in float32, bfloat16 or float16: sharded it takes as little room in each process",
            fix="leave the model as it is loaded, or train it by DistributedDataParallel, quantised in each process",
        )
    odd = next((key for key, each in model.named_parameters() if not each.is_contiguous()), None)
    if odd is not None:
        raise ConfigError(
            "a parameter does not lie row by row in memory, and rows are what is shared out",
            where=odd,
            expected="contiguous parameters",
            fix="parameter.data = parameter.data.contiguous(), before attaching",
        )
    types = {each.dtype for each in model.parameters() if each.requires_grad}
    if len(types) > 1:
        raise ConfigError(
            "trained parameters of several types cannot be in one unit",
            found=some(sorted(map(str, types))),
            expected="one type",
            fix="load the model in one type",
        )


def _everybody() -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return init_device_mesh("cpu" if kind is None else kind.type, (torch.distributed.get_world_size(),))


def _device(mesh: DeviceMesh) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


# Blocks


def _blocks(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """The paths of the blocks: outermost ones, with parameters that no other part of the model has."""
    names = set(wanted or (model._no_split_modules or () if isinstance(model, NamesBlocks) else ()))
    found = [path for path, module, _ in walk(model) if path and _named(module, names)]
    if wanted is not None and not found:
        known = sorted({plain_class(module).__name__ for _, module, _ in walk(model)})
        raise ConfigError(
            "the model has no blocks of these classes",
            where="blocks",
            found=some(map(repr, wanted)),
            expected=f"names among {some(known, 8)}",
            near=nearest(wanted[0], known),
            fix="blocks=None: what the model itself calls a block",
        )
    chosen = _outermost(found or list(_listed(model)))
    return _unshared(model, chosen)


def _named(module: nn.Module, names: Collection[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _listed(model: nn.Module) -> Iterator[str]:
    """Members of lists of modules, those of lists in a list among them."""
    for path, module, parent in walk(model):
        if isinstance(parent, nn.ModuleList) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield path


def _outermost(paths: Sequence[str]) -> list[str]:
    chosen: list[str] = []
    for path in paths:  # in model order: what holds others comes before them
        if not any(path.startswith(f"{outer}.") for outer in chosen[-1:]):
            chosen.append(path)
    return chosen


def _unshared(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those with parameters all of which are theirs alone: tied ones have to be in one unit with their others."""
    places: dict[int, set[str]] = {}
    held: dict[str, list[int]] = {path: [] for path in paths}
    for path, module, _ in walk(model):
        block = next((each for each in paths if path == each or path.startswith(f"{each}.")), "")
        for parameter in module._parameters.values():
            if parameter is not None:
                places.setdefault(id(parameter), set()).add(block)
                held.setdefault(block, []).append(id(parameter))
    return [path for path in paths if held[path] and all(len(places[each]) == 1 for each in held[path])]


# What is not sharded


def _kept_whole(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that sites of several blocks use, and single numbers."""
    found: dict[int, nn.Parameter] = {id(each): each for each in model.parameters() if each.dim() == 0}
    for bank in banks(model):
        for module in bank.modules():
            if isinstance(module, Sharing):
                found |= {id(each): each for each in module.common.parameters()}
    return list(found.values())


def equalise(handle: Handle, device: torch.device) -> None:
    """Gives the adapters of all processes the values of the first one, buffers included. `shard` does it, too.

    What each process drew for itself need not be the same. DistributedDataParallel does this for parameters alone where
    it is told not to broadcast buffers in each pass.

    Args:
        handle: of an adapter on a model that is not sharded.
        device: where the backend wants its tensors.
    """
    _equalise(handle.model, [None], device)


@torch.no_grad()
def _equalise(model: nn.Module, groups: Sequence[Any], device: torch.device) -> None:
    seen: set[int] = set()
    for bank in banks(model):
        for tensor in (*bank.parameters(), *bank.buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            value = tensor.detach().to(device, copy=True)
            for group in groups:
                torch.distributed.broadcast(value, group=group, group_src=0)
            if not torch.equal(value, tensor.detach().to(device)):
                tensor.copy_(value)  # not by the broadcast itself, which no version would show


def _average(mesh: DeviceMesh, parameter: Tensor) -> None:
    """Runs when a backward pass has added to the gradient of a parameter that every process keeps whole.

    An average is linear: what earlier passes have left there is averaged already, and stays what it is.
    """
    if parameter.grad is None:
        return
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(parameter.grad, group=mesh.get_group(dim))
    parameter.grad.div_(mesh.size())


def _free(module: nn.Module, args: Any, output: Any) -> None:
    """Runs after a forward pass of the whole model: without a backward pass nothing else would free its last unit.

    So parameters are parts of themselves whenever no pass is under way.
    """
    if not torch.is_grad_enabled():
        reshard: Callable[[], None] = module.reshard  # type: ignore[assignment]
        reshard()


def is_sharded(handle: Handle) -> bool:
    """Whether the model of an adapter is sharded: then saving it is something that all processes do together."""
    return in_parts(handle.model)


__all__ = ["equalise", "is_sharded", "shard"]
