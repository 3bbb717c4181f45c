"""Pre-trains a tiny Stable Diffusion on Noto's emoji in half an hour of two cores, and leaves two subjects out of it.

    python examples/emoji_diffusion/pretrain.py --output build/emoji-diffusion

What comes to be is a pipeline as diffusers saves them, with a text encoder, words, an autoencoder and a UNet of its
own: `build/emoji-diffusion/pipeline`. Beside it lie the pictures that it has learnt from, the subjects that it has
never seen, a sheet of samples and `pretraining.json`. After a kill the same command goes on. npm fetches the emoji;
where it cannot, `--emoji` names the package's file. `examples/emoji_diffusion/README.md` tells the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

import emoji_networks as networks
import emoji_pictures as pictures
import emoji_words as words
import numpy
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from emoji_networks import Sizes
from emoji_training import ENGINES, Budget, Engine, Minutes, Plan, Stage, Steps, settled, train
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lorafit import files
from lorafit.diffusion.drawing import draw, sheet, write_png
from lorafit.errors import LorafitError

SHARES = {"autoencoder": 0.34, "denoiser": 0.58}
"""Of the minutes. The rest is for imports, for the fastest way to compute a step, for encoding and for the samples."""
BATCHES = {"autoencoder": 16, "denoiser": 32}
RATES = {"autoencoder": 2e-3, "denoiser": 1e-3}
KL = 1e-3
"""Weight of the latents' divergence from noise, both per number of a picture."""
LEVELS = 3
"""Of the pyramid that pictures are compared on: what is blurred is seen at the first, what is displaced at all."""
SHOWN = ("1f600", "1f436", "1f98a", "1f34e", "1f697", "1f333", "1f3e0", "26bd")
"""Emoji on the sheet: a smiling face, a dog, a fox, an apple, a car, a tree, a house, a ball."""
SEEDS = (0, 1, 2, 3)
SAMPLER = {"steps": 25, "guidance": 4.0}


@dataclass(frozen=True)
class Settings:
    """What a run depends on; `plan.json` keeps it."""

    minutes: float | None
    steps: tuple[int, int] | None
    seed: int
    engine: str
    rates: tuple[float, float]
    sizes: Sizes

    def plan(self, name: str) -> Plan:
        """How a stage is trained."""
        place = list(SHARES).index(name)
        budget: Budget = Minutes((self.minutes or 0.0) * SHARES[name])
        if self.steps is not None:
            budget = Steps(self.steps[place])
        return Plan(budget, BATCHES[name], self.rates[place], self.seed, self.engine)


@final
class Autoencoding(Stage):
    """The autoencoder: pictures, turned and mirrored at random, are to come out as they went in."""

    name = "autoencoder"

    def __init__(self, vae: AutoencoderKL, shown: Tensor) -> None:
        self.vae, self.shown, self.modules = vae, shown, (vae,)

    @property
    def count(self) -> int:
        return len(self.shown)

    def loss(self, chosen: Tensor, drawn: torch.Generator, engine: Engine) -> Tensor:
        turns = int(torch.randint(4, (1,), generator=drawn))
        mirrored = bool(torch.rand(1, generator=drawn) < 0.5)
        x = self.shown[chosen].float().div(127.5).sub(1).rot90(turns, (2, 3))
        x = (x.flip(3) if mirrored else x).contiguous(memory_format=engine.memory)
        with engine.computing():
            mean, deviation = networks.moments(self.vae, x)
            latents = mean + deviation * torch.randn(mean.shape, generator=drawn)
            made = self.vae.decode(latents, return_dict=False)[0].float()
        divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).flatten(1).sum(1).mean()
        return pyramid(made, x) + KL * divergence / x[0].numel()


