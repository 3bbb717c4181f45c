"""A search for d90 from the settings of a command: whose folder it is, which records, which model, what is compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lorafit.errors import ConfigError
from lorafit.experiments.claim import claim
from lorafit.experiments.dimension import Metric, Projection, Question, Reference
from lorafit.experiments.dimension_limits import Limits, limits
from lorafit.experiments.dimension_search import Plan
from lorafit.experiments.parts import Parts, part
from lorafit.experiments.trial import Kind, Notify
from lorafit.methods import method_class
from lorafit.methods.intrinsic import IntrinsicDimension
from lorafit.training.config import DEFAULT_TRAINING, Settings
from lorafit.training.tasks import NUMBERS

FILE = "dimension.json"
PAGE = "dimension.html"
BEGUN = "begun.json"
FREE = frozenset({"output_dir", "samples", "max_new_tokens", "general", "slice", "target", "prefix_cache"})
"""Settings that no trial depends on."""
START = 1000
"""The first d, where the model leaves room for it: the method's default."""
MOST = 100_000
"""The largest d, where the model leaves room for it: papers found d90 of 200 to 8,000."""
BELOW_LORA = 10
"""How many times lower the first rate of full fine-tuning is than LoRA's, as "LoRA Without Regret" (2025) finds."""


@final
@dataclass(frozen=True)
class Wanted:
    """What a command asks for, beside the settings of training.

    Attributes:
        projection: SAID or DID.
        full: the reference is full fine-tuning; false: the method of the settings, which is cheaper.
        metric: None is what the data have.
        gain: the share is of the reference's gain over the base, rather than of its score.
        points, rates, seeds: how far the search goes.
        most: the largest d; None is `MOST`, or what the model has.
        budget: seconds; None for as long as it takes.
    """

    projection: Projection = Projection.SAID
    full: bool = True
    metric: Metric | None = None
    gain: bool = True
    points: int = 4
    rates: int = 3
    seeds: int = 3
    most: int | None = None
    budget: float | None = None


@final
@dataclass(frozen=True)
class Asked:
    """A question with all it needs.

    Attributes:
        question: what is asked.
        limits: of the model.
        parts: of the data.
    """

    question: Question
    limits: Limits
    parts: Parts

    def data(self) -> dict[str, Any]:
        """What the file says of the data."""
        parts = self.parts
        return {
            "name": parts.name,
            "form": parts.form,
            "train_records": parts.train_records,
            "validation_records": parts.validation_records,
            "test_records": parts.test_records,
        }


def folder_of(settings: Settings) -> Path:
    """Where an experiment lives: `output_dir`, or a folder named after the data."""
    if settings.output_dir:
        return Path(settings.output_dir)
    stem = "python-qa" if settings.data is None else Path(settings.data).name.partition(".")[0] or "data"
    return Path("runs") / f"{stem}-dimension"


def ask(settings: Settings, wanted: Wanted, folder: Path, notify: Notify) -> Asked:
    """Splits the data and reads the model's config; nothing is trained.

    Args:
        settings: of the command.
        wanted: what it asks for beside them.
        folder: the experiment's, from `begin`.
        notify: is told what the data are and how they are split.

    Raises:
        ConfigError: there is no such model, or no d that it could have.
        DataError: the data cannot be read or split.
    """
    training = {**settings.training}
    rate = training.pop("learning_rate", None)
    parts = part(settings, folder)
    for sentence in parts.said:
        notify(sentence)
    shared = _shared(settings.model_copy(update={"training": training}), parts.train, parts.validation)
    if parts.numbers:  # guessed of all records: a part of them could look otherwise
        shared = shared.model_copy(update={"task": NUMBERS})
    found = limits(settings, parts.labelled, notify)
    if shared.full_learning_rate is None and (found.head or shared.modules_to_save):
        # Each trial names its rate, which for a subspace is hundreds of times what weights can bear.
        shared = shared.model_copy(update={"full_learning_rate": found.head_rate})
    question = Question(
        shared,
        parts.test,
        wanted.projection,
        _reference(shared, wanted, found, rate),
        _plan(wanted, found, settings.seed),
        wanted.metric,
        gain=wanted.gain,
        budget=wanted.budget,
    )
    return Asked(question, found, parts)


