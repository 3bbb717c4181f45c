"""Tiny models of transformers: adapters go both ways between peft and this library, with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lorafit as lf

MODELS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_big_code": ["c_attn", "c_fc"],
    "bert": ["query", "value", "word_embeddings"],
    "llama_classifier": ["q_proj", "up_proj"],
}
TASKS = {"bert": "SEQ_CLS", "llama_classifier": "SEQ_CLS"}
HEADS = {"bert": ["classifier"], "llama_classifier": ["score"]}


@pytest.fixture(params=MODELS)
def case(request, tiny):
    name = request.param
    return getattr(tiny, name), MODELS[name], TASKS.get(name, "CAUSAL_LM"), HEADS.get(name, [])


def test_model_of_peft_is_read(oracle, tiny, case) -> None:
    build, targets, task, heads = case
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task, lora_dropout=0.1)
    handle = oracle.check_read(build, config, tiny.tokens())
    assert list(handle.saved) == heads


def test_model_of_ours_is_read_by_peft(oracle, tiny, case) -> None:
    build, targets, task, heads = case
    theirs = oracle.check_written(
        build, lf.LoRA(r=4, alpha=6), tiny.tokens(), targets=targets, modules_to_save=heads, task_type=task
    )
    assert theirs.peft_config["default"].task_type == task


def test_all_linear_chooses_what_peft_chooses(oracle, tiny, case) -> None:
    build, _, task, heads = case
    config = LoraConfig(r=2, target_modules="all-linear", task_type=task)
    handle = oracle.check_read(build, config, tiny.tokens())
    ours = lf.attach(build(), lf.LoRA(r=2), "all-linear", modules_to_save=heads)
    assert list(ours.sites) == list(handle.sites)


def test_all_linear_of_ours_is_read_by_peft(oracle, tiny, case) -> None:
    build, _, task, heads = case
    oracle.check_written(build, lf.LoRA(r=2), tiny.tokens(), modules_to_save=heads, task_type=task)


def test_loading_twice_in_peft_lengthens_modules_to_save_and_is_read(oracle, tiny) -> None:
    # peft appends "classifier" and "score" each time it meets the config.
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    _, folder = oracle.written_by_peft(tiny.bert, config)
    theirs = PeftModel.from_pretrained(tiny.bert(), folder)
    theirs.save_pretrained(oracle.folder / "twice")
    written = json.loads((oracle.folder / "twice" / "adapter_config.json").read_text())
    assert len(written["modules_to_save"]) > 2
    handle = lf.load(tiny.bert(), oracle.folder / "twice")
    expected = oracle.run(theirs, tiny.tokens())
    torch.testing.assert_close(oracle.run(handle.model, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_missing_from_a_classifier_is_an_error(oracle, tiny, edit_tensors) -> None:
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    _, folder = oracle.written_by_peft(tiny.bert, config)
    edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "classifier" in key])
    with pytest.raises(lf.CheckpointError, match=r"modules_to_save[\s\S]*'classifier'"):
        lf.load(tiny.bert(), folder)


def test_a_task_type_whose_head_is_not_trained_is_left_out_aloud(oracle, tiny) -> None:
    # With the task type in the config peft would look for the head's tensors and fail with a KeyError.
    handle = lf.attach(tiny.bert(), lf.LoRA(r=2), ["query"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    with pytest.warns(lf.LorafitWarning, match=r"task_type is written as null[\s\S]*classifier"):
        folder = handle.save(oracle.folder / "ours", task_type="SEQ_CLS")
    theirs = PeftModel.from_pretrained(tiny.bert(), folder)
    expected = oracle.run(handle.model, tiny.tokens())
    torch.testing.assert_close(oracle.run(theirs, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)


# Embeddings


EMBEDDINGS = {
    "untied": ({}, ["embed_tokens", "q_proj"]),
    "untied with head": ({}, ["embed_tokens", "lm_head"]),
    "tied": ({"tie_word_embeddings": True}, ["embed_tokens", "q_proj"]),
    "tied, head only": ({"tie_word_embeddings": True}, ["lm_head", "q_proj"]),
    "tied, both": ({"tie_word_embeddings": True}, ["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("which", EMBEDDINGS)
@pytest.mark.parametrize("save", ["auto", True, False])
def test_embeddings_that_peft_saves_along_are_read(oracle, tiny, which, save) -> None:
    settings, targets = EMBEDDINGS[which]
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    oracle.check_read(
        lambda: tiny.llama(**settings), config, tiny.tokens(), merge=not settings, save_embedding_layers=save
    )
    stored = load_file(oracle.folder / "peft" / "adapter_model.safetensors")
    along = [key for key in stored if key.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight"))]
    assert bool(along) == (save is not False)


@pytest.mark.parametrize("which", EMBEDDINGS)
def test_adapted_embeddings_of_ours_are_read_by_peft(oracle, tiny, which) -> None:
    settings, targets = EMBEDDINGS[which]
    oracle.check_written(lambda: tiny.llama(**settings), lf.LoRA(r=2), tiny.tokens(), targets=targets)


def test_a_base_embedding_in_the_file_that_is_not_the_models_is_an_error(oracle, tiny) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    _, folder = oracle.written_by_peft(tiny.llama, config)
    model = tiny.llama(initializer_range=0.3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lf.CheckpointError, match=r"base weight that differs[\s\S]*embed_tokens"):
        lf.load(model, folder)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized")
def test_a_resized_embedding_that_peft_saves_along_is_compared(oracle, tiny) -> None:
    tiny.llama().save_pretrained(oracle.folder / "base")

    def resized() -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(oracle.folder / "base")
        torch.manual_seed(7)
        model.resize_token_embeddings(tiny.vocabulary + 3)
        return model.eval()

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    oracle.check_read(resized, config, tiny.tokens(), resave=False)
    stored = load_file(oracle.folder / "peft" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.weight" in stored
    with pytest.raises(lf.CheckpointError, match=r"resize this one first"):
        lf.load(tiny.llama(), oracle.folder / "peft")


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_and_a_head_saved_in_full(oracle, tiny, tied) -> None:
    build = lambda: tiny.llama(tie_word_embeddings=tied)  # noqa: E731
    settings = {"modules_to_save": ["embed_tokens", "lm_head"]}
    oracle.check_read(
        build, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings), tiny.tokens(), merge=False
    )
    oracle.check_written(build, lf.LoRA(r=2), tiny.tokens(), targets=["q_proj"], **settings)


# Precision


def test_an_adapter_over_a_bf16_base(oracle, tiny) -> None:
    # peft adds its fp32 product to the bf16 output and rounds once, we compute in bf16: the same adapter and the same
    # merged weights bit for bit, and outputs that are no further from those in fp32.
    build = lambda: tiny.llama().to(torch.bfloat16)  # noqa: E731
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs, folder = oracle.written_by_peft(build, config)
    handle = lf.load(build(), folder)
    assert {parameter.dtype for path in handle.sites for parameter in handle.adapter(path).parameters()} == {
        torch.float32
    }
    expected = oracle.run(theirs, tiny.tokens())
    found = oracle.run(handle.model, tiny.tokens())
    exact = oracle.run(lf.load(build().float(), folder).model, tiny.tokens())
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (exact - oracle.run(build(), tiny.tokens())).abs().max() > 1
    assert (found - exact).pow(2).mean() < 1.2 * (expected - exact).pow(2).mean() < 1e-3
    oracle.same_tensors(handle.save(oracle.folder / "again"), folder)

    for path in handle.sites:
        layer = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(handle.delta(path), layer.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    again = PeftModel.from_pretrained(build(), oracle.folder / "again")
    assert torch.equal(oracle.run(again, tiny.tokens()), expected)
    handle.merge()
    merged = theirs.merge_and_unload().state_dict()
    for key, value in merged.items():
        assert torch.equal(handle.model.state_dict()[key], value), key


def test_an_adapter_in_bf16_of_peft_is_read(oracle, tiny) -> None:
    build = lambda: tiny.llama().to(torch.bfloat16)  # noqa: E731
    theirs = oracle.peft_adapter(build(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.to(torch.bfloat16)
    theirs.save_pretrained(oracle.folder / "peft")
    stored = load_file(oracle.folder / "peft" / "adapter_model.safetensors")
    handle = lf.load(build(), oracle.folder / "peft")
    path = next(iter(handle.sites))
    assert torch.equal(handle.adapter(path).A, stored[f"base_model.model.{path}.lora_A.weight"].float())


# transformers' own integration


def test_load_adapter_of_transformers_reads_ours(oracle, tiny, case) -> None:
    build, targets, _, heads = case
    handle = lf.attach(build(), lf.LoRA(r=4, alpha=6), targets, modules_to_save=heads, seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    folder = handle.save(oracle.folder / "ours")
    theirs = build()
    theirs.load_adapter(str(folder))
    expected = oracle.run(handle.model, tiny.tokens())
    torch.testing.assert_close(oracle.run(theirs, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_saved_by_transformers_is_read(oracle, tiny, case) -> None:
    build, targets, _, heads = case
    theirs = build()
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, modules_to_save=heads or None))
    oracle.randomise(
        {key: value for key, value in theirs.state_dict().items() if "lora_" in key or "modules_to_save" in key}
    )
    theirs.save_pretrained(oracle.folder / "theirs")
    expected = oracle.run(theirs, tiny.tokens())
    oracle.differ(expected, oracle.run(build(), tiny.tokens()))
    handle = lf.load(build(), oracle.folder / "theirs")
    torch.testing.assert_close(oracle.run(handle.model, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)


def test_auto_model_of_peft_finds_base_and_adapter(oracle, tiny) -> None:
    base = oracle.folder / "base"
    tiny.llama().save_pretrained(base)
    handle = lf.attach(LlamaForCausalLM.from_pretrained(base), lf.LoRA(r=4), ["q_proj"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    folder = handle.save(oracle.folder / "ours", base_model=str(base), task_type="CAUSAL_LM")
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder)
    expected = oracle.run(handle.model, tiny.tokens())
    torch.testing.assert_close(oracle.run(theirs, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(oracle.run(theirs, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)


def test_generation_is_the_same(oracle, tiny) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs, folder = oracle.written_by_peft(tiny.llama, config)
    handle = lf.load(tiny.llama(), folder)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(handle.model.generate(**tiny.tokens(), **options), theirs.generate(**tiny.tokens(), **options))
