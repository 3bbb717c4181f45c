"""A check of settings against each other, against the records, and against the model as its config describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from lorafit.errors import LorafitError
from lorafit.training.config import Settings
from lorafit.training.datacheck_findings import Findings, Level
from lorafit.training.models import Located, choose_dtype, loaded
from lorafit.training.planning_model import NotTraceableError, fitted
from lorafit.training.valued import AnyData

_EVALUATING = ("early_stopping", "eval_limit", "eval_steps", "eval_strategy", "keep_best", "load_best_model_at_end")
"""Settings that do nothing without an evaluation."""
_PLACING = ("rank_pattern", "alpha_pattern", "modules_to_save", "targets", "exclude", "quantise", "packing")
"""Settings that have to fit the model, besides the method's own."""


@final
class Given:
    """Which settings the user gave, and where.

    Args:
        origins: name → where it was written ("run.yaml:3", "--set", "the command line").
    """

    def __init__(self, origins: Mapping[str, str]) -> None:
        self._origins = dict(origins)

    def __contains__(self, name: str) -> bool:
        return name in self._origins

    def where(self, name: str) -> str:
        """Where a setting was written."""
        return f"{self._origins.get(name, 'the default')}: {name}"

    def named(self, text: str, among: Iterable[str], fallback: str) -> str:
        """Which of these settings, if it was given, a message is about, by its name."""
        known = (name for name in among if name in self)
        return next((name for name in known if re.search(rf"\b{re.escape(name)}\b", text)), fallback)


def check_together(settings: Settings, given: Given, findings: Findings) -> None:
    """Notes settings that contradict each other, or that do nothing."""
    nothing_held = settings.eval_data is None and settings.eval_split == 0
    never = settings.training["eval_strategy"] in ("no", None)
    values = {**settings.model_dump(), **settings.training}
    for name in _EVALUATING:
        wanted = name in given and values[name] not in (False, None, "no")
        if wanted and (nothing_held or (never and name not in ("eval_strategy", "eval_limit"))):
            why = "no records are held out (eval_split=0)" if nothing_held else "eval_strategy=no"
            findings.add(
                Level.ERROR,
                "nothing-evaluated",
                f"{name} needs evaluations during the run, and there are none: {why}.",
                given.where(name),
                field=name,
                found=f"{name}={values[name]!r}",
                fix="set eval_split=0.1, or eval_data" if nothing_held else "set eval_strategy=epoch or steps",
            )
    if "max_steps" in given and "num_train_epochs" in given and values["max_steps"] > 0:
        findings.add(
            Level.WARNING,
            "two-lengths",
            "Both max_steps and num_train_epochs are given: max_steps wins.",
            given.where("num_train_epochs"),
            field="num_train_epochs",
            fix="remove one of them",
        )
    if "eval_steps" in given and values["eval_strategy"] == "epoch":
        findings.add(
            Level.ERROR,
            "eval-steps",
            "eval_steps does nothing: evaluations are at the end of each epoch (eval_strategy=epoch).",
            given.where("eval_steps"),
            field="eval_steps",
            found=f"eval_steps={values['eval_steps']!r}",
            fix="set eval_strategy=steps",
        )
    if settings.eval_data is not None and "eval_data" in given and settings.eval_data == settings.data:
        _same_data(settings, given, findings)


def _same_data(settings: Settings, given: Given, findings: Findings) -> None:
    if settings.eval_data_split == (settings.data_split or "train"):
        findings.add(
            Level.ERROR,
            "same-data",
            "Training and evaluation are on the same records.",
            given.where("eval_data"),
            field="eval_data",
            found=f"{settings.eval_data}[{settings.eval_data_split}]",
            fix="leave eval_data away: a tenth of the records is held out",
        )


@final
@dataclass(frozen=True)
class Room:
    """What a model has room for, by its config: positions and tokens of its vocabulary; None where it does not say."""

    positions: int | None
    vocabulary: int | None


def room_of(located: Located) -> Room:
    """Reads the model's config, and no weights."""
    from transformers import AutoConfig

    config = loaded(located, lambda: AutoConfig.from_pretrained(located.path)).get_text_config().to_dict()
    return Room(config.get("max_position_embeddings"), config.get("vocab_size"))


def check_positions(settings: Settings, given: Given, room: Room, made: AnyData, findings: Findings) -> None:
    """Notes records and lengths that the model has no places or no vectors for."""
    places, vocabulary = room.positions, room.vocabulary
    longest = made.info["longest"]
    if places and longest > places:
        long = [one.where for one in (*made.train, *made.eval) if len(one) > places]
        findings.all(
            Level.ERROR,
            "positions",
            f"The record is longer than the model's {places:,} positions.",
            long,
            field="max_length",
            found=f"{longest:,} tokens, the longest; max_length={settings.max_length}",
            fix=f"--max-length {places}",
        )
    elif places and "max_length" in given and settings.max_length > places:
        findings.add(
            Level.ERROR,
            "positions",
            f"max_length is beyond the model's {places:,} positions.",
            given.where("max_length"),
            field="max_length",
            found=f"max_length={settings.max_length}",
            fix=f"--max-length {places}, or less: the longest record has {longest} tokens",
        )
    if vocabulary:
        beyond = [one.where for one in (*made.train, *made.eval) if max(one.input_ids) >= vocabulary]
        findings.all(
            Level.ERROR,
            "vocabulary",
            f"The tokenizer writes tokens that the model has no vector for: it has {vocabulary:,}.",
            beyond,
            field="model",
            fix="take the tokenizer that belongs to the model",
        )


def check_adapter(
    settings: Settings, given: Given, located: Located, made: AnyData, pad: int, findings: Findings
) -> None:
    """Notes targets, ranks and other settings of the method that do not fit the model. Nothing of its size is made."""
    dtype = choose_dtype(settings.dtype, torch.device("cpu"))
    try:
        fitted(settings, located, made, pad, dtype)
    except NotTraceableError as error:
        findings.add(
            Level.NOTE,
            "adapter-unchecked",
            "Whether the adapter fits the model cannot be told without its weights.",
            f"model: {located.path}",
            field="method",
            found=error.message,
            fix="lorafit train --max-steps 1 tells",
        )
    except LorafitError as error:
        _not_fitting(error, settings, given, findings)


def _not_fitting(error: LorafitError, settings: Settings, given: Given, findings: Findings) -> None:
    about = f"{error.message} {error.where or ''}"
    field = given.named(about, _PLACING, "") or given.named(f"{about} {error.found or ''}", settings.method_options, "")
    field = field or "method"
    near = f" (nearest: {', '.join(error.near)})" if error.near else ""
    parts: list[Any] = [part for part in (error.where, error.found) if part is not None]
    findings.add(
        Level.ERROR,
        "adapter",
        error.message,
        given.where(field),
        field=field,
        found=": ".join(map(str, parts)),
        fix=f"{error.fix or f'mend {field}'}{near}",
    )
