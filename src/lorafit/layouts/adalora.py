"""Type ADALORA: triplets P, Λ, Q as PEFT keeps them, after pruning the ones that are left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafit.errors import LorafitWarning, some
from lorafit.layers import Conv2dSite, Site, VectorSite
from lorafit.layouts.base import ContradictionError, Layout, Place, Record, Slot, Undrawn, blank, exactly, put
from lorafit.layouts.lora import LoraLayout
from lorafit.method import Adapter, Around, Method
from lorafit.methods.adalora import AdaLoRA, AdaLoRAAdapter
from lorafit.methods.adalora_budget import lengths
from lorafit.peft_config import Parsed, Reader
from lorafit.peft_layout import Description, anchored, join, whole

READ_BY_PEFT = (VectorSite, Conv2dSite)
MARK = ".lora_E"

PENALTIES = 2
"""PEFT averages the penalties of P and of Q, which are added here: the same weight is twice as large there."""


class AdaLoraLayout(Layout):
    """PEFT's type ADALORA."""

    peft_type = "ADALORA"
    mathematics = frozenset(
        {
            "beta1",
            "beta2",
            "deltaT",
            "init_lora_weights",
            "init_r",
            "lora_alpha",
            "lora_dropout",
            "orth_reg_weight",
            "rank_pattern",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
        }
    )
    must_be: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType(
        {
            **LoraLayout.must_be,
            "alpha_pattern": (None, {}),
            "use_dora": (False,),
        }
    )
    ignored = LoraLayout.ignored | {"r", "use_rslora"}

    # Writing

    def tensors(self, description: Description) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, placed in description.sites.items():
            adapter = placed.adapter
            assert isinstance(adapter, AdaLoRAAdapter)
            found[join(path, "lora_A")] = adapter.Q
            found[join(path, "lora_E")] = adapter.lam[:, None]
            found[join(path, "lora_B")] = _spread(adapter.P, adapter.groups)
        return found

    def config(self, description: Description) -> dict[str, Any]:
        method = _within(description.method)
        strange = [
            p for p, e in description.sites.items() if not isinstance(e.site, READ_BY_PEFT) or e.site.shape.groups > 1
        ]
        if strange:
            warnings.warn(
                f"PEFT has no AdaLoRA for layers of this type: {some(strange)}. lorafit can load this adapter, PEFT "
                "cannot; lorafit.convert() makes a plain LoRA of it, which both can",
                LorafitWarning,
                stacklevel=2,
            )
        patterns: dict[str, list[bool]] = {}
        for path, placed in description.sites.items():
            adapter = placed.adapter
            assert isinstance(adapter, AdaLoRAAdapter)
            k, most = adapter.lam.shape[0], method.init_r
            if k != most:
                patterns[f"{path}{MARK}".removeprefix(".")] = [True] * k + [False] * (most - k)
        return {**_settings(method), "alpha_pattern": {}, "exclude_modules": None, "init_lora_weights": True,
                "rank_pattern": patterns or None, "use_dora": False, "use_rslora": False}  # fmt: skip

    def record(self, description: Description) -> dict[str, Any]:
        """Whether all layers are linear: then the file alone can be made a plain LoRA."""
        return {"vectors": all(isinstance(placed.site, VectorSite) for placed in description.sites.values())}

    # Reading

    def method(self, reader: Reader) -> Method:
        get = reader.config.get
        keys = {
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "total_steps": "total_step",
            "warmup": "tinit",
            "final": "tfinal",
            "interval": "deltaT",
            "orthogonality": "orth_reg_weight",
        }
        alpha = reader.present("lora_alpha", 8)
        return reader.made(
            lambda: AdaLoRA(
                init_r=get("init_r", 12),
                target_r=get("target_r", 8),
                alpha=alpha,
                dropout=get("lora_dropout", 0.0),
                total_steps=get("total_step"),
                warmup=get("tinit", 0),
                final=get("tfinal", 0),
                interval=get("deltaT", 1),
                beta1=get("beta1", 0.85),
                beta2=get("beta2", 0.85),
                orthogonality=get("orth_reg_weight", 0.5) / PENALTIES,
            ),
            keys,
        )

    def rank(self, reader: Reader) -> int:
        r: int = reader.config.get("init_r", 12)
        return r

    def ranks(self, reader: Reader) -> dict[str, int]:
        found: dict[str, int] = {}
        pattern = reader.config.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            raise reader.error("rank_pattern", "a pattern must map names to lists", pattern, "an object")
        for key, kept in pattern.items():
            where = f"rank_pattern[{key!r}]"
            if not isinstance(kept, list) or not all(isinstance(each, bool) for each in kept):
                raise reader.error(where, "this does not say which triplets are kept", kept, "a list of true and false")
            if not f".{key}".endswith(MARK):
                raise reader.error(where, "this is no key of singular values", key, f"a module's path and {MARK!r}")
            found[anchored(f".{key}"[: -len(MARK)].removeprefix("."))] = sum(kept)
        return found

    def keys(self, parsed: Parsed) -> tuple[str, ...]:
        return ("lora_A", "lora_E", "lora_B")

    def slots(self, site: Site, parsed: Parsed) -> tuple[Slot, ...]:
        return (
            Slot("Q", "lora_A", lambda site, q, k: exactly(q, (k, site.shape.inn)), ranked=True),
            Slot("lam", "lora_E", lambda site, e, k: exactly(e, (k, 1)).reshape(-1)),
            Slot("P", "lora_B", lambda site, p, k: _gather(exactly(p, (site.shape.out, k)), site.shape.groups)),
        )

    def adapters(
        self, method: Method, places: Sequence[Place], shared: Mapping[str, Tensor], parsed: Parsed, record: Record
    ) -> dict[str, Adapter]:
        with Undrawn():
            made = blank(method, places)
        if record and _settings(_within(method)) != _settings(_within(parsed.method)):
            raise ContradictionError(f"it is {_within(method)}, the settings are those of {parsed.method}")
        for place in places:
            adapter = made[place.path]
            if not isinstance(adapter, AdaLoRAAdapter):
                raise ContradictionError("the file has triplets")
            shapes = {name: value.shape for name, value in place.values.items()}
            try:
                adapter.resize(shapes)
            except ValueError as error:
                raise ContradictionError(str(error)) from None
            for name, value in place.values.items():
                put(adapter, name, value)
        return made


