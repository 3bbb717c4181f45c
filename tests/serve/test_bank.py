"""The bank: which adapters lie in memory, and that each row of a batch has its own."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafit as lf
from lorafit.serve.bank import AdapterBank, FullError

MEMBERS = {
    "lora": lf.LoRA(r=4),
    "wide": lf.LoRA(r=12),
    "rslora": lf.LoRA(r=4, rslora=True),
    "lora-plus": lf.LoRAPlus(r=3),
    "lora-fa": lf.LoRAFA(r=4),
    "vera": lf.VeRA(r=8, d_init=0.5),
    "vera-too": lf.VeRA(r=8, d_init=0.1),
    "lora-drop": lf.LoRADrop(lf.LoRA(r=4), keep=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")),
    "adalora": lf.AdaLoRA(init_r=6, target_r=4, total_steps=10),
    "dora": lf.DoRA(lf.LoRA(r=4)),
    "dora-vera": lf.DoRA(lf.VeRA(r=8, d_init=0.5)),
    "delta-lora": lf.DeltaLoRA(r=2),
}


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An adapter of each member, saved."""
    model, root = language_model(), tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(MEMBERS.items()):
        handle = lf.attach(model, method, seed=5)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in handle.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(parameter + noise if key.endswith(".m") else noise)
        handle.save(root / name)
        handle.detach()
    return {name: root / name for name in MEMBERS}


@pytest.fixture
def bank(folders):
    made = AdapterBank(language_model())
    for name, folder in folders.items():
        made.register(name, folder)
    return made


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def alone(folder: Path | None, ids):
    """What a model with one adapter attached says."""
    model = language_model()
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lf.load(model, folder)
    return logits(model, ids)


def check(bank, folders, names):
    """Each row of a batch is what its adapter gives alone."""
    ids = torch.randint(64, (len(names), 7), generator=torch.Generator().manual_seed(1))
    with bank.rows(names):
        found = logits(bank._model, ids)
    for row, name, got in zip(ids, names, found, strict=True):
        expected = alone(None if name is None else folders[name], row[None])[0]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    base = alone(None, ids)
    for row, name in enumerate(names):
        assert torch.allclose(found[row], base[row], atol=1e-3) == (name is None), name


def test_rows_of_every_member_that_can_be_folded(bank, folders):
    for name in MEMBERS:
        bank.take(name)
    names = [None, *MEMBERS, "lora", "vera-too", None, "dora", "lora", "dora-vera", "wide"]
    check(bank, folders, names)
    check(bank, folders, list(reversed(names)))
    check(bank, folders, ["lora"] * 4)
    check(bank, folders, [None, None])
    assert bank.resident() == [*MEMBERS]


def test_many_of_one_kind_are_arranged_for_batched_products(folders):
    bank = AdapterBank(language_model())
    names = [f"copy-{number}" for number in range(24)]
    where = {}
    for number, name in enumerate(names):
        where[name] = folders[("lora", "rslora", "lora-fa")[number % 3]]
        bank.register(name, where[name])
        bank.take(name)
    check(bank, where, names[::4])  # six that lie far apart
    check(bank, where, names[1::2])
    check(bank, where, [*names, *names[:5]])
    check(bank, where, names[::4])


def test_nothing_is_read_before_it_is_taken_and_then_once(bank, folders, monkeypatch):
    from lorafit import store

    read, real = [], store.read
    monkeypatch.setattr(store, "read", lambda path, *rest: read.append(Path(path).name) or real(path, *rest))
    assert bank.resident() == [] and bank.used_bytes() == 0
    for _ in range(3):
        bank.take("lora")
        bank.drop("lora")
    assert read == ["lora"] and bank.resident() == ["lora"] and bank.used_bytes() > 0


def test_memory_is_limited_and_the_longest_unused_goes(folders):
    plenty = AdapterBank(language_model())
    plenty.register("lora", folders["lora"])
    plenty.take("lora")
    each = plenty.used_bytes()
    bank = AdapterBank(language_model(), limit=2 * each)
    for name in ("lora", "rslora", "lora-fa", "lora-plus"):
        bank.register(name, folders[name])
    for name in ("lora", "rslora"):
        bank.take(name)
        bank.drop(name)
    bank.take("lora")
    bank.drop("lora")
    bank.take("lora-fa")
    assert bank.resident() == ["lora", "lora-fa"] and bank.used_bytes() <= 2 * each
    bank.take("lora")
    with pytest.raises(FullError, match="no room") as caught:
        bank.take("rslora")
    assert "in use" in str(caught.value.found)
    check(bank, folders, ["lora", "lora-fa", None])
    bank.drop("lora-fa")
    bank.take("rslora")
    assert bank.resident() == ["lora", "rslora"]
    check(bank, folders, ["lora", "rslora", None])


