"""Adapters over layers that bitsandbytes or torchao quantised, as transformers' own settings load them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ASIDE = Path(sys.prefix) / "quant"
"""Where `make` puts both packages, aside from what every other test imports."""
PACKAGE = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "nf4-bf16": "bitsandbytes", "int8": "bitsandbytes"}
STORAGES = [*PACKAGE, "ao-int8", "ao-int4"]


@pytest.fixture(scope="module", params=STORAGES)
def found(request):
    return request.param, outcome(request.param)


def outcome(name):
    package = PACKAGE.get(name, "torchao")
    if importlib.util.find_spec(package) is None and not (ASIDE / package).is_dir():
        pytest.skip(f"{package} is not installed")
    paths = [str(Path(__file__).parents[2] / "src"), str(ASIDE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("stored_by_others.py")
    done = subprocess.run(
        [sys.executable, str(script), name], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def test_adapters_over_it(found):
    name, result = found
    # bitsandbytes evaluates its 4-bit layers in bfloat16 on processors that can, and rounds their scales for good.
    slack = 0.02 if name in ("nf4", "fp4", "nf4-bf16") else 1e-6
    for label in ("lora", "dora"):
        over = result[label]
        assert "14 " in over["summary"] and over["attached"] <= slack and over["disabled"] <= slack
        assert over["losses"][-1] < over["losses"][0] - 0.1 and over["kept"] == 0
        assert over["detached"] <= slack and over["loaded"] <= slack
        assert "dequantise(model)" in over["merge"]


def test_it_becomes_plain(found):
    name, result = found
    # int8 of bitsandbytes rounds activations, too: dequantised it is another model, by that much.
    slack = 0.05 if name in ("int8", "nf4-bf16") else 1e-5
    assert result["changed"] == 14 and result["class"] == "Adapted[Linear]"
    assert result["dequantised"] <= slack and result["merged"] <= 1e-5
    # bfloat16's products and rounded inputs: the same direction, not the same digits.
    assert result["gradients"] <= (0.3 if slack > 1e-5 else 1e-4)
    assert "quantised" in result["copy"]


def test_rounded_inputs_without_a_gradient_are_refused():
    assert "no gradient" in outcome("ao-int8-dynamic")["refused"]


ASYMMETRIC = """
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.quant_primitives import MappingType

import lorafit as lf
from lorafit.layers.foreign import TensorSite

torch.manual_seed(0)
for mapping in (MappingType.ASYMMETRIC, MappingType.SYMMETRIC):
    model = nn.Sequential(nn.Linear(64, 32))
    model[0].weight.data += 0.1
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0), mapping_type=mapping))
    x = torch.randn(2, 64)
    y = model(x)
    print("FORM", type(TensorSite(model[0]).stored(torch.float32)).__name__)
    handle = lf.attach(model, lf.LoRA(r=1))
    print("FAR", float((model(x) - y).abs().max()))
    handle.detach()
    lf.dequantise(model)
    print("FAR", float((model(x) - y).abs().max()))
"""


def test_zero_points_count():
    if importlib.util.find_spec("torchao") is None and not (ASIDE / "torchao").is_dir():
        pytest.skip("torchao is not installed")
    paths = [str(Path(__file__).parents[2] / "src"), str(ASIDE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", ASYMMETRIC], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    far = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("FAR ")]
    assert len(far) == 4 and max(far) < 1e-5
    assert re.findall(r"^FORM (.*)$", done.stdout, re.MULTILINE) == ["Formed", "Int8Rows"]