def _within(method: Method) -> AdaLoRA:
    """AdaLoRA itself, out of the methods around it."""
    while isinstance(method, Around):
        method = method.within
    if not isinstance(method, AdaLoRA):
        raise ContradictionError("the file has triplets")
    return method


def _settings(method: AdaLoRA) -> dict[str, Any]:
    """AdaLoRA's fields under PEFT's names. A run whose length is not known is written as one of a single step."""
    steps = method.total_steps
    warmup, final = (0, 0) if steps is None else lengths(steps, method.warmup, method.final)
    return {
        "beta1": method.beta1,
        "beta2": method.beta2,
        "deltaT": method.interval,
        "init_r": method.init_r,
        "lora_alpha": whole(method.resolved_alpha),
        "lora_dropout": method.dropout,
        "orth_reg_weight": method.orthogonality * PENALTIES,
        "target_r": method.target_r,
        "tfinal": final,
        "tinit": warmup,
        "total_step": 1 if steps is None else steps,
    }


def _spread(p: Tensor, groups: int) -> Tensor:
    """P (out, k / groups) as the file has it, (out, k): zeros where a row's group does not meet a column's."""
    if groups == 1:
        return p
    blocks = p.view(groups, -1, p.shape[1])
    full = p.new_zeros(groups, blocks.shape[1], groups, p.shape[1])
    own = torch.arange(groups, device=p.device)
    full[own, :, own] = blocks
    return full.view(p.shape[0], groups * p.shape[1])


def _gather(full: Tensor, groups: int) -> Tensor:
    """The inverse of `_spread`. Raises ValueError for a P that mixes the groups."""
    if groups == 1:
        return full
    if full.shape[1] % groups:
        raise ValueError(f"a number of columns that divides into {groups} groups")
    blocks = full.view(groups, full.shape[0] // groups, groups, full.shape[1] // groups)
    own = torch.arange(groups, device=full.device)
    kept = blocks[own, :, own]
    if blocks.count_nonzero() != kept.count_nonzero():
        raise ValueError("zeros wherever a row and a column are of different groups")
    return kept.reshape(full.shape[0], -1)
