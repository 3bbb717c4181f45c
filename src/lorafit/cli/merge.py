"""`lorafit merge`: the adapter into the weights of its base, as a plain model, checked after it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options
from lorafit.cli.probing import logits_of, probe_for

if TYPE_CHECKING:
    import torch

    from lorafit.cli.adapters import Description, Loaded
    from lorafit.cli.screen import Screen

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
"""By dtype of the weights: how far logits may move, as a share of the largest logit. The update is rounded into the
weights, with 24, 11 or 8 bits; many layers add that up."""
LOST = 0.02
"""A head gives labels itself where they can be so close together, as a share of their spread."""


@dataclass(frozen=True)
class Comparison:
    """The merged model against the adapted one, on the probe.

    Attributes:
        difference: largest difference of a logit.
        effect: largest difference that the adapter makes to the base model.
        largest: the largest logit of the adapted model.
        tolerance: how large `difference` may be.
    """

    difference: float
    effect: float
    largest: float
    tolerance: float


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", metavar="DIR", help="A new or empty directory.", show_default=False)
    ],
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a weight that another layer shares a copy of its own.")
    ] = False,
    model: options.BaseModel = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Of the merged model: float32, bfloat16, float16. Default: that of the base model's files.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    labels: options.Labels = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fold an adapter into its base model and save that as a plain one.

    The written model is loaded again, and its logits are compared with those of base and adapter. If they do not
    agree, nothing is left behind.
    """
    from lorafit.cli.adapters import PLAIN, check_dtype, describe, load, run_storage
    from lorafit.cli.exits import usage
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.exporting.folder import check_free

    screen = Screen(as_json)
    with usage():
        check_free(output_dir)
        check_dtype(dtype)
    quiet()
    described = describe(adapter, model, labels, screen.say)
    kind = dtype or stored_dtype(described)
    screen.say(f"{described.located.name} in {kind}, with {adapter}")
    trained = run_storage(adapter)
    if trained != PLAIN:
        screen.say(f"it was trained over a base in {trained}, and is merged into the plain one")
    loaded = load(described, kind)
    probe = probe_for(loaded.model)
    assert loaded.handle is not None
    with loaded.handle.disabled():
        plain = logits_of(loaded.model, probe)
    adapted = logits_of(loaded.model, probe)
    untied = fold(loaded, untie)
    if untied:
        screen.say("the weights are no longer tied: config.tie_word_embeddings is false")
    plain, adapted = in_labels(loaded, described, plain, adapted, screen.say)
    found = write(loaded, described, output_dir, probe, plain, adapted)
    show(found, screen)
    screen.say(f"merged: {output_dir}", whole=True)
    screen.say(f"max logit difference {found.difference:.2g} (at most {found.tolerance:.2g} allowed)")
    screen.result({"output_dir": str(output_dir), "dtype": kind, "untied": untied, **vars(found)})


def stored_dtype(described: Description) -> str:
    """The dtype of the base model's files."""
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(described.located.path).dtype or "float32").removeprefix("torch.")


def fold(loaded: Loaded, untie: bool) -> bool:
    """Merges in memory; says whether weights that were tied are so no longer."""
    from lorafit.errors import MergeError

    assert loaded.handle is not None
    tied = _tied(loaded.model)
    try:
        loaded.handle.merge_and_detach(untie=untie)
    except MergeError as error:
        words = {"merge(untie=True)": "--untie", "merge into float32 (model.float())": "--dtype float32"}
        fix = error.fix or ""
        for python, flag in words.items():
            fix = fix.replace(python, flag)
        raise MergeError(
            error.message, found=error.found, expected=error.expected, where=error.where, near=error.near, fix=fix
        ) from error
    if tied and not _tied(loaded.model):
        loaded.model.config.tie_word_embeddings = False
        return True
    return False


