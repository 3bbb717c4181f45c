"""`lorafit inspect`: did the adapter learn anything, where, and what is out of line; two adapters side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    from lorafit.cli.screen import Screen
    from lorafit.handle import Handle
    from lorafit.inspection import Alike, Inspection, Place

SHOWN = 12
"""Sites in the table unless all are asked for."""
BESIDE = "beside"
"""The name of the other adapter on the model."""


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Another one to set beside it.", show_default=False)
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--base", help="Load the base's weights, too: changes as shares of them, and effect on logits."),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help=f"Show every site, not the {SHOWN} that moved most.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write all of it as a page, too.")
    ] = None,
    model: options.BaseModel = None,
    labels: options.Labels = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Look into an adapter: whether it learnt anything, where, and what is out of line.

    Needs the adapter's files alone; with --base it loads the model as well. Two adapters are compared by the directions
    that they read and write.
    """
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.inspection import inspect as look

    screen = Screen(as_json)
    if report is not None:
        from lorafit.report.document import check_place

        with usage():
            check_place(report, adapter)
    quiet()
    handle, effect = _opened(adapter, base or model is not None, model, labels, screen)
    second = None if other is None else _second(handle, other, with_base=effect is not None)
    found = look(handle, weights=effect is not None)
    _show(found, screen, everything)
    if effect is not None:
        screen.say(f"it moves a logit of a fixed probe by up to {effect['effect']:.3g}, of {effect['largest']:.3g}")
    beside = None if other is None or second is None else _beside(handle, second, other, screen)
    told = {
        "adapter": str(adapter),
        "method": handle.method.name,
        "settings": handle.method.settings(),
        "base": effect is not None,
        **_as_json(found),
        "logits": effect,
        "other": beside,
    }
    screen.say(found.verdict())
    if report is not None:
        screen.say(f"report: {_write(told, adapter, report)}", whole=True)
    screen.result({**told, "report": report})


def _write(told: Mapping[str, Any], adapter: Path, report: Path) -> Path:
    from lorafit.report.document import write_document
    from lorafit.report.inspection_page import document

    return write_document(document(told, str(adapter)), report)


def _opened(
    adapter: Path, with_base: bool, model: str | None, labels: str | None, screen: Screen
) -> tuple[Handle, dict[str, float] | None]:
    """The adapter on its base, with its effect on logits; or on layers without weights."""
    if not with_base:
        import lorafit
        from lorafit.bare import bare_model

        return lorafit.load(bare_model(adapter), adapter), None
    from lorafit.cli.adapters import describe, load
    from lorafit.cli.probing import logits_of, probe_for

    loaded = load(describe(adapter, model, labels, screen.say), "float32")
    assert loaded.handle is not None
    tokens = probe_for(loaded.model)
    with loaded.handle.disabled():
        plain = logits_of(loaded.model, tokens)
    adapted = logits_of(loaded.model, tokens)
    effect = {"effect": float((adapted - plain).abs().max()), "largest": float(plain.abs().max())}
    return loaded.handle, effect


def _show(found: Inspection, screen: Screen, everything: bool) -> None:
    ordered = list(found.places) if everything else sorted(found.places, key=lambda one: -one.norm)[:SHOWN]
    related = any(place.relative is not None for place in found.places)
    begun = any(place.start is not None for place in found.places)
    header = ("site", "‖ΔW‖", "of ‖W‖" if related else "", "of its start" if begun else "",
              "rank", "stable", "effective", "σ₁")  # fmt: skip
    rows = [_row(place) for place in ordered]
    kept = [at for at, name in enumerate(header) if name]
    screen.table([header[at] for at in kept], [[row[at] for at in kept] for row in rows], right=range(1, len(kept)))
    if len(ordered) < len(found.places):
        screen.say(f"the {len(ordered)} sites of {len(found.places):,} that moved most; --all shows all")
    if found.dead:
        screen.say(f"without any change: {len(found.dead):,} of {len(found.places):,} sites ({found.dead_share:.1%})")
    for finding in found.findings[:SHOWN]:
        where = finding.path or "the adapter"
        screen.say(f"{where}: {finding.kind} ({finding.detail})")
    if len(found.findings) > SHOWN:
        screen.say(f"and {len(found.findings) - SHOWN:,} more, under --json")


def _row(place: Place) -> tuple[str, ...]:
    seen = place.spectrum
    return (
        place.path,
        f"{place.norm:.3g}",
        "–" if place.relative is None else f"{place.relative:.2%}",
        "–" if place.grown is None else f"{place.grown:.2%}",
        "–" if place.r is None else str(place.r),
        f"{seen.stable_rank:.1f}",
        f"{seen.effective_rank:.1f}",
        f"{seen.values[0]:.3g}" if seen.values else "–",
    )


def _second(handle: Handle, other: Path, *, with_base: bool) -> Handle:
    """The other adapter: on the same base, if there is one, since files such as VeRA's do not tell sizes of layers."""
    import lorafit
    from lorafit.bare import bare_model

    return lorafit.load(
        handle.model if with_base else bare_model(other), other, name=BESIDE if with_base else "default"
    )


def _beside(handle: Handle, second: Handle, other: Path, screen: Screen) -> dict[str, Any]:
    from lorafit.inspection import by_angles, mean_likeness

    found = by_angles(handle, second)
    only = (len(handle.sites) - len(found), len(second.sites) - len(found))
    mean = mean_likeness(None if one is None else one.likeness for one in found.values())
    if mean is None:
        screen.say(f"{other}: no site at which both change something")
    else:
        screen.say(
            f"beside {other}, over {len(found):,} common sites: {mean.outputs:.0%} of the directions that they write "
            f"and {mean.inputs:.0%} of those that they read are shared; the changes' cosine is {mean.cosine:.3f}"
        )
    if any(only):
        screen.say(f"{only[0]:,} sites are in the first alone, {only[1]:,} in the second alone")
    return {
        "adapter": str(other),
        "method": second.method.name,
        "mean": None if mean is None else asdict(mean),
        "sites": {path: None if one is None else _alike(one) for path, one in found.items()},
        "alone": list(only),
    }


def _alike(one: Alike) -> dict[str, Any]:
    return {**asdict(one.likeness), "output_cosines": list(one.outputs), "input_cosines": list(one.inputs)}


def _as_json(found: Inspection) -> dict[str, Any]:
    return {
        "verdict": found.verdict(),
        "dead": list(found.dead),
        "dead_share": found.dead_share,
        "median_relative": found.median_relative,
        "findings": [asdict(finding) for finding in found.findings],
        "sites": {place.path: _site(place) for place in found.places},
    }


def _site(place: Place) -> dict[str, Any]:
    return {
        "out": place.out,
        "in": place.inn,
        "r": place.r,
        "rank_in_use": place.spectrum.rank,
        "norm": place.norm,
        "weight": place.weight,
        "relative": place.relative,
        "start": place.start,
        "rescaled": place.rescaled,
        "grown": place.grown,
        "stable_rank": place.spectrum.stable_rank,
        "effective_rank": place.spectrum.effective_rank,
        "singular_values": list(place.spectrum.values),
        "largest_row": place.largest_row,
        "magnitude": None if place.moved is None else place.moved.magnitude,
        "direction": None if place.moved is None else place.moved.direction,
    }