def test_room_is_made_across_kinds(folders):
    each = {}
    for name in ("lora", "wide", "dora", "vera"):
        bank = AdapterBank(language_model())
        bank.register(name, folders[name])
        bank.take(name)
        each[name] = bank.used_bytes()
    bank = AdapterBank(language_model(), limit=each["wide"] + each["lora"])
    for name in each:
        bank.register(name, folders[name])
    for name in ("lora", "wide", "dora", "vera", "wide", "lora"):
        bank.take(name)
        check(bank, folders, [name, None])
        assert bank.used_bytes() <= each["wide"] + each["lora"]
        bank.drop(name)


def test_pinned_adapters_stay(folders):
    measure = AdapterBank(language_model())
    measure.register("lora", folders["lora"])
    measure.take("lora")
    bank = AdapterBank(language_model(), limit=measure.used_bytes())
    bank.register("lora", folders["lora"], pinned=True)
    bank.register("rslora", folders["rslora"])
    bank.take("lora")
    bank.drop("lora")
    with pytest.raises(FullError):
        bank.take("rslora")


def test_an_adapter_larger_than_all_memory_says_so(folders):
    bank = AdapterBank(language_model(), limit=100)
    bank.register("lora", folders["lora"])
    with pytest.raises(lf.CheckpointError, match="larger than the memory"):
        bank.take("lora")
    assert bank.used_bytes() == 0 and bank.resident() == []


def test_vectors_of_one_projection_cost_vectors(bank):
    bank.take("vera")
    first = bank.used_bytes()
    bank.take("vera-too")
    vectors = bank.used_bytes() - first
    bank.take("lora")
    layers, projection = 2 * 7, 4 * 8 * (48 + 48)
    assert vectors < 4 * layers * (8 + 48) + 1 and first == vectors + projection
    assert bank.used_bytes() - first > 3 * vectors


def test_forgetting(bank, folders):
    bank.take("lora")
    with pytest.raises(lf.StateError, match="in use"):
        bank.forget("lora")
    bank.drop("lora")
    bank.forget("lora")
    assert not bank.known("lora") and bank.resident() == [] and bank.used_bytes() == 0
    with pytest.raises(lf.StateError, match="no adapter of this name"):
        bank.take("lora")
    bank.register("lora", folders["rslora"])
    bank.take("lora")
    check(bank, {"lora": folders["rslora"]}, ["lora", None])


