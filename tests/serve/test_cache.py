"""The cache of a batch: rows that come and go, in tensors that are written in place."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from lorafit.serve.cache import SPARE, RowCache

HEADS, WIDTH = 2, 3


def states(rows: int, columns: int, mark: float = 0.0) -> Tensor:
    """Keys or values, each number another one."""
    count = rows * HEADS * columns * WIDTH
    return (torch.arange(count, dtype=torch.float32) + mark).view(rows, HEADS, columns, WIDTH)


def write(cache: RowCache, columns: int, mark: float) -> Tensor:
    """Writes columns into every layer; returns the keys of the first as the model gets them."""
    cache.reserve(columns)
    shown = []
    for layer in range(len(cache.layers)):
        keys = states(cache.rows, columns, mark + layer * 10_000)
        shown.append(cache.update(keys, -keys, layer))
    cache.advance(columns)
    for keys, values in shown:
        assert torch.equal(keys, -values)
    return shown[0][0]


def filled(rows: int, columns: int, mark: float, windows=(None, None)) -> RowCache:
    cache = RowCache(windows, rows=rows, columns=columns)
    write(cache, columns, mark)
    return cache


def test_columns_are_shown_in_the_order_in_which_they_were_written():
    cache = RowCache((None, None), rows=2, columns=5)
    first = write(cache, 3, 0.0).clone()
    second = write(cache, 2, 500.0)
    assert cache.columns == cache.get_seq_length() == 5
    assert torch.equal(second, torch.cat([first, states(2, 2, 500.0)], dim=2))
    assert cache.get_mask_sizes(1, 0) == (6, 0) and cache.get_max_length() == -1


def test_a_token_is_written_in_place():
    cache = filled(3, 10, 0.0)
    write(cache, 1, 1000.0)
    room = cache.layers[0].keys
    for step in range(SPARE):
        shown = write(cache, 1, 2000.0 + step)
        assert cache.layers[0].keys is room and shown.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    write(cache, 1, 9000.0)
    assert cache.layers[0].keys is not room
    assert cache.columns == 10 + 2 + SPARE


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    cache = filled(2, 4, 0.0)
    cache.reserve(1)
    cache.update(states(2, 1, 77.0), states(2, 1, 77.0), 0)  # and the second layer never comes
    assert cache.columns == 4
    assert torch.equal(write(cache, 1, 300.0), torch.cat([states(2, 4), states(2, 1, 300.0)], dim=2))


class Twin:
    """The same in the plainest way: for each row the columns that it has."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def write(self, keys: Tensor) -> None:
        self.rows = [torch.cat([row, new], dim=1) for row, new in zip(self.rows, keys, strict=True)]

    def drop(self, place: int) -> None:
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def check(self, shown: Tensor) -> None:
        assert shown.shape[0] == len(self.rows) and shown.shape[2] == max(row.shape[1] for row in self.rows)
        assert shown.isfinite().all()
        for got, row in zip(shown, self.rows, strict=True):
            assert torch.equal(got[:, got.shape[1] - row.shape[1] :], row)


@pytest.mark.parametrize("seed", range(6))
def test_rows_come_and_go_and_columns_grow(seed):
    numbers = random.Random(seed)
    cache, twin = RowCache((None, None)), Twin()
    for step in range(300):
        if numbers.random() < (0.15 if twin.rows else 1.0):
            count, longest = numbers.randrange(1, 4), numbers.choice([1, 5, 40, 150])
            other = filled(count, longest, step * 1000.0)
            keys = other.layers[0].keys[:count, :, :longest]
            places = sorted(numbers.sample(range(count), numbers.randrange(1, count + 1)))
            lengths = [numbers.randrange(1, longest + 1) for _ in places]
            cache.take_in(other, places, lengths)
            twin.rows += [keys[place, :, longest - n :].clone() for place, n in zip(places, lengths, strict=True)]
        keys = states(cache.rows, 1, step * 1000.0 + 500)
        shown = write(cache, 1, step * 1000.0 + 500)
        twin.write(keys)
        twin.check(shown)
        while twin.rows and numbers.random() < (0.5 if len(twin.rows) > 6 else 0.05):
            place = numbers.randrange(len(twin.rows))
            cache.drop(place)
            twin.drop(place)
        cache.narrow(max((row.shape[1] for row in twin.rows), default=0))


def test_room_follows_what_is_used():
    cache = RowCache((None,))
    cache.take_in(filled(16, 500, 0.0, (None,)), range(16), [500] * 16)
    high = cache.nbytes
    for _ in range(15):
        cache.drop(0)
    cache.narrow(10)
    for _ in range(400):
        write(cache, 1, 0.0)
        cache.narrow(20)
    assert cache.nbytes < high / 20


def test_what_was_left_behind_never_shows():
    cache = RowCache((None, None))
    cache.take_in(filled(2, 30, 0.0), [0, 1], [30, 30])
    cache.reserve(1)
    for layer in cache.layers:  # a row whose numbers have run away
        layer.keys[1] = torch.nan
        layer.values[1] = torch.nan
    cache.drop(1)
    cache.take_in(filled(1, 3, 0.0), [0], [3])
    assert write(cache, 1, 0.0).isfinite().all()
    cache.take_in(filled(1, 90, 0.0), [0], [90])
    assert write(cache, 1, 0.0).isfinite().all()


def test_a_longer_prompt_shifts_the_others_right():
    cache = RowCache((None,))
    cache.take_in(filled(1, 4, 0.0, (None,)), [0], [4])
    cache.take_in(filled(1, 300, 0.0, (None,)), [0], [300])
    assert cache.columns == 300
    shown = write(cache, 1, 7.0)
    assert torch.equal(shown[0, :, 296:300], states(1, 4)[0]) and torch.equal(shown[1, :, :300], states(1, 300)[0])


@pytest.mark.parametrize("portion", [1, 3, 5])
def test_a_sliding_layer_shows_what_transformers_own_shows(portion):
    ours, theirs = RowCache((6, None), rows=2, columns=30), DynamicSlidingWindowLayer(sliding_window=6)
    assert ours.is_sliding == [True, False]
    for step in range(30 // portion):
        assert ours.get_mask_sizes(portion, 0) == theirs.get_mask_sizes(portion)
        keys = states(2, portion, step * 100.0)
        shown, _ = theirs.update(keys, keys)
        seen, _ = ours.update(keys, keys, 0)
        assert torch.equal(seen, shown[:, :, -seen.shape[2] :])
        assert seen.shape[2] == min(shown.shape[2], 5 + portion)
        ours.update(keys, keys, 1)
        ours.advance(portion)
        assert ours.get_mask_sizes(portion, 1) == (portion * (step + 2), 0)


def test_types_are_kept():
    cache = RowCache((None,), rows=1, columns=2)
    cache.update(states(1, 2).bfloat16(), states(1, 2).bfloat16(), 0)
    cache.advance(2)
    other = RowCache((None,))
    other.take_in(cache, [0], [2])
    assert {tensor.dtype for tensor in (other.layers[0].keys, other.layers[0].values)} == {torch.bfloat16}
    assert RowCache((None,)).nbytes == 0
