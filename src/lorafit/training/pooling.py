"""What the head of a classifier or a regression reads of an encoder: what the model was trained to be read by.

Sentence encoders such as all-MiniLM-L6-v2 were trained through the mean of their last hidden states, which
`modules.json` and a file beside it say. The classes of `transformers` for sequence classification read the first token,
often through a pooler that this training never touched; a head on it starts from noise. `Pooled` reads what the model
says. Models that say nothing are read by their own class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Final, cast, final

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

from lorafit.errors import ConfigError

KEY: Final = "lorafit_pooling"
"""Key of a model's config under which its pooling is kept."""
MODULES: Final = "modules.json"
OWN: Final = "own"
AUTO: Final = "auto"
WORDS: Final[Mapping[str, str]] = {
    "mean": "the mean of the last hidden states",
    "cls": "the last hidden state of the first token",
}
"""What can be read → in words."""
MODES: Final[Mapping[str, str]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
DROPOUTS: Final = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
"""Keys of configs that say how much of what is read is dropped, the first that is there."""


@final
@dataclass(frozen=True)
class Pooling:
    """What is read.

    Attributes:
        kind: a key of `WORDS`; None for what the model's own class reads.
        said: why, in a sentence; empty where there is nothing to say.
    """

    kind: str | None
    said: str = ""


def pooling_of(path: str, asked: str) -> Pooling:
    """What the head reads of a model.

    Args:
        path: the model's directory or hub name.
        asked: "auto", "own", or a key of `WORDS`.

    Raises:
        ConfigError: the model's file on its pooling is damaged, there is no such model, or its files bring a head that
            reads something else.
    """
    config = configured(path)
    kept = config.to_dict().get(KEY)
    if asked == AUTO and kept in WORDS:
        return Pooling(kept)
    if asked == OWN and kept in WORDS:
        raise ConfigError(
            "the weights of this model are those of an encoder with a head on its pooled states",
            where="pooling",
            found=OWN,
            expected=f"auto, or {kept}",
            fix="leave pooling out",
        )
    if asked in WORDS and asked != kept and brings_head(config):
        raise ConfigError(
            "the head that the model's files bring was trained on something else than pooling says",
            where="pooling",
            found=asked,
            expected=f"auto, or {kept if kept in WORDS else OWN}",
            fix="leave pooling out, or take a model without a head",
        )
    if asked in WORDS:
        return Pooling(asked, f"the head reads {WORDS[asked]}, as pooling says")
    if brings_head(config):
        return Pooling(None)
    try:
        modes = _trained_by(path)
    except _UnreachedError as error:
        said = f"{error} cannot be fetched, so it is not known how this model was trained to be read"
        return Pooling(None, f"{said}: its own class reads it, unless pooling says mean or cls")
    if not modes:
        return Pooling(None)
    known = modes[0] if len(modes) == 1 else " and ".join(modes)
    if asked == AUTO and known in WORDS:
        said = f"the head reads {WORDS[known]}, as this model was trained to be read ({MODULES})"
        return Pooling(known, f"{said}; pooling=own takes what its class in transformers does")
    if known == "lasttoken":  # decoders' own classes read that
        return Pooling(None)
    why = "as pooling says" if asked == OWN else "since that is not known here"
    return Pooling(None, f"this model was trained to be read by its {known} pooling; its own class reads it, {why}")


def configured(path: str) -> Any:
    """The config of a model. Raises `ConfigError` where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model's config cannot be read: {str(error).strip().splitlines()[0]}",
            where=f"model: {path}",
            expected="a model directory, or a hub name that can be reached",
            fix="mend the name, or leave model out for the embedded default",
        ) from error


def brings_head(config: Any) -> bool:
    """Whether a model's files hold the head of a classifier or a regression, by its config."""
    names = config.architectures or ()
    return any("SequenceClassification" in name or name.startswith(PREFIX) for name in names)


def classes_of(path: str) -> tuple[str, ...]:
    """The classes by index of the head that a model's files hold, by its config; none where there is no head."""
    config = configured(path)
    told = config.id2label if brings_head(config) else None
    return tuple(str(told[index]) for index in sorted(told)) if told else ()


class _UnreachedError(Exception):
    """A hub model may have a file, which is neither here nor to be had."""


def _trained_by(path: str) -> list[str]:
    """The kinds of pooling that sentence-transformers' files beside a model name; none where there are no such."""
    listed = _read(path, MODULES)
    modules = listed if isinstance(listed, list) else []
    places = [str(one.get("path", "")) for one in modules if str(one.get("type", "")).endswith(".Pooling")]
    if not places:
        return []
    found = _read(path, f"{places[0]}/config.json")
    if not isinstance(found, Mapping):
        return []
    named = found.get("pooling_mode")
    if isinstance(named, str):
        return [named]
    return [mode for key, mode in MODES.items() if found.get(key)]


def _read(path: str, name: str) -> Any:
    """A JSON file of a model; None where it has none. Raises `_UnreachedError` where that cannot be told."""
    kept = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if kept is None:
        if not Path(path).is_dir() and try_to_load_from_cache(path, name) is not _CACHED_NO_EXIST:
            raise _UnreachedError(name)
        return None
    try:
        return json.loads(Path(kept).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            "the model's file on its pooling is damaged",
            where=f"model: {path}/{name}",
            found=str(error),
            expected="JSON, as sentence-transformers writes it",
            fix="restore the file, or say what the head reads: --set pooling=own",
        ) from None


# Models ---------------------------------------------------------------------

PREFIX: Final = "Pooled"
BODY: Final = "body"
"""Where an encoder lies whose own class does not say."""


class Readout(nn.Module):
    """A linear map with a bias: what is read → classes, or one number."""

    def __init__(self, inn: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inn))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, read: Tensor) -> Tensor:
        """(records, inn) → (records, out), in the type of the weights: a trained copy has more bits than its base."""
        return F.linear(read.to(self.weight.dtype), self.weight, self.bias)


