"""Which of a model's adapters act."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafit.adapted import banks, check_together
from lorafit.errors import StateError, nearest, some


def active_names(model: nn.Module, known: Sequence[str]) -> tuple[str, ...]:
    """The names of the adapters that act now, in the order of `known`."""
    names = {name for bank in banks(model) for name in bank.active}
    return tuple(name for name in known if name in names)


def activate(model: nn.Module, known: Sequence[str], names: str | Sequence[str] | None) -> None:
    """Chooses which of the adapters `known` act from now on; see `Handle.activate`."""
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            raise StateError(
                "no adapter of this name is attached",
                found=repr(name),
                expected=f"names among {some(known)}",
                near=nearest(str(name), known),
                fix="attach or load it first",
            )
    check_together(model, chosen)
    for bank in banks(model):
        for name in bank.merged:
            if name not in chosen:
                raise StateError(
                    f"adapter {name!r} is merged into the weights and acts until it is unmerged",
                    found=f"activate({names!r})",
                    expected=f"a choice with {name!r} in it",
                    fix="unmerge it first; disabled() of its own handle takes it out for a while",
                )
    for bank in banks(model):
        bank.set(active=chosen)
