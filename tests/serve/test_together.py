"""Engine and bank together: real adapters, some of them at a time in memory."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import lorafit as lf
from lorafit.serve.bank import AdapterBank
from lorafit.serve.requests import Finish

NAMES = (None, "lora", "small", "dora", "vera")


def alone(model, asked) -> list[int]:
    """What `generate` writes."""
    ids = torch.tensor([asked.ids])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.sampling.max_tokens,
            do_sample=False,
            eos_token_id=list(asked.ends),
        )
    written = made[0, ids.shape[1] :].tolist()
    return written[:-1] if written[-1] in asked.ends else written


@pytest.fixture(scope="module")
def single(tiny, adapters):
    """For each adapter a model with it, loaded as everybody loads it."""
    models = {name: copy.deepcopy(tiny[0]) for name in NAMES}
    for name in NAMES[1:]:
        lf.load(models[name], adapters / name)
    return models


@pytest.mark.parametrize("limit", [None, 40_000])
def test_many_adapters_behind_one_model(kit, tiny, adapters, single, engine_of, limit):
    plain, tokenizer = tiny
    model = copy.deepcopy(plain)
    bank = AdapterBank(model, limit=limit)
    for name in NAMES[1:]:
        bank.register(name, adapters / name)
    engine = engine_of(model, bank, rows=6, chunk=8)
    numbers = random.Random(limit or 0)
    asked = []
    for number in range(15):
        ids = [numbers.randrange(256) for _ in range(numbers.choice([1, 4, 20]))]
        ends = (tokenizer.eos_token_id, *numbers.sample(range(256), 3))
        asked.append(kit.ask(ids, 12, NAMES[number % 5], ends=ends))
    told = [kit.Told() for _ in asked]
    for one, tell in zip(asked, told, strict=True):
        engine.submit(one, tell)
    for one, tell in zip(asked, told, strict=True):
        assert tell.wait().finish in (Finish.STOP, Finish.LENGTH), tell.last
        assert tell.ids == alone(single[one.adapter], one)
    assert len({tuple(tell.ids) for tell in told}) > 10
    if limit is not None:
        assert engine.call(bank.used_bytes).result(5) <= limit and len(engine.call(bank.resident).result(5)) < 4
    engine.call(lambda: bank.forget("dora")).result(5)
    engine.stop()
    bank.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


EIGHT = {
    "lora-2": lf.LoRA(r=2),
    "lora-4": lf.LoRA(r=4, alpha=4),
    "lora-8": lf.LoRA(r=8, rslora=True),
    "vera-4": lf.VeRA(r=4),
    "vera-16": lf.VeRA(r=16),
    "dora-2": lf.DoRA(lf.LoRA(r=2)),
    "dora-6": lf.DoRA(lf.LoRA(r=6)),
    "dora-8": lf.DoRA(lf.LoRA(r=8)),
}
"""Adapters of three methods and six ranks."""


def test_32_requests_over_8_adapters_give_the_tokens_that_each_adapter_gives_alone(
    kit, tiny, tiny_dir, tmp_path, engine_of
):
    plain, tokenizer = tiny
    single = {}
    for seed, (name, method) in enumerate(EIGHT.items()):
        handle = lf.attach(copy.deepcopy(plain), method, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.2)
        handle.save(tmp_path / name, base_model=str(tiny_dir), task_type="CAUSAL_LM")
        single[name] = copy.deepcopy(plain)
        lf.load(single[name], tmp_path / name)
    model = copy.deepcopy(plain)
    bank = AdapterBank(model)
    for name in EIGHT:
        bank.register(name, tmp_path / name)
    engine = engine_of(model, bank, rows=32, waiting=32)
    numbers = random.Random(0)
    names = [*EIGHT] * 4
    numbers.shuffle(names)
    ends = (tokenizer.eos_token_id,)
    asked = [
        kit.ask([numbers.randrange(256) for _ in range(numbers.randrange(1, 24))], 16, name, ends=ends)
        for name in names
    ]
    told = [kit.Told() for _ in asked]
    for one, tell in zip(asked, told, strict=True):
        engine.submit(one, tell)
    for one, tell in zip(asked, told, strict=True):
        assert tell.wait().finish in (Finish.STOP, Finish.LENGTH), tell.last
        assert tell.ids == alone(single[one.adapter], one), one.adapter
    assert {*engine.call(bank.resident).result(5)} == {*EIGHT}
    assert len({tuple(tell.ids) for tell in told}) == 32
    engine.stop()
    bank.close()
