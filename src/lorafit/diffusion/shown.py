"""All pictures of a run with what each shows, and what of a run's settings its pipeline cannot have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lorafit.diffusion import prior
from lorafit.diffusion.family import Family
from lorafit.diffusion.settings import Settings
from lorafit.diffusion.subjects import Gallery, fingerprint
from lorafit.errors import ConfigError, DataError, some

Notify = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Shown:
    """The pictures of a run.

    Attributes:
        subject, prior, held: of the subject, of the class, and of the subject for the held-out loss.
        subject_said, prior_said, held_said: what each of them shows.
        samples: what is drawn on the way.
    """

    subject: Gallery
    subject_said: list[str]
    prior: Gallery | None
    prior_said: list[str]
    held: Gallery | None
    held_said: list[str]
    samples: list[str]

    @property
    def prompts(self) -> list[str]:
        """All that is said of them, each once."""
        return list(dict.fromkeys([*self.subject_said, *self.prior_said, *self.held_said]))

    def fingerprint(self) -> str:
        """Of all pictures and captions."""
        sides = ((self.subject, self.subject_said), (self.prior, self.prior_said), (self.held, self.held_said))
        return fingerprint([(gallery, said) for gallery, said in sides if gallery is not None])

    def tell(self, family: Family, size: int, notify: Notify) -> None:
        """Says what there is, what was small, not read or is cut."""
        for gallery, what in ((self.subject, "subject"), (self.prior, "class"), (self.held, "held out")):
            for line in () if gallery is None else gallery.told(what, size):
                notify(line)
        if self.held is None:
            notify("no eval_images: the held-out loss is on the same pictures, under noise that training never draws")
        for prompt in family.cut([*self.prompts, *self.samples]):
            notify(f"longer than the text encoder reads, and cut: {prompt!r}")


def gather(settings: Settings, pipe: Any, subject: Gallery, held: Gallery | None, notify: Notify) -> Shown:
    """The pictures with their captions; those of the class are drawn where they are missing.

    Raises:
        ConfigError, DataError: as `lorafit.diffusion.prior.gather`; pictures that are trained on and held out, too.
    """
    _check_apart(settings, subject, held)
    said = subject.captions(settings.instance_prompt)
    others = [] if held is None else held.captions(settings.instance_prompt)
    samples = settings.prompts if settings.sample_count else []
    if settings.class_prompt is None:
        return Shown(subject, said, None, [], held, others, samples)
    gallery = prior.gather(pipe, settings, notify)
    return Shown(subject, said, gallery, gallery.captions(settings.class_prompt), held, others, samples)


def _check_apart(settings: Settings, subject: Gallery, held: Gallery | None) -> None:
    """Raises `DataError` for pictures of the subject that are trained on and held out, by their pixels."""
    if held is None:
        return
    learnt = {picture.digest: picture.path.name for picture in subject.pictures}
    both = [f"{picture.path.name} is {learnt[picture.digest]}" for picture in held.pictures if picture.digest in learnt]
    if both:
        raise DataError(
            "pictures that are held out are trained on, too",
            where=settings.eval_images,
            found=f"{some(both, 3)} of {settings.instance_images}",
            expected="pictures that training never sees",
            fix="take them out of one of the two folders, or leave --eval-images out",
        )


def check(settings: Settings, family: Family) -> None:
    """Raises `ConfigError` for settings that a pipeline cannot have."""
    if settings.resolution % family.multiple:
        near = max(family.multiple, round(settings.resolution / family.multiple) * family.multiple)
        raise ConfigError(
            "this pipeline cannot have pictures of this size",
            where="resolution",
            found=settings.resolution,
            expected=f"a multiple of {family.multiple}",
            fix=f"--resolution {near}",
        )
    _check_table(settings, family)
    if settings.min_snr is not None:
        family.weights(torch.zeros(1, dtype=torch.long), settings.min_snr)  # raises where it has no meaning
    if settings.train_text_encoder and not family.text_encoders:
        raise ConfigError(
            "this pipeline has no text encoder that could be trained",
            where="train_text_encoder",
            found="none loaded",
            expected=", ".join(family.trainable_encoders),
            fix="leave --train-text-encoder out",
        )


def _check_table(settings: Settings, family: Family) -> None:
    """Raises `ConfigError` for pictures that are larger than a transformer has places for."""
    config: Any = family.model.config
    most = config.get("pos_embed_max_size")  # Stable Diffusion 3 looks its places up in a table
    if most is None:
        return
    limit = int(most) * int(config["patch_size"]) * int(family.pipe.vae_scale_factor)
    if settings.resolution > limit:
        raise ConfigError(
            "this pipeline cannot have pictures of this size",
            where="resolution",
            found=settings.resolution,
            expected=f"at most {limit}: its transformer knows {most} × {most} places",
            fix=f"--resolution {limit // family.multiple * family.multiple}",
        )
