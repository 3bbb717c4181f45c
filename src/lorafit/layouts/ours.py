"""The key "lorafit" of a config: the method that trained the adapter, exactly, for a run that goes on with it.

What the adapter computes never depends on it: PEFT's own settings say that. Where the two contradict each other, PEFT's
count, and it is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.errors import CheckpointError, ConfigError
from lorafit.layers import Site, TransposedSite
from lorafit.layouts.base import Layout
from lorafit.layouts.own import OWN
from lorafit.method import Method
from lorafit.methods import describe, revive
from lorafit.peft_layout import Description

TRANSPOSED = "transposed"
"""Which of the layers are transposed convolutions, where some are."""


@dataclass(frozen=True)
class Ours:
    """What stands under the key.

    Attributes:
        method: the method of the adapter.
        sites: the method at those sites where it is another one.
        record: all of it.
    """

    method: Method
    sites: Mapping[str, Method]
    record: Mapping[str, Any]

    def at(self, path: str) -> Method:
        """The method of one site."""
        return self.sites.get(path, self.method)


def written(description: Description, layout: Layout) -> dict[str, Any]:
    """What is written under the key."""
    record = layout.record(description)
    turned = _transposed({path: placed.site for path, placed in description.sites.items()})
    if turned:
        record = {**record, TRANSPOSED: turned}
    plain = _described(description.method)
    if plain is None:  # of another package: it is read as what PEFT sees in it
        return {"method": None, "trained": description.method.name, **record}
    own = {path: placed.method for path, placed in description.sites.items() if placed.method != description.method}
    sites = {path: _described(method) for path, method in own.items()}
    return {"method": plain, "sites": sites, **record}


def _described(method: Method) -> dict[str, Any] | None:
    plain = describe(method)
    try:
        return plain if revive(json.loads(json.dumps(plain))) == method else None
    except (ConfigError, TypeError):
        return None


def read(config: Mapping[str, Any]) -> Ours | str | None:
    """What a config has under the key: it, a reason why it cannot be read, or None where there is nothing to read."""
    record = config.get(OWN)
    if record is None:
        return None
    if not isinstance(record, dict) or "method" not in record:
        return f"it is {record!r}, no object with a method"
    if record["method"] is None:
        return None
    sites = record.get("sites", {})
    try:
        if not isinstance(record["method"], dict) or not isinstance(sites, dict):
            return "a method is an object, and so are sites"
        return Ours(revive(record["method"]), {path: revive(each) for path, each in sites.items()}, record)
    except (ConfigError, TypeError, AttributeError) as error:
        return str(error).replace("\n", ";")


def check_transposed(config: Mapping[str, Any], layout: Layout, sites: Mapping[str, Site], where: object) -> None:
    """Raises `CheckpointError` where a file takes a transposed convolution for another layer, or the other way round.

    From A and B alone that cannot be told: the numbers would fit, and be added in the wrong places.
    """
    record = config.get(OWN)
    if not isinstance(record, dict):
        if layout.peft_type.startswith("LORAFIT"):  # without its key it says nothing of the kind
            return
        record = {}  # PEFT has no adapter for transposed convolutions
    told, turned = record.get(TRANSPOSED, []), _transposed(sites)
    if not isinstance(told, list):
        raise CheckpointError(
            "the paths of transposed convolutions are no list",
            where=f"{where}: {OWN}.{TRANSPOSED}",
            found=repr(told),
            expected="a list of paths",
            fix="copy the file again",
        )
    for path, site in sites.items():
        if (path in told) != (path in turned):
            raise CheckpointError(
                "the model has another kind of layer there",
                where=f"{where}: {path}",
                found=site.kind,
                expected="a transposed convolution" if path in told else "a layer that is no transposed convolution",
                fix="load the base model that the adapter was trained on",
            )


def _transposed(sites: Mapping[str, Site]) -> list[str]:
    return [path for path, site in sites.items() if isinstance(site, TransposedSite)]