def test_closing_gives_the_plain_model_back(bank):
    plain = language_model()
    for name in MEMBERS:
        bank.take(name)
    bank.close()
    assert {name: type(module) for name, module in bank._model.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    ids = torch.arange(5)[None]
    assert torch.equal(logits(bank._model, ids), logits(plain, ids))


def test_outside_of_rows_the_base_answers(bank):
    ids = torch.arange(5)[None]
    bank.take("lora")
    assert torch.equal(logits(bank._model, ids), alone(None, ids))


def test_rows_that_cannot_be(bank):
    with pytest.raises(lf.StateError, match="not in memory"), bank.rows(["lora"]):
        pass
    bank.take("lora")
    with bank.rows(["lora"]), pytest.raises(lf.StateError, match="one row for each name"):
        logits(bank._model, torch.zeros(2, 3, dtype=torch.long))
    with bank.rows(["lora"]), pytest.raises(lf.StateError, match="no gradients"):
        bank._model(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(lf.StateError, match="no adapter of this name") as caught, bank.rows(["lorra"]):
        pass
    assert "lora" in caught.value.near


def test_what_cannot_be_folded_is_refused_when_it_is_registered(tmp_path):
    model = language_model()
    lf.attach(model, lf.IntrinsicDimension(d=20)).save(tmp_path / "intrinsic")
    bank = AdapterBank(language_model())
    with pytest.raises(lf.CheckpointError, match="'intrinsic'") as caught:
        bank.register("intrinsic", tmp_path / "intrinsic")
    assert "merge" in caught.value.fix
    lf.attach(language_model(), lf.LoRA(r=2), modules_to_save=["lm_head"]).save(tmp_path / "copies")
    with pytest.raises(lf.CheckpointError, match="replace the base's in full") as caught:
        bank.register("copies", tmp_path / "copies")
    assert "lm_head" in str(caught.value.found)
    with pytest.raises(lf.CheckpointError, match="no such folder"):
        bank.register("none", tmp_path / "none")
    assert bank.names() == []


def test_a_name_is_given_once(bank, folders):
    with pytest.raises(lf.ConfigError, match="already"):
        bank.register("lora", folders["wide"])


def test_damaged_files_leave_everything_as_it_was(bank, folders, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folders["lora"], broken)
    bank.register("broken", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    bank.take("dora")
    with pytest.raises(lf.CheckpointError):
        bank.take("broken")
    assert bank.resident() == ["dora"]
    check(bank, folders, ["dora", None])


def test_an_adapter_of_another_model_is_refused_when_it_is_taken(bank, tmp_path):
    other = LlamaForCausalLM(copy.deepcopy(language_model().config))
    lf.attach(other, lf.LoRA(r=2)).save(tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    text = json.loads(config.read_text())
    assert text["peft_type"] == "LORA"
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    lf.attach(small, lf.LoRA(r=2)).save(tmp_path / "small")
    bank.register("small", tmp_path / "small")
    with pytest.raises(lf.CheckpointError):
        bank.take("small")
    assert bank.used_bytes() == 0


def test_a_model_with_adapters_attached_is_refused():
    model = language_model()
    lf.attach(model, lf.LoRA(r=2))
    with pytest.raises(lf.StateError, match="adapters attached"):
        AdapterBank(model)


def test_the_projections_of_vera_count_as_memory(tmp_path):
    sizes = []
    for limit in (None, 40_000):
        bank = AdapterBank(language_model(), limit=limit)
        for seed in range(4):  # each with a projection of its own
            folder = tmp_path / str(seed)
            if not folder.exists():
                lf.attach(language_model(), lf.VeRA(r=64, d_init=0.5), seed=seed).save(folder)
            bank.register(str(seed), folder)
            bank.take(str(seed))
            bank.drop(str(seed))
        sizes.append((len(bank.resident()), bank.used_bytes()))
    (many, size), (few, limited) = sizes
    assert many == 4 and size > 4 * 4 * 64 * (48 + 48)
    assert few == 1 and limited <= 40_000


def test_within_rows_slots_stay_where_they_are(bank):
    bank.take("lora")
    bank.drop("lora")
    with bank.rows(["lora"]):
        bank.take("lora")
        bank.drop("lora")
        for change in (lambda: bank.take("wide"), lambda: bank.forget("lora"), bank.close):
            with pytest.raises(lf.StateError, match="already"):
                change()
        with pytest.raises(lf.StateError, match="already"), bank.rows([None]):
            pass
    assert bank.resident() == ["lora"]


def test_no_adapter_is_attached_under_a_bank(bank):
    bank.take("lora")
    with pytest.raises(lf.StateError, match="would not act") as caught:
        lf.attach(bank._model, lf.LoRA(r=2))
    assert "close()" in caught.value.fix


def test_a_copy_of_the_model_is_plain(bank, folders):
    bank.take("lora")
    ids = torch.arange(5)[None]
    with bank.rows(["lora"]):
        copied = copy.deepcopy(bank._model)
    assert torch.equal(logits(copied, ids), alone(None, ids))
    other = AdapterBank(copied)
    other.register("dora", folders["dora"])
    other.take("dora")
    check(other, folders, ["dora", None])


def test_a_layer_of_another_type_than_the_rest(tmp_path):
    def mixed():
        model = language_model().bfloat16()
        model.lm_head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        return model

    model = mixed()
    handle = lf.attach(model, lf.LoRA(r=2), targets=["q_proj", "lm_head"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.2)
    handle.save(tmp_path)
    bank = AdapterBank(mixed())
    bank.register("a", tmp_path)
    bank.take("a")
    ids = torch.arange(10).view(2, 5)
    with bank.rows(["a", None]):
        found = logits(bank._model, ids)
    torch.testing.assert_close(found[0], logits(model, ids)[0], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(found[1], logits(mixed(), ids)[1], rtol=3e-2, atol=3e-2)
