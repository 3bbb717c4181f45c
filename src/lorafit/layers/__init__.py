"""Everything the library knows about layer types: one `Site` class each. Nothing else in the core names one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import nn

from lorafit.layers.convolution import Conv1dSite, Conv2dSite, Conv3dSite, ConvSite
from lorafit.layers.following import FollowingSite, genuine, overriding
from lorafit.layers.foreign import Bits4Site, Bits8Site, TensorSite, bitsandbytes_layers, is_torchao
from lorafit.layers.fused import copy_of
from lorafit.layers.lookup import EmbeddingSite, sparse
from lorafit.layers.mixing import Mixing, alone
from lorafit.layers.own import OwnConv1dSite, OwnConv2dSite, OwnConv3dSite, OwnConvSite, OwnLinearSite, OwnSite
from lorafit.layers.packed import Int8Conv1DSite, Int8LinearSite, PackedSite, Stored
from lorafit.layers.site import Acting, BaseForward, Made, Shape, Site, apply
from lorafit.layers.transposed import ConvTranspose1dSite, ConvTranspose2dSite, ConvTranspose3dSite, TransposedSite
from lorafit.layers.vector import Conv1DSite, LinearSite, VectorSite
from lorafit.quant.modules import Int8InOut, Int8OutIn

__all__ = [
    "KINDS",
    "SITES",
    "Acting",
    "BaseForward",
    "Bits4Site",
    "Bits8Site",
    "Conv1DSite",
    "Conv1dSite",
    "Conv2dSite",
    "Conv3dSite",
    "ConvSite",
    "ConvTranspose1dSite",
    "ConvTranspose2dSite",
    "ConvTranspose3dSite",
    "EmbeddingSite",
    "FollowingSite",
    "Int8Conv1DSite",
    "Int8LinearSite",
    "LinearSite",
    "Made",
    "Mixing",
    "OwnConvSite",
    "OwnSite",
    "PackedSite",
    "Shape",
    "Site",
    "Sites",
    "Stored",
    "TensorSite",
    "TransposedSite",
    "VectorSite",
    "alone",
    "apply",
    "bypass",
    "copy_of",
    "own_forward",
    "packed",
    "site_class",
    "site_of",
    "sparse",
    "unfollowed",
]

SITES: dict[type[nn.Module], type[Site]] = {
    nn.Linear: LinearSite,
    nn.Embedding: EmbeddingSite,
    nn.Conv1d: Conv1dSite,
    nn.Conv2d: Conv2dSite,
    nn.Conv3d: Conv3dSite,
    nn.ConvTranspose1d: ConvTranspose1dSite,
    nn.ConvTranspose2d: ConvTranspose2dSite,
    nn.ConvTranspose3d: ConvTranspose3dSite,
}

OWN: dict[type[Site], type[Site]] = {
    LinearSite: OwnLinearSite,
    Conv1dSite: OwnConv1dSite,
    Conv2dSite: OwnConv2dSite,
    Conv3dSite: OwnConv3dSite,
}
"""A site of torch's own forward → the site of a class that has another one."""

KINDS = f"{', '.join(site.kind for site in SITES.values())} or {Conv1DSite.kind}"
"""The layers that can be adapted, for errors."""


def _known() -> Iterator[tuple[type, type[Site]]]:
    # Layers over stored forms first: they are instances of a plain type, too.
    yield Int8OutIn, Int8LinearSite
    yield Int8InOut, Int8Conv1DSite
    yield from bitsandbytes_layers()
    yield from SITES.items()
    # A model can hold HF's Conv1D only if somebody imported it: then it is here without importing transformers.
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None:
        yield transformers.Conv1D, Conv1DSite


def site_class(kind: type[nn.Module]) -> type[Site] | None:
    """The site class for modules of type `kind`, or None for a type that the library does not know."""
    kind = genuine(kind)
    for base, site in _known():
        if issubclass(kind, base):
            return site if overriding(kind, base) is None else OWN.get(site, site)
    return None


def site_of(module: nn.Module) -> Site:
    """The site of a layer of a known type, adapted or not, as its weight is kept now."""
    kind = site_class(type(module))
    assert kind is not None, type(module)
    if kind is LinearSite and is_torchao(module._parameters.get("weight")):
        return TensorSite(module)
    return kind(module)


def packed(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight is kept in another form than numbers that can be trained."""
    return site_class(type(module)) is not None and site_of(module).packed


@final
class Sites(Mapping[str, Site]):
    """Path → site. Sites are made when they are asked for: a layer's weight can get another form."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)

    def __getitem__(self, path: str) -> Site:
        return site_of(self._modules[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def bypass(parent: nn.Module, module: nn.Module) -> tuple[str, str] | None:
    """Why a layer directly inside `parent` would be read without its forward being called, and what mends it."""
    copied = copy_of(parent, module)
    if copied is not None:
        return (
            f"diffusers has fused it with others into {copied!r}, and calls that alone: an adapter would do nothing",
            "unfuse_qkv_projections() first; fuse again once the adapter is merged",
        )
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "torch.nn.MultiheadAttention reads this layer's weight and never calls its forward: "
            "an adapter would do nothing",
            'leave it out with exclude=["out_proj"]',
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "torch.nn.TransformerEncoderLayer reads this layer's weight directly on its inference fast path, which "
            "torch.backends.mha.set_fastpath_enabled(False) turns off: an adapter would act in training and do nothing "
            "in evaluation",
            "call torch.backends.mha.set_fastpath_enabled(False) before attaching",
        )
    return None


def own_forward(kind: type[nn.Module]) -> str | None:
    """The name of the class that gives `kind` a forward other than its known base's, or None.

    Such a layer computes something else than its base type, so a low-rank path built for the base would not follow it.
    """
    for base, site in _known():
        if issubclass(kind, base):
            # A stored form has a forward of its own, which its site follows.
            return None if site.packed else overriding(kind, base)
    return None


def unfollowed(kind: type[nn.Module]) -> str | None:
    """The same for types whose sites do not follow another forward: what they compute cannot even be tried."""
    site = site_class(kind)
    return None if site is None or issubclass(site, FollowingSite) else own_forward(kind)
