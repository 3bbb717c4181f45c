"""Slots of different adapters, and the products of a batch that uses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafit.layers import site_of
from lorafit.mixed.assignment import Assignment, compact, width
from lorafit.mixed.bucket import Bucket
from lorafit.mixed.changes import Pair, Vectors, padded
from lorafit.mixed.tables import table_for

CPU = torch.device("cpu")


def pairs(layer: nn.Linear, number: int, *, r: int = 3, gain: bool = False) -> list[Pair]:
    out, inn = layer.weight.shape
    return [
        Pair(torch.randn(r, inn), torch.randn(out, r), torch.rand(out) + 0.5 if gain else None) for _ in range(number)
    ]


def changed(layer: nn.Linear, change, x):
    """The layer with a change in its weight, by nothing but matrices."""
    pair = change.pair() if isinstance(change, Vectors) else change
    weight = layer.weight + pair.up @ pair.down
    weight = weight if pair.gain is None else pair.gain[:, None] * weight
    return torch.nn.functional.linear(x, weight, layer.bias)


BATCHES = {
    "one for all": [2] * 6,
    "the base": [None] * 6,
    "in runs": [None, 0, 0, 1, 1, 1, 3],
    "scattered": [3, None, 0, 3, 1, 0, None, 1],
    "each its own": list(range(8)),
    "each its own, mixed up": [5, 2, 7, 0, 1, 6, 4, 3],
    "two each": [slot for slot in range(8) for _ in range(2)],
    "one with many": [0] * 9 + [1, 2, 3, 4, 5, 6, 7],
    "with holes": [0, 1, 2, 4, 5, 6, 7, None, 0],
    "far apart": [0, 7],
    "uneven and scattered": [7, 0, None, 1, 0, 2, 3, 0, 4, 5, 6, 0, 1],
}


@pytest.mark.parametrize("tokens", [(), (1,), (5,), (70,), (2, 3)], ids=str)
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("gain", [False, True])
def test_each_row_has_the_change_of_its_slot(slots, tokens, gain):
    layer = nn.Linear(6, 10)
    site, changes = site_of(layer), pairs(layer, 8, gain=gain)
    table = table_for(site, changes[0], like=layer.weight.detach())
    table.resize(8)
    for slot, change in enumerate(changes):
        table.write(slot, change)
    x = torch.randn(len(slots), *tokens, 6)
    with torch.no_grad():
        rows = zip(x, slots, strict=True)
        expected = torch.stack(
            [layer(row) if slot is None else changed(layer, changes[slot], row) for row, slot in rows]
        )
        y = layer(x)
        if any(slot is not None for slot in slots):
            table.add_(site, y, x, Assignment(slots, CPU))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_both_ways_to_take_products_were_tried():
    ways = {
        name: Assignment(slots, CPU).steps(1) for name, slots in BATCHES.items() if any(s is not None for s in slots)
    }
    assert {name for name, steps in ways.items() if steps.batched is not None} >= {
        "each its own",
        "two each",
        "with holes",
    }
    assert {name for name, steps in ways.items() if steps.segments} >= {"in runs", "far apart", "one with many"}
    assert ways["one with many"].batched is not None  # and what is over, by itself
    scattered = Assignment(BATCHES["scattered"], CPU)
    assert not scattered.steps(1).direct and scattered.steps(70).direct  # many tokens are not copied
    assert [tuple(run) for run in Assignment([1, 1, None, 0, 1], CPU).runs] == [(1, 0, 2), (0, 3, 4), (1, 4, 5)]


def test_width_weighs_made_up_rows_against_calls():
    assert width([1] * 32, 1) == 1 and width([4] * 8, 1) == 4
    assert width([30] + [1] * 31, 1) == 1
    assert width([64] * 8, 64) == 0  # arithmetic outweighs every call
    assert compact([4, 5, 6]) and not compact([1, 30])


def test_vectors_around_one_pair_share_it():
    layer = nn.Linear(6, 10)
    site = site_of(layer)
    down, up = torch.randn(4, 6), torch.randn(10, 4)
    changes = [Vectors(down, up, torch.randn(4), torch.randn(10), None) for _ in range(3)]
    table = table_for(site, changes[0], like=layer.weight.detach())
    assert table.takes(Vectors(down.clone(), up.clone(), torch.ones(4), torch.ones(10), None))
    assert not table.takes(Vectors(down + 1, up, torch.ones(4), torch.ones(10), None))
    assert not table.takes(Pair(down, up, None))
    assert table.bytes_each == (4 + 10) * 4
    table.resize(3)
    for slot, change in enumerate(changes):
        table.write(slot, change)
    slots = [2, None, 0, 2, 1]
    x = torch.randn(5, 7, 6)
    with torch.no_grad():
        y = layer(x)
        table.add_(site, y, x, Assignment(slots, CPU))
        for row, slot, got in zip(x, slots, y, strict=True):
            torch.testing.assert_close(got, layer(row) if slot is None else changed(layer, changes[slot], row))


def test_ranks_are_padded_to_few_sizes():
    assert [padded(r) for r in (1, 8, 9, 16, 64, 65)] == [8, 8, 16, 16, 64, 128]
    layer = nn.Linear(6, 10)
    site = site_of(layer)
    table = table_for(site, *pairs(layer, 1, r=3), like=layer.weight.detach())
    assert table.takes(*pairs(layer, 1, r=8)) and not table.takes(*pairs(layer, 1, r=9))
    assert not table.takes(*pairs(layer, 1, gain=True))
    table.resize(1)
    table.write(0, *pairs(layer, 1, r=8))
    (low,) = pairs(layer, 1, r=2)  # nothing of the former one may be left
    table.write(0, low)
    x = torch.randn(2, 6)
    with torch.no_grad():
        y = layer(x)
        table.add_(site, y, x, Assignment([0, None], CPU))
        torch.testing.assert_close(y[0], changed(layer, low, x[0]), rtol=1e-4, atol=1e-4)


@pytest.fixture
def bucket():
    layer = nn.Linear(6, 10)
    changes = {name: {"layer": change} for name, change in zip("abcdefgh", pairs(layer, 8), strict=True)}
    made = Bucket({"layer": site_of(layer)}, changes["a"], {"layer": layer.weight.detach()})
    return layer, made, changes


def gives(layer, bucket, changes):
    """Whether each adapter in a bucket changes what it should."""
    x = torch.randn(6)
    for name, slot in bucket.where().items():
        with torch.no_grad():
            y = layer(x[None])
            bucket.tables["layer"].add_(site_of(layer), y, x[None], Assignment([slot], CPU))
            torch.testing.assert_close(y[0], changed(layer, changes[name]["layer"], x), rtol=1e-4, atol=1e-4)
    return True


def test_slots_are_filled_moved_freed_and_given_back(bucket):
    layer, slots, changes = bucket
    assert slots.slots == slots.free == 0 and slots.bytes_each == 8 * (6 + 10) * 4
    slots.grow(5)
    for name in "abcde":
        assert slots.takes(changes[name])
        slots.put(name, changes[name])
    assert slots.free == 0 and gives(layer, slots, changes)
    slots.arrange({"e", "b"})
    assert {slots.slot("e"), slots.slot("b")} == {0, 1} and gives(layer, slots, changes)
    slots.remove("b")
    slots.remove("a")
    assert slots.free == 2 and set(slots.where()) == set("cde")
    slots.grow(1)
    slots.put("f", changes["f"])
    assert gives(layer, slots, changes)
    slots.shrink()
    assert slots.slots == 4 and slots.free == 0 and set(slots.where()) == set("cdef") and gives(layer, slots, changes)


def test_a_free_slot_changes_nothing(bucket):
    layer, slots, changes = bucket
    slots.grow(2)
    slots.put("a", changes["a"])
    slots.remove("a")
    x = torch.randn(2, 6)
    with torch.no_grad():
        y = layer(x)
        slots.tables["layer"].add_(site_of(layer), y, x, Assignment([0, 1], CPU))
        assert torch.equal(y, layer(x))


def test_low_precision_keeps_a_small_gain():
    layer = nn.Linear(32, 32).bfloat16()
    site = site_of(layer)
    change = Pair(torch.zeros(8, 32), torch.zeros(32, 8), torch.full((32,), 1.003))
    table = table_for(site, change, like=layer.weight.detach())
    table.resize(1)
    table.write(0, change)
    x = torch.full((1, 32), 1.0, dtype=torch.bfloat16)
    with torch.no_grad():
        y = torch.full((1, 32), 0.001, dtype=torch.bfloat16)
        before = y.clone()
        table.add_(site, y, x, Assignment([0], CPU))
    linear = (before - layer.bias).float()
    torch.testing.assert_close((y - before).float(), 0.003 * linear, rtol=0.05, atol=1e-5)


def test_slots_made_in_inference_mode_are_written_to_outside_of_it(bucket):
    layer, slots, changes = bucket
    slots.grow(3)
    for name in "abc":
        slots.put(name, changes[name])
    with torch.inference_mode():
        slots.remove("b")
        slots.shrink()
    slots.arrange({"c"})
    slots.remove("a")
    assert gives(layer, slots, changes)
