"""Layers stored as int8 rows: the same numbers as the plain model of the same weights, in a quarter of the memory."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import threading
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lorafit as lf
from lorafit.layers import Stored
from lorafit.quant.modules import Int8Layer
from lorafit.quant.rows import Int8Rows, fill, pack

METHODS = {
    "lora": lf.LoRA(r=4),
    "dropout": lf.LoRA(r=4, dropout=0.3),
    "pissa": lf.LoRA(r=4, init="pissa"),
    "olora": lf.LoRA(r=4, init="olora"),
    "lora-fa": lf.LoRAFA(r=4),
    "lora-plus": lf.LoRAPlus(),
    "vera": lf.VeRA(r=16),
    "adalora": lf.AdaLoRA(init_r=4, target_r=2, total_steps=10),
    "dora": lf.DoRA(lf.LoRA(r=4)),
    "delta-lora": lf.DeltaLoRA(r=4, start=1),
    "intrinsic": lf.IntrinsicDimension(d=20),
}


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), Conv1D(40, 64), nn.Tanh(), nn.Linear(40, 24, bias=False))


def pair(seed=0):
    """A quantised model, and the plain one that has its weights."""
    packed = plain(seed)
    lf.quantise(packed)
    twin = copy.deepcopy(packed)
    assert lf.dequantise(twin) == ["0", "2", "4"]
    return packed, twin


def nudge(*handles):
    """The same random step away from the start for all."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameters in zip(*(handle.parameters() for handle in handles), strict=True):
            step = torch.randn_like(parameters[0]) * 0.05
            for each in parameters:
                each.add_(step)


def values(model, x, seed=3):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad


