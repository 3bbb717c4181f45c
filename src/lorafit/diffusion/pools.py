"""What training draws from: latents of pictures, kept as the VAE's distributions of them, and their prompts.

Which picture, which view of it, which latents and which noise a batch has depends on its number and the seed alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lorafit.diffusion.conditions import Condition
from lorafit.diffusion.family import Family, Posterior
from lorafit.diffusion.seeds import generator
from lorafit.diffusion.settings import Settings
from lorafit.diffusion.subjects import Gallery, views

TOGETHER = 4
"""So many pictures go through the VAE at a time."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures for one forward pass.

    Attributes:
        latents: scaled, (n, channels, height, width), on the CPU.
        prompts: one for each.
        noise: shaped like the latents.
        shares: (n,): where in the noise schedule.
        subjects: the first so many are the subject's, the rest the class's.
    """

    latents: Tensor
    prompts: list[str]
    noise: Tensor
    shares: Tensor
    subjects: int


@final
class Pool:
    """The pictures of one kind.

    Attributes:
        posteriors: of each picture, its views in rows.
        prompts: of each picture.
    """

    def __init__(self, name: str, posteriors: Sequence[Posterior], prompts: Sequence[str], seed: int) -> None:
        self.name = name
        self.posteriors = list(posteriors)
        self.prompts = list(prompts)
        self._seed = seed

    def __len__(self) -> int:
        return len(self.posteriors)

    @classmethod
    def of(cls, name: str, family: Family, gallery: Gallery, prompts: Sequence[str], settings: Settings) -> Pool:
        """Looks at all pictures of a gallery once."""
        found = []
        for picture in gallery.pictures:
            seen = views(
                picture,
                settings.resolution,
                crop=settings.crop,
                count=settings.views,
                flip=settings.flip,
                seed=settings.seed,
            )
            parts = [family.posterior(seen[start : start + TOGETHER]) for start in range(0, len(seen), TOGETHER)]
            found.append(Posterior(torch.cat([one.mean for one in parts]), torch.cat([one.std for one in parts])))
        return cls(name, found, prompts, settings.seed)

    def place(self, number: int) -> int:
        """Which picture comes as the `number`-th: all of them once, then all again in another order."""
        turn, position = divmod(number, len(self))
        order = torch.randperm(len(self), generator=generator(self._seed, self.name, "order", turn))
        return int(order[position])

    def drawn(self, family: Family, number: int) -> tuple[Tensor, str]:
        """The latents and the prompt of what comes as the `number`-th."""
        place = self.place(number)
        found, random = self.posteriors[place], generator(self._seed, self.name, "latents", number)
        view = int(torch.randint(found.mean.shape[0], (), generator=random))
        noise = torch.randn(found.mean.shape[1:], generator=random)
        return family.drawn(Posterior(found.mean[view], found.std[view]), noise), self.prompts[place]

    def middle(self, family: Family, place: int) -> Tensor:
        """The latents of a picture's first view, without chance."""
        found = self.posteriors[place]
        return family.drawn(Posterior(found.mean[0], found.std[0]), None)


@final
class Pools:
    """The subject's pictures, and those of the class, if there are any."""

    def __init__(self, family: Family, subject: Pool, prior: Pool | None, settings: Settings) -> None:
        self.family = family
        self.subject = subject
        self.prior = prior
        self.size = settings.batch_size
        self._seed = settings.seed

    def batch(self, number: int) -> Batch:
        """The `number`-th batch of a run."""
        latents: list[Tensor] = []
        prompts: list[str] = []
        for pool in [self.subject] if self.prior is None else [self.subject, self.prior]:
            for place in range(number * self.size, (number + 1) * self.size):
                one, prompt = pool.drawn(self.family, place)
                latents.append(one)
                prompts.append(prompt)
        stacked = torch.stack(latents)
        random = generator(self._seed, "noise", number)
        noise = torch.randn(stacked.shape, generator=random)
        return Batch(stacked, prompts, noise, torch.rand(len(prompts), generator=random), self.size)


class Prompts(ABC):
    """From prompts to what the denoiser is told."""

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Condition:
        """A row for each prompt."""


@final
class Fixed(Prompts):
    """Encoded once, by encoders that are not trained.

    Args:
        family: of the pipeline.
        prompts: all that will come.
    """

    def __init__(self, family: Family, prompts: Sequence[str]) -> None:
        self._rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        parts = []
        with torch.no_grad():
            for prompt in self._rows:
                parts.append(family.encode([prompt]).detached())
        self._known = Condition.together(parts)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self._known.take([self._rows[prompt] for prompt in prompts])


@final
class Learnt(Prompts):
    """Encoded anew each time, by encoders that are trained."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def condition(self, prompts: Sequence[str]) -> Condition:
        different = list(dict.fromkeys(prompts))
        found = self._family.encode(different)
        return found.take([different.index(prompt) for prompt in prompts])
