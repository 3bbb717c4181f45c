"""A base model with an adapter on it, as `eval`, `chat` and `merge` load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import CheckpointError, ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from lorafit.handle import Handle
    from lorafit.training.batches import AnyCollator
    from lorafit.training.headed import Headed
    from lorafit.training.models import Located
    from lorafit.training.numbers import Scale
    from lorafit.training.objectives import Objective

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAIN = "none"
QUANTISED = (PLAIN, "int8", "nf4")
SETTINGS = "settings.json"
CAUSAL = "CAUSAL_LM"
CLASSES = "SEQ_CLS"
ANY = "?"
"""Instead of the names of classes, for a command that has no use for a classifier and only says so."""


@dataclass(frozen=True)
class Description:
    """What there is to load, before it is loaded.

    Attributes:
        adapter: its folder, None for the base alone.
        located: the base model.
        task_type: `CAUSAL` or `CLASSES`, which a regression is, too, with one number instead of classes.
        labels: the names of a classifier's classes by index; empty for anything else.
        tokenizer_path: where the tokenizer is read from: the adapter's folder if it has one.
        whole: modules of which the adapter brings trained copies.
        scale: how the output of a regression becomes a label; None for anything else.
        pooling: what the head reads; None for what the model's own class reads.
    """

    adapter: Path | None
    located: Located
    task_type: str
    labels: tuple[str, ...]
    tokenizer_path: str
    whole: tuple[str, ...] = ()
    scale: Scale | None = None
    pooling: str | None = None

    @property
    def headed(self) -> bool:
        """Whether it is a classifier or a regression, and no language model."""
        return self.task_type == CLASSES

    @property
    def classifies(self) -> bool:
        """Whether it is a classifier."""
        return self.headed and self.scale is None


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer and the adapter on it.

    Attributes:
        model: in evaluation mode, on the device that computes.
        tokenizer: with a padding token.
        handle: the adapter; None for the base alone.
        head: modules that the base's files do not hold, whose values are drawn at random.
    """

    model: Any
    tokenizer: Any
    handle: Handle | None
    head: tuple[str, ...]


def describe(adapter: Path | None, model: str | None, labels: str | None, say: Callable[[str], None]) -> Description:
    """Reads what an adapter's folder says of itself.

    Raises:
        CheckpointError: there is no adapter.
        ConfigError: its base model or its classes are not known.
    """
    from lorafit import store
    from lorafit.training.headed import Headed
    from lorafit.training.models import locate

    config: dict[str, Any] = {}
    if adapter is not None:
        stored = store.read(adapter)
        config = stored.config
        model = model or config.get("base_model_name_or_path")
        if not model:
            raise ConfigError(
                "the adapter does not say which model it belongs to",
                where=f"{stored.config_path}: base_model_name_or_path",
                expected="a model directory or a hub name",
                fix="--model DIR|NAME",
            )
    known = adapter is not None and Headed.read(adapter) is not None  # a run that trains no whole head writes no type
    task_type = config.get("task_type") or (CLASSES if known else CAUSAL)
    if task_type not in (CAUSAL, CLASSES):
        raise ConfigError(
            "adapters for this task are not known to this command",
            where=f"{adapter}/{store.CONFIG}: task_type",
            found=repr(task_type),
            expected=f"{CAUSAL} or {CLASSES}",
            fix="load it with lorafit.load in Python",
        )
    located = locate(model, say)
    head = _head(adapter, labels) if adapter is not None and task_type == CLASSES else Headed()
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    whole = tuple(config.get("modules_to_save") or ())
    tokenizer = str(adapter) if own else located.path
    return Description(adapter, located, task_type, head.labels, tokenizer, whole, head.scale, head.pooling)


def _head(adapter: Path, labels: str | None) -> Headed:
    from lorafit.training.folder import LABELS
    from lorafit.training.headed import Headed

    found = Headed.read(adapter)
    if found is not None and found.scale is not None:
        if labels not in (None, ANY):
            raise ConfigError(
                "a regression has no classes that could be named",
                where="--labels",
                found=labels,
                expected="the adapter of a classifier",
                fix="leave --labels out",
            )
        return found
    if labels is not None:
        names = tuple(name.strip() for name in labels.split(","))
        return Headed(names, None, None if found is None else found.pooling)
    if found is None or not found.labels:
        raise CheckpointError(
            "the adapter's folder does not name the classifier's classes",
            where=adapter / LABELS,
            found="no such file",
            expected="the names of the classes, in the order of the head",
            fix="--labels negative,positive",
        )
    return found


