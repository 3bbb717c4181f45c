"""PEFT's adapter layout as a table: which tensor of which method stands under which key, and what its config says.

Facts were read from files that peft 0.21.2 wrote and from its documentation. Key names never shape a module: only this
file and `fitting` know them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafit.errors import CheckpointError, LorafitWarning, some
from lorafit.layers import Conv1DSite, EmbeddingSite, Site
from lorafit.method import Adapter, Method
from lorafit.methods.lora import LoRA
from lorafit.targets import lookup, suffixes_for

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter and its place in a file."""

    attribute: str
    key: str
    to_file: Callable[[Site, Tensor], Tensor]
    from_file: Callable[[Site, Tensor, int], Tensor]


def _down(key: str) -> Slot:
    return Slot("A", key, lambda site, a: site.down_to_file(a), lambda site, a, r: site.down_from_file(a, r))


def _up(key: str) -> Slot:
    return Slot("B", key, lambda site, b: site.up_to_file(b), lambda site, b, r: site.up_from_file(b, r))


MATRIX_SLOTS = (_down("lora_A.weight"), _up("lora_B.weight"))
EMBEDDING_SLOTS = (_down("lora_embedding_A"), _up("lora_embedding_B"))
SLOT_KEYS = tuple(slot.key for slot in (*MATRIX_SLOTS, *EMBEDDING_SLOTS))
FOREIGN_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lora_A": "AdaLoRA",
    "lora_B": "AdaLoRA",
    "lora_E": "AdaLoRA",
    "ranknum": "AdaLoRA",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "lora_B.bias": "LoRA with trained biases",
}
"""Keys of methods that this version does not read: known, so that an error can say what they are."""


HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task type → modules that PEFT saves in full where a model has them, named in modules_to_save or not."""


def saved_as(name: str, path: str) -> bool:
    """Whether an entry of modules_to_save names the module at `path` for PEFT: it compares ends, not components."""
    return path.endswith(name)


def slots(site: Site) -> tuple[Slot, ...]:
    """The places of a LoRA's tensors at this site."""
    return EMBEDDING_SLOTS if isinstance(site, EmbeddingSite) else MATRIX_SLOTS


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


def tensors_of(description: Description) -> dict[str, Tensor]:
    """Every tensor under its key, on the CPU, contiguous.

    Raises:
        CheckpointError: a tensor of a subclass that stands for data elsewhere.
    """
    found: dict[str, Tensor] = {}
    for path, placed in description.sites.items():
        for slot in slots(placed.site):
            key = join(path, slot.key)
            value = _plain(key, placed.adapter.get_parameter(slot.attribute))
            found[key] = slot.to_file(placed.site, value)
    for path, copy in description.copies.items():
        for key, value in copy.state_dict().items():
            found[join(path, key)] = _plain(join(path, key), value)
    return {key: value.to("cpu").contiguous().clone() for key, value in found.items()}


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


def config_of(description: Description) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it.

    Raises:
        CheckpointError: the method has no place in this layout.
    """
    method = description.method
    if not isinstance(method, LoRA):
        raise CheckpointError(
            "this method has no place in PEFT's layout yet", found=type(method).__name__, expected="LoRA"
        )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, placed in description.sites.items():
        own = placed.method
        assert isinstance(own, LoRA)
        if own.r != method.r:
            ranks[path] = own.r
        if own.resolved_alpha != method.resolved_alpha:
            alphas[path] = _whole(own.resolved_alpha)
    kinds = [placed.site for placed in description.sites.values()]
    copies = list(description.copies)
    warn_shared([*description.sites, *copies], description.modules)
    return {
        "alpha_pattern": _exact(alphas, list(description.sites)),
        "auto_mapping": None,
        "base_model_name_or_path": description.base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": any(isinstance(site, Conv1DSite) for site in kinds),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _whole(method.resolved_alpha),
        "lora_dropout": method.dropout,
        "modules_to_save": _saved_names(copies, list(description.modules)) if copies else None,
        "peft_type": "LORA",
        "r": method.r,
        "rank_pattern": _exact(ranks, list(description.sites)),
        "revision": None,
        "target_modules": suffixes_for(list(description.sites), list(description.modules)),
        "task_type": _task_type(description),
        "use_dora": False,
        "use_rslora": method.rslora,
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
        caught = [path for path in modules if any(saved_as(name, path) for name in names)]
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


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _exact(values: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Patterns that give each path its own value and no other; anchored where a plain path would hit another's end."""
    values = dict(sorted(values.items()))  # the order in which a file has them, and the first hit counts
    if all(lookup(values, path) == values.get(path) for path in paths):
        return dict(values)
    return {f"^{re.escape(path)}": value for path, value in values.items()}
