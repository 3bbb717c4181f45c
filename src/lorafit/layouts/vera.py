"""Type VERA: two vectors a site, and the pair of projections once, or the seed that it is drawn from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafit.errors import CheckpointError, ConfigError, LorafitWarning, some
from lorafit.layers import Site, VectorSite
from lorafit.layouts.base import ContradictionError, Layout, Place, Record, Slot, exactly, put
from lorafit.method import Adapter, Method
from lorafit.methods.vera import Projection, VeRA, VeRAAdapter
from lorafit.peft_config import Parsed, Reader
from lorafit.peft_layout import Description, join

A, B = "base_model.vera_A", "base_model.vera_B"


class VeraLayout(Layout):
    """PEFT's type VERA."""

    peft_type = "VERA"
    mathematics = frozenset({"d_initial", "projection_prng_key", "r", "save_projection", "vera_dropout"})
    must_be: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({"bias": ("none",)})
    ignored = frozenset({"init_weights"})
    shared = (A, B)

    # Writing

    def tensors(self, description: Description) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, placed in description.sites.items():
            adapter = placed.adapter
            assert isinstance(adapter, VeRAAdapter)
            found[join(path, "vera_lambda_b")] = adapter.b
            found[join(path, "vera_lambda_d")] = adapter.d
        projection = _projection(description)
        if self._stored(description):
            found[A], found[B] = projection.A, projection.B
        return found

    def config(self, description: Description) -> dict[str, Any]:
        method = description.method
        assert isinstance(method, VeRA)
        strange = [path for path, each in description.sites.items() if not isinstance(each.site, VectorSite)]
        if strange:
            warnings.warn(
                f"PEFT has no VeRA for layers of this type: {some(strange)}. lorafit can load this adapter, PEFT "
                "cannot; lorafit.convert() makes a plain LoRA of it, which both can",
                LorafitWarning,
                stacklevel=2,
            )
        return {
            "d_initial": method.d_init,
            "init_weights": True,
            "projection_prng_key": _projection(description).key or 0,
            "r": method.r,
            "save_projection": self._stored(description),
            "vera_dropout": method.dropout,
        }

    def record(self, description: Description) -> dict[str, Any]:
        """The sizes of the layers, with which the file alone can be made a plain LoRA."""
        vectors = {path: each.site for path, each in description.sites.items() if isinstance(each.site, VectorSite)}
        return {"shapes": {path: list(site.shape[:2]) for path, site in vectors.items()}}

    @staticmethod
    def _stored(description: Description) -> bool:
        method = description.method
        assert isinstance(method, VeRA)
        # A pair whose seed nobody knows can only be kept as it is.
        return method.save_projection or _projection(description).key is None

    # Reading

    def method(self, reader: Reader) -> Method:
        get = reader.config.get
        keys = {"d_init": "d_initial", "dropout": "vera_dropout"}
        return reader.made(
            lambda: VeRA(
                r=get("r", 256),
                d_init=get("d_initial", 0.1),
                save_projection=get("save_projection", True),
                dropout=get("vera_dropout", 0.0),
            ),
            keys,
        )

    def rank(self, reader: Reader) -> int:
        r: int = reader.config.get("r", 256)
        return r

    def keys(self, parsed: Parsed) -> tuple[str, ...]:
        return ("vera_lambda_b", "vera_lambda_d")

    def slots(self, site: Site, parsed: Parsed) -> tuple[Slot, ...]:
        return (
            Slot("d", "vera_lambda_d", lambda site, d, r: exactly(d, (r,)), ranked=True),
            Slot("b", "vera_lambda_b", lambda site, b, r: exactly(b, (site.shape.out,))),
        )

    def adapters(
        self, method: Method, places: Sequence[Place], shared: Mapping[str, Tensor], parsed: Parsed, record: Record
    ) -> dict[str, Adapter]:
        if not isinstance(method, VeRA):
            raise ContradictionError("the file has the vectors of VeRA")
        if record and method != parsed.method:
            raise ContradictionError(f"it is {method}, the settings are those of {parsed.method}")
        spots = [place.spot for place in places]
        out, inn = max(spot.shape.out for spot in spots), max(spot.shape.inn for spot in spots)
        try:
            made = method.adapters_on(spots, projection(parsed, shared, out, inn))
        except ConfigError as error:
            raise CheckpointError(
                error.message,
                where=f"{parsed.where.parent}: {A}, {B}",
                found=error.found,
                expected=error.expected,
                fix=error.fix,
            ) from None
        for place in places:
            adapter = made[place.path].to(device=place.spot.device, dtype=place.spot.dtype)
            for name, value in place.values.items():
                put(adapter, name, value)
        return made


def projection(parsed: Parsed, shared: Mapping[str, Tensor], out: int, inn: int) -> Projection:
    """The pair A, B of a file: stored in it, or drawn again from its seed for layers of at most these sizes.

    Raises:
        CheckpointError: half of it, or one without a seed.
    """
    reader = Reader(parsed.config, parsed.where)
    key = parsed.config.get("projection_prng_key", 0)
    if isinstance(key, bool) or not isinstance(key, int) or not -(2**63) <= key < 2**64:
        raise reader.error("projection_prng_key", "this is no seed", key, "a whole number")
    stored = [name for name in (A, B) if name in shared]
    saved = parsed.config.get("save_projection", True)
    if saved and len(stored) < 2:
        absent = A if A not in shared else B
        raise CheckpointError(
            "missing key",
            where=f"{parsed.where.parent}: {absent}",
            found=f"save_projection = {saved} and {len(stored)} of two projections",
            expected=repr(absent),
            fix="copy the file again; or set save_projection to false, if the seed alone was saved",
        )
    if not saved and stored:
        # PEFT leaves them unused then. Which of the two was meant nobody can tell, unless they agree.
        warnings.warn(
            f"{parsed.where}: save_projection is false, and the file holds {some(stored)}: the seed is used, "
            "as in PEFT",
            LorafitWarning,
            stacklevel=2,
        )
    if saved:
        a, b = (shared[name].to(torch.promote_types(shared[name].dtype, torch.float32)) for name in (A, B))
        return Projection(a, b, key)
    return Projection.draw(key, parsed.rank, out, inn)


def _projection(description: Description) -> Projection:
    for placed in description.sites.values():
        adapter = placed.adapter
        assert isinstance(adapter, VeRAAdapter)
        assert isinstance(adapter.common, Projection)
        return adapter.common
    raise AssertionError("an adapter without sites")