def in_labels(
    loaded: Loaded, described: Description, plain: torch.Tensor, adapted: torch.Tensor, say: Callable[[str], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Has the merged head of a regression give labels, rather than what they were learnt as; says what else to know.

    Returns:
        The logits of base and adapter, as they have to be then.
    """
    import torch

    from lorafit.training.models import head_paths
    from lorafit.training.numbers import SCALE

    if described.pooling is not None:
        say(
            f"the merged model is a {type(loaded.model).__name__}, a class of lorafit's: transformers alone does not "
            "read it; lorafit.training.models.load_classifier does"
        )
    scale = described.scale
    if scale is None or scale == scale.kept:
        return plain, adapted
    parameters, why = dict(loaded.model.named_parameters()), "the head has no bias to hold the labels' mean"
    for path in head_paths(loaded.model):
        weight, bias = parameters.get(f"{path}.weight"), parameters.get(f"{path}.bias")
        if weight is not None and bias is not None and weight.ndim == 2 and weight.shape[0] == 1:
            lost = torch.finfo(bias.dtype).eps * abs(scale.offset)
            if lost > LOST * abs(scale.factor):
                why = f"labels of {scale.offset:.3g} in the head's type would be {lost:.2g} apart at least"
                break
            with torch.no_grad():
                weight.mul_(scale.factor)
                bias.mul_(scale.factor).add_(scale.offset)
            say(f"the head gives labels now: its weights times {scale.factor:.3g}, its bias {scale.offset:+.3g}")
            return scale.label(plain), scale.label(adapted)
    setattr(loaded.model.config, SCALE, scale.as_json())
    say(f"{why}: a label is {scale.offset:.6g} + {scale.factor:.6g} times the output (config.json: {SCALE})")
    return plain, adapted


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def write(
    loaded: Loaded,
    described: Description,
    output_dir: Path,
    probe: dict[str, torch.Tensor],
    plain: torch.Tensor,
    adapted: torch.Tensor,
    *,
    keep: bool = False,
    card: str = "",
) -> Comparison:
    """Writes beside `output_dir`, compares, and only then puts the directory in its place.

    Args:
        loaded: the merged model.
        described: where it came from.
        output_dir: a new or empty directory.
        probe: tokens.
        plain: the base's logits for them.
        adapted: those of base and adapter.
        keep: leave a model in its place even if it does not compute what it should, for the caller to say so.
        card: the text of README.md; none is written if it is empty.
    """
    from lorafit.exporting.folder import fresh

    with fresh(output_dir) as partial:
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        found = _compare(loaded, described, partial, probe, plain, adapted)
        if not keep:
            agree(found, "it was removed")
    return found


def _compare(
    loaded: Loaded,
    described: Description,
    written: Path,
    probe: dict[str, torch.Tensor],
    plain: torch.Tensor,
    adapted: torch.Tensor,
) -> Comparison:
    """Loads what was written and compares it with the adapted model."""
    from lorafit.cli.adapters import CLASSES
    from lorafit.errors import MergeError
    from lorafit.training.models import Located, load_causal, load_classifier

    kind = next(loaded.model.parameters()).dtype
    place = Located(str(written), described.located.name)
    if described.task_type == CLASSES:
        pad = loaded.tokenizer.pad_token_id
        again, missing = load_classifier(place, kind, described.labels, pad, pooling=described.pooling)
        if missing:
            raise MergeError("the written model lacks weights", where=written, found=", ".join(missing))
    else:
        again = load_causal(place, kind)
    merged = logits_of(again.to(probe["input_ids"].device).eval(), probe)
    return comparison(merged, plain, adapted, TOLERANCE[str(kind).removeprefix("torch.")])


def comparison(merged: torch.Tensor, plain: torch.Tensor, adapted: torch.Tensor, share: float) -> Comparison:
    """Logits of a merged model against those of base and adapter; they may differ by `share` of the largest."""
    largest = float(adapted.abs().max())
    return Comparison(
        difference=float((merged - adapted).abs().max()),
        effect=float((adapted - plain).abs().max()),
        largest=largest,
        tolerance=share * largest,
    )


def agree(found: Comparison, fate: str) -> None:
    """Raises `MergeError` if the merged model does not compute what it should; `fate` says what became of it."""
    from lorafit.errors import MergeError

    if not found.difference <= found.tolerance:
        raise MergeError(
            f"the merged model does not compute what base and adapter compute; {fate}",
            found=f"a logit differs by {found.difference:.3g}",
            expected=f"at most {found.tolerance:.3g}",
            fix="--dtype float32 rounds least; if it is float32 already, this is a bug",
        )


def show(found: Comparison, screen: Screen) -> None:
    """Says how far rounding took the merged model from the adapted one, beside what the adapter does."""
    screen.say(f"the adapter moves a logit by up to {found.effect:.3g}; the largest logit is {found.largest:.3g}")
    if found.difference > found.effect / 4:
        screen.say(
            "warning: rounding takes away much of what the adapter does: --dtype float32 keeps it"
            if found.effect
            else "warning: the adapter does nothing"
        )
