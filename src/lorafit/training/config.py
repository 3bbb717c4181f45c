"""The settings of a run: one schema, strict, with the neighbours' spellings accepted and named.

A setting is written flat, wherever it comes from (flags, ``--set``, a YAML file, Python): `resolve` sorts the names
into the schema's own, the method's fields and arguments of `transformers.TrainingArguments`, and refuses every other.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafit.errors import ConfigError
from lorafit.training.aliases import ALIASES, NEIGHBOURS, VALUES
from lorafit.training.spelling import Layer, Merged, Spelling, coerced, either, schema_error

Task = Literal["auto", "causal-lm", "sequence-classification", "regression"]
Pooled = Literal["auto", "own", "mean", "cls"]

SPELLING = Spelling(ALIASES, VALUES, NEIGHBOURS)
"""How other tools spell what is a setting here."""

RESERVED: Mapping[str, str] = {
    "data_seed": "seed is also that of the data",
    "disable_tqdm": "there is one progress bar, and none without a terminal",
    "do_eval": "evaluation follows from eval_data and eval_split",
    "do_predict": "use `lorafit eval`",
    "do_train": "`lorafit train` trains",
    "label_names": "the data decide",
    "local_rank": "the launcher sets it",
    "optim_target_modules": "use targets",
    "prediction_loss_only": "evaluation needs the loss alone",
    "remove_unused_columns": "the data hold no column that is not used",
    "resume_from_checkpoint": "the same command resumes by itself",
    "save_only_model": "a run goes on from its checkpoints, and needs the optimizer's state for that",
    "torch_compile_backend": "compile has torch's own",
    "torch_compile_mode": "compile has torch's own",
    "train_sampling_strategy": "batches are made of records of similar length",
}
"""Training arguments that are not the user's to set here, and why."""

DEFAULT_TRAINING: Mapping[str, Any] = {
    "eval_strategy": "epoch",
    "logging_steps": 1,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 1.0,
    "per_device_eval_batch_size": 16,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
}
"""What differs from the defaults of `TrainingArguments`."""


UNRECORDED: Mapping[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
}
"""Training arguments of steps that are taken to learn something of a run: nothing is evaluated, and nothing kept."""


class Settings(BaseModel):
    """Everything that a run depends on.

    Attributes:
        model: a directory or a hub name; None is the embedded SmolLM2-135M-Instruct.
        data: a file, a directory or a hub name; None is the embedded questions on Python's standard library.
        data_split: the split of a hub data set.
        eval_data: held-out data; None holds out `eval_split` of `data`.
        eval_data_split: its split.
        eval_split: share (0.1) or number (200) of the records to hold out; 0 holds none out; None is a tenth.
        eval_limit: evaluate on so many of the held-out records at most, evenly chosen; None is all.
        columns: role → column, where the columns go by other names.
        group: a column whose groups the split keeps whole.
        slice: a column by which held-out records are told apart; None is one with a name such as domain or source.
        target: data of another domain, on which the run is measured before and after.
        general: a general text, on which what is forgotten is measured: a file, "embedded" or "none".
        task: "causal-lm", "sequence-classification" (or "classification"), "regression", or "auto": what the records
            are.
        pooling: what the head of a classifier or a regression reads: the "mean" of an encoder's hidden states, that of
            its first token ("cls"), what the model's own class takes ("own"), or "auto": as the model was trained.
        max_length: tokens of the longest sequence; longer ones are cut, and counted.
        packing: whether records of a batch share rows, with the same loss at each token; "auto" where that saves work
            and the model is found to keep them apart.
        method: a name of `lorafit.METHODS`.
        method_options: the fields of the method: r, alpha, dropout, …
        targets, exclude, rank_pattern, alpha_pattern, modules_to_save: as for `lorafit.attach`.
        full_learning_rate: that of modules trained in full, such as a new head; None is LoRA's for the model's width,
            or `learning_rate` where that is given.
        output_dir: where the run lives; the same command goes on there.
        seed: of the split, the initial values, the order of the data and dropout.
        dtype: of the base model; "auto" is bfloat16 where the hardware has it, else float32. Adapters are float32.
        quantise: how the base's linear layers are kept: "int8" rows of the library's own, or "nf4" by bitsandbytes.
        samples: so many held-out questions are answered before and after.
        max_new_tokens: length of those answers.
        prefix_cache: whether layers below the lowest adapted one are computed in the first pass alone; "auto" where
            there are several passes and it spares some work.
        recompute: "cheap" computes norms and products of activations again in the backward pass, "blocks" whole layers.
        compile: whether each decoder layer is compiled.
        shard: whether each process of a run keeps a part of the model (FSDP2), and not all of it.
        keep_best: whether the adapter with the lowest held-out loss is the one that the run ends with.
        early_stopping: whether the run ends at the evaluation at which it is found to overfit.
        training: arguments of `transformers.TrainingArguments`, by their own names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    data: str | None = None
    data_split: str | None = None
    eval_data: str | None = None
    eval_data_split: str | None = None
    eval_split: int | float | None = Field(default=None, ge=0)
    eval_limit: int | None = Field(default=None, ge=1)
    columns: dict[str, str] | None = None
    group: str | None = None
    slice: str | None = None
    target: str | None = None
    general: str = "embedded"
    task: Task = "auto"
    pooling: Pooled = "auto"
    max_length: int = Field(default=1024, ge=2)
    packing: bool | Literal["auto"] = "auto"
    method: str = "lora"
    method_options: dict[str, Any] = Field(default_factory=dict)
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] = Field(default_factory=list)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] = Field(default_factory=list)
    full_learning_rate: float | None = Field(default=None, gt=0)
    output_dir: str = ""
    seed: int = Field(default=42, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantise: Literal["none", "int8", "nf4"] = "none"
    samples: int = Field(default=4, ge=0)
    max_new_tokens: int = Field(default=48, ge=1)
    prefix_cache: bool | Literal["auto"] = "auto"
    recompute: Literal["none", "cheap", "blocks"] = "none"
    compile: bool = False
    shard: bool = False
    keep_best: bool = True
    early_stopping: bool = False
    training: dict[str, Any] = Field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run's folder: `output_dir`, or one named after data and method."""
        if self.output_dir:
            return Path(self.output_dir)
        stem = "python-qa" if self.data is None else Path(self.data).name.partition(".")[0] or "data"
        return Path("runs") / f"{stem}-{self.method}"


