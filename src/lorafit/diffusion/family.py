"""What sets pipelines apart: which part denoises, how prompts are encoded, and what is to be predicted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafit.diffusion.conditions import Condition
from lorafit.errors import ConfigError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of an attention layer by their names in diffusers."""
CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Those of the text's side, where pictures and text attend to each other."""
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Those of CLIP's encoders."""
SIDE = 8
"""Pixels that pictures of the pipelines come in multiples of."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the VAE says of pictures: a normal distribution of latents for each, unscaled, single precision, on the CPU.

    Attributes:
        mean, std: (pictures, channels, height, width).
    """

    mean: Tensor
    std: Tensor


class Family(ABC):
    """One kind of pipeline.

    Attributes:
        name: as people call it.
        pipeline: the class in diffusers.
        denoiser: the name of the part that denoises, in the pipeline and in diffusers' file.
        trainable_encoders: names of the text encoders that diffusers' file can hold adapters of.
        pipe: the pipeline.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    denoiser: ClassVar[str]
    trainable_encoders: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        wanted, found = int(self.model_config("in_channels")), int(pipe.vae.config.latent_channels)
        if wanted != found:
            raise ConfigError(
                f"this {self.name} pipeline takes more than noisy latents, as those for inpainting and editing do",
                where=f"{self.denoiser}.config.in_channels",
                found=wanted,
                expected=f"{found}, as the VAE has them",
                fix="take the text-to-image pipeline that it was made from",
            )

    @property
    def model(self) -> nn.Module:
        """The part that denoises."""
        return self.component(self.denoiser)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that can be trained and that this pipeline has."""
        return tuple(name for name in self.trainable_encoders if self.pipe.components.get(name) is not None)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of all parts that can have adapters."""
        return (self.denoiser, *self.text_encoders)

    def component(self, name: str) -> nn.Module:
        """A part by its name."""
        found = self.pipe.components[name]
        assert isinstance(found, nn.Module), name
        return found

    def model_config(self, key: str) -> Any:
        """A setting of the denoiser's."""
        config: Any = self.component(self.denoiser).config
        return config[key]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the denoiser's weights."""
        return next(self.model.parameters()).dtype

    @property
    def multiple(self) -> int:
        """A picture's sides must be multiples of so many pixels."""
        return math.lcm(SIDE, int(self.pipe.vae_scale_factor))

    # Pictures

    def posterior(self, images: Tensor) -> Posterior:
        """The VAE's distribution of the latents of pictures (n, 3, h, w) from −1 to 1, in single precision."""
        with _single(self.pipe.vae), torch.no_grad():
            own = next(self.pipe.vae.parameters())
            found = self.pipe.vae.encode(images.to(own.device, own.dtype)).latent_dist
            return Posterior(found.mean.float().cpu(), found.std.float().cpu())

    def drawn(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        """Latents as the denoiser sees them; `noise` (standard normal) chooses among them, None is the mean.

        Returns:
            Single precision, on the CPU.
        """
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return self.scaled(latents)

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of pictures (n, 3, h, w) from −1 to 1, drawn from the VAE's posterior.

        Args:
            images: the pictures.
            generator: on the CPU; None takes the mean.
        """
        found = self.posterior(images)
        noise = None if generator is None else torch.randn(found.mean.shape, generator=generator)
        return self.drawn(found, noise)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents of the VAE, (…, channels, height, width), as the denoiser sees them."""
        config = self.pipe.vae.config
        factor, shift = float(config.scaling_factor), config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            middle, width = (torch.tensor(each, dtype=latents.dtype).view(-1, 1, 1) for each in (mean, std))
            return (latents - middle) * factor / width
        return (latents - (0.0 if shift is None else float(shift))) * factor

    # Prompts

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told of prompts; differentiable by the text encoders' parameters."""

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that are longer than CLIP's encoders read."""
        names = [name for name in ("tokenizer", "tokenizer_2") if self.pipe.components.get(name) is not None]
        long = []
        for prompt in dict.fromkeys(prompts):
            for tokenizer in (self.pipe.components[name] for name in names):
                if len(tokenizer(prompt, verbose=False).input_ids) > tokenizer.model_max_length:
                    long.append(prompt)
                    break
        return long

    # Training

    @abstractmethod
    def check_training(self) -> None:
        """Raises `ConfigError` where the pipeline's scheduler does not say how it was trained; drawing needs none."""

    def _unsaid(self, expected: str) -> ConfigError:
        """The error for a scheduler from which the noise of the training cannot be told."""
        return ConfigError(
            "the scheduler of this pipeline does not say by which noise it was trained",
            where="scheduler.config",
            found=type(self.pipe.scheduler).__name__,
            expected=expected,
            fix=f"take a pipeline with one of these; by other noise its {self.denoiser} would unlearn what it knows",
        )

    @abstractmethod
    def level(self, shares: Tensor) -> Tensor:
        """How noisy: from numbers that are drawn evenly from [0, 1), (n,), to whole places of the noise schedule."""

    @abstractmethod
    def _squares(self, latents: Tensor, condition: Condition, noise: Tensor, level: Tensor) -> Tensor:
        """The mean squared error of what the denoiser predicts, (n,), in single precision."""

    def weights(self, level: Tensor, min_snr: float) -> Tensor:
        """The weights of min-SNR with this γ, (n,). Raises `ConfigError` where there are none."""
        raise ConfigError(
            f"{self.name} learns by flow matching, whose places are drawn instead of weighed",
            where="min_snr",
            found=min_snr,
            expected="None",
            fix="leave --min-snr out",
        )

    def error(
        self, latents: Tensor, condition: Condition, noise: Tensor, shares: Tensor, *, min_snr: float | None = None
    ) -> Tensor:
        """The loss of each picture.

        Args:
            latents: scaled, (n, channels, height, width).
            condition: a row for each picture.
            noise: standard normal, shaped like the latents.
            shares: from [0, 1), (n,): where in the noise schedule.
            min_snr: γ of min-SNR weighting, or None.

        Returns:
            (n,), single precision, on the denoiser's device.
        """
        place = self.device
        level = self.level(shares.cpu()).to(place)
        losses = self._squares(latents.to(place), condition.to(place), noise.to(place), level)
        return losses if min_snr is None else losses * self.weights(level, min_snr)

    def loss(
        self, latents: Tensor, condition: Condition, generator: torch.Generator, *, min_snr: float | None = None
    ) -> Tensor:
        """The loss of each picture, (n,), under noise and times that a generator on the CPU draws."""
        noise = torch.randn(latents.shape, generator=generator)
        shares = torch.rand(latents.shape[0], generator=generator)
        return self.error(latents, condition, noise, shares, min_snr=min_snr)

    # Places for adapters

    @abstractmethod
    def default_targets(self) -> tuple[str, ...]:
        """The attention projections of the denoiser, as suffixes."""

    def text_targets(self, name: str) -> tuple[str, ...]:
        """Those of a text encoder."""
        return TEXT

    def idle(self, name: str) -> str | None:
        """A regular expression for layers of a text encoder whose output the denoiser is not told; None for none."""
        return None


@contextmanager
def _single(vae: nn.Module) -> Iterator[None]:
    """Within it a VAE is in single precision: in halves, encoders of some pipelines overflow."""
    before = next(vae.parameters()).dtype
    if before in (torch.float32, torch.float64):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(before)
