"""What every file of an adapter has in common with PEFT's: prefix, names of modules, modules saved in full, task.

Facts were read from files that peft 0.21.2 wrote and from its documentation. Which tensor of which method stands under
which key is for `layouts` to know.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafit.errors import CheckpointError, LorafitWarning, some
from lorafit.layers import Conv1DSite, Site
from lorafit.method import Adapter, Method
from lorafit.patterns import Patterns
from lorafit.targets import suffixes_for

PREFIX = "base_model.model."
BASE = ".base_layer"
"""What PEFT puts after the path of an adapted layer for the layer itself."""

HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task type → modules that PEFT saves in full where a model has them, named in modules_to_save or not."""


def saved_as(name: str, path: str) -> bool:
    """Whether an entry of modules_to_save names the module at `path` for PEFT: it compares ends, not components."""
    return path.endswith(name)


@dataclass(frozen=True)
class Placed:
    """One adapted layer: its site, its adapter, and the method as it is there."""

    site: Site
    adapter: Adapter
    method: Method


@dataclass(frozen=True)
class Description:
    """All that a file says of an adapter; `modules` maps every module path to the first path of the same module."""

    method: Method
    sites: Mapping[str, Placed]
    copies: Mapping[str, nn.Module]
    modules: Mapping[str, str]
    base_model: str | None
    task_type: str | None


def join(path: str, key: str) -> str:
    """A key in a file: prefix, module path (which is empty for a model that is one layer) and the tensor's own key."""
    return f"{PREFIX}{path}.{key}" if path else f"{PREFIX}{key}"


def copies_of(description: Description) -> dict[str, Tensor]:
    """The tensors of modules saved in full, under their keys."""
    return {
        join(path, key): value for path, copy in description.copies.items() for key, value in copy.state_dict().items()
    }


def for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file takes them: on the CPU, contiguous, each with memory of its own.

    Raises:
        CheckpointError: a tensor of a subclass that stands for data elsewhere.
    """
    return {key: _plain(key, value).to("cpu").contiguous().clone() for key, value in tensors.items()}


def _plain(key: str, value: Tensor) -> Tensor:
    value = value.detach()
    if type(value) is not Tensor:
        raise CheckpointError(
            "this tensor is no plain one: it is sharded over processes, or quantised",
            where=key,
            found=type(value).__name__,
            expected="a torch.Tensor",
            fix="gather the whole state first (get_model_state_dict of torch.distributed.checkpoint.state_dict with "
            "full_state_dict=True), load it into an unsharded model with the same adapter, and save there",
        )
    return value


def common_config(description: Description) -> dict[str, Any]:
    """The part of adapter_config.json that is the same for every type of adapter."""
    sites, copies = list(description.sites), list(description.copies)
    warn_shared([*sites, *copies], description.modules)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": description.base_model,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(placed.site, Conv1DSite) for placed in description.sites.values()),
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": _saved_names(copies, list(description.modules)) if copies else None,
        "revision": None,
        "target_modules": suffixes_for(sites, list(description.modules)),
        "task_type": _task_type(description),
    }


def warn_shared(paths: Sequence[str], aliases: Mapping[str, str]) -> None:
    """Warns of an adapted module that the model holds under several paths: PEFT adapts it under the first alone."""
    chosen = set(paths)
    also = {other: path for other, path in aliases.items() if other != path and path in chosen}
    if also:
        other, path = next(iter(also.items()))
        warnings.warn(
            f"{path} is the same module as {other}: here an adapter acts wherever the module is used, in PEFT under "
            f"the first path only, so the two compute different things ({len(also)} such paths)",
            LorafitWarning,
            stacklevel=2,
        )


def _saved_names(copies: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Names that make PEFT replace exactly `copies`: last components where they are exact, else whole paths."""
    tails = sorted({path.rpartition(".")[2] for path in copies})
    for names in (tails, sorted(copies)):
        caught = [path for path in modules if path.endswith(tuple(names))]  # as `saved_as` has it, for all at once
        if set(caught) == set(copies):
            return names
    warnings.warn(
        f"PEFT cannot load this adapter: by the name of {some(copies)} it would also replace "
        f"{some(path for path in caught if path not in copies)}, of which the file holds no copy. lorafit can",
        LorafitWarning,
        stacklevel=2,
    )
    return names


def _task_type(description: Description) -> str | None:
    """The task type, unless it makes PEFT look for a head that is not in the file and fail."""
    heads = HEADS.get(description.task_type or "", ())
    needed = [path for path in description.modules if any(saved_as(head, path) for head in heads)]
    absent = [path for path in needed if path not in description.copies]
    if not absent:
        return description.task_type
    warnings.warn(
        f"task_type is written as null: for {description.task_type!r} PEFT expects a trained copy of "
        f"{some(absent)}, which this adapter does not have. attach(..., modules_to_save={absent!r}) trains one",
        LorafitWarning,
        stacklevel=2,
    )
    return None


def whole(value: float) -> float:
    """A number as an int where it is one."""
    return int(value) if float(value).is_integer() else value


def exact_pattern(values: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Patterns that give each path its own value and no other; anchored where a plain path would hit another's end."""
    values = dict(sorted(values.items()))  # the order in which a file has them, and the first hit counts
    patterns = Patterns(values)
    if all(patterns.find(path) == values.get(path) for path in paths):
        return dict(values)
    return {anchored(path): value for path, value in values.items()}


def anchored(path: str) -> str:
    """A pattern for one path and no other."""
    return f"^{re.escape(path)}"