def begin(settings: Settings, wanted: Wanted) -> Path:
    """Makes the folder this experiment's, or finds that it is: finished trials are never trained again, so that they
    have to be of these very settings.

    Raises:
        ConfigError: settings that do not go together, or a folder that is another experiment's or holds something else.
        CheckpointError: what it holds is damaged.
    """
    _check(settings, wanted)
    folder = folder_of(settings)
    claim(folder, BEGUN, _own(settings))
    return folder


def _own(settings: Settings) -> dict[str, Any]:
    """What trials depend on. The learning rate is none of it: it is where a search begins."""
    found: dict[str, Any] = json.loads(json.dumps(settings.model_dump(exclude=set(FREE))))
    found["training"].pop("learning_rate", None)
    return found


def comparison(path: Path) -> dict[str, Any]:
    """The file of a `lorafit compare`.

    Raises:
        ConfigError: there is no such file, or it is none of that command.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem: object = error
    else:
        if isinstance(found, dict) and isinstance(found.get("candidates"), list):
            return found
        problem = "another file"
    raise ConfigError(
        "the comparison cannot be read",
        where=f"--comparison {path}",
        found=problem,
        expected="comparison.json of lorafit compare",
        fix="--comparison runs/.../comparison.json",
    )


def _check(settings: Settings, wanted: Wanted) -> None:
    if method_class(settings.method) is IntrinsicDimension:
        raise ConfigError(
            "subspaces are compared with something else",
            where="method",
            found="intrinsic",
            expected="full fine-tuning (the default), or another method",
            fix="leave --method out",
        )
    given = [settings.method] if settings.method != Settings.model_fields["method"].default else []
    given += sorted(settings.method_options) + (["rank_pattern"] if settings.rank_pattern else [])
    if wanted.full and given:
        raise ConfigError(
            "settings of a method that is not trained here",
            where="--against",
            found=f"full, and {', '.join(given)}",
            expected="--against lora, for a method in the place of full fine-tuning",
            fix=f"add --against lora, or leave {given[0]} out",
        )


def _shared(settings: Settings, train: str, validation: str) -> Settings:
    """What every trial has: the files of the parts, and nothing that only people would look at."""
    return settings.model_copy(
        update={
            "data": train,
            "eval_data": validation,
            "data_split": None,
            "eval_data_split": None,
            "eval_split": None,
            "eval_limit": None,
            "group": None,
            "general": "none",
            "target": None,
            "slice": None,
            "samples": 0,
            "output_dir": "",
        }
    )


def _plan(wanted: Wanted, found: Limits, seed: int) -> Plan:
    layerwise = wanted.projection.layerwise
    least = found.least(layerwise)
    most = min(found.size, MOST if wanted.most is None else wanted.most)
    if most < least:
        raise ConfigError(
            "the largest d is smaller than the smallest",
            where="--max-d",
            found=most,
            expected=f"at least {least:,}: {'λ of each layer, and one more' if layerwise else 'one number'}",
            fix=f"--max-d {max(least, 1000)}" + (", or --kind did" if layerwise else ""),
        )
    start = min(max(START, least), most)
    seeds = tuple(range(seed, seed + wanted.seeds))
    return Plan(start, least, most, found.rate(start, layerwise), wanted.points, wanted.rates, seeds)


def _reference(shared: Settings, wanted: Wanted, found: Limits, rate: float | None) -> Reference:
    usual = found.reference_rate(shared)
    if wanted.full:
        return Reference("full", "full fine-tuning", Kind.FULL, _rarely(shared), rate or usual / BELOW_LORA)
    told = shared.method + (f" (r = {shared.method_options['r']})" if "r" in shared.method_options else "")
    return Reference(shared.method, told, Kind.ADAPTER, shared, rate or usual)


def _rarely(settings: Settings) -> Settings:
    """With fewer checkpoints, where the user does not say: of all weights they are gigabytes."""
    chosen = {name: settings.training.get(name) for name in ("save_strategy", "save_steps")}
    if chosen != {name: DEFAULT_TRAINING[name] for name in chosen}:
        return settings
    return settings.model_copy(update={"training": {**settings.training, "save_steps": 0.5, "save_total_limit": 1}})
