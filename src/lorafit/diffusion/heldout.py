"""The loss that a run is judged by: on fixed latents, noises and times, none of which training draws.

With pictures of the subject that are not trained on, it tells what is learnt of the subject. Without, it is measured
on the training pictures under other noises: it tells how well they are known, and not whether they are known too well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from lorafit.diffusion.family import Family
from lorafit.diffusion.pools import Pool, Prompts
from lorafit.diffusion.seeds import generator
from lorafit.diffusion.settings import Settings
from lorafit.rest import at_rest

LOOKED_AT = 8
"""So many pictures of the class at most are measured on."""


@final
class Held:
    """Fixed pairs of picture and noise.

    Args:
        name: of the noises: others for each name.
        pool: the pictures.
        family: of the pipeline.
        settings: of the run.
        most: so many pictures at most: one out of each of as many equal parts of the pool.
    """

    def __init__(self, name: str, pool: Pool, family: Family, settings: Settings, *, most: int | None = None) -> None:
        count = len(pool) if most is None else min(most, len(pool))
        draws = settings.evaluation_draws
        random = generator(settings.seed, "held out", name)
        latents: list[Tensor] = []
        self.prompts: list[str] = []
        for place in _chosen(len(pool), count, generator(settings.seed, "chosen", name)):
            latents += [pool.middle(family, place)] * draws
            self.prompts += [pool.prompts[place]] * draws
        self._latents = torch.stack(latents)
        self._noise = torch.randn(self._latents.shape, generator=random)
        # One time from each of as many equal parts of the schedule as there are noises.
        self._shares = ((torch.arange(draws) + torch.rand(count, draws, generator=random)) / draws).flatten()
        self._size = max(2 * settings.batch_size, 4)

    def __len__(self) -> int:
        return len(self.prompts)

    def losses(self, family: Family, prompts: Prompts) -> list[float]:
        """The loss of each pair; the pipeline is left as it was."""
        found: list[float] = []
        with ExitStack() as stack:
            for part in family.components:
                stack.enter_context(at_rest(family.component(part)))
            for start in range(0, len(self), self._size):
                rows = slice(start, start + self._size)
                condition = prompts.condition(self.prompts[rows])
                losses = family.error(self._latents[rows], condition, self._noise[rows], self._shares[rows])
                found += losses.cpu().double().tolist()
        return found


def _chosen(length: int, count: int, random: torch.Generator) -> list[int]:
    """One place out of each of `count` equal parts of `range(length)`.

    >>> _chosen(3, 3, torch.Generator())
    [0, 1, 2]
    """
    # Not the first of each part: where every other picture is of another prompt, that could be one prompt's alone.
    ends = [number * length // count for number in range(count + 1)]
    return [begin + int(torch.randint(end - begin, (1,), generator=random)) for begin, end in pairwise(ends)]


def mean(losses: Sequence[float]) -> float:
    """Their mean."""
    return sum(losses) / len(losses)
