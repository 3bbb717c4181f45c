"""The keys of LoRA files for pipelines: today's, those of older releases of diffusers, and those of the kohya scripts.

Each becomes the name of a part, the path of a layer and what the tensor is. A name that could be two layers' is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

DOWN, UP, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"


class Named(NamedTuple):
    """What a key stands for; `part` is None where the file does not say, `layer` has points."""

    part: str | None
    layer: str
    what: str


KINDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"^(?P<layer>.+?)\.{pattern}$"), what)
    for pattern, what in (
        (r"lora_A(\.default(_\d+)?)?\.weight", DOWN),
        (r"lora_B(\.default(_\d+)?)?\.weight", UP),
        (r"lora(_linear_layer)?\.down\.weight", DOWN),
        (r"lora(_linear_layer)?\.up\.weight", UP),
        (r"lora_down\.weight", DOWN),
        (r"lora_up\.weight", UP),
        (r"lora_magnitude_vector(\.weight)?", MAGNITUDE),
        (r"alpha", ALPHA),
    )
)
"""How keys end, and what they then are."""

OLD = re.compile(r"^(?P<layer>.+)\.to_(?P<which>q|k|v|out)_lora\.(?P<way>down|up)\.weight$")
"""Of attention layers whose processors held the adapter, before diffusers 0.25."""
PROJECTIONS: Mapping[bool, Mapping[str, str]] = {
    False: {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    True: {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"},
}
"""Whether the part is a text encoder → the short name of a projection → its name there."""

KOHYA: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""How flat names begin → part."""


def named(key: str, parts: Collection[str], layers: Mapping[str, Mapping[str, str]]) -> Named | None:
    """What a key stands for, or None for one that is not known.

    Args:
        key: of a tensor.
        parts: the names of a pipeline's parts, all that there can be.
        layers: part → flat name → path of the pipeline's own layers, for the scripts' keys.

    >>> named("unet.mid_block.attentions.0.to_q.lora_A.weight", ["unet"], {})
    Named(part='unet', layer='mid_block.attentions.0.to_q', what='lora_A.weight')
    >>> named("unet.mid.attn1.processor.to_out_lora.up.weight", ["unet"], {})
    Named(part='unet', layer='mid.attn1.to_out.0', what='lora_B.weight')
    >>> named("lora_unet_mid_block_conv1.alpha", ["unet"], {"unet": {"mid_block_conv1": "mid_block.conv1"}})
    Named(part='unet', layer='mid_block.conv1', what='alpha')
    """
    for begin, part in KOHYA.items():
        if key.startswith(begin):
            flat, _, end = key.removeprefix(begin).partition(".")
            layer = layers.get(part, {}).get(flat) or layers.get(part, {}).get(flat.removeprefix("text_model_"))
            found = _kind(f"x.{end}", text=False)
            return None if layer is None or found is None else Named(part, layer, found[1])
    own = key.partition(".")[0]
    part_of = own if own in parts else None
    rest = key[len(own) + 1 :] if part_of is not None else key
    found = _kind(rest.replace(".processor.", "."), text=own.startswith("text_encoder"))
    return None if found is None else Named(part_of, *found)


def _kind(rest: str, *, text: bool) -> tuple[str, str] | None:
    old = OLD.match(rest)
    if old is not None:
        layer = f"{old['layer']}.{PROJECTIONS[text][old['which']]}"
        return layer, DOWN if old["way"] == "down" else UP
    for pattern, what in KINDS:
        match = pattern.match(rest)
        if match is not None:
            return match["layer"], what
    return None


def flattened(paths: Collection[str]) -> dict[str, str]:
    """Paths by their names with lines for points, as the scripts write them; ambiguous ones are left out."""
    found: dict[str, str] = {}
    twice = set()
    for path in paths:
        flat = path.replace(".", "_")
        if flat in found:
            twice.add(flat)
        found[flat] = path
    return {flat: path for flat, path in found.items() if flat not in twice}
