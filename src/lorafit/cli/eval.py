"""`lorafit eval`: how well an adapter predicts held-out records, and its base model beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options

if TYPE_CHECKING:
    import torch

    from lorafit.cli.adapters import Description, Loaded
    from lorafit.cli.heldout import HeldOut
    from lorafit.cli.screen import Screen


@dataclass(frozen=True)
class Score:
    """How well the held-out records are predicted.

    Attributes:
        loss: nats per prediction; of a regression the mean squared error as a share of the labels' variance.
        perplexity: its exponential; None for a regression.
        accuracy: share of right classes; None but for a classifier.
        predictions: tokens, or records.
        agreement: of a regression: error and correlations with their intervals, flat; None for anything else.
    """

    loss: float
    perplexity: float | None
    accuracy: float | None
    predictions: int
    agreement: dict[str, float] | None = None


def evaluate(
    adapter: Annotated[
        Path | None, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model alone, without an adapter.")] = False,
    model: options.BaseModel = None,
    dtype: options.Dtype = None,
    quantise: options.RunQuantise = None,
    labels: options.Labels = None,
    data: options.Data = None,
    data_split: options.DataSplit = None,
    columns: options.Columns = None,
    limit: options.EvalLimit = None,
    max_length: options.MaxLength = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Records in a batch.", rich_help_panel=options.RUN)
    ] = 16,
    samples: options.Samples = 0,
    max_new_tokens: options.MaxNewTokens = 48,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure an adapter, and its base model beside it.

    Without --data: on the held-out records of the run that made the adapter, if it lies in a run's folder; else on the
    embedded evaluation data.
    """
    from lorafit.cli.adapters import check_dtype, check_quantise, describe, load, storage_of
    from lorafit.cli.exits import usage
    from lorafit.cli.heldout import heldout, wanted
    from lorafit.cli.quiet import quiet
    from lorafit.cli.screen import Screen
    from lorafit.cli.values import mapping

    screen = Screen(as_json)
    with usage():
        _check(adapter, base, limit)
        check_dtype(dtype)
        check_quantise(quantise)
        roles = mapping(columns, "the command line: --columns") if columns else None
    quiet()
    described = describe(adapter, model, labels, screen.say)
    request = wanted(adapter, data, data_split, roles, limit, max_length, screen.say)
    held = heldout(request, described, samples or 0, screen.say)
    loaded = load(described, dtype, storage_of(adapter, quantise, screen.say), screen.say)
    scores = _scores(loaded, held, described, batch_size)
    _show(scores, screen)
    if loaded.head and "base" in scores:
        screen.say(f"the base has no trained {', '.join(loaded.head)}: its row is that of a random one")
    shown = _answered(loaded, held, max_new_tokens or 48, screen)
    screen.result(
        {
            "adapter": adapter,
            "model": described.located.name,
            "data": held.info,
            "scores": {name: vars(score) for name, score in scores.items()},
            "samples": shown,
        }
    )


def _check(adapter: Path | None, base: bool, limit: int | None) -> None:
    from lorafit.errors import ConfigError

    if (adapter is None) != base:
        raise ConfigError(
            "it is not clear what to measure",
            found="an adapter and --base" if base else "neither an adapter nor --base",
            expected="one of them",
            fix="lorafit eval runs/demo/adapter, or lorafit eval --base",
        )
    if limit is not None and limit < 1:
        raise ConfigError(
            "there would be nothing to measure",
            where="--eval-limit",
            found=limit,
            expected="at least 1 record",
            fix="--eval-limit 100, or leave it out to measure on all of them",
        )


def _scores(loaded: Loaded, held: HeldOut, described: Description, batch_size: int) -> dict[str, Score]:
    scores = {}
    for name, acting in sides(loaded):
        with acting:
            scores[name] = measure(loaded, held, described, batch_size)
    return scores


def sides(loaded: Loaded) -> Sequence[tuple[str, AbstractContextManager[None]]]:
    """The base model and, if there is one, the adapter: each a name and the context in which it acts."""
    if loaded.handle is None:
        return [("base", nullcontext())]
    return [("base", loaded.handle.disabled()), ("adapter", nullcontext())]


