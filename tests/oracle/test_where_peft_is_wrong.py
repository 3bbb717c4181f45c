"""Where peft 0.21 is wrong or silent and this library is right or speaks: each test shows both."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafit as lf

IMAGES = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(3))
CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["0"])


def _conv(**settings) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, **settings))


BY_NAME = {
    "dilation": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 2, "padding_mode": "circular", "stride": 2},
    "replicate": {"padding": "same", "padding_mode": "replicate"},
}


@pytest.mark.parametrize("which", BY_NAME)
def test_convolution_whose_setting_peft_drops(oracle, tiny, which) -> None:
    build = lambda: tiny.seeded(lambda: _conv(**BY_NAME[which]))  # noqa: E731
    theirs, folder = oracle.written_by_peft(build, CONFIG)
    unmerged = oracle.run(theirs, IMAGES)
    merged = oracle.run(theirs.merge_and_unload(), IMAGES)
    assert (unmerged - merged).abs().max() > 0.1  # peft: forward is not what its own merged weight computes

    handle = lf.load(build(), folder)
    torch.testing.assert_close(oracle.run(handle.model, IMAGES), merged, atol=1e-5, rtol=1e-5)
    handle.merge()
    torch.testing.assert_close(oracle.run(handle.model, IMAGES), merged, atol=1e-5, rtol=1e-5)


def test_dilated_convolution_with_padding_in_numbers(oracle, tiny) -> None:
    # Without the dilation peft's low-rank path has another size than the layer.
    build = lambda: tiny.seeded(lambda: _conv(dilation=2, padding=1))  # noqa: E731
    theirs, folder = oracle.written_by_peft(build, CONFIG)
    with pytest.raises(RuntimeError, match="size of tensor"):
        oracle.run(theirs, IMAGES)
    merged = oracle.run(theirs.merge_and_unload(), IMAGES)
    handle = lf.load(build(), folder)
    torch.testing.assert_close(oracle.run(handle.model, IMAGES), merged, atol=1e-5, rtol=1e-5)


def test_training_a_dilated_convolution_reaches_the_merged_function(oracle, tiny) -> None:
    # The dropped setting is in the gradients too: what peft trained is not what it merges.
    build = lambda: tiny.seeded(lambda: _conv(dilation=2, padding="same"))  # noqa: E731
    goal = torch.randn(2, 6, 8, 9, generator=torch.Generator().manual_seed(8)) * 0.1 + oracle.run(build(), IMAGES)

    def train(model: nn.Module, parameters: list[nn.Parameter]) -> float:
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0)
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.mse_loss(model(IMAGES), goal)
            loss.backward()
            optimizer.step()
        return F.mse_loss(oracle.run(model, IMAGES), goal).item()

    torch.manual_seed(0)
    theirs = get_peft_model(build(), CONFIG)
    reached = train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert F.mse_loss(oracle.run(theirs.merge_and_unload(), IMAGES), goal).item() > 1.2 * reached
    handle = lf.attach(build(), lf.LoRA(r=4, alpha=6), ["0"], seed=0)
    reached = train(handle.model, handle.parameters())
    handle.merge()
    assert F.mse_loss(oracle.run(handle.model, IMAGES), goal).item() == pytest.approx(reached, rel=1e-4)


def test_merging_a_grouped_convolution(oracle, tiny) -> None:
    build = lambda: tiny.seeded(lambda: _conv(groups=2, padding=1))  # noqa: E731
    handle = lf.attach(build(), lf.LoRA(r=4, alpha=6), ["0"], seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    expected = oracle.run(handle.model, IMAGES)
    theirs = PeftModel.from_pretrained(build(), handle.save(oracle.folder / "ours"))
    torch.testing.assert_close(oracle.run(theirs, IMAGES), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        theirs.merge_and_unload()
    handle.merge()
    torch.testing.assert_close(oracle.run(handle.model, IMAGES), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [(1, 1, 3), (1, 1, 1)], ids=str)
def test_merging_a_conv3d_with_a_flat_kernel(oracle, tiny, kernel) -> None:
    # peft takes every kernel that starts with 1 × 1 for that of a 1 × 1 Conv2d.
    x = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    build = lambda: tiny.seeded(lambda: nn.Sequential(nn.Conv3d(4, 6, kernel)))  # noqa: E731
    theirs, folder = oracle.written_by_peft(build, CONFIG)
    expected = oracle.run(theirs, x)
    with pytest.raises(RuntimeError):
        theirs.merge_and_unload()
    handle = lf.load(build(), folder)
    handle.merge()
    torch.testing.assert_close(oracle.run(handle.model, x), expected, atol=1e-5, rtol=1e-5)


# Files


def _linear(tiny) -> nn.Module:
    return tiny.seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
BOTH = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])


def test_an_unexpected_key(oracle, tiny, edit_tensors) -> None:
    _, folder = oracle.written_by_peft(lambda: _linear(tiny), BOTH)

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.1.lora_A.weight"] = torch.ones(2, 8)
        tensors["base_model.model.2.lora_C.weight"] = torch.ones(2, 8)

    edit_tensors(folder, rename)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(_linear(tiny), folder)  # peft: no word
    with pytest.raises(lf.CheckpointError, match=r"1\.lora_A\.weight|2\.lora_C\.weight"):
        lf.load(_linear(tiny), folder)


def test_missing_keys(oracle, tiny, edit_tensors) -> None:
    # peft computes something else and goes on: with a warning on the first adapter, without a word on a further one.
    theirs, folder = oracle.written_by_peft(lambda: _linear(tiny), BOTH)
    expected = oracle.run(theirs, X)
    edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".2.lora_" in key])
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        incomplete = PeftModel.from_pretrained(_linear(tiny), folder)
    assert (oracle.run(incomplete, X) - expected).abs().max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        incomplete.load_adapter(folder, "second")
    with pytest.raises(lf.CheckpointError, match=r"missing key[\s\S]*2\.lora_A\.weight"):
        lf.load(_linear(tiny), folder)


def test_a_partly_wrong_target_list(oracle, tiny) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_porj"]))  # peft: no word
    assert not any("v_proj" in key and "lora_" in key for key in theirs.state_dict())
    with pytest.raises(lf.TargetError, match=r"'v_porj'[\s\S]*v_proj"):
        lf.attach(tiny.llama(), lf.LoRA(r=2), ["q_proj", "v_porj"])
    theirs.save_pretrained(oracle.folder / "peft")
    with pytest.raises(lf.CheckpointError, match=r"target_modules[\s\S]*'v_porj'[\s\S]*v_proj"):
        lf.load(tiny.llama(), oracle.folder / "peft")


def test_alpha_pattern_whose_order_counts(oracle, tiny) -> None:
    # peft sorts the keys in the file, and reads back another scale than it saved.
    pattern = {"v_proj": 2, "layers.0.self_attn.v_proj": 16}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], alpha_pattern=pattern)
    theirs, folder = oracle.written_by_peft(tiny.llama, config)
    expected = oracle.run(theirs, tiny.tokens())
    again = oracle.run(PeftModel.from_pretrained(tiny.llama(), folder), tiny.tokens())
    assert (again - expected).abs().max() > 1e-2

    handle = lf.attach(tiny.llama(), lf.LoRA(r=2, alpha=4), ["q_proj", "v_proj"], alpha_pattern=pattern, seed=0)
    oracle.randomise(dict(handle.named_parameters()))
    expected = oracle.run(handle.model, tiny.tokens())
    folder = handle.save(oracle.folder / "ours")
    for model in (lf.load(tiny.llama(), folder).model, PeftModel.from_pretrained(tiny.llama(), folder)):
        torch.testing.assert_close(oracle.run(model, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)


# Merging


def test_a_module_that_the_model_holds_twice(oracle, tiny) -> None:
    # peft replaces it under the first path, so that the two uses compute different things; here both are adapted.
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    build = lambda: tiny.seeded(Twice)  # noqa: E731
    theirs, folder = oracle.written_by_peft(build, LoraConfig(r=2, target_modules=["first"]))
    assert type(theirs.base_model.model.second) is nn.Linear
    with pytest.warns(lf.LorafitWarning, match="first is the same module as second"):
        handle = lf.load(build(), folder)
    delta = handle.delta("first")
    w, bias = build().first.weight + delta, build().first.bias
    expected = F.linear(torch.tanh(F.linear(X, w, bias)), w, bias)
    torch.testing.assert_close(oracle.run(handle.model, X), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(lf.LorafitWarning, match="first is the same module as second"):
        folder = handle.save(oracle.folder / "ours")
    assert torch.equal(oracle.run(lf.load(build(), folder).model, X), oracle.run(handle.model, X))


def test_merging_a_tied_weight(oracle, tiny) -> None:
    build = lambda: tiny.llama(tie_word_embeddings=True)  # noqa: E731
    theirs, folder = oracle.written_by_peft(
        build, LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    )
    expected = oracle.run(theirs, tiny.tokens())
    head = build().lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):  # peft warns, and goes on
        merged = theirs.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, head)  # the output layer changed too
    assert (oracle.run(merged, tiny.tokens()) - expected).abs().max() > 0.1

    handle = lf.load(build(), folder)
    before = {key: value.clone() for key, value in handle.model.state_dict().items()}
    with pytest.raises(lf.MergeError, match=r"lm_head"):
        handle.merge()
    assert all(torch.equal(value, before[key]) for key, value in handle.model.state_dict().items())
    handle.merge(untie=True)
    assert torch.equal(handle.model.lm_head.weight, head)
    torch.testing.assert_close(oracle.run(handle.model, tiny.tokens()), expected, atol=1e-5, rtol=1e-5)
    handle.unmerge()
    assert handle.model.lm_head.weight is handle.model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fifty_cycles_of_merging(oracle, tiny, dtype) -> None:
    build = lambda: tiny.llama().to(dtype)  # noqa: E731
    theirs, folder = oracle.written_by_peft(build, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    before = {key: value.clone() for key, value in build().state_dict().items()}
    key = "model.layers.0.self_attn.q_proj.weight"
    weight = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    handle = lf.load(build(), folder)
    expected = oracle.run(handle.model, tiny.tokens())
    for _ in range(50):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        handle.merge()
        handle.unmerge()
    assert not torch.equal(weight, before[key])  # peft: the base has drifted
    if dtype == torch.bfloat16:
        assert (weight - before[key]).abs().max() > 1e-2
    after = {key: value for key, value in handle.model.state_dict().items() if ".adapters." not in key}
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert torch.equal(oracle.run(handle.model, tiny.tokens()), expected)


def test_values_that_are_not_finite(oracle, tiny, edit_tensors) -> None:
    _, folder = oracle.written_by_peft(lambda: _linear(tiny), BOTH)
    edit_tensors(folder, lambda tensors: [value.fill_(float("inf")) for value in tensors.values()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = PeftModel.from_pretrained(_linear(tiny), folder)  # peft: no word
        assert not torch.isfinite(theirs.merge_and_unload()[0].weight).all()
    with pytest.raises(lf.CheckpointError, match="infinite or not a number"):
        lf.load(_linear(tiny), folder)
    assert load_file(folder / "adapter_model.safetensors")
