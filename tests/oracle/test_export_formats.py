"""Exports read by the programs that they are for, or by the formulas of those that are not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorafit as lf
from lorafit import resizing, store
from lorafit.exporting import diffusers, gguf_adapter, gguf_model, vllm
from lorafit.exporting.flat import flat
from lorafit.exporting.gguf_names import Names

CARD = "a card\n"


def shaken(model: nn.Module, place: Path, method: Any, **options: Any) -> dict[str, Tensor]:
    """Saves an adapter that changes a model, which stays as it was; the change of each layer."""
    handle = lf.attach(model, method, **options)
    torch.manual_seed(1)
    for parameter in handle.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    handle.save(place)
    found = {path: handle.delta(path).clone() for path in handle.sites}
    handle.detach()
    return found


def by_peft(model: nn.Module, place: Path) -> dict[str, Tensor]:
    loaded = PeftModel.from_pretrained(model, place)
    modules = dict(loaded.base_model.model.named_modules())
    layers = {path: each for path, each in modules.items() if isinstance(each, LoraLayer)}
    found = {path: each.get_delta_weight("default").detach().clone() for path, each in layers.items()}
    loaded.unload()
    return found


# resize


@pytest.mark.parametrize("way", ["rank", "energy"])
def test_peft_loads_a_resized_adapter_as_the_truncated_change(tiny: Any, tmp_path: Path, way: str) -> None:
    model = tiny.llama()
    options = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 1}, "targets": "all-linear"}
    before = shaken(model, tmp_path / "adapter", lf.LoRA(r=4, alpha=5), **options)
    source = resizing.opened(tmp_path / "adapter")
    size = resizing.by_rank(source, 2) if way == "rank" else resizing.by_energy(source, 0.8)
    assert way == "rank" or len(set(size.ranks.values())) > 1
    small = resizing.resize(source, size, tmp_path / "small")
    after = by_peft(model, small)
    assert set(after) == set(before)
    for path, delta in before.items():
        u, s, vh = torch.linalg.svd(delta.double())
        r = size.ranks[path]
        torch.testing.assert_close(after[path].double(), (u[:, :r] * s[:r]) @ vh[:r], rtol=0, atol=1e-6)


def test_peft_adapts_the_layers_that_are_left_and_no_other(tiny: Any, tmp_path: Path) -> None:
    model = tiny.llama()
    before = shaken(model, tmp_path / "adapter", lf.LoRA(r=4), targets=["q_proj", "v_proj"])
    source = resizing.opened(tmp_path / "adapter")
    scores = {path: float(place) for place, path in enumerate(source.layers)}
    small = resizing.resize(source, resizing.by_importance(source, scores, 0.5), tmp_path / "small")
    after = by_peft(model, small)
    assert set(after) == set(list(source.layers)[len(before) // 2 :])
    assert all(torch.equal(after[path], before[path]) for path in after)


def test_a_resized_dora_computes_the_same_in_peft(tiny: Any, tmp_path: Path) -> None:
    model = tiny.llama()
    shaken(model, tmp_path / "adapter", lf.DoRA(lf.LoRA(r=4)), targets=["q_proj", "down_proj"])
    source = resizing.opened(tmp_path / "adapter")
    small = resizing.resize(source, resizing.by_rank(source, 2), tmp_path / "small")
    tokens = torch.arange(12)[None]
    handle = lf.load(model, small)
    with torch.no_grad():
        ours = model(tokens).logits.clone()
    handle.detach()
    loaded = PeftModel.from_pretrained(model, small)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, ours, rtol=0, atol=1e-5)


# vLLM


def test_vllm_gets_one_rank_and_a_scale_of_one(tiny: Any, tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=False)
    options = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up_proj": 1}}
    targets = ["q_proj", "up_proj", "embed_tokens", "lm_head"]
    before = shaken(model, tmp_path / "adapter", lf.LoRA(r=4, alpha=5, rslora=True), targets=targets, **options)
    with flat(tmp_path / "adapter") as own:
        assert vllm.write(own, tmp_path / "out", dtype="float32", card=CARD) == 16
        assert vllm.check(own, tmp_path / "out", "float32").good
        assert vllm.check_by_peft(own, tmp_path / "out", "float32").good
    stored = store.read(tmp_path / "out")
    config = stored.config
    assert config["r"] == config["lora_alpha"] == 16 and not config["use_rslora"]
    assert "rank_pattern" not in config and "alpha_pattern" not in config
    assert {tensor.shape[0] for key, tensor in stored.tensors.items() if "_A" in key} == {16}
    after = by_peft(model, tmp_path / "out")
    for path, delta in before.items():
        torch.testing.assert_close(after[path], delta, rtol=0, atol=1e-6)


def test_vllm_refuses_what_it_cannot_take_by_its_name(tiny: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    shaken(model, tmp_path / "conv", lf.LoRA(r=2), targets=["0", "1"])
    with flat(tmp_path / "conv") as own, pytest.raises(lf.CheckpointError, match="convolutions") as raised:
        vllm.write(own, tmp_path / "out", dtype="float32", card=CARD)
    assert raised.value.found == "0"
    with pytest.raises(lf.CheckpointError, match="higher than vLLM allows"):
        vllm.allowed_rank(513)
    shaken(tiny.llama(), tmp_path / "copies", lf.LoRA(r=2), targets=["q_proj"], modules_to_save=["lm_head"])
    with flat(tmp_path / "copies") as own, pytest.raises(lf.CheckpointError, match="modules_to_save"):
        vllm.write(own, tmp_path / "out", dtype="float32", card=CARD)


def test_base_weights_that_peft_puts_beside_an_adapter_are_no_modules_saved_in_full(tiny: Any, tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=False)
    targets = ["q_proj", "embed_tokens", "lm_head"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("base_layer" in key for key in store.read(tmp_path / "adapter").tensors)
    before = {path: each.clone() for path, each in by_peft(adapted.unload(), tmp_path / "adapter").items()}
    with flat(tmp_path / "adapter") as own:
        vllm.write(own, tmp_path / "out", dtype="float32", card=CARD)
        gguf_adapter.write(own, tmp_path, config=model.config, dtype="float32", name="mine")
        assert vllm.check(own, tmp_path / "out", "float32").good
        assert gguf_adapter.check(own, tmp_path, config=model.config, dtype="float32").good
    assert not any("base_layer" in key for key in store.read(tmp_path / "out").tensors)
    after = by_peft(model, tmp_path / "out")
    assert set(after) == set(before)
    for path, delta in before.items():
        torch.testing.assert_close(after[path], delta, rtol=0, atol=1e-5)


# GGUF


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of a projection as llama.cpp's converter puts them, head by head: x₀ y₀ x₁ y₁ …"""
    heads_of = rows.reshape(heads, 2, -1, rows.shape[1])
    order = [
        heads_of[head, half, pair] for head in range(heads) for pair in range(heads_of.shape[2]) for half in (0, 1)
    ]
    return torch.stack(order)


