"""`lorafit merge`: the adapter into the weights of its base, as a plain model, checked after it was written."""

from __future__ import annotations

import os
import shutil
import tempfile
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

    screen = Screen(as_json)
    with usage():
        _check_free(output_dir)
        check_dtype(dtype)
    quiet()
    described = describe(adapter, model, labels, screen.say)
    kind = dtype or _stored_dtype(described)
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
    untied = _fold(loaded, untie)
    if untied:
        screen.say("the weights are no longer tied: config.tie_word_embeddings is false")
    found = _write(loaded, described, output_dir, probe, plain, adapted)
    _show(found, screen)
    screen.say(f"merged: {output_dir}", whole=True)
    screen.say(f"max logit difference {found.difference:.2g} (at most {found.tolerance:.2g} allowed)")
    screen.result({"output_dir": str(output_dir), "dtype": kind, "untied": untied, **vars(found)})


def _check_free(path: Path) -> None:
    from lorafit.errors import ConfigError, some

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            "the output directory is not empty",
            where=path,
            found=some(sorted(child.name for child in path.iterdir()), 3) if path.is_dir() else "a file",
            expected="a new or empty directory",
            fix="choose another --output-dir",
        )


def _stored_dtype(described: Description) -> str:
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(described.located.path).dtype or "float32").removeprefix("torch.")


def _fold(loaded: Loaded, untie: bool) -> bool:
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


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _write(
    loaded: Loaded,
    described: Description,
    output_dir: Path,
    probe: dict[str, torch.Tensor],
    plain: torch.Tensor,
    adapted: torch.Tensor,
) -> Comparison:
    """Writes beside `output_dir`, compares, and only then puts the directory in its place."""
    output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.partial-", dir=output_dir.absolute().parent))
    try:
        partial.chmod(0o755)
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        found = _compare(loaded, described, partial, probe, plain, adapted)
        mode = (partial / "config.json").stat().st_mode
        for path in partial.iterdir():
            path.chmod(mode)  # some writers of weights leave them to their owner alone
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if output_dir.is_dir():
            output_dir.rmdir()  # it is empty, and a rename onto a directory is not everywhere possible
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless something was raised
    return found


def _compare(
    loaded: Loaded,
    described: Description,
    written: Path,
    probe: dict[str, torch.Tensor],
    plain: torch.Tensor,
    adapted: torch.Tensor,
) -> Comparison:
    """Loads what was written and compares it with the adapted model. Raises `MergeError` if they do not agree."""
    from lorafit.cli.adapters import CLASSES
    from lorafit.errors import MergeError
    from lorafit.training.models import Located, load_causal, load_classifier

    kind = next(loaded.model.parameters()).dtype
    place = Located(str(written), described.located.name)
    if described.task_type == CLASSES:
        again, missing = load_classifier(place, kind, described.labels, loaded.tokenizer.pad_token_id)
        if missing:
            raise MergeError("the written model lacks weights", where=written, found=", ".join(missing))
    else:
        again = load_causal(place, kind)
    merged = logits_of(again.to(probe["input_ids"].device).eval(), probe)
    largest = float(adapted.abs().max())
    found = Comparison(
        difference=float((merged - adapted).abs().max()),
        effect=float((adapted - plain).abs().max()),
        largest=largest,
        tolerance=TOLERANCE[str(kind).removeprefix("torch.")] * largest,
    )
    if not found.difference <= found.tolerance:
        raise MergeError(
            "the merged model does not compute what base and adapter compute; it was removed",
            found=f"a logit differs by {found.difference:.3g}",
            expected=f"at most {found.tolerance:.3g}",
            fix="--dtype float32 rounds least; if it is float32 already, this is a bug",
        )
    return found


def _show(found: Comparison, screen: Screen) -> None:
    screen.say(f"the adapter moves a logit by up to {found.effect:.3g}; the largest logit is {found.largest:.3g}")
    if found.difference > found.effect / 4:
        screen.say(
            "warning: rounding takes away much of what the adapter does: --dtype float32 keeps it"
            if found.effect
            else "warning: the adapter does nothing"
        )
