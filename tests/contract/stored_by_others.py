"""Adapters over one storage of another library; prints what came out as JSON. Run by test_quant_others.py.

A process of its own: what these libraries do when they are imported shall reach no other test.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import lorafit as lf  # noqa: E402

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)
LINEAR = {(64, 64), (128, 64), (64, 128), (32, 64)}


def storage(name):
    if name in ("nf4", "fp4"):
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=name == "nf4")
    if name == "nf4-bf16":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao import quantization

    made = {
        "ao-int8": lambda: quantization.Int8WeightOnlyConfig(),
        "ao-int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "ao-int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }
    return TorchAoConfig(made[name]())


def far(a, b):
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def gradients(model, handle, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return [parameter.grad.clone() for parameter in handle.parameters()]


def kept(model, tokens):
    """How many matrices of the size of a quantised weight autograd keeps as floating-point numbers."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    head = model.lm_head.weight
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    plain = [t for t in saved if type(t) is torch.Tensor and t.is_floating_point() and tuple(t.shape) in LINEAR]
    loss.backward()
    return len([t for t in plain if t.untyped_storage().data_ptr() != head.untyped_storage().data_ptr()])


def over(model, method, tokens, folder):
    """Attaches, trains, saves, merges, detaches."""
    found = {}
    model.eval()
    with torch.no_grad():
        base = model(tokens).logits
        again = model(tokens).logits
    found["base twice"] = far(again, base)
    handle = lf.attach(model, method, seed=0)
    found["summary"] = handle.summary()
    with torch.no_grad():
        found["attached"] = far(model(tokens).logits, base)
    model.train()
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    found["losses"] = losses
    found["kept"] = kept(model, tokens)
    model.eval()
    with torch.no_grad():
        y = model(tokens).logits
        with handle.disabled():
            found["disabled"] = far(model(tokens).logits, base)
        y = model(tokens).logits
    handle.save(folder)
    try:
        handle.merge()
    except lf.MergeError as error:
        found["merge"] = str(error)
    handle.detach()
    with torch.no_grad():
        found["detached"] = far(model(tokens).logits, base)
    handle = lf.load(model, folder, trainable=True)
    with torch.no_grad():
        found["loaded"] = far(model(tokens).logits, y)
    return found, handle, y


def main(name):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=storage(name), dtype=torch.float32)
    tokens = torch.randint(128, (2, 9))
    result = {}
    if name == "ao-int8-dynamic":
        try:
            lf.attach(model, lf.LoRA(r=4))
        except lf.TargetError as error:
            sys.stdout.write(f"RESULT {json.dumps({'refused': str(error)})}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        for label, method in (("lora", lf.LoRA(r=4, dropout=0.1)), ("dora", lf.DoRA(lf.LoRA(r=4)))):
            result[label], handle, y = over(model, method, tokens, Path(folder) / label)
            if label == "lora":
                handle.detach()
                try:
                    lf.attach(model, lf.LoRA(r=2), ["q_proj"], modules_to_save=["up_proj"])
                except lf.TargetError as error:
                    result["copy"] = str(error)
        mine = gradients(model, handle, tokens)
        result["changed"] = len(lf.dequantise(model))
        with torch.no_grad():
            result["dequantised"] = far(model(tokens).logits, y)
        its = gradients(model, handle, tokens)
        result["gradients"] = max(far(a, b) for a, b in zip(mine, its, strict=True))
        with torch.no_grad():
            y = model(tokens).logits
            handle.merge()
            result["merged"] = far(model(tokens).logits, y)
        result["class"] = type(model.model.layers[0].mlp.up_proj).__name__
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")


main(sys.argv[1])
