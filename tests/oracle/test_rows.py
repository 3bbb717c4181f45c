"""Rows of one batch with adapters of PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import lorafit as lf


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_adapters_of_a_grouped_convolution_that_see_all_channels(tmp_path, fill):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["0"])).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.4)
    theirs.save_pretrained(tmp_path)
    handle = lf.load(model, tmp_path, name="all")
    fill(own := lf.attach(model, lf.LoRA(r=4), ["0"], name="own"))
    x = torch.randn(4, 4, 5, 5)
    with torch.no_grad():
        expected = theirs(x)
        assert own.active == ("own",)
        expected[1] = model(x)[1]
        with own.disabled():
            expected[2] = model(x)[2]
        with handle.rows(["all", "own", None, "all"]):
            torch.testing.assert_close(model(x), expected)
