"""Which of a model's adapters act."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lorafit.adapted import bank_of, banks, check_together, rescales, walk
from lorafit.errors import StateError, check_attached, nearest, some
from lorafit.layers import copy_of


def active_names(model: nn.Module, known: Sequence[str]) -> tuple[str, ...]:
    """The names of the adapters that act now, in the order of `known`."""
    names = {name for bank in banks(model) for name in bank.active}
    return tuple(name for name in known if name in names)


def activate(model: nn.Module, known: Sequence[str], names: str | Sequence[str] | None) -> None:
    """Chooses which of the adapters `known` act from now on; see `Handle.activate`."""
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in chosen:
        check_attached(name, known)
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
    check_unscaled(((path, module) for path, module, _ in walk(model)), chosen)
    for bank in banks(model):
        bank.set(active=chosen)


def check_active(name: str, active: Sequence[str]) -> None:
    """Raises `StateError` for an adapter that merging would make act."""
    if name not in active:
        raise StateError(
            f"adapter {name!r} is not active, and merging it would make it act",
            found=f"active: {some(active) or 'none'}",
            expected="an active adapter",
            fix=f"activate({name!r}) first",
        )


def check_apart(name: str, *, merged: bool) -> None:
    """Raises `StateError` for an adapter that is in the weights."""
    if merged:
        raise StateError(f"adapter {name!r} is merged", expected="an unmerged one", fix="unmerge it first")


def check_site(path: str, sites: Collection[str]) -> None:
    """Raises `StateError` for a path that is none of an adapter's sites."""
    if path not in sites:
        raise StateError(
            "no such site",
            found=repr(path),
            expected=f"one of {len(sites)} sites",
            near=nearest(path, sites),
            fix="see handle.sites",
        )


def check_trainable(name: str, trained: Sequence[object]) -> None:
    """Raises `StateError` for an adapter without anything that is trained."""
    if not trained:
        raise StateError(
            f"adapter {name!r} has nothing to train",
            found="an adapter that was loaded for inference",
            expected="a trainable one",
            fix="load(model, path, trainable=True)",
        )


def check_settled(lifted: str | None) -> None:
    """Raises `StateError` while a merged adapter is out of the weights and will be put back into them."""
    if lifted is not None:
        raise StateError(
            f"inside disabled(): adapter {lifted!r} is merged, and comes back into the weights at its end",
            expected="nothing merged, unmerged or detached until then",
            fix="leave the with block first",
        )


def check_unscaled(modules: Iterable[tuple[str, nn.Module]], names: Sequence[str]) -> None:
    """Raises `StateError` for an adapter that rescales W + Δ (DoRA) where another one is merged into W now."""
    for path, module in modules:
        bank = bank_of(module)
        if bank is None or not bank.merged:
            continue
        for name in names:
            if name not in bank.merged and rescales(module, name):
                raise StateError(
                    f"adapter {name!r} rescales the rows of W + Δ (DoRA), and another one is merged into W now",
                    where=path,
                    found=f"{bank.merged[0]!r}, merged",
                    expected="the base's weight",
                    fix=f"unmerge {bank.merged[0]!r} first",
                )


def check_in_place(model: nn.Module, modules: Iterable[tuple[str, nn.Module]], name: str, doing: str) -> None:
    """Raises `StateError` for a layer that was replaced after attach, as `resize_token_embeddings` does."""
    for path, module in modules:
        try:
            now: nn.Module | None = model.get_submodule(path)
        except AttributeError:
            now = None
        bank = bank_of(module)
        if now is not module or bank is None or name not in bank:
            raise StateError(
                f"a layer was replaced after the adapter was attached; cannot {doing}",
                where=path,
                found="another module, without the adapter" if bank is not None else "no adapter",
                expected="the module that was adapted",
                fix="resize, convert or replace layers first, then attach",
            )


def check_read(model: nn.Module, modules: Iterable[tuple[str, nn.Module]], doing: str) -> None:
    """Raises `StateError` for a layer of which the model reads a copy, as that of diffusers' fused projections."""
    for path, module in modules:
        try:
            copied = copy_of(model.get_submodule(path.rpartition(".")[0]), module)
        except AttributeError:  # gone with all that was around it: nobody reads it
            continue
        if copied is not None:
            raise StateError(
                f"the projections were fused after the adapter was attached; cannot {doing}",
                where=path,
                found=f"{copied!r}, which holds a copy of this weight and is called instead of it",
                expected="projections that are not fused",
                fix="unfuse_qkv_projections() first; fuse again after merging, when the copies are of merged weights",
            )
