"""Families with a UNet: they learn what their scheduler says (noise, velocity or the sample) at times drawn evenly.

(Ho et al. 2020, arXiv:2006.11239; weights by Hang et al. 2023, arXiv:2303.09556.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lorafit.diffusion.conditions import Condition
from lorafit.diffusion.family import ATTENTION, Family
from lorafit.diffusion.library import library
from lorafit.errors import ConfigError


class UNet(Family, ABC):
    """Pipelines with a UNet, trained on a schedule of βs."""

    denoiser = "unet"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.schedule: Any = library().DDPMScheduler.from_config(pipe.scheduler.config)
        self.kind = str(self.schedule.config.prediction_type)

    def check_training(self) -> None:
        config = self.pipe.scheduler.config
        if config.get("trained_betas") is None and "beta_start" not in config:
            raise self._unsaid("one with a schedule of betas, as DDPM's, DDIM's, Euler's and DPM-Solver's are")
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                "what this pipeline predicts is not known here",
                where="scheduler.config.prediction_type",
                found=repr(self.kind),
                expected="epsilon, v_prediction or sample",
                fix="take a pipeline with one of these",
            )

    def level(self, shares: Tensor) -> Tensor:
        steps = int(self.schedule.config.num_train_timesteps)
        return (shares * steps).long().clamp(0, steps - 1)

    def weights(self, level: Tensor, min_snr: float) -> Tensor:
        kept: Tensor = self.schedule.alphas_cumprod.to(level.device).float()[level]
        snr = kept / (1 - kept)
        if self.kind == "epsilon":
            return (min_snr / snr).clamp(max=1.0)  # min(SNR, γ) / SNR, where SNR may be 0
        clipped = snr.clamp(max=min_snr)
        return clipped / (snr + 1) if self.kind == "v_prediction" else clipped

    def _squares(self, latents: Tensor, condition: Condition, noise: Tensor, level: Tensor) -> Tensor:
        noisy = self.schedule.add_noise(latents, noise, level)
        found = self._predicted(noisy.to(self.dtype), level, condition)
        found = found[:, : latents.shape[1]]  # some predict a variance, too
        if self.kind == "v_prediction":
            wanted: Tensor = self.schedule.get_velocity(latents, noise, level)
        else:
            wanted = noise if self.kind == "epsilon" else latents
        return (found.float() - wanted.float()).square().flatten(1).mean(1)

    @abstractmethod
    def _predicted(self, noisy: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """What the UNet makes of noisy latents."""

    def default_targets(self) -> tuple[str, ...]:
        return ATTENTION


@final
class StableDiffusion(UNet):
    """Stable Diffusion 1 and 2."""

    name = "Stable Diffusion"
    pipeline = "StableDiffusionPipeline"
    trainable_encoders = ("text_encoder",)

    def encode(self, prompts: Sequence[str]) -> Condition:
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.device, 1, False)
        return Condition({"text": embeds})

    def _predicted(self, noisy: Tensor, level: Tensor, condition: Condition) -> Tensor:
        text = condition["text"].to(noisy.dtype)
        found: Tensor = self.model(noisy, level, encoder_hidden_states=text, return_dict=False)[0]
        return found


@final
class StableDiffusionXL(UNet):
    """Stable Diffusion XL. It is told that a picture was never larger and was not cut, as it is told when it draws."""

    name = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    trainable_encoders = ("text_encoder", "text_encoder_2")

    def encode(self, prompts: Sequence[str]) -> Condition:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition({"text": embeds, "pooled": pooled})

    def _predicted(self, noisy: Tensor, level: Tensor, condition: Condition) -> Tensor:
        factor = int(self.pipe.vae_scale_factor)
        height, width = noisy.shape[2] * factor, noisy.shape[3] * factor
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=noisy.dtype, device=noisy.device)
        added = {"text_embeds": condition["pooled"].to(noisy.dtype), "time_ids": sizes.repeat(noisy.shape[0], 1)}
        text = condition["text"].to(noisy.dtype)
        found: Tensor = self.model(
            noisy, level, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]
        return found

    def idle(self, name: str) -> str | None:
        # Of the first encoder the states before the last layer are used, and no pooled ones.
        if name != "text_encoder":
            return None
        config: Any = self.component(name).config
        return rf"(text_model\.)?encoder\.layers\.{int(config.num_hidden_layers) - 1}\..*"
