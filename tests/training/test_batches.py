"""Padding, and the order of an epoch."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import DataLoader

from lorafit.errors import ConfigError
from lorafit.training.batches import Collator, LabelCollator, LengthBucketSampler, Records, SharedBatches
from lorafit.training.classify import EncodedLabel
from lorafit.training.encode import Encoded

SHORT = Encoded([5, 6], [-100, 6], "a")
LONG = Encoded([1, 2, 3], [-100, 2, 3], "b")
LENGTHS = random.Random(0).choices(range(5, 200), k=1003)


def batches(sampler, size):
    order = list(sampler)
    return [order[place : place + size] for place in range(0, len(order), size)]


def test_collator_pads_on_the_right():
    batch = Collator(pad_token_id=9)([SHORT, LONG])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 9], [1, 2, 3]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[-100, 6, -100], [-100, 2, 3]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_collator_pads_to_a_multiple():
    batch = Collator(9, pad_to_multiple_of=4)([LONG])
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, torch.Size([1, 4]))
    assert Collator(9, pad_to_multiple_of=3)([LONG])["input_ids"].tolist() == [[1, 2, 3]]


def test_label_collator():
    batch = [EncodedLabel([1, 2], [0, 1], 1, "a"), EncodedLabel([3], [0], 0, "b")]
    assert {key: value.tolist() for key, value in LabelCollator(9)(batch).items()} == {
        "input_ids": [[1, 2], [3, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[0, 1], [0, 0]],
        "labels": [1, 0],
    }
    assert set(LabelCollator(9, 8)([EncodedLabel([1], None, 1, "a")])) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


@pytest.mark.parametrize("kind", [Collator, LabelCollator])
def test_collator_settings(kind):
    with pytest.raises(ConfigError, match="padding token"):
        kind(-1)
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        kind(0, pad_to_multiple_of=0)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 100, 1003])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_each_record_once(count, size):
    for epoch in (0, 1):
        sampler = LengthBucketSampler(LENGTHS[:count], size, seed=3)
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(count))
        assert len(sampler) == count


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthBucketSampler(LENGTHS, 8, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    state = torch.random.get_rng_state()
    order(0, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batches_hold_like_lengths_in_random_order():
    padding = 0
    longest = []
    for batch in batches(LengthBucketSampler(LENGTHS, 8, seed=0, longest_first=False), 8):
        widths = [LENGTHS[index] for index in batch]
        padding += max(widths) * len(widths) - sum(widths)
        longest.append(max(widths))
    assert padding < 0.05 * sum(LENGTHS)
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_batch_has_the_longest_record(seed):
    # With 20 seeds the longest record falls into the batch that is not full now and then.
    lengths = LENGTHS[:13]
    sampler = LengthBucketSampler(lengths, 4, seed)
    first = batches(sampler, 4)
    assert max(lengths[index] for index in first[0]) == max(lengths)
    assert sorted(sampler) == list(range(13))
    assert [len(batch) for batch in first] == [4, 4, 4, 1]


def test_only_the_first_epoch_begins_with_the_longest():
    sampler = LengthBucketSampler(LENGTHS, 8, seed=0)
    firsts = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        firsts.append(max(LENGTHS[index] for index in batches(sampler, 8)[0]))
    assert firsts[0] == max(LENGTHS)
    assert set(firsts[1:]) != {max(LENGTHS)}


def test_sampler_settings():
    for bad in ({"lengths": []}, {"batch_size": 0}, {"megabatch": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            LengthBucketSampler(**{"lengths": [1], "batch_size": 1, "seed": 0, **bad})


def test_accelerate_sets_the_epoch_and_resumes_exactly():
    from accelerate import Accelerator, skip_first_batches

    data = [Encoded([index] * length, [-100] * length, "x") for index, length in enumerate(LENGTHS[:101])]

    def loader():
        sampler = LengthBucketSampler([len(one) for one in data], 8, seed=5)
        made = DataLoader(data, batch_size=8, sampler=sampler, collate_fn=Collator(0))
        return Accelerator(cpu=True).prepare(made)

    def seen(loader, epoch):
        loader.set_epoch(epoch)
        return [batch["input_ids"][:, 0].tolist() for batch in loader]

    whole = loader()
    epochs = [seen(whole, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert seen(skip_first_batches(loader(), 5), 1) == epochs[1][5:]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("records", [24, 25, 30, 47])
def test_processes_together_have_the_batches_of_one(records: int, count: int) -> None:
    order = LengthBucketSampler(LENGTHS[:records], 12, seed=1)
    for epoch in (0, 1):
        parts = [
            SharedBatches(order, 12 // count, number=number, count=count, drop_last=False) for number in range(count)
        ]
        for part in parts:
            part.set_epoch(epoch)
        each = [list(part) for part in parts]
        assert {len(own) for own in each} == {len(parts[0])} == {-(-records // 12)}
        together = [[place for own in each for place in own[step] if place >= 0] for step in range(len(each[0]))]
        alone = list(order)
        assert together == [alone[start : start + 12] for start in range(0, records, 12)]
        assert all(len(batch) <= 12 // count and batch for own in each for batch in own)
        assert max(map(len, together[-1:])) == (records % 12 or 12)


def test_a_batch_that_is_not_full_can_be_dropped() -> None:
    order = LengthBucketSampler(LENGTHS[:25], 8, seed=1)
    parts = [SharedBatches(order, 4, number=number, count=2, drop_last=True) for number in range(2)]
    assert [len(part) for part in parts] == [3, 3] and all(len(batch) == 4 for part in parts for batch in part)


def test_who_has_no_record_has_one_that_says_nothing() -> None:
    kept = [Encoded([5, 6, 7], [-100, 6, 7], "a:1"), Encoded([8, 9, 10], [-100, -100, 10], "a:2")]
    records = Records(kept)
    order = LengthBucketSampler([3], 2, seed=0)
    first, second = (list(SharedBatches(order, 1, number=number, count=2, drop_last=False)) for number in range(2))
    assert sorted([first, second]) == [[[-1]], [[0]]]
    assert records[0] is kept[0] and len(records) == 2
    assert records[-2] == Encoded([8, 9], [-100, -100], "a:2")
    labelled = Records([EncodedLabel([1, 2, 3], [0, 0, 1], 4, "b:1")])
    assert labelled[-1] == EncodedLabel([1, 2], [0, 0], -100, "b:1")
