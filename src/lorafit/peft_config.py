"""Reading PEFT's adapter_config.json strictly: the mathematics it asks for, or an error that names file and key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import CheckpointError, ConfigError, nearest, some
from lorafit.methods.lora import LoRA
from lorafit.peft_layout import HEADS

PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base weight alone. The others put a residual into it when PEFT loads."""

MUST_BE: Mapping[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "ensure_weight_tying": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
"""Settings that change what PEFT computes and that this version reads only at the values that do not."""

USED = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
NOT_MATHEMATICS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "lorafit",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Settings of PEFT that do not enter the function an adapter computes (how it was initialised, where its base is)."""


@dataclass(frozen=True)
class Parsed:
    """What a config says of the mathematics.

    `heads` are the entries of `modules_to_save` that PEFT adds for the task type, whether the model has them or not.
    """

    method: LoRA
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: list[str] | str | None
    exclude: list[str] | str
    modules_to_save: list[str]
    heads: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    unknown: tuple[str, ...]


def parse(config: Mapping[str, Any], where: Path) -> Parsed:
    """Reads a config strictly.

    Raises:
        CheckpointError: an unknown type of adapter, a value out of range or of the wrong type, or a setting that
            changes the mathematics in a way that this version does not compute; names file, key, found, expected, fix.
    """
    reader = _Reader(config, where)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise reader.error(
            "peft_type",
            "the adapter is of a type that this version does not read",
            kind,
            "'LORA'",
            near=nearest(str(kind), ["LORA"]),
        )
    for key, allowed in MUST_BE.items():
        if key in config and config[key] not in allowed:
            raise reader.error(
                key,
                "this setting changes what the adapter computes, in a way that this version does not read",
                config[key],
                f"{allowed[0]!r}",
                fix="merge the adapter with the library that wrote it, or export it as plain LoRA there",
            )
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise reader.error(
            "init_lora_weights",
            "this initialisation keeps a part of the base weight in the adapter, so the file alone is not the change",
            init,
            f"one of {', '.join(map(repr, PLAIN_INITS))}",
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )
    return Parsed(
        method=reader.method(),
        rank_pattern=reader.pattern("rank_pattern", int),
        alpha_pattern=reader.pattern("alpha_pattern", float),
        targets=reader.expression("target_modules"),
        exclude=reader.expression("exclude_modules") or [],
        modules_to_save=reader.saved(),
        heads=HEADS.get(str(config.get("task_type")), ()),
        layers=reader.layers(),
        layers_pattern=reader.layers_pattern(),
        unknown=tuple(sorted(set(config) - USED - NOT_MATHEMATICS - set(MUST_BE))),
    )


class _Reader:
    """Takes typed values out of a config, with errors that name file and key."""

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self.config = config
        self.where = where

    def error(
        self,
        key: str,
        message: str,
        found: object,
        expected: str,
        *,
        near: Sequence[str] = (),
        fix: str | None = None,
    ) -> CheckpointError:
        return CheckpointError(
            message,
            where=f"{self.where}: {key}",
            found=repr(found),
            expected=expected,
            near=near,
            fix=fix or f"mend {key!r} in the file",
        )

    def method(self) -> LoRA:
        get = self.config.get
        r, alpha, dropout = get("r", 8), get("lora_alpha", 8), get("lora_dropout", 0.0)
        rslora = get("use_rslora", False)
        if alpha is None:
            raise self.error("lora_alpha", "a value is missing", None, "a number greater than 0")
        try:
            return LoRA(r=r, alpha=alpha, dropout=dropout, rslora=rslora)
        except ConfigError as error:
            keys = {
                "LoRA.r": "r",
                "LoRA.alpha": "lora_alpha",
                "LoRA.dropout": "lora_dropout",
                "LoRA.rslora": "use_rslora",
            }
            key = keys[str(error.where)]
            raise self.error(key, error.message, self.config.get(key), str(error.expected or "a boolean")) from None

    def pattern(self, key: str, kind: type[int] | type[float]) -> dict[str, Any]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(key, "a pattern must map names to numbers", value, "an object")
        for name, number in value.items():
            number_ok = isinstance(number, int) or (kind is float and isinstance(number, float))
            if isinstance(number, bool) or not number_ok or not 0 < number < math.inf:
                raise self.error(
                    f"{key}[{name!r}]", "a value is out of range", number, f"a {kind.__name__} greater than 0"
                )
            self._compile(key, name)
        return value

    def names(self, key: str) -> list[str] | str | None:
        value = self.config.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
            return value
        raise self.error(key, "these are no module names", value, "a list of names, or a regular expression")

    def expression(self, key: str) -> list[str] | str | None:
        value = self.names(key)
        if isinstance(value, str):
            self._compile(key, value)
        return value

    def _compile(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise self.error(key, f"a name is not a regular expression: {error}", pattern, "a pattern") from None

    def saved(self) -> list[str]:
        value = self.names("modules_to_save")
        if isinstance(value, str):
            raise self.error("modules_to_save", "these are no module names", value, "a list of names")
        return value or []

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.names("layers_pattern") or []
        patterns = (value,) if isinstance(value, str) else tuple(value)
        for pattern in patterns:
            self._compile("layers_pattern", pattern)
        return patterns

    def layers(self) -> tuple[int, ...] | None:
        value = self.config.get("layers_to_transform")
        listed = value if isinstance(value, list) else [value]
        if value is None or value == []:
            return None
        if all(isinstance(index, int) and not isinstance(index, bool) for index in listed):
            return tuple(listed)
        raise self.error("layers_to_transform", "these are no layer numbers", value, "a whole number or a list of them")


def expected_sites(parsed: Parsed, paths: Sequence[str], where: Path) -> list[str] | None:
    """The paths among `paths` that a config names, as PEFT matches them; None where it does not name any.

    Raises:
        CheckpointError: a name in the config that matches nothing.
    """
    if parsed.targets is None:
        return None
    tests = [parsed.targets] if isinstance(parsed.targets, str) else parsed.targets
    regular = isinstance(parsed.targets, str)
    chosen = []
    hit: set[str] = set()
    for path in paths:
        matched = [test for test in tests if _peft_match(test, path, regular)]
        hit.update(matched)
        # A name that is the whole path is meant as it stands; PEFT looks at layers for suffixes only.
        wanted = path in matched or _layer_wanted(parsed, path)
        if matched and wanted and not _excluded(parsed.exclude, path):
            chosen.append(path)
    unmatched = [test for test in tests if test not in hit]
    if unmatched:
        tails = sorted({path.rpartition(".")[2] for path in paths})
        raise CheckpointError(
            "the adapter was made for modules that this model does not have",
            where=f"{where}: target_modules",
            found=some(map(repr, unmatched)),
            expected=f"names among {some(tails, 8)}",
            near=nearest(unmatched[0], tails),
            fix="load the base model that the adapter was trained on (base_model_name_or_path)",
        )
    return chosen


def _peft_match(test: str, path: str, regular: bool) -> bool:
    if regular:
        return re.fullmatch(test, path) is not None
    return path == test or path.endswith("." + test)


def _excluded(exclude: list[str] | str, path: str) -> bool:
    if isinstance(exclude, str):
        return re.fullmatch(exclude, path) is not None
    return any(_peft_match(test, path, False) for test in exclude)


def _layer_wanted(parsed: Parsed, path: str) -> bool:
    if parsed.layers is None:
        return True
    # The first number counts: a later one is that of an expert or another list inside the layer.
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in parsed.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(pattern, path) for pattern in patterns) if match), None)
    return found is not None and int(found.group(1)) in parsed.layers