def own_fields() -> list[str]:
    """The names that the schema itself has for single settings."""
    return [name for name in Settings.model_fields if name not in ("method_options", "training")]


def resolve(layers: Iterable[Layer], notify: Callable[[str], None] = lambda _: None) -> Settings:
    """One set of settings from several sources; later ones win.

    Args:
        layers: (origin, flat settings), weakest first.
        notify: is told once for each setting that came under a neighbour's name.

    Raises:
        ConfigError: an unknown setting (with near names), two spellings of one in the same source, or a value of the
            wrong type or out of range; names the source and the key.
    """
    from lorafit.methods import build, method_class

    merged = SPELLING.merged(layers, notify)
    name, origin = merged.get("method", ("lora", "the default"))
    canonical = method_class(name, f"{origin}: method").name
    merged["method"] = (canonical, origin)
    own, options, training = _sorted(merged, canonical)
    try:
        settings = Settings(**own, method_options=options, training={**DEFAULT_TRAINING, **training})
    except ValidationError as error:
        raise schema_error(error, merged) from None
    build(canonical, options)
    return settings


def _sorted(merged: Merged, method: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    from transformers import TrainingArguments

    from lorafit.methods import INNER, accepts

    own_names = set(own_fields())
    method_types = accepts(method, merged.get(INNER, (None, ""))[0])
    training_types = _types(TrainingArguments)
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for name, (value, origin) in merged.items():
        if name in own_names:
            kind = Settings.model_fields[name].annotation
            own[name] = coerced(name, value, kind, origin) if either(kind) else value
        elif name in method_types:
            options[name] = SPELLING.option(method, name, value, method_types[name], origin)
        elif name in RESERVED:
            raise ConfigError(
                f"{name} is not yours to set here",
                where=f"{origin}: {name}",
                found=repr(value),
                expected=RESERVED[name],
                fix=f"remove {name}",
            )
        elif name in training_types:
            training[name] = coerced(name, value, training_types[name], origin)
        else:
            known = {*own_names, *method_types, *training_types} - set(RESERVED)
            expected = f"a setting of lorafit, of {method} or of transformers.TrainingArguments"
            raise SPELLING.unknown(name, origin, method, known, expected)
    return own, options, training


def _types(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
