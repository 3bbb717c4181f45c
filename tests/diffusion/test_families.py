"""Each family against the plainest way to write its loss, latents and conditions; and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

import diffusers

from lorafit.diffusion.families import StableDiffusion, StableDiffusion3, StableDiffusionXL, family
from lorafit.diffusion.places import adapt, adapt_encoders, convolutions, sites_of, targets_of
from tests.diffusion import tiny

pytestmark = pytest.mark.filterwarnings("ignore", "error::lorafit.errors.LorafitWarning")  # diffusers warns a lot
KINDS = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}


def batch(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (count, 4, tiny.SIDE // 2, tiny.SIDE // 2)
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return latents, noise, torch.tensor([0.02, 0.5, 0.97])[:count]


@pytest.mark.parametrize("name", list(KINDS))
def test_a_pipeline_is_of_its_family(name: str) -> None:
    kind = family(tiny.made(name))
    assert type(kind) is KINDS[name]
    assert kind.model is getattr(kind.pipe, kind.denoiser)
    assert set(kind.components) <= set(kind.pipe._lora_loadable_modules)
    assert kind.multiple == 8


@pytest.mark.parametrize("name", list(KINDS))
def test_the_loss_is_one_number_a_picture_and_repeats(name: str) -> None:
    kind = family(tiny.made(name))
    latents, _, _ = batch()
    condition = kind.encode(["a disc", "a sks disc", ""])
    first, again = (kind.loss(latents, condition, torch.Generator().manual_seed(2)) for _ in range(2))
    assert first.shape == (3,) and torch.equal(first, again) and bool(torch.isfinite(first).all())
    other = kind.loss(latents, condition, torch.Generator().manual_seed(3))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_a_unet_by_hand(kind: str) -> None:
    pipe = tiny.sd(prediction_type=kind)
    own = family(pipe)
    latents, noise, shares = batch()
    condition = own.encode(["a disc"] * 3)
    times = torch.tensor([20, 500, 970])
    kept = pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    wanted = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * latents,
    }[kind]
    with torch.no_grad():
        found = pipe.unet(noisy, times, encoder_hidden_states=condition["text"]).sample
        losses = own.error(latents, condition, noise, shares)
    torch.testing.assert_close(losses, (found - wanted).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_by_hand(kind: str) -> None:
    pipe = tiny.sd(prediction_type=kind)
    own = family(pipe)
    level = torch.tensor([0, 300, 999])
    kept = pipe.scheduler.alphas_cumprod[level].double()
    snr = kept / (1 - kept)
    least = torch.minimum(snr, torch.tensor(5.0))
    wanted = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    torch.testing.assert_close(own.weights(level, 5.0).double(), wanted, rtol=1e-4, atol=1e-6)
    latents, noise, shares = batch()
    condition = own.encode(["a disc"] * 3)
    with torch.no_grad():
        plain = own.error(latents, condition, noise, shares)
        weighed = own.error(latents, condition, noise, shares, min_snr=5.0)
    torch.testing.assert_close(weighed, plain * own.weights(own.level(shares), 5.0))


def test_the_loss_of_flow_matching_by_hand() -> None:
    pipe = tiny.sd3()
    own = family(pipe)
    latents, noise, shares = batch()
    condition = own.encode(["a disc", "x", ""])
    places = own.level(shares)
    assert places.tolist() == sorted(places.tolist()) and int(own.level(torch.tensor([0.5]))) in (499, 500)
    sigma = pipe.scheduler.sigmas[places]
    assert bool((sigma[:-1] > sigma[1:]).all()), "the schedule begins with noise"
    mixed = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        found = pipe.transformer(
            hidden_states=mixed,
            timestep=sigma * 1000,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
        ).sample
        losses = own.error(latents, condition, noise, shares)
    torch.testing.assert_close(losses, (found - (noise - latents)).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(lf.ConfigError, match="min-snr"):
        own.error(latents, condition, noise, shares, min_snr=5.0)


def test_the_places_of_flow_matching_are_logit_normal() -> None:
    own = family(tiny.sd3())
    shares = (torch.arange(2000) + 0.5) / 2000
    found = (own.level(shares).double() + 0.5) / 1000
    normal = torch.logit(found)
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02


@pytest.mark.parametrize("name", list(KINDS))
def test_latents_are_scaled_as_decoding_undoes_it(name: str) -> None:
    pipe = tiny.made(name)
    own = family(pipe)
    images = torch.rand(2, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(images).latent_dist.mean
    latents = own.latents(images)
    config = pipe.vae.config
    if name == "sdxl":
        middle, width = (torch.tensor(each).view(1, 4, 1, 1) for each in (config.latents_mean, config.latents_std))
        back = latents * width / config.scaling_factor + middle
    else:
        back = latents / config.scaling_factor + (config.shift_factor or 0.0)
    torch.testing.assert_close(back, mean)
    torch.testing.assert_close(own.scaled(mean[0]), latents[0])
    drawn, again = (own.latents(images, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(drawn, again) and not torch.equal(drawn, latents)


def test_a_half_vae_encodes_in_single_precision_and_stays_half() -> None:
    pipe = tiny.sd()
    own = family(pipe)
    images = torch.rand(1, 3, tiny.SIDE, tiny.SIDE)
    pipe.vae.to(torch.bfloat16)
    found = own.posterior(images)
    assert found.mean.dtype is torch.float32 and next(pipe.vae.parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize("name", list(KINDS))
def test_conditions_are_the_pipelines_own(name: str) -> None:
    pipe = tiny.made(name)
    own = family(pipe)
    found = own.encode(["a disc", "a sks disc"])
    alone = own.encode(["a sks disc"])
    assert len(found) == 2
    for key in found.tensors:
        torch.testing.assert_close(found.take([1])[key], alone[key])
    if name == "sd":
        ids = pipe.tokenizer(["a disc"], padding="max_length", max_length=tiny.TOKENS, return_tensors="pt").input_ids
        torch.testing.assert_close(found["text"][:1], pipe.text_encoder(ids).last_hidden_state)
    assert own.cut(["a disc", "a very long prompt indeed"]) == ["a very long prompt indeed"]


def test_what_is_of_no_known_family_is_refused_by_name() -> None:
    with pytest.raises(lf.ConfigError) as error:
        family(tiny.dit())
    text = str(error.value)
    assert "DiTPipeline" in text and "reads no prompt" in text and "attach(pipe.transformer" in text
    assert "StableDiffusion3Pipeline" in text
    with pytest.raises(lf.ConfigError, match="inpainting"):
        family(tiny.sd(in_channels=9))
    with pytest.raises(lf.ConfigError, match="flow_prediction"):
        family(tiny.sd(prediction_type="flow_prediction")).check_training()


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", diffusers.FlowMatchEulerDiscreteScheduler),
        ("sdxl", diffusers.EDMEulerScheduler),
        ("sd3", diffusers.DDPMScheduler),
    ],
)
def test_noise_that_a_pipeline_was_not_trained_by_is_never_assumed(name: str, scheduler: Any) -> None:
    pipe = tiny.made(name)
    family(pipe).check_training()
    pipe.scheduler = scheduler()
    own = family(pipe)  # enough to read and draw by
    with pytest.raises(lf.ConfigError, match="by which noise it was trained") as error:
        own.check_training()
    assert error.value.found == scheduler.__name__


@pytest.mark.parametrize("scheduler", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler])
def test_other_ways_to_draw_keep_the_noise_that_was_trained_by(scheduler: Any) -> None:
    pipe = tiny.made("sd")
    before = family(pipe).schedule.alphas_cumprod
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    own = family(pipe)
    own.check_training()
    assert torch.equal(own.schedule.alphas_cumprod, before)


def test_the_transformer_of_a_class_pipeline_can_be_adapted() -> None:
    transformer = tiny.dit().transformer
    x, times, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    with torch.no_grad():
        base = transformer(x, times, labels).sample
    handle = lf.attach(transformer, lf.LoRA(r=2), targets=["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        transformer(x, times, labels).sample.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        adapted = transformer(x, times, labels).sample
        assert not torch.allclose(adapted, base)
        handle.merge()
        torch.testing.assert_close(transformer(x, times, labels).sample, adapted, rtol=1e-4, atol=1e-5)
    handle.detach()
    with torch.no_grad():
        assert torch.equal(transformer(x, times, labels).sample, base)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (name, targets)
        for name in KINDS
        for targets in (None, "all-linear", "convolutions", ["attention", "convolutions"])
    ],
    ids=str,
)
def test_every_adapted_layer_learns(name: str, targets: Any) -> None:
    kind = family(tiny.made(name))
    handle = adapt(kind, lf.LoRA(r=2), targets=targets, seed=0)
    assert list(handle.sites) == list(sites_of(kind, targets))
    latents, noise, shares = batch()
    condition = kind.encode(["a disc"] * 3)
    optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        kind.error(latents, condition.detached(), noise, shares).mean().backward()
        optimizer.step()  # raises where an adapter got no gradient


@pytest.mark.parametrize("name", list(KINDS))
def test_every_adapted_layer_of_the_text_encoders_learns(name: str) -> None:
    kind = family(tiny.made(name))
    handles = adapt_encoders(kind, lf.LoRA(r=2), seed=0)
    assert tuple(handles) == kind.text_encoders
    latents, noise, shares = batch()
    optimizers = [handle.optimizer(torch.optim.AdamW, lr=1e-2) for handle in handles.values()]
    kind.error(latents, kind.encode(["a disc"] * 3), noise, shares).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    if name == "sdxl":  # of its first encoder the last layer is not looked at
        assert all("layers.0." in path for path in handles["text_encoder"].sites)
        assert any("layers.1." in path for path in handles["text_encoder_2"].sites)


def test_words_for_targets() -> None:
    kind = family(tiny.sd())
    assert targets_of(kind, "attention") == list(kind.default_targets()) == targets_of(kind, None)
    assert targets_of(kind, "re.*") == "re.*" and targets_of(kind, ["to_q"]) == ["to_q"]
    modules = dict(kind.model.named_modules())
    named = list(sites_of(kind, "convolutions"))
    every = [path for path, module in modules.items() if isinstance(module, torch.nn.Conv2d)]
    assert named == [path for path in every if path not in ("conv_in", "conv_out")] and len(named) == len(every) - 2
    assert set(sites_of(kind, ["convolutions", "conv_in", "conv_out"])) == set(every)
    with pytest.raises(lf.TargetError, match="no convolutions"):
        convolutions(tiny.text_encoder())
    with pytest.raises(lf.TargetError, match="stands alone"):
        targets_of(kind, ["attention", "all-linear"])