@final
class Denoising(Stage):
    """UNet and text encoder: what noise was added to the latents of a picture with this caption."""

    name = "denoiser"

    def __init__(
        self, unet: UNet2DConditionModel, text: CLIPTextModel, latents: tuple[Tensor, Tensor], captions: Tensor
    ) -> None:
        self.unet, self.text, self.modules = unet, text, (unet, text)
        self.mean, self.deviation = latents
        self.captions = captions  # (pictures, forms, words)
        self.forms = torch.tensor(list(pictures.FORMS.values()))
        self.schedule = networks.scheduler()

    @property
    def count(self) -> int:
        return len(self.mean)

    def loss(self, chosen: Tensor, drawn: torch.Generator, engine: Engine) -> Tensor:
        mean, deviation = self.mean[chosen], self.deviation[chosen]
        latents = mean + deviation * torch.randn(mean.shape, generator=drawn)
        noise = torch.randn(mean.shape, generator=drawn)
        times = torch.randint(self.schedule.config.num_train_timesteps, (len(chosen),), generator=drawn)
        forms = torch.multinomial(self.forms, len(chosen), replacement=True, generator=drawn)
        noisy = self.schedule.add_noise(latents, noise, times).contiguous(memory_format=engine.memory)
        told = self.text(self.captions[chosen, forms])[0]
        with engine.computing():
            found = self.unet(noisy, times, encoder_hidden_states=told, return_dict=False)[0]
        return F.mse_loss(found.float(), self.schedule.get_velocity(latents, noise, times))


def pyramid(made: Tensor, wanted: Tensor) -> Tensor:
    """The mean absolute difference of pictures, as they are and at half and quarter size."""
    total = F.l1_loss(made, wanted)
    for _ in range(LEVELS - 1):
        made, wanted = F.avg_pool2d(made, 2), F.avg_pool2d(wanted, 2)
        total = total + F.l1_loss(made, wanted)
    return total / LEVELS


