"""What a run needs before its first step: arguments, data, tokenizer, model, objective; what fails early is first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lorafit.errors import ConfigError
from lorafit.training import ranks
from lorafit.training.batches import AnyCollator, Collator, LabelCollator, ValueCollator
from lorafit.training.brought import agreed
from lorafit.training.classify import EncodedLabel
from lorafit.training.config import Settings
from lorafit.training.data import Data, DataSettings, Examples, LabelledData, load_examples
from lorafit.training.embedded_data import embedded_data_path
from lorafit.training.headed import Headed
from lorafit.training.loss import SupervisedLoss
from lorafit.training.models import Located, choose_dtype, head_paths, load_classifier, load_tokenizer, locate
from lorafit.training.objectives import Classes, NextToken, Numbers, Objective
from lorafit.training.packing import PackingCollator
from lorafit.training.packing_trial import Decision, decide
from lorafit.training.pooling import classes_of, pooling_of
from lorafit.training.quantised import check_quantise, load_base, quantise_loaded
from lorafit.training.recompute import checkpointing
from lorafit.training.sequences import Encoded, Sample
from lorafit.training.sharding import check_shard
from lorafit.training.trainer import records_in_all, records_per_step
from lorafit.training.valued import AnyData, ValueData, class_names, load_any
from lorafit.training.watching import Watched, gather

Notify = Callable[[str], object]

HELD_OUT = 0.1
"""The share of the data that is held out where the user names none."""

RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Training arguments under the name that everybody knows → the name that newer releases of transformers want."""


@dataclass(frozen=True)
class Task:
    """Model, data and objective of one run.

    Attributes:
        model: the base model, plain.
        tokenizer: its tokenizer.
        located: where the model is and what it is called.
        data: training and held-out records, encoded.
        samples: held-out questions to answer before and after (none but for a language model).
        objective: what is minimised.
        collator: makes batches of a row for each record.
        layout: makes the batches to train and to evaluate on, in which records may share rows.
        head: modules that are trained in full: the head, and what else the checkpoint did not hold.
        fingerprint: of the encoded data, so that a run does not go on with others.
        watched: what is measured before and after and not learnt from.
        pooling: what the head of a classifier or a regression reads, None for what the model's own class reads.
    """

    model: Any
    tokenizer: Any
    located: Located
    data: AnyData
    samples: list[Sample]
    objective: Objective
    collator: AnyCollator
    layout: AnyCollator | PackingCollator
    head: list[str]
    fingerprint: str
    watched: Watched
    pooling: str | None = None


def training_arguments(settings: Settings, output_dir: Path) -> TrainingArguments:
    """The arguments of `transformers.Trainer`. Raises `ConfigError` where they do not go together."""
    check_quantise(settings.quantise, compiles=settings.compile)
    check_shard(settings)
    ranks.join(settings.training)
    options = checkpointing(settings.recompute, settings.training, compiles=settings.compile)
    for old, new in RENAMED.items():
        if old in options and new in TrainingArguments.__dataclass_fields__:
            options[new] = options.pop(old)
    if "learning_rate" not in options:
        options["learning_rate"] = 0.0  # decided when the model's width is known
    if settings.eval_data is None and settings.eval_split == 0:
        options["eval_strategy"] = "no"
    accelerated = torch.accelerator.is_available()
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            seed=settings.seed,
            data_seed=settings.seed,
            disable_tqdm=True,
            remove_unused_columns=False,
            # Said, not found out: else transformers refuses bfloat16 on a processor that has it.
            **{"dataloader_pin_memory": accelerated, "use_cpu": not accelerated, **options},
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"the training arguments do not go together: {str(error).splitlines()[0]}",
            where="transformers.TrainingArguments",
            fix="see the message; the names are those of TrainingArguments",
        ) from error


def data_settings(settings: Settings) -> DataSettings:
    """Which data a run learns from and which it holds out, with the defaults filled in."""
    data, held, share = settings.data, settings.eval_data, settings.eval_split
    if data is None:
        data = str(embedded_data_path("train"))
        if held is None and share is None:
            held = str(embedded_data_path("eval"))
    return DataSettings(
        data=data,
        data_split=settings.data_split,
        eval_data=held,
        eval_data_split=settings.eval_data_split,
        eval_split=HELD_OUT if held is None and share is None else share or None,
        seed=settings.seed,
        columns=settings.columns,
        group=settings.group,
        slice=settings.slice,
    )


