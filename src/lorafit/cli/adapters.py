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
    from lorafit.training.models import Located

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAIN = "none"
QUANTISED = (PLAIN, "int8", "nf4")
SETTINGS = "settings.json"
CAUSAL = "CAUSAL_LM"
CLASSES = "SEQ_CLS"


@dataclass(frozen=True)
class Description:
    """What there is to load, before it is loaded.

    Attributes:
        adapter: its folder, None for the base alone.
        located: the base model.
        task_type: `CAUSAL` or `CLASSES`.
        labels: the names of a classifier's classes by index; empty for a language model.
        tokenizer_path: where the tokenizer is read from: the adapter's folder if it has one.
        whole: modules of which the adapter brings trained copies.
    """

    adapter: Path | None
    located: Located
    task_type: str
    labels: tuple[str, ...]
    tokenizer_path: str
    whole: tuple[str, ...] = ()


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
    task_type = config.get("task_type") or CAUSAL
    if task_type not in (CAUSAL, CLASSES):
        raise ConfigError(
            "adapters for this task are not known to this command",
            where=f"{adapter}/{store.CONFIG}: task_type",
            found=repr(task_type),
            expected=f"{CAUSAL} or {CLASSES}",
            fix="load it with lorafit.load in Python",
        )
    located = locate(model, say)
    names = _labels(adapter, labels) if adapter is not None and task_type == CLASSES else ()
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    whole = tuple(config.get("modules_to_save") or ())
    return Description(adapter, located, task_type, names, str(adapter) if own else located.path, whole)


def _labels(adapter: Path, labels: str | None) -> tuple[str, ...]:
    from lorafit.training.folder import LABELS

    if labels is not None:
        return tuple(name.strip() for name in labels.split(","))
    path = adapter / LABELS
    if not path.is_file():
        raise CheckpointError(
            "the adapter's folder does not name the classifier's classes",
            where=path,
            found="no such file",
            expected="the names of the classes, in the order of the head",
            fix="--labels negative,positive",
        )
    return tuple(json.loads(path.read_text(encoding="utf-8")))


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
        model, head = load_classifier(located, kind, described.labels, tokenizer.pad_token_id)
        told = quantise_loaded(quantise, model, [*dict.fromkeys([*described.whole, *head])])
    else:
        model, told = load_base(quantise, located, kind, described.whole)
    if told:
        say(told)
    model.to(device).eval()
    handle = None if described.adapter is None else load_adapter(model, described.adapter)
    return Loaded(model, tokenizer, handle, tuple(head))


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
