"""How often the intervals hold the truth, and how often a difference is seen that is none."""

from __future__ import annotations

import math

import pytest
import torch

from lorafit.experiments.bootstrap import Sample, draw, holm, interval, probability

RECORDS, RESAMPLES = 60, 600


def made(generator, shifts, *, seeds, luck=0.03, alone=0.02, spreads=None):
    """Losses of records of unlike length, for candidates whose true losses are 2 + shift.

    luck is how far a seed moves a model's loss, alone how far a record of one model is off by itself.
    """

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(5, 40, (RECORDS,), generator=generator).double()
    hard = 0.5 * normal(RECORDS)
    samples = []
    for at, shift in enumerate(shifts):
        wide = 1.0 if spreads is None else spreads[at]
        seed = luck * wide * normal(seeds, 1)
        liking = 0.05 * normal(RECORDS)  # what this candidate finds easy
        losses = counts * (2 + shift + hard + liking + seed + alone * normal(seeds, RECORDS))
        samples.append(Sample(tuple(map(tuple, losses.tolist()))))
    return samples, counts.tolist()


def adjusted(samples, counts, seed):
    values = draw(samples, counts, resamples=RESAMPLES, seed=seed).values
    pairs = [(a, b) for a in range(len(samples)) for b in range(a)]
    found = holm([probability(values[:, a] - values[:, b]) for a, b in pairs])
    return dict(zip(pairs, found, strict=True))


@pytest.mark.parametrize(("candidates", "seeds"), [(1, 3), (1, 5), (2, 3), (4, 3)])
def test_the_intervals_hold_the_truth(candidates, seeds):
    generator, times = torch.Generator().manual_seed(1), 400
    scores = differences = 0
    for time in range(times):
        samples, counts = made(generator, [0.1 * each for each in range(candidates)], seeds=seeds)
        values = draw(samples, counts, resamples=RESAMPLES, seed=time).values
        low, high = interval(values[:, 0], 0.95)
        scores += low <= 2 <= high
        if candidates > 1:
            low, high = interval(values[:, 1] - values[:, 0], 0.95)
            differences += low <= 0.1 <= high
    error = 2.6 * math.sqrt(0.95 * 0.05 / times)
    assert scores / times > 0.95 - error
    if candidates > 1:
        assert 0.95 - error < differences / times


@pytest.mark.parametrize("luck", [0.03, 0.3])
def test_resampling_three_seeds_would_miss_it_more_often(luck):
    """What the page of this module says of drawing seeds with replacement, and that Student's t mends it."""
    generator, times = torch.Generator().manual_seed(2), 400
    held = resampled = 0
    for time in range(times):
        samples, counts = made(generator, [0.0], seeds=3, luck=luck)
        drawn = draw(samples, counts, resamples=RESAMPLES, seed=time)
        low, high = interval(drawn.values[:, 0], 0.95)
        held += low <= 2 <= high
        records = draw([Sample(samples[0].sums, fixed=True)], counts, resamples=RESAMPLES, seed=time).values[:, 0]
        own = torch.tensor(drawn.seeds[0])
        again = own[torch.randint(3, (RESAMPLES, 3), generator=generator)].mean(1) - own.mean()
        low, high = interval(records + again, 0.95)
        resampled += low <= 2 <= high
    assert held / times > 0.925
    assert resampled < held
    if luck == 0.3:
        assert resampled / times < 0.88


@pytest.mark.parametrize(
    ("candidates", "spreads", "most"), [(2, None, 0.05), (5, None, 0.05), (2, (4, 1), 0.07), (5, (4, 1, 1, 1, 1), 0.06)]
)
def test_equal_candidates_are_rarely_told_apart(candidates, spreads, most):
    """Also where the seeds of one lie four times as far apart."""
    generator, times, alarms = torch.Generator().manual_seed(3), 400, 0
    for time in range(times):
        samples, counts = made(generator, [0.0] * candidates, seeds=3, spreads=spreads)
        alarms += any(each < 0.05 for each in adjusted(samples, counts, time).values())
    assert alarms / times <= most + 2 * math.sqrt(0.05 * 0.95 / times)


