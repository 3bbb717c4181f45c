"""The next token of each row of a batch, drawn for all rows at once.

Each row brings a random number of its own, from a generator of its own, and nothing else of a row's draw depends on
what the other rows are: the same seed gives the same answer in any company, up to the rounding of the logits.
A draw inverts the cumulated probabilities: the token is the first at which their sum is above ``u`` times the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lorafit.serve.requests import Sampling


@final
class Draw:
    """How one request draws its tokens, and its random numbers.

    Args:
        sampling: what was asked for.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.greedy
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        # Always on the CPU: a seed then means the same numbers on every device.
        self._numbers = torch.Generator()
        if self.greedy:
            return
        if sampling.seed is None:
            self._numbers.seed()
        else:
            self._numbers.manual_seed(sampling.seed)

    def number(self) -> Tensor:
        """The next random number, (), at least 0 and below 1."""
        return torch.rand((), generator=self._numbers)


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """A token for each row; None for a row whose logits are not finite.

    Single logits may be −inf, as models have it that never write certain tokens.

    Args:
        logits: (rows, vocabulary), in any type.
        draws: one for each row.
    """
    best, tokens = logits.max(dim=-1)
    drawn = [row for row, draw in enumerate(draws) if not draw.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        some = len(drawn) < len(draws)
        rows, top = (logits[index], best[index]) if some else (logits, best)
        tokens[index] = _drawn(rows, top, [draws[row] for row in drawn])
    # The largest is NaN if any is, and infinite if any is or all are −inf.
    finite = best.isfinite().tolist()
    return [token if good else None for token, good in zip(tokens.tolist(), finite, strict=True)]


def _drawn(logits: Tensor, best: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each of these rows, (rows,), at its temperature and within its share of the probability."""

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=logits.device)[:, None]

    # The largest is taken off before the division: it stays 0, and nothing else can leave the range upwards.
    scaled = (logits.float() - best.float()[:, None]).div_(column([draw.temperature for draw in draws]))
    probabilities = scaled.softmax(dim=-1)
    numbers = torch.stack([draw.number() for draw in draws]).to(logits.device)[:, None]
    cut = [row for row, draw in enumerate(draws) if draw.top_p < 1]
    if len(cut) == len(draws):
        return _from_most(probabilities, column([draw.top_p for draw in draws]), numbers)
    tokens = _from_all(probabilities, numbers)
    if cut:
        index = torch.tensor(cut, device=logits.device)
        tokens[index] = _from_most(probabilities[index], column([draws[row].top_p for row in cut]), numbers[index])
    return tokens


def _from_all(probabilities: Tensor, numbers: Tensor) -> Tensor:
    sums = probabilities.cumsum(dim=-1)
    return _first_above(sums, sums[:, -1:], numbers)[:, 0]


def _from_most(probabilities: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:
    """Draws from the fewest most probable tokens that have `top_p` together: those before which there is less."""
    falling, order = probabilities.sort(dim=-1, descending=True)
    sums = falling.cumsum(dim=-1)
    kept = (sums - falling < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
    place = _first_above(sums, sums.gather(1, kept - 1), numbers)
    return order.gather(1, place)[:, 0]


def _first_above(sums: Tensor, whole: Tensor, numbers: Tensor) -> Tensor:
    """(rows, 1), the first place at which the sum is above `numbers` · `whole`: never one of probability 0.

    There is one: a number of 24 bits below 1 makes any `whole` smaller by half of its last bit or more.
    """
    return torch.searchsorted(sums, numbers * whole, right=True).clamp_(max=sums.shape[1] - 1)  # past it: NaN
