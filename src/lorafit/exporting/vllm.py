"""Plain LoRA as vLLM loads it: one rank for all layers, one that it allows, and a scale of 1.

Of a config vLLM reads r, lora_alpha and use_rslora, and nothing that differs from layer to layer (rank_pattern,
alpha_pattern): so the scales are multiplied into B, and A and B are padded with zeros. It refuses DoRA and modules that
are replaced in full. It adapts linear layers, and of embeddings `embed_tokens` and `lm_head`
(vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import warnings
from pathlib import Path

import lorafit.checkpoint
from lorafit import store
from lorafit.bare import bare_model
from lorafit.errors import CheckpointError, some
from lorafit.exporting.flat import (
    NAME,
    TYPES,
    Checked,
    Flat,
    compared,
    padded,
    refuse_copies,
    shaped,
)
from lorafit.layouts.lora import EMBEDDING
from lorafit.peft_layout import for_file, join

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (it takes 1 as well, from 0.9 on)."""
EMBEDDINGS = ("embed_tokens", "lm_head")


def allowed_rank(r: int) -> int:
    """The least rank of vLLM's that holds `r`.

    Raises:
        CheckpointError: there is none.

    >>> allowed_rank(3), allowed_rank(64), allowed_rank(65)
    (8, 64, 128)
    """
    for rank in RANKS:
        if r <= rank:
            return rank
    raise CheckpointError(
        "the adapter's rank is higher than vLLM allows",
        found=r,
        expected=f"at most {RANKS[-1]}",
        fix="--r 256 takes the best approximation of that rank, --to hf merges",
    )


def write(own: Flat, folder: Path, *, dtype: str, card: str) -> int:
    """Writes an adapter for vLLM.

    Args:
        own: the adapter.
        folder: a new one.
        dtype: of A and B.
        card: the text of README.md.

    Returns:
        The rank that vLLM has to allow.

    Raises:
        CheckpointError: vLLM cannot take what the adapter does; says which module.
    """
    refuse_copies(own, "vLLM")
    _refuse_layers(own)
    rank = allowed_rank(max(pair.down.shape[0] for pair in own.plain.pairs.values()))
    tensors = {}
    for path, pair in own.plain.pairs.items():
        up, down = own.scaled(path)
        down, up = shaped(pair, *padded(down, up, rank))
        tensors[join(path, pair.keys[0])] = down.to(TYPES[dtype])
        tensors[join(path, pair.keys[1])] = up.to(TYPES[dtype])
    kept = ("base_model_name_or_path", "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")
    config = {
        **{key: own.config.get(key) for key in kept},
        "bias": "none",
        "fan_in_fan_out": own.config.get("fan_in_fan_out", False),
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "task_type": own.config.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }
    store.write_parts(folder, config, for_file(tensors), card)
    return rank


def check(own: Flat, written: Path, dtype: str) -> Checked:
    """Loads what was written anew and compares the change of each layer with the adapter's own."""
    again = lorafit.checkpoint.load(bare_model(written), written, name=NAME)
    return compared(own, again.delta, dtype)


def check_by_peft(own: Flat, written: Path, dtype: str) -> Checked | None:
    """The same by peft's reading of the files; None where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    peft = importlib.import_module("peft")
    config = peft.PeftConfig.from_pretrained(written)
    config.task_type = None  # the layers are all there is of a model here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds no config of a base model, and there is none
        again = peft.PeftModel.from_pretrained(bare_model(written), written, config=config)
    modules = dict(again.base_model.model.named_modules())
    return compared(own, lambda path: modules[path].get_delta_weight("default"), dtype)


def serve_line(base: str, name: str, folder: Path, rank: int) -> str:
    """The command that serves the base with the adapter.

    >>> serve_line("org/base", "mine", Path("out dir"), 16)
    "vllm serve org/base --enable-lora --lora-modules 'mine=out dir' --max-lora-rank 16"
    """
    module = f"{name}={folder}"
    if module.count("=") > 1 or "," in module:  # such words vLLM takes as JSON alone
        module = json.dumps({"name": name, "path": str(folder)}, ensure_ascii=False)
    return shlex.join(["vllm", "serve", base, "--enable-lora", "--lora-modules", module, "--max-lora-rank", str(rank)])


def _refuse_layers(own: Flat) -> None:
    odd = [path for path, pair in own.plain.pairs.items() if pair.kernel]
    odd += [
        path
        for path, pair in own.plain.pairs.items()
        if pair.keys == EMBEDDING and path.rpartition(".")[2] not in EMBEDDINGS
    ]
    if odd:
        raise CheckpointError(
            "vLLM cannot take an adapter of these modules: they are convolutions, or embeddings that it does not adapt",
            found=some(odd, 5),
            expected=f"linear layers, and of embeddings {' and '.join(EMBEDDINGS)}",
            fix="--to hf merges the adapter into its base",
        )
