"""How well numbers agree: against the plainest formulas, and intervals that hold what they say."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from lorafit.training.agreement import agreement


def pairs(records: int, noise: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(records, generator=generator, dtype=torch.float64)
    off = noise * torch.randn(records, generator=generator, dtype=torch.float64)
    return torch.stack([right + off, right], dim=1)


def ranks(values: list[float]) -> list[float]:
    """Mid-ranks, written down the plain way."""
    return [sum(other < each for other in values) + (values.count(each) + 1) / 2 for each in values]


@pytest.mark.parametrize("rounded", [False, True], ids=["no-ties", "ties"])
def test_the_figures_are_those_of_the_formulas(rounded: bool) -> None:
    both = pairs(40, 0.5)
    both = (both * 2).round() / 2 if rounded else both
    predicted, right = both[:, 0].tolist(), both[:, 1].tolist()
    found = agreement(both)
    assert found.records == 40
    assert found.error.value == pytest.approx(
        statistics.fmean(abs(a - b) for a, b in zip(predicted, right, strict=True))
    )
    assert found.pearson is not None and found.spearman is not None
    assert found.pearson.value == pytest.approx(statistics.correlation(predicted, right))
    assert found.spearman.value == pytest.approx(statistics.correlation(ranks(predicted), ranks(right)))


def test_the_same_numbers_give_the_same_intervals_and_these_are_around_the_value() -> None:
    found, again = agreement(pairs(60, 0.7)), agreement(pairs(60, 0.7))
    assert found == again
    for name, one in found.parts():
        assert one.low is not None and one.high is not None and one.low < one.value < one.high, name
    assert set(found.figures()) == {
        f"{name}{end}" for name in ("mean_absolute_error", "pearson", "spearman") for end in ("", "_low", "_high")
    }


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """r of a normal pair with this noise is known; of 60 samples about 57 intervals hold it."""
    truth = 1 / math.sqrt(1 + 0.5**2)
    held = 0
    for seed in range(60):
        one = agreement(pairs(80, 0.5, seed), draws=400).pearson
        assert one is not None and one.low is not None and one.high is not None
        held += one.low <= truth <= one.high
    assert 50 <= held <= 60


def test_what_is_not_defined_is_left_out() -> None:
    flat = torch.stack([torch.full((5,), 0.1, dtype=torch.float64), torch.arange(5, dtype=torch.float64)], dim=1)
    found = agreement(flat)
    assert found.pearson is None and found.spearman is None
    assert set(found.figures()) == {"mean_absolute_error", "mean_absolute_error_low", "mean_absolute_error_high"}
    lone = agreement(torch.tensor([[1.0, 3.0]]))
    assert lone.error.value == 2 and lone.error.low is None and lone.figures() == {"mean_absolute_error": 2.0}


def test_perfect_and_opposite() -> None:
    right = torch.arange(6.0)
    same, turned = agreement(torch.stack([right, right], 1)), agreement(torch.stack([-right, right], 1))
    assert same.pearson is not None and same.pearson.value == pytest.approx(1) and same.error.value == 0
    assert turned.spearman is not None and turned.spearman.value == pytest.approx(-1)


def test_many_records_are_drawn_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = agreement(pairs(50, 0.5))
    monkeypatch.setattr("lorafit.training.agreement.CELLS", 50 * 7)
    pieces = agreement(pairs(50, 0.5))
    assert pieces.figures() == pytest.approx(whole.figures(), abs=1e-12)