def test_a_gguf_adapter_is_what_llama_cpp_adds_to_the_tensors_of_its_base(tiny: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = tiny.llama(tie_word_embeddings=False)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
    before = shaken(model, tmp_path / "adapter", lf.LoRA(r=4, alpha=5), targets=targets, rank_pattern={"v_proj": 2})
    with flat(tmp_path / "adapter") as own:
        gguf_adapter.write(own, tmp_path, config=model.config, dtype="float32", name="mine")
        assert gguf_adapter.check(own, tmp_path, config=model.config, dtype="float32").good
    reader = GGUFReader(tmp_path / gguf_adapter.FILE)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    config = model.config
    wanted = {
        "blk.1.attn_q.weight": interleaved(before["model.layers.1.self_attn.q_proj"], config.num_attention_heads),
        "blk.0.attn_k.weight": interleaved(before["model.layers.0.self_attn.k_proj"], config.num_key_value_heads),
        "blk.1.attn_v.weight": before["model.layers.1.self_attn.v_proj"],
        "blk.0.ffn_down.weight": before["model.layers.0.mlp.down_proj"],
        "output.weight": before["lm_head"],
    }
    for name, delta in wanted.items():
        down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"] / up.shape[1]  # llama-adapter.h: alpha / rank, the rank being B's
        torch.testing.assert_close(scale * (up @ down), delta, rtol=0, atol=1e-6)
    table, up = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    assert table.shape[0] == config.vocab_size and up.shape[0] == config.hidden_size
    scale = fields["adapter.lora.alpha"] / up.shape[1]
    torch.testing.assert_close(scale * (table @ up.mT), before["model.embed_tokens"], rtol=0, atol=1e-6)


def test_a_gguf_adapter_has_no_place_for_a_tied_output(tiny: Any, tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    shaken(model, tmp_path / "table", lf.LoRA(r=4), targets=["q_proj", "embed_tokens"])
    with flat(tmp_path / "table") as own, pytest.raises(lf.CheckpointError, match="output is tied") as table:
        gguf_adapter.write(own, tmp_path, config=model.config, dtype="float32", name="mine")
    assert table.value.found == "model.embed_tokens" and not (tmp_path / gguf_adapter.FILE).exists()
    names = Names.of(tiny.llama(tie_word_embeddings=True).config, whole=False)
    with pytest.raises(lf.CheckpointError, match="no place") as raised:
        names.tensor("lm_head.weight")
    assert "tied" in str(raised.value.found)
    with pytest.raises(lf.CheckpointError, match="not written as GGUF"):
        Names.of(tiny.bert().config, whole=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_transformers_reads_a_merged_gguf_as_the_model(tiny: Any, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    from lorafit.exporting.gguf_tokenizer import Vocabulary

    model = tiny.llama(tie_word_embeddings=False)
    tokens = [f"t{place}" for place in range(model.config.vocab_size)]
    fields = {"tokenizer.ggml.model": ("gpt2", None), "tokenizer.ggml.tokens": (tokens, "STRING")}
    words = Vocabulary(fields, "")
    tensors = dict(model.state_dict())
    other = gguf_model.write(tensors, tmp_path, config=model.config, vocabulary=words, dtype=dtype, name="mine")
    assert not gguf_model.check(tensors, tmp_path, config=model.config, dtype=dtype).difference > 0.01
    assert bool(other) == (dtype == "q8_0")  # the tiny model's rows of 48 are no whole blocks
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_model.FILE, dtype=torch.float32)
    tokens_in = torch.arange(20)[None]
    with torch.no_grad():
        wanted, found = model(tokens_in).logits, again(tokens_in).logits
    share = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 5e-2}[dtype]
    assert float((wanted - found).abs().max()) <= share * float(wanted.abs().max())


def test_the_tokenizer_that_is_written_is_the_one_that_the_embedded_gguf_has() -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from lorafit.exporting.gguf_tokenizer import vocabulary
    from lorafit.training.embedded import embedded_model_path, find_source

    source = find_source()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path(lambda _: None))
    own = {key: each.contents() for key, each in GGUFReader(source).fields.items() if key.startswith("tokenizer.")}
    made = {key: value for key, (value, _) in vocabulary(tokenizer, len(tokenizer), None).fields.items()}
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert made[f"tokenizer.ggml.{key}"] == own[f"tokenizer.ggml.{key}"], key
    copied = vocabulary(tokenizer, len(tokenizer), source)
    assert "copied" in copied.said and set(copied.fields) == set(own)


def test_stretched_rotary_embeddings_are_refused(tiny: Any) -> None:
    config = tiny.llama().config
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(lf.CheckpointError, match="rotary"):
        gguf_model.check_config(config)


# diffusers


class Attention(nn.Module):
    """The layers of a UNet by their names in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8)})])})
        self.up_blocks = nn.ModuleList([nn.Conv2d(4, 4, 3)])


def test_diffusers_keys_and_settings(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, paths = Attention(), ["mid_block.attentions.0.to_q", "up_blocks.0"]
    shaken(model, tmp_path / "adapter", lf.LoRA(r=4, alpha=3), targets=paths, rank_pattern={"up_blocks.0": 2})
    plain = diffusers.opened(tmp_path / "adapter", tmp_path)
    assert diffusers.component_of(list(plain.pairs)) == "unet"
    diffusers.write(plain, tmp_path, component="unet", dtype="float32")
    assert diffusers.check(plain, tmp_path, component="unet", dtype="float32").good
    with safe_open(tmp_path / diffusers.WEIGHTS, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()[diffusers.METADATA])
    assert shapes == {
        "unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8),
        "unet.mid_block.attentions.0.to_q.lora_B.weight": (8, 4),
        "unet.up_blocks.0.lora_A.weight": (2, 4, 3, 3),
        "unet.up_blocks.0.lora_B.weight": (4, 2, 1, 1),
    }
    assert settings["unet.r"] == settings["unet.lora_alpha"]
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"]
    with pytest.raises(lf.ConfigError, match="cannot be told"):
        diffusers.component_of(["model.layers.0.self_attn.q_proj"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [lf.LoRA(r=4, alpha=3), lf.DoRA(lf.LoRA(r=4, alpha=3))], ids=["lora", "dora"])
def test_diffusers_loads_it_into_a_unet_and_computes_the_same(tmp_path: Path, method: Any) -> None:
    library = pytest.importorskip("diffusers", reason="diffusers is not installed: its keys are tested above")
    torch.manual_seed(0)
    unet = library.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    shaken(unet, tmp_path / "adapter", method, targets=["to_q", "to_v", "proj_in"], rank_pattern={"to_v": 2})
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8))
    with torch.no_grad():
        plain = unet(*inputs).sample.clone()
        handle = lf.load(unet, tmp_path / "adapter")
        wanted = unet(*inputs).sample.clone()
    handle.detach()
    read = diffusers.opened(tmp_path / "adapter", tmp_path)
    diffusers.write(read, tmp_path, component="unet", dtype="float32")
    unet.load_lora_adapter(str(tmp_path), weight_name=diffusers.WEIGHTS, prefix="unet")
    with torch.no_grad():
        found = unet(*inputs).sample
    assert float((wanted - plain).abs().max()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