def test_a_better_one_is_seen():
    generator, times, seen = torch.Generator().manual_seed(4), 100, 0
    for time in range(times):
        samples, counts = made(generator, [0.0, 0.2, 0.2, 0.2], seeds=3)
        found = adjusted(samples, counts, time)
        seen += all(found[other, 0] < 0.05 for other in (1, 2, 3))
    assert seen / times > 0.9


def test_pairing_the_records_sees_more_than_their_spread():
    samples, counts = made(torch.Generator().manual_seed(5), [0.0, 0.2], seeds=3, luck=0.005)
    values = draw(samples, counts, resamples=2000, seed=0).values
    alone = [high - low for low, high in (interval(values[:, at], 0.95) for at in (0, 1))]
    low, high = interval(values[:, 1] - values[:, 0], 0.95)
    assert high - low < min(alone) / 2
    assert low < 0.2 < high


def test_the_score_is_a_ratio():
    drawn = draw([Sample(((1.0, 9.0), (3.0, 11.0)))], [1, 9], resamples=10, seed=0)
    assert float(drawn.scores[0]) == pytest.approx(24 / 2 / 10)
    assert drawn.seeds == (pytest.approx((1.0, 1.4)),)


def test_of_one_seed_the_intervals_are_of_the_records_alone():
    drawn = draw([Sample(((1.0, 2.0, 3.0),)), Sample(((1.1, 2.1, 3.1),))], [1, 1, 1], resamples=500, seed=0)
    assert drawn.spread is None and drawn.degrees == 0
    assert drawn.values[:, 1] - drawn.values[:, 0] == pytest.approx(0.1)  # no seed moves it


def test_an_untrained_model_has_no_luck_of_seeds():
    base, tuned = Sample(((5.0, 6.0, 7.0),), fixed=True), Sample(((1.0, 2.0, 3.0), (2.0, 3.0, 4.0)))
    drawn = draw([base, tuned], [1, 1, 1], resamples=2000, seed=0)
    assert drawn.degrees == 1 and drawn.spread == pytest.approx(math.sqrt(0.5))
    assert drawn.values[:, 0].std() < drawn.values[:, 1].std() / 2


def test_one_record_gives_no_interval_of_records():
    drawn = draw([Sample(((3.0,),))], [2], resamples=5, seed=0)
    assert drawn.values.flatten().tolist() == [1.5] * 5


def test_the_same_seed_draws_the_same():
    samples, counts = made(torch.Generator().manual_seed(6), [0.0, 0.1], seeds=3)
    first, again, other = (draw(samples, counts, resamples=50, seed=seed).values for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_holm_steps_down():
    assert holm([]) == []
    assert holm([0.04, 0.001, 0.02]) == pytest.approx([0.04, 0.003, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_luck_of_another_kind_stays_apart():
    """Heads of an untrained classifier lie far apart: that says nothing of trained models, and counts for itself."""
    generator = torch.Generator().manual_seed(5)
    (trained,), counts = made(generator, [0.0], seeds=3)
    (heads,), _ = made(generator, [0.5], seeds=5, luck=1.0)
    heads = Sample(heads.sums, apart=True)
    alone, both = (draw(each, counts, resamples=4000, seed=1) for each in ([trained], [trained, heads]))
    assert both.spread == alone.spread and both.degrees == 2
    own = torch.tensor(both.seeds[1], dtype=torch.float64)
    low, high = interval(both.values[:, 1], 0.95)
    assert (high - low) / 2 == pytest.approx(2.776 * float(own.std()) / math.sqrt(5), rel=0.15)
    first = heads.sums[:1]
    one, still = (
        draw([trained, Sample(first, fixed=fixed, apart=not fixed)], counts, resamples=4000, seed=1).values[:, 1]
        for fixed in (False, True)
    )
    assert torch.equal(one, still), "one head tells of the records alone"
