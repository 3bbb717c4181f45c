"""The table of methods is that of `lorafit.METHODS`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lorafit as lf
from lorafit.cli.methods import LAYERS, SHAPES, default_shapes
from lorafit.cli.screen import Screen
from lorafit.methods.table import COLUMNS, rows


def test_every_method_has_its_row(lorafit: Callable[..., Any]) -> None:
    result = lorafit("methods")
    assert result.status == 0 and not result.err
    for name, kind in lf.METHODS.items():
        row = next(line for line in result.out.splitlines() if line.startswith(f"{name} "))
        assert kind.paper in row and kind.trains in row
    assert "4,884,480" in result.out and "210 linear layers of SmolLM2-135M" in result.out


def test_names_and_numbers_are_whole_on_a_narrow_terminal() -> None:
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, width=60, force_terminal=True, color_system=None)
    found = rows(default_shapes())
    screen.table(COLUMNS, [row.cells() for row in found], right=(2,), whole=(0, 2))
    assert max(map(len, out.getvalue().splitlines())) <= 60 and COLUMNS[-1] == "paper"
    for row in found:
        assert any({row.name, f"{row.numbers:,}"} <= set(line.split()) for line in out.getvalue().splitlines())
    folded = [line[-7:].strip() for line in out.getvalue().splitlines()]
    assert "".join(found[0].paper.split()) in "".join("".join(folded).split())  # and nothing is cut off


def test_counts_are_those_of_a_real_adapter(lorafit: Callable[..., Any], llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    value = lorafit("methods", "--model", llama, "--json").json
    for row in value["methods"]:
        model = AutoModelForCausalLM.from_pretrained(llama)
        handle = lf.attach(model, lf.METHODS[row["name"]]())
        assert row["numbers"] == handle.num_trainable and value["sites"] == len(handle.sites)


def test_the_default_shapes_are_smollm2s() -> None:
    """Its published config: huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, config.json."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafit.layers import site_class
    from lorafit.plan import Modules, all_linear

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with torch.device("meta"):
        modules = Modules.of(LlamaForCausalLM(config))
    shapes = []
    for path in all_linear(modules):
        kind = site_class(type(modules.by_path[path]))
        assert kind is not None
        shape = kind(modules.by_path[path]).shape
        shapes.append((shape.out, shape.inn))
    assert shapes == list(SHAPES) * LAYERS


def test_a_model_that_is_not_there(lorafit: Callable[..., Any]) -> None:
    result = lorafit("methods", "--model", "./nope")
    assert result.status == 1 and "no such model directory" in result.err
