"""A Stable Diffusion pipeline of some thousand random numbers, and pictures of a subject, without a network."""

from __future__ import annotations

from pathlib import Path

SIDE = 16
"""Pixels of what the pipeline draws."""
TOKENS = 24


def save_pipeline(folder: Path) -> Path:
    """The pipeline, as `save_pretrained` writes it; its tokenizer knows single letters."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=TOKENS
    )
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def save_pictures(folder: Path, count: int = 3) -> Path:
    """Red discs on white, in PNG and JPEG, one with a text of its own."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for place in range(count):
        image = Image.new("RGB", (20 + 4 * place, 20), "white")
        ImageDraw.Draw(image).ellipse((4 + place, 4, 14 + place, 14), fill=(220, 30, 40))
        image.save(folder / (f"{place}.jpg" if place == 1 else f"{place}.png"))
    (folder / "0.txt").write_text("a red disc", encoding="utf-8")
    return folder
