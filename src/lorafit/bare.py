"""A model of the layers that an adapter's file tells of, without their weights: to look at an adapter with no base.

The shapes of A and B say what layer they belong to. Weights of zeros take no memory, whatever their size. Base weights
that the file itself has, as PEFT puts those of embeddings and outputs beside their adapters, are taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lorafit import store
from lorafit.errors import CheckpointError, some
from lorafit.layers.hollow import hollow_layer, hollow_table
from lorafit.layouts import PAIRS, parse
from lorafit.layouts.lora import EMBEDDING, MATRIX
from lorafit.peft_layout import BASE, PREFIX

TRIPLETS = ("lora_A", "lora_B")
"""What AdaLoRA's files call the same two."""


def bare_model(path: str | Path, name: str = "default") -> nn.Module:
    """A model with the layers of an adapter's folder, under their paths; a weight that the file lacks is zero.

    Args:
        path: the adapter's folder, as for `lorafit.load`.
        name: the adapter's name.

    Raises:
        CheckpointError: the files are damaged, or of a type whose files do not tell the sizes of the layers (VeRA, and
            what only this library writes).
    """
    stored = store.read(Path(path), name)
    layout, parsed, _ = parse(stored.config, stored.config_path)
    if layout is PAIRS:
        raise CheckpointError(
            "the file does not tell which of its convolutions are transposed, or in groups",
            where=stored.weights_path,
            found=f"type {layout.peft_type}",
            expected="the base model",
            fix="give it, too: --base, or --model with its directory or name",
        )
    locate = layout.locator(parsed)
    sites: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        if not key.startswith(PREFIX):
            continue  # loading says what is wrong with it
        rest = key[len(PREFIX) :]
        place, own = locate(rest)
        if place is not None:
            sites.setdefault(place, {})[own] = tensor
        else:
            module, _, last = rest.rpartition(".")
            copies.setdefault(module, {})[last] = tensor
    root = nn.Module()
    for place, tensors in sorted(sites.items(), key=lambda pair: _counted(pair[0])):
        _put(root, place, _layer(tensors, f"{stored.weights_path}: {place}"))
    for place, tensors in copies.items():
        site = place.removesuffix(BASE)
        if site in sites:
            _fill(root.get_submodule(site), tensors)
        else:
            _put(root, place, _holder(tensors))
    return root


def _counted(path: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 2, as files do not."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _layer(tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    for keys, made in ((MATRIX, hollow_layer), (TRIPLETS, hollow_layer), (EMBEDDING, hollow_table)):
        down, up = (tensors.get(key) for key in keys)
        layer = None if down is None or up is None else made(down, up)
        if layer is not None:
            return layer
    raise CheckpointError(
        "the file does not tell the size of this layer",
        where=where,
        found=some(tensors),
        expected=f"{MATRIX[0]} and {MATRIX[1]}, or those of an embedding",
        fix="give the base model, too: --base, or --model with its directory or name",
    )


def _holder(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with these tensors, which an adapter replaces by its own or finds to be the base's."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives an adapted layer the base weights that the file has of it; of another shape, loading says so."""
    for name, tensor in tensors.items():
        own = layer._parameters.get(name)
        if own is not None and own.shape == tensor.shape:
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    place = root
    for name in parents:
        if name not in place._modules:
            place.add_module(name, nn.Module())
        child = place._modules[name]
        assert child is not None
        place = child
    place.add_module(last, module)