def saved(model, x):
    """What autograd keeps of a forward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum().backward()
    return kept


def llama(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **options)
    )


# Rows


def test_packing_keeps_each_row_to_half_a_step_and_says_what_is_lost():
    matrix = torch.randn(33, 57) * torch.logspace(-6, 3, 33)[:, None]
    matrix[5] = 0
    rows = pack(matrix)
    back = rows.values * rows.scale
    assert rows.values.dtype == torch.int8 and rows.values.abs().max() == 127
    assert ((back - matrix).abs() <= rows.scale * 0.5001).all() and torch.equal(back[5], matrix[5])
    assert rows.error == pytest.approx(float((back - matrix).norm() / matrix.norm()), rel=1e-4)
    again = pack(back)
    assert torch.equal(again.values, rows.values)


def test_packing_zeros_and_numbers_without_a_scale():
    rows = pack(torch.full((2, 3), 1e-45))
    assert not rows.values.any() and rows.scale.isfinite().all() and rows.error == 1.0
    assert pack(torch.zeros(2, 3)).error == 0.0
    assert math.isnan(pack(torch.tensor([[1.0, math.nan]])).error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_formed_matrix_is_the_rounded_product(dtype, transposed):
    rows = pack(torch.randn(700, 900))
    stored = (rows.values.t().contiguous(), rows.scale.t()) if transposed else (rows.values, rows.scale)
    form = Int8Rows(*stored, dtype, transposed)
    expected = (rows.values * rows.scale.to(torch.promote_types(dtype, torch.float32))).to(dtype)
    assert form.shape == (700, 900) and torch.equal(form.form(form.tensors, dtype), expected)
    assert torch.equal(fill(torch.empty(700, 900, dtype=dtype), rows.values, rows.scale), expected)


# The layer by itself


def test_the_module_stays_the_object_it_was():
    model = plain()
    before = list(model)
    report = lf.quantise(model)
    assert list(model) == before and isinstance(model[0], nn.Linear) and isinstance(model[2], Conv1D)
    assert all(isinstance(model[i], Int8Layer) for i in (0, 2, 4)) and model[0].weight.dtype == torch.int8
    assert "int8 rows" in repr(model[0]) and not any(p.requires_grad for p in (model[0].weight, model[2].weight))
    assert set(report.layers) == {"0", "2", "4"} and 0 < report.error <= report.worst[1] < 0.02
    assert report.worst[0] in str(report) and "3 layers" in str(report)
    numbers = 48 * 64 + 64 * 40 + 40 * 24
    assert report.before == 4 * numbers and report.after == numbers + 4 * (64 + 40 + 24)


def test_the_error_is_that_of_the_weights():
    model = plain()
    before = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    report = lf.quantise(model)
    lf.dequantise(model)
    lost = [(model[i].weight - w).norm().item() for i, w in zip((0, 2, 4), before, strict=True)]
    size = [w.norm().item() for w in before]
    assert list(report.layers.values()) == pytest.approx([a / b for a, b in zip(lost, size, strict=True)], rel=1e-3)
    assert report.error == pytest.approx(math.hypot(*lost) / math.hypot(*size), rel=1e-3)


def test_values_and_gradients_are_those_of_the_plain_model():
    packed, twin = pair()
    x = torch.randn(2, 5, 48)
    for mine, its in zip(values(packed, x), values(twin, x), strict=True):
        assert torch.equal(mine, its)
    bias = packed[0].bias
    assert torch.allclose(bias.grad, twin[0].bias.grad)


def test_bfloat16_keeps_the_scales():
    packed, twin = pair()
    packed.to(torch.bfloat16), twin.to(torch.bfloat16)
    assert packed[0].weight_scale.dtype == torch.float32 and packed[0].bias.dtype == torch.bfloat16
    x = torch.randn(6, 48, dtype=torch.bfloat16)
    for mine, its in zip(values(packed, x), values(twin, x), strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, its)


def test_autocast_and_double_precision():
    packed, twin = pair()
    x = torch.randn(6, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, its = packed(x), twin(x)
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, its)
    assert torch.allclose(packed(x.double()), twin.double()(x.double()))


def test_second_derivatives():
    packed, _ = pair()
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(packed, (x,), atol=1e-6)


def test_no_formed_weight_is_kept_for_the_backward_pass():
    sizes = {(64, 48), (48, 64), (40, 64), (64, 40), (24, 40), (40, 24)}
    packed, _ = pair()
    for attach in (False, True):
        handle = lf.attach(packed, lf.LoRA(r=4, dropout=0.1)) if attach else None
        kept = saved(packed, torch.randn(7, 48, requires_grad=True))
        floats = [t for t in kept if t.is_floating_point() and tuple(t.shape) in sizes]
        assert floats == [] and any(t.dtype == torch.int8 for t in kept)
    assert handle is not None


def test_several_threads_use_one_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 256), nn.Linear(256, 96))
    lf.quantise(model)
    inputs = [torch.randn(40, 96) for _ in range(4)]
    expected = [model(x).detach() for x in inputs]
    wrong = []

    def work(x, y):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(x), y):
                    wrong.append(1)

    threads = [threading.Thread(target=work, args=each) for each in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inference_mode_first_leaves_training_possible():
    packed, _ = pair()
    x = torch.randn(3, 48)
    with torch.inference_mode():
        packed(x)
    handle = lf.attach(packed, lf.LoRA(r=2))
    packed(x).sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


# Dynamo instantiates every autograd.Function that it traces, which torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_whole():
    torch.compiler.reset()
    packed, twin = pair()
    x = torch.randn(4, 48)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), twin(x), atol=1e-6)
    handle, other = lf.attach(packed, lf.LoRA(r=4), seed=0), lf.attach(twin, lf.LoRA(r=4), seed=0)
    nudge(handle, other)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    for mine, its in zip(values(compiled, x), values(twin, x), strict=True):
        assert torch.allclose(mine, its, atol=1e-5)


# State dicts


def test_the_packed_form_is_saved_and_loaded():
    packed, _ = pair()
    fresh = plain(seed=1)
    lf.quantise(fresh)
    assert str(fresh.load_state_dict(packed.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(3, 48)
    assert torch.equal(fresh(x), packed(x))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), packed(x)) and type(other[0]) is type(packed[0])


def test_plain_weights_are_packed_as_they_load():
    original = plain(seed=1)
    expected = copy.deepcopy(original)
    lf.quantise(expected)
    packed, _ = pair()
    packed.load_state_dict(original.state_dict())
    x = torch.randn(3, 48)
    assert torch.equal(packed(x), expected(x))


def test_a_packed_state_does_not_load_into_a_plain_model():
    packed, _ = pair()
    with pytest.raises(RuntimeError, match="weight_scale"):
        plain().load_state_dict(packed.state_dict())


# Adapters over it


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_what_it_is_over_the_plain_model(name):
    packed, twin = pair()
    base = {key: value.clone() for key, value in packed.state_dict().items()}
    mine, its = (lf.attach(model, METHODS[name], seed=0) for model in (packed, twin))
    nudge(mine, its)
    x = torch.randn(2, 9, 48)
    for a, b in zip(values(packed, x), values(twin, x), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(mine.parameters(), its.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(mine.delta("2"), its.delta("2"), atol=1e-6)
    optimizers = [each.optimizer(torch.optim.SGD, lr=1e-2, total_steps=10) for each in (mine, its)]
    for _ in range(3):
        for model, optimizer in zip((packed, twin), optimizers, strict=True):
            optimizer.zero_grad()
            values(model, x)
            optimizer.step()
    assert torch.allclose(packed.eval()(x), twin.eval()(x), atol=1e-4)
    mine.detach()
    assert all(torch.equal(value, base[key]) for key, value in packed.state_dict().items())


def test_dora_forms_the_weight_once_a_step(monkeypatch):
    packed, _ = pair()
    handle = lf.attach(packed, lf.DoRA(lf.LoRA(r=4)))
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    formed = []
    original = Stored.__call__
    monkeypatch.setattr(Stored, "__call__", lambda self: formed.append(1) or original(self))
    x = torch.randn(3, 48)
    for _ in range(2):
        packed(x).sum().backward()
        packed(x).sum().backward()
        optimizer.step()
    assert len(formed) == 2 * 3


def test_saved_and_loaded(tmp_path):
    packed, twin = pair()
    handle = lf.attach(packed, lf.LoRA(r=4))
    nudge(handle)
    x = torch.randn(3, 48)
    y = packed(x)
    handle.save(tmp_path)
    lf.load(twin, tmp_path)
    assert torch.equal(twin(x), y)
    handle.detach()
    lf.load(packed, tmp_path)
    assert torch.equal(packed(x), y)


def test_merging_rounds_again_and_says_so_and_unmerging_is_exact():
    packed, _ = pair()
    base = {key: value.clone() for key, value in packed.state_dict().items()}
    handle = lf.attach(packed, lf.LoRA(r=4))
    nudge(handle)
    x = torch.randn(3, 48)
    y = packed(x)
    exact = {path: site.weight() + site.unfold(handle.delta(path)) for path, site in handle.sites.items()}
    delta = math.sqrt(sum(float(handle.delta(path).square().sum()) for path in handle.sites))
    with pytest.warns(lf.LorafitWarning, match=r"off by (\d+\.\d)% of its size") as told:
        handle.merge()
    lost = math.sqrt(sum(float((handle.sites[path].weight() - exact[path]).square().sum()) for path in exact))
    assert f"{lost / delta:.1%}" in str(told[0].message) and told[0].filename == __file__
    assert packed[0].weight.dtype == torch.int8 and torch.allclose(packed(x), y, atol=0.1)
    handle.unmerge()
    assert torch.equal(packed(x), y)
    assert all(torch.equal(packed.state_dict()[key], value) for key, value in base.items())
    with pytest.warns(lf.LorafitWarning):
        handle.merge_and_detach()
    assert type(packed[0]).__name__ == "Int8[Linear]" and torch.allclose(packed(x), y, atol=0.1)


def test_dequantised_first_it_merges_exactly():
    packed, _ = pair()
    handle = lf.attach(packed, lf.DoRA(lf.LoRA(r=4)))
    nudge(handle)
    x = torch.randn(3, 48)
    y = packed(x)
    assert lf.dequantise(packed) == ["0", "2", "4"] and lf.dequantise(packed) == []
    assert torch.allclose(packed(x), y, atol=1e-6)
    handle.merge_and_detach()
    assert type(packed[0]) is nn.Linear and torch.allclose(packed(x), y, atol=1e-5)


def test_merged_values_that_are_not_finite_are_refused():
    packed, _ = pair()
    handle = lf.attach(packed, lf.LoRA(r=4))
    with torch.no_grad():
        handle.parameters()[1].fill_(math.inf)
    with pytest.raises(lf.MergeError, match="not finite"):
        handle.merge()
    assert not handle.merged


def test_a_language_model_with_checkpointing():
    torch.manual_seed(0)
    model = llama()
    report = lf.quantise(model)
    assert len(report.layers) == 14 and model.lm_head.weight.dtype == torch.float32
    handle = lf.attach(model, lf.LoRA(r=4), seed=0)
    tokens = torch.randint(64, (2, 9))
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = [p.grad.clone() for p in handle.parameters()]
    handle.model.zero_grad()
    checkpoint(lambda each: model(input_ids=each, labels=each).loss, tokens, use_reentrant=False).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(handle.parameters(), before, strict=True))


# What is refused


@pytest.mark.parametrize(
    ("make", "targets", "match"),
    [
        (lambda: nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3)), ["0"], "not a linear layer"),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), ["out_proj"], "reads this layer's weight"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), ["1"], "targets matches no module"),
        (lambda: nn.Sequential(nn.GELU()), "all-linear", "no layer is left"),
    ],
)
def test_layers_that_cannot_be_are_refused(make, targets, match):
    with pytest.raises(lf.TargetError, match=match):
        lf.quantise(make(), targets)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 0), lambda: nn.Linear(0, 8)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_are_refused(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(lf.TargetError, match=r"where: +1(?s:.)*its weight is empty"):
        lf.quantise(model)
    assert not isinstance(model[0], Int8Layer)


def test_float8_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(lf.TargetError, match="float8_e4m3fn"):
        lf.quantise(model)


def test_shared_and_packed_weights_are_refused():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(lf.TargetError, match="also another layer's"):
        lf.quantise(model, ["lm_head"])
    packed, _ = pair()
    with pytest.raises(lf.TargetError, match="another form already"):
        lf.quantise(packed)


def test_a_model_with_adapters_is_refused():
    model = plain()
    lf.attach(model, lf.LoRA(r=2))
    with pytest.raises(lf.StateError, match="has adapters"):
        lf.quantise(model)


def test_merged_adapters_are_not_dequantised_under():
    packed, _ = pair()
    handle = lf.attach(packed, lf.LoRA(r=2))
    handle.merge()  # a change of zero: nothing is lost, and nothing said
    with pytest.raises(lf.StateError, match="merged"):
        lf.dequantise(packed)


def test_weights_that_are_not_finite_are_refused_before_any_changes():
    model = plain()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    with pytest.raises(lf.ConfigError, match="not finite"):
        lf.quantise(model)
    assert type(model[0]) is nn.Linear


def test_a_packed_module_cannot_be_trained_in_full():
    packed, _ = pair()
    with pytest.raises(lf.TargetError, match="quantised"):
        lf.attach(packed, lf.LoRA(r=2), ["0"], modules_to_save=["4"])


def test_exclude():
    model = plain()
    assert set(lf.quantise(model, exclude=["2"]).layers) == {"0", "4"} and type(model[2]) is Conv1D


# Loading


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    return tmp_path


def test_loading_shard_by_shard_is_loading_and_quantising(folder):
    expected = LlamaForCausalLM.from_pretrained(folder)
    reference = lf.quantise(expected)
    model, report = lf.load_quantised(llama, folder)
    assert report.layers == pytest.approx(reference.layers) and report.error == pytest.approx(reference.error)
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(model.eval()(tokens).logits, expected(tokens).logits)
    assert all(p.device.type == "cpu" for p in model.parameters())
    handle = lf.attach(model, lf.LoRA(r=4))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in handle.parameters())


def test_loading_what_was_packed(folder, tmp_path):
    model, _ = lf.load_quantised(llama, folder)
    path = tmp_path / "packed.safetensors"
    save_file(model.state_dict(), path)
    again, report = lf.load_quantised(llama, path)
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(again(tokens).logits, model(tokens).logits) and report.layers == {}
    assert "no layer packed" in str(report)


def test_loading_ties_weights_and_casts():
    original = llama(tie_word_embeddings=True)
    pairs = [(key, value) for key, value in original.state_dict().items() if key != "lm_head.weight"]
    model, _ = lf.load_quantised(lambda: llama(tie_word_embeddings=True), pairs, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32


def test_loading_conv1d_from_pairs_in_the_memory_of_one():
    original = plain()
    memory = torch.empty(4096)

    def pairs():
        for key, value in original.state_dict().items():
            yield key, memory[: value.numel()].view(value.shape).copy_(value)

    model, _ = lf.load_quantised(lambda: plain(seed=1), pairs())
    lf.quantise(original)
    x = torch.randn(3, 48)
    assert torch.equal(model(x), original(x))


def test_what_does_not_fit_is_said(folder, tmp_path):
    with pytest.raises(lf.CheckpointError, match="has a tensor that the model has not"):
        lf.load_quantised(plain, folder)
    state = dict(plain().state_dict())
    with pytest.raises(lf.CheckpointError, match=r"no 2\.weight"):
        lf.load_quantised(plain, [(key, value) for key, value in state.items() if key != "2.weight"])
    with pytest.raises(lf.CheckpointError, match="another shape"):
        lf.load_quantised(plain, {**state, "0.weight": torch.zeros(3, 3)}.items())
    with pytest.raises(lf.CheckpointError, match="not int8 rows"):
        wrong = {"0.weight": torch.zeros(64, 48, dtype=torch.int16), "0.weight_scale": torch.ones(64, 1)}
        lf.load_quantised(plain, {**state, **wrong}.items())
    with pytest.raises(lf.ConfigError, match="not finite"):
        lf.load_quantised(plain, {**state, "0.weight": torch.full((64, 48), math.inf)}.items())
    with pytest.raises(lf.CheckpointError, match="no checkpoint here"):
        lf.load_quantised(plain, tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "header", "type", "index", "short"])
def test_damaged_files_are_said(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_file(dict(plain().state_dict()), path)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + whole[8:])
    elif damage == "type":
        path.write_bytes(whole.replace(b'"F32"', b'"X32"', 1))
    elif damage == "short":
        path.write_bytes(b"\x01")
    else:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["model.safetensors"]}))
    with pytest.raises(lf.CheckpointError, match="download it again"):
        lf.load_quantised(plain, tmp_path)


# What was given is what is taken


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.c = nn.Linear(8, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("cast", [torch.float16, torch.float8_e4m3fn])
def test_a_scale_beside_a_floating_weight_is_refused(cast):
    model = plain()
    lf.quantise(model)
    state = {**model.state_dict()}
    state["0.weight"] = state["0.weight"].to(cast)
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"0\.weight: a weight of torch\.float.* multiplied by their scale"):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight, before)
    for order in (1, -1):
        with pytest.raises(lf.CheckpointError, match="a floating-point weight has a scale beside it"):
            lf.load_quantised(plain, list(state.items())[::order])
    without = {key: value for key, value in model.state_dict().items() if key != "0.weight_scale"}
    with pytest.raises(lf.CheckpointError, match=r"no 0\.weight_scale"):
        lf.load_quantised(plain, without.items())
    with pytest.raises(lf.CheckpointError, match=r"no 0\.weight"):
        lf.load_quantised(plain, [(key, value) for key, value in model.state_dict().items() if key != "0.weight"])


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_a_layer_under_two_names_is_loaded_once(form):
    original = Shared()
    state = {key: value.clone() for key, value in original.state_dict().items()}
    lf.quantise(original)
    if form == "packed":
        state = original.state_dict()
    x = torch.randn(2, 8)
    everything = list(state.items())
    by_name = sorted(everything, key=lambda row: row[0].partition(".")[2])
    alone = [(key, value) for key, value in everything if not key.startswith("a.")]
    for pairs in (everything, everything[::-1], by_name, alone):
        model, _ = lf.load_quantised(Shared, pairs)
        assert model.a is model.b and isinstance(model.a, Int8Layer) and torch.equal(model(x), original(x))
    for key in ("b.weight", "b.bias"):
        with pytest.raises(lf.CheckpointError, match="different numbers under different names"):
            lf.load_quantised(Shared, {**state, key: torch.zeros_like(state[key])}.items())
    with pytest.raises(lf.CheckpointError, match=r"more than once(?s:.)*twice"):
        lf.load_quantised(Shared, [*everything, everything[0]])


def test_assigned_conv1d_weights_are_contiguous():
    model = plain()
    lf.quantise(model)
    model.load_state_dict(plain(seed=1).state_dict(), assign=True)
    assert model[2].weight.is_contiguous() and model[2].weight_scale.is_contiguous()


def test_a_model_that_is_one_layer():
    original = nn.Linear(8, 4)
    state = {key: value.clone() for key, value in original.state_dict().items()}
    model, report = lf.load_quantised(lambda: nn.Linear(8, 4), state.items())
    assert list(report.layers) == [""] and isinstance(model, Int8Layer)


def test_dequantising_inside_disabled_of_a_merged_adapter_is_refused():
    packed, _ = pair()
    handle = lf.attach(packed, lf.LoRA(r=2), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lf.LorafitWarning)
        handle.merge()
    with handle.disabled(), pytest.raises(lf.StateError, match=r"inside disabled\(\)"):
        lf.dequantise(packed)
    handle.unmerge()
    assert lf.dequantise(packed) == ["0", "2", "4"]


def test_a_single_vector_and_its_gradients():
    model = nn.Sequential(nn.Linear(8, 4))
    lf.quantise(model)
    model(torch.randn(8)).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.ones(4))


def test_converting_in_inference_mode_leaves_training_possible():
    packed = plain()
    with torch.inference_mode():
        lf.quantise(packed)
    twin = copy.deepcopy(packed)
    with torch.inference_mode():
        lf.dequantise(twin)
    for model in (packed, twin):
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
        handle = lf.attach(model, lf.LoRA(r=2), seed=0)
        model(torch.randn(2, 48)).sum().backward()
        assert all(parameter.grad is not None for parameter in handle.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dequantised_in_the_type_the_model_works_in(dtype):
    model = plain().to(dtype)
    lf.quantise(model)
    x = torch.randn(2, 48, dtype=dtype)
    y = model(x)
    handle = lf.attach(model, lf.LoRA(r=2), seed=0)
    lf.dequantise(model)
    assert {model[at].weight.dtype for at in (0, 2, 4)} == {dtype}
    assert torch.allclose(model(x), y, rtol=1e-2 if dtype == torch.bfloat16 else 1e-12)
    handle.detach()
    lf.quantise(model)
    lf.dequantise(model, dtype=torch.float16)
    assert model[0].weight.dtype == torch.float16
    lf.quantise(model)
    with pytest.raises(lf.ConfigError, match="floating-point type"):
        lf.dequantise(model, dtype=torch.int8)


def test_double_precision_beyond_single_is_refused_before_any_changes():
    model = plain().double()
    model[4].weight.data[0, 0] = 1e39
    with pytest.raises(lf.ConfigError, match="beyond float32"):
        lf.quantise(model)
    assert not any(isinstance(module, Int8Layer) for module in model)


@pytest.mark.parametrize("copied", ["pickle", "save", "deepcopy"])
def test_a_packed_model_with_adapters_is_pickled(copied):
    packed, _ = pair()
    handle = lf.attach(packed, lf.LoRA(r=2), seed=0)
    nudge(handle)
    if copied == "pickle":
        again = pickle.loads(pickle.dumps(packed))
    elif copied == "deepcopy":
        again = copy.deepcopy(packed)
    else:
        stream = io.BytesIO()
        torch.save(packed, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
    x = torch.randn(2, 48)
    assert torch.equal(again(x), packed(x)) and [type(each) for each in again] == [type(each) for each in packed]


@pytest.mark.parametrize(
    "outside", ["../outside.safetensors", "/outside.safetensors", "..\\outside.safetensors", "absolute"]
)
def test_an_index_stays_in_its_folder(tmp_path, outside):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(dict(plain().state_dict()), tmp_path / "outside.safetensors")
    name = str(tmp_path / "outside.safetensors") if outside == "absolute" else outside
    index = {"weight_map": dict.fromkeys(plain().state_dict(), name)}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(lf.CheckpointError, match="outside of its folder"):
        lf.load_quantised(plain, inner)


def test_the_index_says_which_file_has_a_tensor(tmp_path):
    state = {key: value.clone() for key, value in plain().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file({"0.weight": torch.ones(64, 48)}, tmp_path / "b.safetensors")
    for last in ("a", "b"):
        index = {"weight_map": {**dict.fromkeys(state, "a.safetensors"), "4.weight": f"{last}.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        if last == "a":
            model, _ = lf.load_quantised(plain, tmp_path)
        else:  # the other file is read, and does not have what it should
            with pytest.raises(lf.CheckpointError, match=r"no 4\.weight"):
                lf.load_quantised(plain, tmp_path)
    index = {"weight_map": {"extra": "b.safetensors", **dict.fromkeys(state, "a.safetensors")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = lf.load_quantised(plain, tmp_path)
    original = plain()
    lf.quantise(original)
    x = torch.randn(2, 48)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize(
    "header",
    [
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, True], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0.0, 16.0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-500, -484]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [56, 72]},
        {"dtype": "F32", "shape": [10**9, 10**7], "data_offsets": [0, 4 * 10**16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16, 3]},
        "[" * 100_000,
    ],
    ids=lambda header: str(header)[:60],
)
def test_damaged_headers_are_said(tmp_path, header):
    text = header if isinstance(header, str) else json.dumps({"weight": header})
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(64))
    with pytest.raises(lf.CheckpointError, match="no safetensors file that can be read"):
        lf.load_quantised(lambda: nn.Linear(2, 2, bias=False), path)
