"""How far scores, and differences of scores, could be off: by the test records that were drawn, and by the seeds.

All candidates are measured on the same test records, each by one or more trained models that differ in their seed. The
score of a candidate is that of its models' mean: Σ loss / Σ predictions, a ratio. Two kinds of luck are in it.

*Records* are drawn anew with replacement, the same ones for all candidates, so that a record's being hard drops out of
differences. With n records the spread that this gives is √((n-1)/n) of what it should be (Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", arXiv:1411.5279), and normal where Student's t is called for; both are mended
by a factor, which is 1 for many records.

*Seeds* are too few to be drawn with replacement: of three seeds the resampled spread is √(2/3) of the true one, and
knows ten values. Instead the seeds' mean is moved by what Student's t says of it: s/√S · z / √(χ²/f). With few seeds s
is itself a guess, and so the seeds of all candidates are taken together, as in an analysis of variance: f is the sum of
S-1 over the candidates. A candidate whose own seeds lie further apart than that keeps its own s; one whose seeds agree
by luck does not profit from it. Of one seed each nothing can be said: f is 0, and the intervals are of the records
alone. Seeds are not paired across candidates: the same number draws other values for weights of another shape.
`tests/experiments/test_bootstrap.py` measures how often the intervals hold the truth, with three seeds too, and how
often equal candidates are told apart: in 1 to 3 of 100 comparisons, and in 5 to 7 where the seeds of one of them lie
four times as far apart as those of the others, which three seeds hardly show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

CELLS: Final = 4_000_000
"""So many numbers are held at a time."""


@final
@dataclass(frozen=True)
class Sample:
    """What was measured of one candidate.

    Attributes:
        sums: for each seed, the sum of each record (loss in nats, or what was right).
        fixed: whether seeds have no part in it: an untrained model.
        apart: whether its seeds are luck of another kind, which is not taken together with that of the others: the
            values of an untrained classifier's head.
    """

    sums: tuple[tuple[float, ...], ...]
    fixed: bool = False
    apart: bool = False


@final
@dataclass(frozen=True)
class Draws:
    """Scores as they are, and as they could have been.

    Attributes:
        scores: (candidates).
        values: (resamples, candidates); differences of columns are differences of candidates.
        seeds: for each candidate its seeds' own scores.
        spread: the standard deviation of one seed's score, all candidates but those apart taken together; None of one
            seed each.
        degrees: of freedom of `spread`.
    """

    scores: Tensor
    values: Tensor
    seeds: tuple[tuple[float, ...], ...]
    spread: float | None
    degrees: int


def draw(samples: Sequence[Sample], counts: Sequence[float], *, resamples: int, seed: int) -> Draws:
    """Draw records and seeds anew.

    Args:
        samples: at least one candidate, each with at least one seed, all of the same records.
        counts: the predictions of each record.
        resamples: how many times to draw.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(counts, dtype=torch.float64)
    measured = [torch.tensor(sample.sums, dtype=torch.float64) for sample in samples]
    means = torch.stack([each.mean(0) for each in measured], 1)
    scores = means.sum(0) / weights.sum()
    seeds = [each.sum(1) / weights.sum() for each in measured]

    values = scores + _records(means, weights, scores, resamples, generator)
    variances = [
        None if sample.fixed or len(each) < 2 else float(each.var())
        for sample, each in zip(samples, seeds, strict=True)
    ]
    parted = [
        (len(each) - 1, own)
        for sample, each, own in zip(samples, seeds, variances, strict=True)
        if own is not None and not sample.apart
    ]
    degrees = sum(free for free, _ in parted)
    pooled = math.fsum(free * own for free, own in parted) / degrees if degrees else None
    if pooled is not None:
        errors = [
            0.0 if sample.fixed or sample.apart else math.sqrt(max(pooled, own or 0.0) / len(each))
            for sample, each, own in zip(samples, seeds, variances, strict=True)
        ]
        moved = torch.randn(resamples, len(samples), generator=generator, dtype=torch.float64)
        values = values + moved * torch.tensor(errors, dtype=torch.float64) * _student(resamples, degrees, generator)
    for place, (sample, each, own) in enumerate(zip(samples, seeds, variances, strict=True)):
        if sample.apart and own is not None:
            off = torch.randn(resamples, 1, generator=generator, dtype=torch.float64)
            off *= math.sqrt(own / len(each)) * _student(resamples, len(each) - 1, generator)
            values[:, place] += off[:, 0]
    return Draws(
        scores=scores,
        values=values,
        seeds=tuple(tuple(each.tolist()) for each in seeds),
        spread=None if pooled is None else math.sqrt(pooled),
        degrees=degrees,
    )


def _records(means: Tensor, weights: Tensor, scores: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """How far the scores are off when the records are drawn anew: (resamples, candidates)."""
    records = len(weights)
    if records < 2:
        return torch.zeros(resamples, len(scores), dtype=torch.float64)
    chunk = max(1, CELLS // records)
    moved = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = torch.randint(records, (rows, records), generator=generator)
        times = torch.zeros(rows, records, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        off = (times @ means) / (times @ weights)[:, None] - scores
        moved.append(off * _student(rows, records - 1, generator))
    return torch.cat(moved) * math.sqrt(records / (records - 1))


def _student(rows: int, degrees: int, generator: torch.Generator) -> Tensor:
    """What a normal number is multiplied by to become one of Student's t: (rows, 1)."""
    squares = torch.zeros(rows, 1, dtype=torch.float64)
    chunk = max(1, CELLS // rows)
    for start in range(0, degrees, chunk):
        normal = torch.randn(rows, min(chunk, degrees - start), generator=generator, dtype=torch.float64)
        squares += normal.square().sum(1, keepdim=True)
    return (degrees / squares).sqrt()


def interval(values: Tensor, level: float) -> tuple[float, float]:
    """The middle of `values` that holds a share of `level`."""
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def probability(values: Tensor) -> float:
    """How probable a difference as far from zero as this one is, to either side, where there is none.

    >>> probability(torch.zeros(99))
    1.0
    """
    fewer = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(values) + 1))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities of several comparisons, such that those below 0.05 hold one false alarm in 20 times all of them.

    Holm 1979, "A simple sequentially rejective multiple test procedure".

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(probabilities)
    least = 0.0
    for done, at in enumerate(sorted(range(len(probabilities)), key=probabilities.__getitem__)):
        least = max(least, min(1.0, probabilities[at] * (len(probabilities) - done)))
        adjusted[at] = least
    return adjusted
