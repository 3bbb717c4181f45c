"""Which layers of a pipeline's parts are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorafit.diffusion.family import Family
from lorafit.errors import TargetError
from lorafit.handle import Handle
from lorafit.inject import attach
from lorafit.layers import ConvSite, Shape, site_of
from lorafit.method import Method, Sample
from lorafit.plan import Modules, choose, plan
from lorafit.targets import ALL_LINEAR, Targets, suffixes_for

WORDS = ("attention", "convolutions")
"""Words for layers of the denoiser, which stand in a list beside suffixes or alone."""
ENDS = ("conv_in", "conv_out")
"""Convolutions through which latents come in and go out: their few channels have no room for a usual rank."""


def targets_of(family: Family, wanted: str | Sequence[str] | None) -> Targets:
    """What `lorafit.attach` is told, with the words resolved.

    Args:
        family: of the pipeline.
        wanted: "attention", "convolutions", "all-linear", a regular expression, a list of suffixes and words; None is
            what the family adapts.

    Raises:
        TargetError: the denoiser has no layers of a kind.
    """
    if wanted is None:
        return list(family.default_targets())
    if isinstance(wanted, str) and wanted not in WORDS:
        return wanted
    named: list[str] = []
    for word in [wanted] if isinstance(wanted, str) else wanted:
        if word == WORDS[0]:
            named += family.default_targets()
        elif word == WORDS[1]:
            named += convolutions(family.model)
        elif word == ALL_LINEAR:
            raise TargetError(
                "all-linear stands alone",
                where="targets",
                found=repr(list(wanted)),
                expected="all-linear, or words and suffixes",
                fix="--targets all-linear, or leave it out of the list",
            )
        else:
            named.append(word)
    return list(dict.fromkeys(named))


def convolutions(model: nn.Module) -> list[str]:
    """Suffixes that name all convolutions of a model but `ENDS`, and nothing else.

    Raises:
        TargetError: it has none.
    """
    modules = Modules.of(model)
    known = [path for path in modules.known() if path not in ENDS]
    paths = [path for path in known if isinstance(site_of(modules.by_path[path]), ConvSite)]
    if not paths:
        raise TargetError(
            "this part has no convolutions",
            where="targets",
            found=type(model).__name__,
            expected="a UNet",
            fix="--targets attention",
        )
    found = suffixes_for(paths, list(modules.aliases))
    return found if isinstance(found, list) else paths


def frozen(family: Family) -> None:
    """Freezes all parts of a pipeline but the denoiser, which `adapt` freezes.

    Of text encoders that are to be trained: before they have adapters, nobody asks for gradients of their weights.
    """
    for name, part in family.pipe.components.items():
        if name != family.denoiser and isinstance(part, nn.Module):
            part.requires_grad_(False)


def sites_of(
    family: Family,
    targets: str | Sequence[str] | None,
    exclude: Targets = (),
    *,
    method: Method | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, Shape]:
    """Path → shape of the layers of the denoiser that `adapt` will adapt.

    Raises as `lorafit.attach`, also for layers that cannot take a method, where one is given.
    """
    modules = Modules.of(family.model)
    paths = choose(family.model, modules, targets_of(family, targets), exclude, [])
    if method is not None:
        plan(
            family.model,
            method,
            paths,
            modules,
            name="default",
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
        )
    return {path: site.shape for path, site in zip(paths, modules.sites(paths), strict=True)}


def adapt(
    family: Family,
    method: Method,
    *,
    targets: str | Sequence[str] | None = None,
    exclude: Targets = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int | None = None,
    sample: Sample | None = None,
    name: str = "default",
) -> Handle:
    """Attaches a method to a pipeline's denoiser. The options are those of `lorafit.attach`."""
    return attach(
        family.model,
        method,
        targets_of(family, targets),
        exclude=exclude,
        name=name,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        seed=seed,
        sample=sample,
    )


def adapt_encoders(
    family: Family,
    method: Method,
    *,
    seed: int | None = None,
    sample: Sample | None = None,
    name: str = "default",
) -> dict[str, Handle]:
    """Attaches a method to the attention of all text encoders that can be trained: name of the part → handle."""
    made: dict[str, Handle] = {}
    try:
        for part in family.text_encoders:
            idle = family.idle(part)
            options: dict[str, Any] = {} if idle is None else {"exclude": idle}
            made[part] = attach(
                family.component(part),
                method,
                list(family.text_targets(part)),
                name=name,
                seed=seed,
                sample=sample,
                **options,
            )
    except BaseException:
        for handle in made.values():
            handle.detach()
        raise
    return made
