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
