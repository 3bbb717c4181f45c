"""The types of adapter files as a table: three of PEFT's, and two of this library's for what these cannot hold well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lorafit.errors import nearest
from lorafit.layouts import ours
from lorafit.layouts.adalora import AdaLoraLayout
from lorafit.layouts.base import ContradictionError, Layout, Place, Slot, site_rank
from lorafit.layouts.lora import LoraLayout
from lorafit.layouts.ours import Ours, check_transposed
from lorafit.layouts.own import OWN, OwnLayout
from lorafit.layouts.pairs import OwnPairLayout, mostly_zeros, transposed
from lorafit.layouts.vera import VeraLayout
from lorafit.method import Adapter
from lorafit.methods.adalora import AdaLoRAAdapter
from lorafit.methods.dora import DoRAAdapter
from lorafit.methods.intrinsic import IntrinsicAdapter
from lorafit.methods.lora import LoRA
from lorafit.methods.vera import VeRAAdapter
from lorafit.patterns import Patterns
from lorafit.peft_config import COMMON, NOT_MATHEMATICS, Parsed, Reader
from lorafit.peft_layout import HEADS, Description, common_config, copies_of, for_file

LORA, ADALORA, VERA, LORAFIT = LoraLayout(), AdaLoraLayout(), VeraLayout(), OwnLayout()
PAIRS = OwnPairLayout()
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {layout.peft_type: layout for layout in (LORA, ADALORA, VERA, LORAFIT, PAIRS)}
)
"""`peft_type` in a config → layout."""

FOREIGN_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "lora_magnitude_vector": "DoRA",
        "lora_magnitude_vector.weight": "DoRA",
        "lora_A.weight": "LoRA",
        "lora_B.weight": "LoRA",
        "lora_embedding_A": "LoRA",
        "lora_embedding_B": "LoRA",
        "lora_A": "AdaLoRA",
        "lora_B": "AdaLoRA",
        "lora_E": "AdaLoRA",
        "ranknum": "AdaLoRA",
        "vera_lambda_b": "VeRA",
        "vera_lambda_d": "VeRA",
        "lora_B.bias": "LoRA with trained biases",
    }
)
"""Keys of one type in a file of another: known, so that an error can say what they are."""


def layout_for(description: Description) -> Layout:
    """The type of file that holds these adapters."""
    adapters = [placed.adapter for placed in description.sites.values()]
    for kind, layout in ((AdaLoRAAdapter, ADALORA), (VeRAAdapter, VERA)):
        if all(isinstance(adapter, kind) for adapter in adapters):
            return layout
    if any(_own(adapter) for adapter in adapters):
        return LORAFIT
    return PAIRS if transposed(description.sites) or mostly_zeros(description.sites) else LORA


def _own(adapter: Adapter) -> bool:
    """Whether no type of PEFT's can hold an adapter."""
    inner = adapter.inner if isinstance(adapter, DoRAAdapter) else None
    return isinstance(adapter, IntrinsicAdapter) or isinstance(inner, AdaLoRAAdapter | VeRAAdapter)


def tensors_of(description: Description, layout: Layout | None = None) -> dict[str, Tensor]:
    """Every tensor under its key, on the CPU, contiguous.

    Args:
        description: of the adapters.
        layout: the type of file; None for `layout_for` them.

    Raises:
        CheckpointError: a tensor of a subclass that stands for data elsewhere, or an update that no file can hold.
    """
    layout = layout_for(description) if layout is None else layout
    return for_file({**layout.tensors(description), **copies_of(description)})


def config_of(description: Description, layout: Layout | None = None) -> dict[str, Any]:
    """adapter_config.json; arguments as for `tensors_of`.

    Raises:
        CheckpointError: the adapters have no place in any type of file.
    """
    layout = layout_for(description) if layout is None else layout
    config = {**common_config(description), **layout.config(description), "peft_type": layout.peft_type}
    told = layout is not PAIRS and _told(description)
    return config if told else {**config, OWN: ours.written(description, layout)}


def _told(description: Description) -> bool:
    """Whether PEFT's settings tell all of the method; PEFT warns of a key that it does not know."""
    methods = [description.method, *(placed.method for placed in description.sites.values())]
    return all(isinstance(method, LoRA) and method.init == "default" for method in methods)


def mathematics(config: Mapping[str, Any]) -> frozenset[str]:
    """The settings of a config that say what is computed."""
    layout = LAYOUTS.get(str(config.get("peft_type")))
    return COMMON if layout is None else COMMON | layout.mathematics


def parse(config: Mapping[str, Any], where: Path) -> tuple[Layout, Parsed, Ours | str | None]:
    """Reads a config strictly.

    Returns:
        The type of file, what PEFT's settings say, and what stands under the key "lorafit" (see `ours.read`).

    Raises:
        CheckpointError: an unknown type of adapter, a value out of range or of the wrong type, or a setting that
            changes the mathematics in a way that this version does not compute; names file, key, found, expected, fix.
    """
    reader = Reader(config, where)
    kind = config.get("peft_type")
    layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
    if layout is None:
        near = nearest(str(kind), LAYOUTS)
        raise reader.error(
            "peft_type",
            "the adapter is of a type that this version does not read",
            kind,
            f"one of {', '.join(map(repr, LAYOUTS))}",
            near=near,
            fix=f"write {near[0]!r} if that is meant" if near else "merge it into its base where it was made",
        )
    reader.check(layout.must_be)
    own = ours.read(config)
    # A file of this library's type is nothing without its own key; all others can be read as PEFT reads them.
    method = own.method if isinstance(own, Ours) and layout is LORAFIT else layout.method(reader)
    known = COMMON | NOT_MATHEMATICS | layout.mathematics | layout.ignored | set(layout.must_be)
    return (
        layout,
        Parsed(
            method=method,
            rank=layout.rank(reader),
            rank_pattern=Patterns(layout.ranks(reader)),
            alpha_pattern=Patterns(layout.alphas(reader)),
            targets=reader.expression("target_modules"),
            exclude=reader.expression("exclude_modules") or [],
            modules_to_save=reader.saved(),
            heads=HEADS.get(str(config.get("task_type")), ()),
            layers=reader.layers(),
            layers_pattern=reader.layers_pattern(),
            unknown=tuple(sorted(set(config) - known)),
            config=config,
            where=where,
        ),
        own,
    )


__all__ = [
    "ADALORA",
    "FOREIGN_KEYS",
    "LAYOUTS",
    "LORA",
    "LORAFIT",
    "PAIRS",
    "VERA",
    "ContradictionError",
    "Layout",
    "Ours",
    "Place",
    "Slot",
    "check_transposed",
    "config_of",
    "layout_for",
    "mathematics",
    "parse",
    "site_rank",
    "tensors_of",
]
