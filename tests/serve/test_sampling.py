"""Tokens drawn for all rows of a batch at once."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lorafit.errors import ConfigError
from lorafit.serve.requests import Sampling
from lorafit.serve.sampling import Draw, choose

DRAWS = 20_000


def draw(**settings) -> Draw:
    return Draw(Sampling(1, **settings))


def logits(rows: int, tokens: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * 2


def warped(row: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The probabilities of transformers' own warpers."""
    scores = TemperatureLogitsWarper(temperature)(None, row[None]) if temperature != 1 else row[None]
    return (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)[0]


def test_greedy_rows_take_the_largest():
    rows = logits(7)
    assert choose(rows, [draw(temperature=0.0)] * 7) == rows.argmax(-1).tolist()
    assert choose(rows.bfloat16(), [draw(temperature=1e-7)] * 7) == rows.bfloat16().argmax(-1).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.8, 0.6), (0.5, 0.05), (1.0, 0.999)]
)
def test_draws_have_the_probabilities_of_transformers_warpers(temperature, top_p):
    row = logits(1)[0]
    expected = warped(row, temperature, top_p)
    drawn = choose(
        row.expand(DRAWS, -1), [draw(temperature=temperature, top_p=top_p, seed=seed) for seed in range(DRAWS)]
    )
    counts = torch.bincount(torch.tensor(drawn), minlength=len(row))
    assert not counts[expected == 0].any()
    usual = expected * DRAWS > 5
    chi = ((counts - expected * DRAWS) ** 2 / (expected * DRAWS))[usual].sum()
    freedom = max(1, int(usual.sum()) - 1)
    assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_a_row_draws_the_same_whatever_the_others_are():
    def one() -> list[Draw]:
        return [draw(temperature=0.9, top_p=0.8, seed=3), draw(seed=4), draw(temperature=0.0), draw(top_p=0.3, seed=5)]

    rows = [logits(4, seed=seed) for seed in range(30)]
    together = one()
    all_drawn = [choose(row, together) for row in rows]
    by_itself = one()
    assert all_drawn == [[choose(row[i : i + 1], [by_itself[i]])[0] for i in range(4)] for row in rows]
    assert len({tuple(tokens) for tokens in all_drawn}) > 10
    other_way = one()
    assert all_drawn == [choose(row.flip(0), other_way[::-1])[::-1] for row in rows]


def test_seeds_differ_and_none_is_a_fresh_one():
    row = torch.zeros(1, 1000)
    assert len({choose(row, [draw(seed=seed)])[0] for seed in (1, 2, 3, -1, 2**63)}) > 3
    assert len({choose(row, [draw()])[0] for _ in range(5)}) > 1


def test_rows_that_are_not_finite_are_told_apart():
    rows = logits(6)
    rows[1, 3] = torch.nan
    rows[2, 3] = torch.inf
    rows[3] = -torch.inf
    rows[4, 5:] = -torch.inf
    for settings in ({"temperature": 0.0}, {"seed": 1}, {"seed": 1, "top_p": 0.5}):
        made = choose(rows, [draw(**settings) for _ in range(6)])
        assert [token is None for token in made] == [False, True, True, True, False, False]
        assert made[4] is not None and made[4] < 5


class Edge:
    """Draws a number at the edge of what there is."""

    greedy, temperature = False, 1.0

    def __init__(self, number: float, top_p: float) -> None:
        self._number, self.top_p = number, top_p

    def number(self) -> torch.Tensor:
        return torch.tensor(self._number)


def test_what_has_no_probability_is_never_drawn():
    largest = 1 - 2**-24
    for spread in range(300):
        row = torch.full((1, 8), -torch.inf)
        row[0, 2], row[0, 5] = 0.0, -0.01 * spread
        assert choose(row, [Edge(0.0, 1.0)]) == [2] and choose(row, [Edge(largest, 1.0)]) == [5]
        assert choose(row, [Edge(0.0, 0.999)])[0] in (2, 5) and choose(row, [Edge(largest, 0.999)])[0] in (2, 5)
        assert choose(row, [Edge(largest, 0.4)])[0] in (2, 5)


def test_extreme_logits_and_temperatures_stay_in_range():
    row = torch.tensor([[1e30, 3e38, -3e38, 0.0]])
    for temperature in (1e-4, 1.0, 1e6):
        assert choose(row, [draw(temperature=temperature, seed=0)]) == [1]
    assert choose(logits(1, 5).half() * 1e3, [draw(temperature=2.0, top_p=1e-6, seed=0)])[0] is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**64},
        {"stop": ("x", "")},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ConfigError) as caught:
        Sampling(**{"max_tokens": 4, **settings})
    assert caught.value.where == next(iter(settings))
