"""The networks of a tiny Stable Diffusion: a variational autoencoder, a text encoder, a UNet, and how noise comes in.

Sizes are chosen by what 30 minutes of two cores can pay. Forward and for one picture of 48 pixels the encoder takes
0.11 billion operations, the decoder 0.28, the UNet 0.25; a step of training takes three times that. Measured on two
cores of an AMD EPYC, 10 minutes are 137,000 pictures for the autoencoder, in bfloat16, and 17 minutes 182,000 for
the UNet, in float32: each of the 1,395 emoji 98 times, and 130. At 64 pixels everything costs 1.8 times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

LATENTS = 4
"""Channels of a latent picture."""
SMALLER = 4
"""A latent picture is so many times smaller each way: two of the autoencoder's three blocks halve it."""


@dataclass(frozen=True)
class Sizes:
    """How large the networks are.

    Attributes:
        pixels: of a picture each way; a multiple of 16.
        autoencoder: channels of its three blocks.
        unet: channels of its three blocks; the last two attend to the text.
        groups: of the UNet's norms; they divide its channels and the sums of neighbours.
        heads: of attention in the UNet.
        text: the width of the text encoder.
        layers: of the text encoder.
        words: pieces of a prompt at most, with the marks of beginning and end.
    """

    pixels: int = 48
    autoencoder: tuple[int, int, int] = (16, 32, 64)
    unet: tuple[int, int, int] = (48, 96, 128)
    groups: int = 16
    heads: int = 4
    text: int = 128
    layers: int = 2
    words: int = 24


TINY = Sizes(pixels=32, autoencoder=(8, 8, 8), unet=(8, 8, 8), groups=4, heads=2, text=16, layers=1)
"""For tests: seconds."""


def autoencoder(sizes: Sizes) -> AutoencoderKL:
    """Pictures to latents and back."""
    return AutoencoderKL(
        block_out_channels=sizes.autoencoder,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=sizes.pixels,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
    )


def denoiser(sizes: Sizes) -> UNet2DConditionModel:
    """Noisy latents, a time and a text to the velocity of the noise."""
    return UNet2DConditionModel(
        sample_size=sizes.pixels // SMALLER,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=sizes.unet,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=sizes.groups,
        attention_head_dim=sizes.heads,  # the number of heads: diffusers calls it so
        cross_attention_dim=sizes.text,
    )


def text_encoder(sizes: Sizes, vocabulary: int) -> CLIPTextModel:
    """Prompts to what the UNet attends to."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            max_position_embeddings=sizes.words,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise, made to end in noise alone, as arXiv:2305.08891 asks for.

    Nearly all of these pictures are white at the corners: were there a rest of the picture in the last step of noise,
    the UNet would learn to look for it, and find none when it draws.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def moments(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pictures (n, 3, h, w) in -1 … 1, in float32."""
    mean, logarithm = vae.encode(pictures).latent_dist.parameters.float().chunk(2, dim=1)
    return mean, logarithm.clamp(-30.0, 20.0).mul(0.5).exp()


@torch.no_grad()
def whiten(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Makes latents with this mean and deviation of each channel have mean 0 and deviation 1, and decodes them alike.

    A pipeline divides by one factor for all channels and takes no mean away; so the two 1 x 1 convolutions that stand
    between encoder and latents, and between latents and decoder, do it.
    """
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into is not None and out is not None
    channels = mean.numel()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation.view(1, -1, 1, 1)
    into.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()


def pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The networks as diffusers' pipeline, in evaluation mode and plain memory."""
    plain: dict[str, Any] = {
        name: module.to(memory_format=torch.contiguous_format).eval()
        for name, module in (("vae", vae), ("text_encoder", text), ("unet", unet))
    }
    made = StableDiffusionPipeline(
        **plain,
        tokenizer=tokenizer,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made
