"""What a denoiser is told beside the noisy latents: the encoded prompts of a batch, by the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded prompts, a row each.

    Attributes:
        tensors: what the family makes of them, by name, (prompts, …) each.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def take(self, rows: Sequence[int]) -> Condition:
        """The rows in this order; one may come several times."""
        return self._each(lambda tensor: tensor[torch.tensor(list(rows), device=tensor.device)])

    def to(self, device: torch.device) -> Condition:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def detached(self) -> Condition:
        """The same without what is needed for a backward pass."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition({name: change(tensor) for name, tensor in self.tensors.items()})

    @classmethod
    def together(cls, parts: Sequence[Condition]) -> Condition:
        """The rows of several, one after the other."""
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})
