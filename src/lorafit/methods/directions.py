"""Singular directions: of rows that come in batch by batch, and how a budget of them is shared out over sites.

Incremental SVD of centred rows: Ross et al. 2008 (as in scikit-learn's `IncrementalPCA`); the randomised one within:
Halko et al. 2011.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

EXACT = 256
"""Matrices with a side of at most this get a full SVD; larger ones a randomised one of the few directions wanted."""


class Directions:
    """The `limit` directions in which rows vary most, kept up to date as rows come in.

    Attributes:
        components: (k, in), orthonormal, most varied first; k is at most `limit` and what the rows span.
        singular: (k,), the singular values of the centred rows.
        count: how many rows there were.
    """

    components: Tensor
    singular: Tensor
    mean: Tensor

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.scatter = 0.0
        self.cosines: list[float] = []

    def add(self, rows: Tensor) -> None:
        """Takes rows (n, in) into account, in float32 or better."""
        n, total = len(rows), self.count + len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        self.scatter += float(centred.square().sum())
        if self.count:
            step = (mean - self.mean) * math.sqrt(self.count * n / total)
            self.scatter += float(step.square().sum())
            known = self.singular[:, None] * self.components
            singular, components = leading(torch.cat([known, centred, step[None]]), self.limit)
            both = min(len(components), len(self.components))
            self.cosines = (components[:both] * self.components[:both]).sum(1).abs().tolist()
            self.mean = self.mean + (mean - self.mean) * (n / total)
        else:
            singular, components = leading(centred, self.limit)
            self.mean = mean
        self.singular, self.components, self.count = singular, components, total

    def explained(self) -> list[float]:
        """ξ: which part of all variance each direction explains. Empty for rows that are all the same."""
        if not self.count:
            return []
        rounding = 4 * torch.finfo(self.mean.dtype).eps
        if self.scatter <= self.count * float(self.mean.square().sum()) * rounding**2:
            return []
        explained: list[float] = (self.singular.square() / self.scatter).tolist()
        return explained

    def converged(self, r: int, tau: float) -> bool:
        """Whether the first `r` directions are what they were a batch before."""
        return self.count > 0 and len(self.cosines) >= r and all(cosine >= tau for cosine in self.cosines[:r])


def leading(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest singular values of a matrix (n, in) and their right singular vectors (k, in); fewer if it has less.

    Matrices with both sides above `EXACT` go through a random sketch of 2 k directions with four power iterations
    (Halko et al. 2011), always the same one. The largest entry of each vector is positive.
    """
    if min(rows.shape) > max(EXACT, 2 * k):
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(rows.shape[1], 2 * k, generator=generator, dtype=rows.dtype).to(rows.device)
        for _ in range(4):
            sketch = rows.t() @ torch.linalg.qr(rows @ sketch).Q
            sketch = torch.linalg.qr(sketch).Q
        basis = torch.linalg.qr(rows @ sketch).Q
        _, singular, components = torch.linalg.svd(basis.t() @ rows, full_matrices=False)
    else:
        _, singular, components = torch.linalg.svd(rows, full_matrices=False)
    least = singular[0] * torch.finfo(rows.dtype).eps * max(rows.shape)
    k = min(k, int((singular > least).sum()))
    components = components[:k] * first_signs(components[:k])[:, None]
    return singular[:k], components


def first_signs(rows: Tensor) -> Tensor:
    """For each row of a matrix the sign of its largest entry, 1 for a row of zeros."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def share_out(explained: Sequence[Sequence[float]], budget: int, least: int = 0) -> list[int]:
    """How many of the `budget` largest figures each row has; of equal ones the earlier site's come first.

    The first `least` of each row come before all others.

    >>> share_out([[0.5, 0.1], [0.9, 0.4, 0.3]], 3)
    [1, 2]
    >>> share_out([[0.1, 0.1], [0.9, 0.4, 0.3]], 3), share_out([[0.1, 0.1], [0.9, 0.4, 0.3]], 3, least=1)
    ([0, 3], [1, 2])
    """
    figures = [
        (-math.inf if place < least else -figure, site)
        for site, row in enumerate(explained)
        for place, figure in enumerate(row)
    ]
    chosen = Counter(site for _, site in sorted(figures)[:budget])
    return [chosen[site] for site in range(len(explained))]
