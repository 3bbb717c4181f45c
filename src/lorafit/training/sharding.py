"""A run whose model is sharded over its processes: what does not go with that, and how it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lorafit.distributed import equalise, shard
from lorafit.errors import ConfigError
from lorafit.handle import Handle
from lorafit.state import load_state
from lorafit.training import ranks
from lorafit.training.config import Settings

NEEDED = "_sync_replicated_trainable_parameters"
"""What a trainer has that can be given a model which is sharded already."""


def check_shard(settings: Settings) -> None:
    """Raises `ConfigError` for settings that do not go with a sharded model, or with several processes."""
    for name in ("fsdp", "fsdp_config"):
        if settings.training.get(name):
            raise ConfigError(
                "the trainer would shard the model by itself, and leave the adapters' buffers behind",
                where=name,
                found=settings.training[name],
                expected="shard: true",
                fix=f"remove {name} and write --shard",
            )
    for name, found, reason, fix in _contradictions(settings) if settings.shard else ():
        raise ConfigError(reason, where=f"shard, {name}", found=found, expected="one of the two", fix=fix)
    if settings.shard and NEEDED not in vars(Trainer):
        raise ConfigError(
            "this release of transformers has no trainer for a model that is sharded already",
            where="shard",
            expected="transformers 5.23 or newer",
            fix="pip install -U transformers, or leave shard out",
        )


def _contradictions(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """(other setting, what was found, why it does not go with `shard`, what to do)."""
    if settings.quantise != "none":
        yield (
            "quantise",
            settings.quantise,
            "a quantised base cannot be sharded",
            "leave one of them out: a base in bfloat16, sharded over two processes, is as large in each as int8",
        )
    if settings.compile:
        yield "compile", "true", "a sharded model is not compiled", "leave compile out"
    if settings.recompute == "cheap":
        yield (
            "recompute",
            "cheap",
            "what is cheap to compute again needs weights that are not there by then",
            "--recompute blocks",
        )
    if settings.prefix_cache is True:
        yield (
            "prefix_cache",
            "true",
            "states are kept on disk by one process, and here each has other records",
            "leave prefix_cache out",
        )


def check_several() -> None:
    """Raises `ConfigError` where there is nobody to share a model with."""
    if ranks.count() == 1:
        raise ConfigError(
            "one process has nobody to share the model with",
            where="shard",
            found="1 process",
            expected="2 or more",
            fix="torchrun --nproc-per-node 2 -m lorafit train ..., or leave shard out",
        )


def divide(
    handle: Handle,
    arguments: TrainingArguments,
    checkpoint: Path | None,
    notify: Callable[[str], object],
    *,
    sharded: bool,
) -> None:
    """Makes the adapter of a run ready for its processes, before its trainer is made: sharded, or the same in each.

    Args:
        handle: the run's adapter.
        arguments: of the trainer; what DistributedDataParallel is to do is settled in them.
        checkpoint: from which the run goes on.
        notify: is told what was done.
        sharded: as the settings say.
    """
    if ranks.count() == 1:
        return
    if sharded:
        _shard(handle, arguments.device, checkpoint, notify)
        return
    equalise(handle, arguments.device)
    if arguments.ddp_broadcast_buffers is None:
        arguments.ddp_broadcast_buffers = False  # they stay the same; written to in each pass, they would look changed
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = _has_experts(handle.model)


def _has_experts(model: nn.Module) -> bool:
    """Whether parts of a model see no token in some batches: then its gradients have to be looked for."""
    return isinstance(model, PreTrainedModel) and any("expert" in key for key in _keys(model.config.to_dict()))


def _keys(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        yield str(key)
        if isinstance(value, dict):
            yield from _keys(value)


def _shard(handle: Handle, device: torch.device, checkpoint: Path | None, notify: Callable[[str], object]) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    if checkpoint is not None:  # its adapter may have other shapes, which a sharded one cannot take on
        load_state(handle, checkpoint)
    units = shard(handle, init_device_mesh(device.type, (ranks.count(),)))
    notify(f"the model is sharded over {ranks.count()} processes: {len(units)} blocks, and the rest of it")
