"""An adapter in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorafit.layers import Site
from lorafit.method import Method


def summary(method: Method, sites: Sequence[Site], saved: int, trained: int, total: int) -> str:
    """Method, resolved settings, sites, trained share.

    Args:
        method: the method.
        sites: where it sits.
        saved: how many modules are trained in full.
        trained: how many numbers are trained.
        total: how many the base model has.
    """
    settings = ", ".join(f"{key} {_short(value)}" for key, value in method.settings().items())
    where = ", ".join(f"{count} {kind}" for kind, count in Counter(site.kind for site in sites).items())
    full = f", {saved} modules trained in full" if saved else ""
    share = trained / max(1, total)
    return f"{method.name} ({settings}) on {where}{full}: {trained:,} of {total:,} numbers trained ({share:.2%})"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
