"""The families that are known, and which of them a pipeline is of.

Stable Diffusion 3 learns the velocity ε − x of a straight line from the latents x to noise ε, at a place σ of it that
is drawn logit-normally (Esser et al. 2024, arXiv:2403.03206). Those with a UNet are in `unets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lorafit.diffusion.conditions import Condition
from lorafit.diffusion.family import ATTENTION, CONTEXT, SIDE, Family
from lorafit.diffusion.library import library
from lorafit.diffusion.unets import StableDiffusion, StableDiffusionXL
from lorafit.errors import ConfigError

__all__ = ["FAMILIES", "Family", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL", "family"]


@final
class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: a transformer, and flow matching."""

    name = "Stable Diffusion 3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    trainable_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.schedule: Any = library().FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def check_training(self) -> None:
        if "shift" not in self.pipe.scheduler.config:
            raise self._unsaid("one of flow matching with a shift, such as FlowMatchEulerDiscreteScheduler")

    @property
    def multiple(self) -> int:
        patch = int(self.model_config("patch_size"))
        return math.lcm(SIDE, int(self.pipe.vae_scale_factor) * patch)

    def encode(self, prompts: Sequence[str]) -> Condition:
        texts = list(prompts)
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts, texts, texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition({"text": embeds, "pooled": pooled})

    def level(self, shares: Tensor) -> Tensor:
        steps = int(self.schedule.config.num_train_timesteps)
        even = shares.double().clamp(1e-6, 1 - 1e-6)
        normal = torch.special.ndtri(even)  # the inverse of the normal distribution's integral
        return (torch.sigmoid(normal) * steps).long().clamp(0, steps - 1)

    def _squares(self, latents: Tensor, condition: Condition, noise: Tensor, level: Tensor) -> Tensor:
        sigmas = self.schedule.sigmas.to(latents.device)[level].to(latents.dtype).view(-1, 1, 1, 1)
        times = self.schedule.timesteps.to(latents.device)[level]
        noisy = ((1 - sigmas) * latents + sigmas * noise).to(self.dtype)
        found: Tensor = self.model(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=condition["text"].to(noisy.dtype),
            pooled_projections=condition["pooled"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return (found.float() - (noise - latents).float()).square().flatten(1).mean(1)

    def default_targets(self) -> tuple[str, ...]:
        return (*ATTENTION, *CONTEXT)


FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3)
"""All that are known."""


def family(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        ConfigError: it is of none that is known, or is one for inpainting or editing.
    """
    diffusers = library()
    for kind in FAMILIES:
        if isinstance(pipe, getattr(diffusers, kind.pipeline)):
            return kind(pipe)
    names = ", ".join(kind.pipeline for kind in FAMILIES)
    parts = [name for name in ("unet", "transformer") if name in pipe.components]
    labelled = isinstance(pipe, diffusers.DiTPipeline)
    raise ConfigError(
        "this pipeline draws classes by their numbers and reads no prompt"
        if labelled
        else "pipelines of this kind are not known here",
        where="pipeline",
        found=type(pipe).__name__,
        expected=f"one of {names}",
        fix=f"in a loop of your own: lorafit.attach(pipe.{(parts or ['unet'])[0]}, lorafit.LoRA(r=8), "
        f"targets={list(ATTENTION)!r})",
    )
