"""`pytorch_lora_weights.safetensors`, as the pipelines of diffusers load and save it.

The keys are PEFT's with the component's name in place of `base_model.model`. The settings stand in the file's metadata
under `lora_adapter_metadata`, each after the component's name. Readers before diffusers 0.35 do not look there and take
a scale of 1: so the scales are multiplied into B, and both kinds compute the same
(diffusers/loaders/lora_base.py, utils/peft_utils.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafit import store
from lorafit.conversion import Pair, Plain, convert, read_pairs
from lorafit.delta import LowRank
from lorafit.errors import CheckpointError, ConfigError, some
from lorafit.exporting.flat import TOLERANCE, TYPES, Checked, shaped
from lorafit.layouts.lora import EMBEDDING
from lorafit.peft_layout import exact_pattern, for_file

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = ("unet", "transformer", *ENCODERS)
KNOWN = (
    ("unet", re.compile(r"(down_blocks|up_blocks|mid_block)\.")),
    ("text_encoder", re.compile(r"(text_model\.)?encoder\.layers\.\d+\.")),
    ("transformer", re.compile(r"(single_)?transformer_blocks\.\d+\.")),
)
"""A component and how the paths of its layers begin."""


def component_of(paths: list[str]) -> str:
    """The component whose layers these are.

    Raises:
        ConfigError: it cannot be told.

    >>> component_of(["mid_block.attentions.0.to_q"])
    'unet'
    """
    found = [name for name, begin in KNOWN if all(begin.match(path) for path in paths)]
    if len(found) != 1:
        raise ConfigError(
            "it cannot be told which part of a pipeline this adapter belongs to",
            found=some(paths, 3),
            expected=f"one of {', '.join(COMPONENTS)}",
            fix=f"--component {COMPONENTS[0]}",
        )
    return found[0]


def opened(adapter: Path, folder: Path) -> Plain:
    """An adapter as LoRA or DoRA; what is neither is converted in `folder`.

    Raises:
        CheckpointError: its file does not say by itself what it changes, or diffusers cannot take it.
    """
    plain = read_pairs(store.read(adapter))
    if plain is None:
        plain = read_pairs(store.read(_converted(adapter, folder / "plain")))
        assert plain is not None
    if plain.replaced:
        raise CheckpointError(
            "diffusers takes no modules that are replaced in full (modules_to_save)",
            where=adapter / store.WEIGHTS,
            found=some(sorted(plain.replaced), 3),
            expected="A and B alone",
            fix="train without modules_to_save, or merge the adapter into the pipeline's part in Python",
        )
    odd = [path for path, pair in plain.pairs.items() if pair.keys == EMBEDDING]
    if odd:
        raise CheckpointError(
            "diffusers has no keys for adapted embeddings",
            where=adapter / store.WEIGHTS,
            found=some(odd, 3),
            expected="linear layers and convolutions",
            fix="merge the adapter into the pipeline's part in Python (lorafit.load, then merge_and_detach)",
        )
    return plain


def _converted(adapter: Path, output: Path) -> Path:
    try:
        return convert(adapter, output=output)
    except CheckpointError as error:
        raise CheckpointError(
            error.message,
            found=error.found,
            expected=error.expected,
            where=error.where,
            fix="in Python: lorafit.convert(path, model=model, r=16) with the pipeline's part; export that",
        ) from error


def write(plain: Plain, folder: Path, *, component: str, dtype: str) -> None:
    """Writes the file for one component of a pipeline."""
    write_parts({component: plain}, folder / WEIGHTS, dtype=dtype)


def write_parts(parts: Mapping[str, Plain], path: Path, *, dtype: str) -> None:
    """Writes the file for several components of a pipeline, by their names."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, plain in parts.items():
        for layer, pair in plain.pairs.items():
            down, up = shaped(pair, pair.down, pair.up * pair.scale)
            tensors[f"{component}.{layer}.lora_A.weight"] = down.to(TYPES[dtype])
            tensors[f"{component}.{layer}.lora_B.weight"] = up.to(TYPES[dtype])
        for layer, (_, value) in plain.magnitudes.items():
            tensors[f"{component}.{layer}.{_magnitude(component)}"] = value.to(TYPES[dtype])
        settings |= {f"{component}.{key}": value for key, value in _config(plain).items()}
    metadata = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    save_file(for_file(tensors), path, metadata)


def _magnitude(component: str) -> str:
    """How the key of a layer's magnitudes ends.

    The denoiser's keys are read by PEFT, as PEFT writes them; text encoders' by transformers 5, which puts the
    adapter's name behind the first word alone, and drops what then is no parameter's name.
    """
    return "lora_magnitude_vector.weight" if component in ENCODERS else "lora_magnitude_vector"


def _config(plain: Plain) -> dict[str, Any]:
    ranks = {path: pair.down.shape[0] for path, pair in plain.pairs.items()}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = exact_pattern({path: rank for path, rank in ranks.items() if rank != most}, list(ranks))
    return {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "use_dora": bool(plain.magnitudes),
        "lora_bias": False,
    }


@torch.no_grad()
def check(plain: Plain, written: Path, *, component: str, dtype: str) -> Checked:
    """Reads the file anew and compares s B A of each layer, and its magnitudes, with the adapter's own."""
    with safe_open(written / WEIGHTS, framework="pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
        settings = json.loads(file.metadata()[METADATA])
    worst = largest = 0.0
    for path, pair in plain.pairs.items():
        mine = _product(pair)
        down, up = (tensors[f"{component}.{path}.lora_{letter}.weight"] for letter in "AB")
        theirs = _product(Pair(down.flatten(1), up.flatten(1), _scale(settings, component, path)))
        largest = max(largest, float(mine.abs().max()))
        apart = float((mine - theirs).abs().max())
        if path in plain.magnitudes:
            own = plain.magnitudes[path][1].float()
            apart = max(apart, float((own - tensors[f"{component}.{path}.{_magnitude(component)}"]).abs().max()))
            largest = max(largest, float(own.abs().max()))
        worst = apart if not worst >= apart else worst
    return Checked(worst, TOLERANCE[dtype] * largest, "ΔW")


def _product(pair: Pair) -> Tensor:
    groups = pair.down.shape[0] // pair.up.shape[1]
    if groups > 1:  # what a grouped convolution does is not the change of a weight: its factors stand for it
        return torch.cat([(pair.up * pair.scale).flatten(), pair.down.flatten()])
    return LowRank(pair.up, pair.down, scale=pair.scale).dense()


def _scale(settings: Mapping[str, Any], component: str, path: str) -> float:
    def value(pattern: str, usual: str) -> float:
        found: Mapping[str, float] = settings[f"{component}.{pattern}"]
        hits = [number for key, number in found.items() if re.match(rf"(.*\.)?({key})$", path)]
        return float(hits[0] if hits else settings[f"{component}.{usual}"])

    return value("alpha_pattern", "lora_alpha") / value("rank_pattern", "r")