def measure(loaded: Loaded, held: HeldOut, described: Description, batch_size: int) -> Score:
    """The mean over all predictions of the held-out records."""
    from lorafit.training.objectives import CORRECT, COUNTS, LOSSES, Numbers, mean_loss

    table = by_record(loaded, held, described, batch_size)
    total, count, correct = (table[:, column].sum().item() for column in (LOSSES, COUNTS, CORRECT))
    loss = mean_loss(total, count)
    if described.scale is not None:
        return Score(loss, None, None, int(count), Numbers(described.scale).figures(table))
    return Score(loss, math.exp(min(loss, 700)), correct / count if described.classifies else None, int(count))


def by_record(loaded: Loaded, held: HeldOut, described: Description, batch_size: int) -> torch.Tensor:
    """The held-out records from short to long, as `Tally.stacked` has them: loss, predictions, right ones, pairs."""
    import torch

    from lorafit.cli.adapters import judged_by

    device = next(loaded.model.parameters()).device
    objective, made = judged_by(loaded, described)
    collate: Any = made
    records: list[Any] = sorted(held.records, key=len)  # alike in length: little padding
    parts = []
    with torch.no_grad():
        for start in range(0, len(records), batch_size):
            batch = {key: value.to(device) for key, value in collate(records[start : start + batch_size]).items()}
            parts.append(objective.tally(loaded.model, batch).stacked())
    return torch.cat(parts)


def _show(scores: dict[str, Score], screen: Screen) -> None:
    if any(score.agreement is not None for score in scores.values()):
        _show_numbers(scores, screen)
        return
    classifies = any(score.accuracy is not None for score in scores.values())
    header = ("", "loss", "accuracy" if classifies else "perplexity", "records" if classifies else "tokens")
    rows = [
        (
            name,
            f"{score.loss:.4f}",
            f"{score.perplexity:.4g}" if score.accuracy is None else f"{score.accuracy:.1%}",
            f"{score.predictions:,}",
        )
        for name, score in scores.items()
    ]
    screen.table(header, rows, right=(1, 2, 3))


def _show_numbers(scores: dict[str, Score], screen: Screen) -> None:
    """A regression: the error in the labels' own unit, and correlations, each with its 95 % interval."""
    header = ("", "loss", "mean absolute error", "Pearson", "Spearman", "records")
    rows = []
    for name, score in scores.items():
        found = score.agreement or {}
        cells = (within(found, key) for key in ("mean_absolute_error", "pearson", "spearman"))
        rows.append((name, f"{score.loss:.4f}", *cells, f"{score.predictions:,}"))
    screen.table(header, rows, right=(1, 2, 3, 4, 5))
    screen.say(
        "loss: squared error as a share of the variance of the labels that were learnt; brackets: 95 % intervals"
    )


def within(found: Mapping[str, float], key: str) -> str:
    """One of `Agreement.figures` with its interval; what is not defined is said to be so.

    >>> within({"pearson": 0.5, "pearson_low": 0.4, "pearson_high": 0.6}, "pearson"), within({}, "pearson")
    ('0.500 (0.400 to 0.600)', 'not defined')
    """
    if key not in found:
        return "not defined"
    ends = "" if f"{key}_low" not in found else f" ({found[f'{key}_low']:.3f} to {found[f'{key}_high']:.3f})"
    return f"{found[key]:.3f}{ends}"


def _answered(loaded: Loaded, held: HeldOut, length: int, screen: Screen) -> list[dict[str, Any]]:
    """Held-out questions with the answers of both sides, shown as they are given."""
    from lorafit.training.answers import answers

    if not held.samples:
        return []
    made = {}
    for name, acting in sides(loaded):
        with acting:
            made[name] = answers(loaded.model, loaded.tokenizer, held.samples, length)
    shown = []
    for place, sample in enumerate(held.samples):
        outputs = {name: texts[place] for name, texts in made.items()}
        shown.append({"prompt": sample.prompt, **outputs, "reference": sample.gold})
        screen.say()
        for label, text in shown[-1].items():
            screen.say(f"{label + ':':11}" + text.replace("\n", "\n" + " " * 11))
    return shown