class Pooled(PreTrainedModel):
    """An encoder, and a head on what its config's `lorafit_pooling` says. `pooled_class` makes one for each encoder.

    The encoder lies where other classes with a head on it have it: so files of it are read, whoever wrote them.
    """

    body_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # A pooler that nothing reads would be adapted and never get a gradient.
        plain = {"add_pooling_layer": False} if "add_pooling_layer" in signature(self.body_class).parameters else {}
        known = config.to_dict()
        self.num_labels = config.num_labels
        self.pooling = known[KEY]
        self.dropped = float(next((known[key] for key in DROPOUTS if known.get(key) is not None), 0.0))
        self.add_module(self.base_model_prefix, self.body_class(config, **plain))
        self.classifier = Readout(config.get_text_config().hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """Logits (records, labels) of sequences (records, tokens)."""
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        read = hidden[:, 0] if self.pooling == "cls" else mean(hidden, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(F.dropout(read, self.dropped, self.training)))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Readout):
            init.normal_(module.weight, mean=0.0, std=float(self.config.to_dict().get("initializer_range") or 0.02))
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(records, width): the mean over the tokens that are no padding, summed in float32.

    >>> mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    if mask is None:
        return hidden.float().mean(1).to(hidden.dtype)
    told = mask[..., None].float()
    return ((hidden.float() * told).sum(1) / told.sum(1).clamp(min=1)).to(hidden.dtype)


def pooled_class(config: Any) -> type[Pooled]:
    """The class for an encoder of this config, the same one for all configs of a class.

    Raises:
        ConfigError: `transformers` has no bare model for it.
    """
    kind: Any = type(config)
    return _pooled_class(kind)


@cache
def _pooled_class(kind: Any) -> type[Pooled]:
    try:
        body: Any = MODEL_MAPPING[kind]
    except KeyError:
        raise ConfigError(
            "this model has no bare form whose hidden states could be pooled",
            where="pooling",
            found=kind.__name__,
            expected="an encoder of transformers",
            fix="--set pooling=own",
        ) from None
    body = body[0] if isinstance(body, tuple) else body
    # What transformers asks of a model's class is what the encoder inside can do.
    told = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    able = {name: getattr(body, name) for name in (*told, "supports_gradient_checkpointing", "config_class")}
    own = {"body_class": body, "base_model_prefix": body.base_model_prefix or BODY, "__module__": __name__}
    made: Any = type(f"{PREFIX}{body.__name__}", (Pooled,), {**able, **own})
    return cast("type[Pooled]", made)
