"""Pipelines of some thousand random numbers, one of each family, and pictures of a subject; no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SIDE = 16
"""Pixels of what the pipelines draw."""
TOKENS = 16


def tokenizer() -> Any:
    """CLIP's kind, which knows single letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def text_encoder(*, projects: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = len(tokenizer())
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **options,
    ).eval()


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": SIDE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **options}).eval()


def sd(*, prediction_type: str = "epsilon", in_channels: int = 4) -> Any:
    """Stable Diffusion."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(in_channels=in_channels),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Stable Diffusion XL, whose VAE has a mean and a width of its latents."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 2.0, 0.5, 1.0)),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projects=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sd3() -> Any:
    """Stable Diffusion 3, without its largest text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder(projects=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projects=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def dit() -> Any:
    """DiT, which is told a class and no prompt."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE // 2,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler())


MADE: Mapping[str, Callable[[], Any]] = {"sd": sd, "sdxl": sdxl, "sd3": sd3}
"""The families that are known."""


def made(name: str) -> Any:
    """A pipeline of a family, quiet."""
    pipe = MADE[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoised(pipe: Any, prompt: str = "a disc") -> torch.Tensor:
    """What the denoiser predicts for fixed latents and a prompt, through the text encoders."""
    from lorafit.diffusion.families import family

    kind = family(pipe)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, SIDE // 2, SIDE // 2, generator=generator).to(kind.dtype)
    with torch.no_grad():
        condition = kind.encode([prompt, prompt])
        if kind.denoiser == "transformer":
            return pipe.transformer(
                hidden_states=latents,
                timestep=torch.tensor([700.0, 40.0]),
                encoder_hidden_states=condition["text"],
                pooled_projections=condition["pooled"],
                return_dict=False,
            )[0]
        return kind._predicted(latents, torch.tensor([700, 40]), condition)


def shaken(handles: Mapping[str, Any], *, seed: int = 1, by: float = 0.2) -> None:
    """Moves everything that adapters train."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for handle in handles.values():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * by)


def discs(folder: Path, count: int = 3, color: tuple[int, int, int] = (220, 30, 40)) -> Path:
    """Discs on white."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for place in range(count):
        image = Image.new("RGB", (20 + 4 * place, 20), "white")
        ImageDraw.Draw(image).ellipse((4 + place, 4, 14 + place, 14), fill=color)
        image.save(folder / f"{place}.png")
    return folder


def adapted(pipe: Any, method: Any, *, encoders: bool = True, targets: Any = None, seed: int = 1) -> dict[str, Any]:
    """Adapters with random values on all parts."""
    from lorafit.diffusion.families import family
    from lorafit.diffusion.places import adapt, adapt_encoders

    kind = family(pipe)
    handles = {kind.denoiser: adapt(kind, method, targets=targets, seed=0)}
    if encoders:
        handles |= adapt_encoders(kind, method, seed=0)
    shaken(handles, seed=seed)
    return handles


def saved(name: str, folder: Path, method: Any, **options: Any) -> torch.Tensor:
    """Writes a random adapter; what the adapted pipeline predicts."""
    from lorafit.diffusion.saving import save

    pipe = made(name)
    save(adapted(pipe, method, **options), folder)
    return denoised(pipe)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """The records of an event in a run's folder."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def adapter_of(outcome: Any) -> dict[str, torch.Tensor]:
    """The tensors of diffusers' file of a run."""
    from safetensors.torch import load_file

    return load_file(outcome.adapter / "pytorch_lora_weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