def opened(paths: Sequence[Path]) -> Tensor:
    """Pictures as (n, 3, height, width), uint8."""
    rows = []
    for path in paths:
        with Image.open(path) as image:
            rows.append(torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(rows)


@torch.no_grad()
def encoded(vae: AutoencoderKL, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of all pictures."""
    parts = [networks.moments(vae, some.float().div(127.5).sub(1)) for some in shown.split(64)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([deviation for _, deviation in parts])


@torch.no_grad()
def fidelity(vae: AutoencoderKL, shown: Tensor) -> float:
    """How alike pictures are to what the autoencoder makes of them: the mean signal-to-noise ratio in decibels."""
    ratios = []
    for some in shown.split(64):
        x = some.float().div(127.5).sub(1)
        made = vae.decode(networks.moments(vae, x)[0], return_dict=False)[0].clamp(-1, 1)
        ratios.append(-10 * ((made - x).square().flatten(1).mean(1) / 4).log10())
    return torch.cat(ratios).mean().item()


def latents_of(vae: AutoencoderKL, shown: Tensor) -> tuple[Tensor, Tensor]:
    """The latents of all pictures, after the autoencoder is made to give each channel mean 0 and deviation 1."""
    mean, deviation = encoded(vae, shown)
    middle = mean.mean((0, 2, 3))
    width = (mean.var((0, 2, 3)) + deviation.square().mean((0, 2, 3))).sqrt()
    networks.whiten(vae, middle, width)
    shape = (1, -1, 1, 1)
    return (mean - middle.view(shape)) / width.view(shape), deviation / width.view(shape)


def numbered(tokenizer: CLIPTokenizer, shown: Sequence[pictures.Emoji], length: int) -> tuple[Tensor, int]:
    """The captions of all pictures in all forms as (pictures, forms, words), and how many of them were cut."""
    texts = [one.caption(form) for one in shown for form in pictures.FORMS]
    cut = sum(len(ids) > length for ids in tokenizer(texts, verbose=False).input_ids)
    found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return found.view(len(shown), len(pictures.FORMS), length), cut


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Runs the example; 1 is a failure that is told."""
    options = parser().parse_args(arguments)
    try:
        run(options, sizes)
    except LorafitError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped: the same command goes on, from a minute ago at most")
        return 130
    return 0


def run(options: argparse.Namespace, sizes: Sizes | None) -> None:
    """All of it; what is there already is not done again."""
    out = Path(options.output)
    settings = Settings(
        None if options.steps else options.minutes,
        options.steps,
        options.seed,
        options.engine,
        (options.rates[0], options.rates[1]),
        sizes or Sizes(pixels=options.pixels),
    )
    out.mkdir(parents=True, exist_ok=True)
    settled(out, settings)
    if (out / "pipeline").is_dir():
        say(f"{out / 'pipeline'} is there already")
        return
    if not (out / "data").is_dir():
        archive = Path(options.emoji) if options.emoji else pictures.fetched(out)
        pictures.write(archive, out / "data", settings.sizes.pixels)
    shown = pictures.listed(out / "data")
    say(f"{len(shown):,} emoji to learn from; held out: {', '.join(each.word for each in pictures.SUBJECTS)}")
    pairs = words.merges(words.counted(one.caption("full") for one in shown))
    finish(out, settings, shown, pairs)


def finish(out: Path, settings: Settings, shown: Sequence[pictures.Emoji], pairs: Sequence[words.Merge]) -> None:
    """Trains both stages and saves what they make; the pipeline comes to be at once, last of all."""
    torch.manual_seed(settings.seed)
    sizes = settings.sizes
    vae = networks.autoencoder(sizes)
    unet = networks.denoiser(sizes)
    text = networks.text_encoder(sizes, len(words.vocabulary(pairs)))
    drawings = opened([out / "data" / "pictures" / f"{one.file}.png" for one in shown])
    done = {"autoencoder": train(Autoencoding(vae, drawings), settings.plan("autoencoder"), out, say)}
    latents = latents_of(vae, drawings)
    away = {
        subject.word: fidelity(vae, opened(sorted((out / "data" / "subjects" / subject.word).rglob("*.png"))))
        for subject in pictures.SUBJECTS
    }
    told = {"learnt": fidelity(vae, drawings), **away}
    say(f"autoencoder, decibels: {', '.join(f'{name} {value:.1f}' for name, value in told.items())}")
    captions, cut = numbered(words.tokenizer(pairs, sizes.words), shown, sizes.words)
    if cut:
        say(f"{cut:,} of {captions.shape[0] * captions.shape[1]:,} captions are longer than {sizes.words} words: cut")
    done["denoiser"] = train(Denoising(unet, text, latents, captions), settings.plan("denoiser"), out, say)
    pipe = networks.pipeline(vae, text, words.tokenizer(pairs, sizes.words), unet)
    partial = out / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    sampled(pipe, shown, out / "sheet.png")
    about = {
        "emoji": pictures.PACKAGE,
        "learnt": len(shown),
        "captions_cut": cut,
        "decibels": told,
        "stages": done,
        "weights": {path.parent.name: digest(path) for path in sorted(partial.glob("*/*.safetensors"))},
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }
    files.write_text(out / "pretraining.json", json.dumps(about, indent=1) + "\n")
    partial.replace(out / "pipeline")
    say(f"{out / 'pipeline'}: saved; {out / 'sheet.png'} shows what it draws")


def sampled(pipe: Any, shown: Sequence[pictures.Emoji], path: Path) -> None:
    """A sheet: some captions, and what is drawn for each."""
    chosen = [one for one in shown if one.file in SHOWN] or list(shown[: len(SHOWN)])
    drawn = draw(pipe, [one.caption("full") for one in chosen], seeds=SEEDS, **SAMPLER)
    write_png(sheet(drawn, columns=len(SEEDS), rows_said=[one.name for one in chosen]), path)


def digest(path: Path) -> str:
    """SHA-256 of a file, the first 16 digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def pair(kind: type) -> Any:
    """What reads an option of two values, one for each stage."""

    def read(value: str) -> tuple[Any, ...]:
        found = tuple(kind(part) for part in value.split(","))
        if len(found) != 2 or min(found) <= 0:
            raise argparse.ArgumentTypeError(f"two numbers above 0 with a comma between them, not {value}")
        return found

    return read


def positive(value: str) -> float:
    """What reads a number above 0."""
    if not float(value) > 0:
        raise argparse.ArgumentTypeError(f"a number above 0, not {value}")
    return float(value)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--output", default="build/emoji-diffusion", help="the run's folder (%(default)s)")
    made.add_argument("--emoji", help=f"the file {pictures.FILE}; npm fetches it where it is not given")
    made.add_argument("--minutes", type=positive, default=30.0, help="for all of it (%(default)s)")
    made.add_argument("--steps", type=pair(int), help="of autoencoder and denoiser, instead of minutes: 1000,2000")
    made.add_argument("--pixels", type=int, choices=(32, 48, 64), default=48, help="of a picture (%(default)s)")
    made.add_argument("--rates", type=pair(float), default=tuple(RATES.values()), help="learning rates of the two")
    made.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (%(default)s)")
    made.add_argument(
        "--engine", choices=("auto", *ENGINES), default="auto", help="how steps are computed; auto tries all (auto)"
    )
    return made


def say(message: str) -> None:
    """A line for people, at once."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