def storage_of(adapter: Path | None, quantise: str | None, say: Callable[[str], None]) -> str:
    """How the base is to be kept: as the command says, or as the run had it in whose folder the adapter lies."""
    if quantise is not None or adapter is None:
        return quantise or PLAIN
    own = run_storage(adapter)
    if own != PLAIN:
        run = adapter.absolute().parent.name
        say(f"over a base in {own}, as in the run {run}; --quantise {PLAIN} takes the plain one")
    return own


def run_storage(adapter: Path) -> str:
    """How the base was kept in the run in whose folder the adapter lies; plain where it lies elsewhere."""
    kept = adapter.absolute().parent / SETTINGS
    if not kept.is_file():
        return PLAIN
    try:
        return str(json.loads(kept.read_text(encoding="utf-8")).get("quantise", PLAIN))
    except (AttributeError, ValueError):
        raise CheckpointError(
            "the settings of the adapter's run are damaged",
            where=kept,
            expected="the JSON that the run wrote",
            fix="restore the file, or remove it; --quantise none says that the base is the plain one",
        ) from None


def load(
    described: Description, dtype: str | None, quantise: str = PLAIN, say: Callable[[str], object] = lambda _: None
) -> Loaded:
    """Loads it, the base kept as `quantise` says.

    Raises:
        LorafitError: the model or the adapter cannot be loaded, or they do not fit each other.
    """
    from lorafit.checkpoint import load as load_adapter
    from lorafit.training.models import Located, choose_dtype, load_classifier, load_tokenizer
    from lorafit.training.quantised import load_base, quantise_loaded

    located, device = described.located, computing_device()
    tokenizer = load_tokenizer(Located(described.tokenizer_path, located.name))
    kind = choose_dtype(dtype or "auto", device)
    head: list[str] = []
    if described.task_type == CLASSES:
        model, head = load_classifier(
            located, kind, described.labels, tokenizer.pad_token_id, pooling=described.pooling
        )
        told = quantise_loaded(quantise, model, [*dict.fromkeys([*described.whole, *head])])
    else:
        model, told = load_base(quantise, located, kind, described.whole)
    if told:
        say(told)
    model.to(device).eval()
    handle = None if described.adapter is None else load_adapter(model, described.adapter)
    return Loaded(model, tokenizer, handle, tuple(head))


def judged_by(loaded: Loaded, described: Description) -> tuple[Objective, AnyCollator]:
    """How held-out records are judged, and what makes their batches."""
    from lorafit.training.batches import Collator, LabelCollator, ValueCollator
    from lorafit.training.loss import SupervisedLoss
    from lorafit.training.objectives import Classes, NextToken, Numbers

    pad = loaded.tokenizer.pad_token_id
    if described.scale is not None:
        return Numbers(described.scale), ValueCollator(pad, described.scale)
    if described.classifies:
        return Classes(), LabelCollator(pad)
    return NextToken(SupervisedLoss.prepare(loaded.model)), Collator(pad)


def check_quantise(name: str | None) -> None:
    """Raises `ConfigError` for a way of keeping a base that is not known."""
    if name not in (None, *QUANTISED):
        raise ConfigError(
            "no such way to keep a base",
            where="--quantise",
            found=repr(name),
            expected=", ".join(QUANTISED),
            near=nearest(str(name), QUANTISED),
            fix="--quantise int8",
        )


def check_dtype(name: str | None) -> None:
    """Raises `ConfigError` for a name that is no dtype's."""
    if name not in (None, *DTYPES):
        raise ConfigError(
            "no such type",
            where="--dtype",
            found=repr(name),
            expected=", ".join(DTYPES),
            near=nearest(str(name), DTYPES),
            fix="--dtype float32",
        )


def computing_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found