def prepare(settings: Settings, arguments: TrainingArguments, notify: Notify) -> Task:
    """Data first: what is wrong with them shows before a model is loaded.

    Raises:
        DataError: the data cannot be read, recognised or learned from.
        ConfigError: there is no such model, or it cannot have records in rows as they are asked for.
    """
    located = locate(settings.model, notify)
    tokenizer = load_tokenizer(located)
    loaded = load_examples(data_settings(settings))
    data = encode(settings, tokenizer, loaded)
    for sentence in data.announcements:
        notify(sentence)
    watched = gather(settings, tokenizer, loaded, data, records_in_all(arguments, len(data.train)))
    for sentence in watched.told:
        notify(sentence)
    dtype = choose_dtype(settings.dtype, arguments.device)
    pad = tokenizer.pad_token_id
    fingerprint = _fingerprint(data)
    if isinstance(data, Data):
        model, told = load_base(settings.quantise, located, dtype, settings.modules_to_save)
        _say(notify, told)
        loss = SupervisedLoss.prepare(model)
        plain = Collator(pad)
        decision = lay_out(settings, arguments, model, loss, data, plain)
        _say(notify, decision.told)
        rows = decision.collator
        return Task(
            model, tokenizer, located, data, data.samples, NextToken(loss), plain, rows, [], fingerprint, watched
        )
    check_unpacked(settings)
    pooling = pooling_of(located.path, settings.pooling)
    _say(notify, pooling.said)
    model, head = load_classifier(located, dtype, class_names(data), pad, seed=settings.seed, pooling=pooling.kind)
    if head:
        notify(f"new in this model, and trained in full: {', '.join(head)}")
    own = head_paths(model)
    brought = [path for path in own if path not in head]
    if brought == own and isinstance(data, LabelledData):
        _say(notify, agreed(data.labels, classes_of(located.path), located.path))
    objective, collator = labelled(data, pad, model.config if brought and brought == own else None)
    if brought:
        notify(f"the head that the model's files bring is trained on, in full: {', '.join(brought)}")
    head = [*head, *brought]
    _say(notify, quantise_loaded(settings.quantise, model, [*settings.modules_to_save, *head]))
    return Task(
        model=model,
        tokenizer=tokenizer,
        located=located,
        data=data,
        samples=[],
        objective=objective,
        collator=collator,
        layout=collator,
        head=head,
        fingerprint=fingerprint,
        watched=watched,
        pooling=pooling.kind,
    )


def labelled(data: AnyData, pad: int, brings: Any = None) -> tuple[Objective, LabelCollator | ValueCollator]:
    """How a classifier or a regression is trained, and its batches.

    Args:
        data: what it trains on.
        pad: the id of the padding token.
        brings: the config of a model whose files bring its head; None where that is new.
    """
    if isinstance(data, ValueData):
        scale = data.scale if brings is None else data.scale.brought(brings)
        return Numbers(scale), ValueCollator(pad, scale)
    return Classes(), LabelCollator(pad)


def headed(task: Task) -> Headed:
    """What is to be known of the head of a classifier or a regression."""
    scale = task.objective.scale if isinstance(task.objective, Numbers) else None
    return Headed(tuple(class_names(task.data)), scale, task.pooling)


def _say(notify: Notify, text: str) -> None:
    if text:
        notify(text)


def check_unpacked(settings: Settings) -> None:
    """Raises `ConfigError` if the records of a classifier or a regression are to share rows."""
    if settings.packing is True:
        raise ConfigError(
            "a classifier cannot have several records in a row",
            where="packing",
            found="records with labels",
            expected="a language model: a classifier reads its answer off a row's end",
            fix="leave packing out",
        )


def lay_out(
    settings: Settings, arguments: TrainingArguments, model: Any, loss: SupervisedLoss, data: Data, plain: Collator
) -> Decision:
    """Whether records share rows, by settings, data and model: for a run and for its plan.

    Raises:
        ConfigError: they are to, and cannot.
    """
    wanted = settings.packing
    if wanted is not False and arguments.include_num_input_tokens_seen == "non_padding":
        if wanted is True:
            raise ConfigError(
                "transformers cannot count the tokens of packed rows",
                where="packing",
                found="include_num_input_tokens_seen=non_padding",
                expected="one of the two",
                fix="leave include_num_input_tokens_seen out: the records count tokens anyway",
            )
        wanted = False
    size, step = arguments.train_batch_size, records_per_step(arguments)
    return decide(wanted, model, loss, data.train, plain, batch_size=size, seed=settings.seed, step=step)


def encode(settings: Settings, tokenizer: Any, loaded: Examples) -> AnyData:
    """The records as training takes them: for a language model, or for a classifier or a regression.

    Raises:
        DataError: they cannot be learned from.
    """
    return load_any(
        data_settings(settings),
        tokenizer,
        task=settings.task,
        max_length=settings.max_length,
        samples=settings.samples,
        loaded=loaded,
        known=lambda: classes_of(locate(settings.model, lambda _: None).path),
    )


def _fingerprint(data: AnyData) -> str:
    digest = hashlib.sha256()
    records: list[Any] = [*data.train, *data.eval]
    for one in records:
        match one:
            case Encoded():
                learnt: Any = list(one.labels)
            case EncodedLabel():
                learnt = one.label
            case _:
                learnt = one.value
        digest.update(json.dumps([list(one.input_ids), learnt]).encode())
    return digest.hexdigest()
