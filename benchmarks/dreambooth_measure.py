"""What a taught pipeline draws, in numbers: how near samples come to the subject, and how far the rest has drifted.

Pictures are compared by the features of EfficientNet-Lite0, averaged over the places of its last convolution, as the
cosine distance (0 is the same direction); and by the root mean square of their pixels' differences, from 0 to 1. The
pipeline itself tells how well it knows pictures: by the error of what it predicts under noise that is the same before
and after. Each function is called in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import vision_candidates
from benchmarks.dreambooth_trials import Pretrained, Subject

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SIZE = 128
"""Pixels that the features are computed at; pictures are enlarged to it."""
STEPS, GUIDANCE, BATCH = 25, 4.0, 8
SAMPLES, OTHER_SEEDS = 16, 2
"""Seeds of the subject's prompt and of its class's, and of each other prompt."""
OTHERS = ("1f600", "1f34e", "1f697", "1f333", "1f3e0", "26bd", "1f436", "1f42f")
"""Emoji of the other prompts: a face, an apple, a car, a tree, a house, a ball; a dog and a tiger, which are kin."""
KEPT, NOISES = 32, 8
"""Learnt pictures whose error is measured, and noises for each picture."""
TOLD = 32
"""Other prompts that a run is told to keep."""


def constants() -> list[float]:
    """What all measurements depend on: one that was kept with other numbers is not taken for one with these."""
    return [SIZE, STEPS, GUIDANCE, SAMPLES, OTHER_SEEDS, KEPT, NOISES]


Job = tuple[str, str, int]
"""Of a sample: what it is for ("subject", "class" or "other"), the prompt, the seed."""


def jobs(subject: Subject, captions: Sequence[str]) -> list[Job]:
    """All samples, in the order in which they are kept."""
    prompts = (("subject", subject.instance_prompt), ("class", subject.class_prompt))
    own = [(what, prompt, seed) for what, prompt in prompts for seed in range(SAMPLES)]
    return own + [("other", caption, seed) for caption in captions for seed in range(OTHER_SEEDS)]


def others(learnt: Sequence[Mapping[str, Any]]) -> list[str]:
    """The captions of the other prompts."""
    chosen = [row["caption"] for row in learnt if row["file"] in OTHERS]
    return chosen or [row["caption"] for row in learnt[: len(OTHERS)]]


def to_keep(learnt: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Captions that a run may be told to keep: of learnt pictures by which nothing is measured."""
    measured = {*OTHERS, *(row["file"] for row in _kept(learnt))}
    free = [row["caption"] for row in learnt if row["file"] not in measured]
    return tuple(dict.fromkeys(free[:: max(1, len(free) // TOLD)]))[:TOLD]


def _kept(learnt: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The learnt pictures whose error is measured."""
    return learnt[:: max(1, len(learnt) // KEPT)][:KEPT]


def of_the_class(subject: Subject, learnt: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The learnt pictures whose caption can be the prompt of the class."""
    return [row["path"] for row in learnt if subject.class_prompt.endswith(f" {row['head']}, {row['kind']}")]


def measured(
    pretrained: str, word: str, adapter: str | None, samples: str, base: str | None, data: str, threads: int
) -> dict[str, Any]:
    """Draws and measures; the samples are kept in a folder.

    Args:
        pretrained: folder of the pre-training.
        word: the subject's.
        adapter: a run's folder; None is the pipeline as it is.
        samples: folder for the samples.
        base: folder with those of the pipeline as it is; None where this is it.
        data: folder of packages.
        threads: of torch.
    """
    import torch

    from lorafit.diffusion.pipelines import open_pipeline
    from lorafit.diffusion.reading import load

    torch.set_num_threads(threads)
    started = Pretrained(Path(pretrained))
    subject, learnt = started.subject(word), started.learnt()
    pipe = open_pipeline(started.pipeline, dtype=torch.float32, device="cpu")
    if adapter is not None:
        load(pipe, adapter)
    listed = jobs(subject, others(learnt))
    drawn = _drawn(pipe, listed, Path(samples))
    found: dict[str, Any] = {"errors": errors(pipe, subject, learnt)}
    see = Eye(Path(data))
    for key, what in (("near", "subject"), ("class_near", "class")):
        own = [image for image, job in zip(drawn, listed, strict=True) if job[0] == what]
        found[key] = near(see, subject, learnt, own)
    if base is not None:
        found["drift"] = drift(see, drawn, listed, Path(base))
    return found


def reference(pretrained: str, word: str, base: str, data: str, threads: int) -> dict[str, Any]:
    """What the distances are beside: real pictures of the subject, and what another seed alone changes."""
    import torch

    torch.set_num_threads(threads)
    started = Pretrained(Path(pretrained))
    subject, learnt = started.subject(word), started.learnt()
    see = Eye(Path(data))
    listed = jobs(subject, others(learnt))
    chosen = [number for number, (what, _, _) in enumerate(listed) if what == "other"]
    drawn = opened(places(Path(base), listed))
    pairs = [(drawn[one], drawn[one + 1]) for one in chosen[::OTHER_SEEDS]]
    apart = _apart(see, [one for one, _ in pairs], [other for _, other in pairs])
    unseen = opened(sorted(subject.unseen.glob("*.png")))
    return {"real": near(see, subject, learnt, unseen) if unseen else None, "another_seed": apart}


class Eye:
    """Turns pictures into features and into pixels."""

    def __init__(self, data: Path) -> None:
        self._network = vision_candidates.network(data, 2, SIZE, 0)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, channels), each of length 1."""
        import torch
        import torch.nn.functional as F

        with torch.no_grad():
            parts = [
                self._network.extract_features(vision_candidates.ready(some, SIZE)).mean((2, 3))
                for some in bytes_of(images).split(32)
            ]
        return F.normalize(torch.cat(parts), dim=1)


def bytes_of(images: Sequence[Image.Image]) -> Tensor:
    """(pictures, 3, height, width), uint8."""
    import numpy
    import torch

    return torch.stack([torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine distances of rows of length 1, of each to each."""
    return (1 - one @ other.T).clamp(min=0)


def rms(one: Tensor, other: Tensor) -> Tensor:
    """The root mean square difference of pictures in bytes, of each to each, from 0 to 1.

    >>> import torch
    >>> rms(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)).tolist()
    [[1.0, 1.0]]
    """
    left, right = (each.flatten(1).double() / 255 for each in (one, other))
    return (left[:, None] - right[None]).square().mean(2).sqrt()


def near(
    see: Eye, subject: Subject, learnt: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]
) -> dict[str, dict[str, list[float]]]:
    """How far each picture is from the nearest one of the subject and of its class, by features and by pixels.

    Of the subject there are those that were learnt from ("seen"), and those that were never shown ("unseen").
    """
    sides = {
        "seen": sorted(subject.seen.glob("*.png")),
        "unseen": sorted(subject.unseen.glob("*.png")),
        "class": of_the_class(subject, learnt),
    }
    real = {side: opened(paths) for side, paths in sides.items() if paths}
    found: dict[str, dict[str, list[float]]] = {"features": {}, "pixels": {}}
    own, raw = see.features(images), bytes_of(images)
    for side, pictures in real.items():
        found["features"][side] = _least(cosine(own, see.features(pictures)))
        found["pixels"][side] = _least(rms(raw, bytes_of(pictures)))
    return found


def _least(distances: Tensor) -> list[float]:
    values: list[float] = distances.min(1).values.tolist()
    return values


def drift(see: Eye, drawn: Sequence[Image.Image], listed: Sequence[Job], base: Path) -> dict[str, list[float]]:
    """How far each sample of an other prompt is from that of the same seed before."""
    chosen = [number for number, (what, _, _) in enumerate(listed) if what == "other"]
    before = opened([place for number, place in enumerate(places(base, listed)) if number in set(chosen)])
    return _apart(see, [drawn[number] for number in chosen], before)


def _apart(see: Eye, one: Sequence[Image.Image], other: Sequence[Image.Image]) -> dict[str, list[float]]:
    features: list[float] = cosine(see.features(one), see.features(other)).diagonal().tolist()
    pixels: list[float] = rms(bytes_of(one), bytes_of(other)).diagonal().tolist()
    return {"features": features, "pixels": pixels}


def errors(pipe: Any, subject: Subject, learnt: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The mean error of each picture under noises that do not depend on what is measured."""
    import torch

    from lorafit.diffusion.pipelines import family
    from lorafit.diffusion.seeds import generator
    from lorafit.rest import at_rest

    kind = family(pipe)
    kept = _kept(learnt)
    unseen = sorted(subject.unseen.glob("*.png"))
    sides = {
        "subject": (unseen, [subject.instance_prompt] * len(unseen)),
        "learnt": ([row["path"] for row in kept], [row["caption"] for row in kept]),
    }
    found: dict[str, list[float]] = {}
    for side, (paths, prompts) in sides.items():
        if not paths:
            continue
        with at_rest(kind.model), torch.no_grad():
            pixels = bytes_of(opened(paths)).float().div(127.5).sub(1)
            latents, condition = kind.latents(pixels), kind.encode(prompts)
            rows = [kind.loss(latents, condition, generator(0, "error", side, draw)) for draw in range(NOISES)]
        found[side] = torch.stack(rows).mean(0).tolist()
    return found


def strengths(
    pretrained: str, adapters: Mapping[str, str], scales: Sequence[float], samples: str, data: str, threads: int
) -> dict[str, Any]:
    """Subjects alone and together, at several strengths: a row of samples for each, and the distances."""
    import torch

    from lorafit.diffusion import drawing
    from lorafit.diffusion.pipelines import open_pipeline
    from lorafit.diffusion.reading import detach, load, strength

    torch.set_num_threads(threads)
    started = Pretrained(Path(pretrained))
    learnt, see = started.learnt(), Eye(Path(data))
    subjects = {word: started.subject(word) for word in adapters}
    pipe = open_pipeline(started.pipeline, dtype=torch.float32, device="cpu")
    loads: list[tuple[str, Any]] = [*adapters.items(), ("together", dict(adapters))]
    rows = []
    for name, paths in loads:
        handles = load(pipe, paths)
        for word, subject in subjects.items():
            if name not in (word, "together"):
                continue
            row: dict[str, Any] = {"adapters": name, "prompt": word, "scales": []}
            for scale in scales:
                with strength(handles, scale):
                    images = drawing.draw(pipe, [subject.instance_prompt], seeds=range(SAMPLES // 2), steps=STEPS,
                                          guidance=GUIDANCE, batch=BATCH)  # fmt: skip
                place = Path(samples) / f"{name}-{word}-{scale:g}.png"
                drawing.write_png(images[0], place)
                row["scales"].append({"scale": scale, "near": near(see, subject, learnt, images), "sample": place.name})
            rows.append(row)
        detach(handles)
    return {"rows": rows}


def _drawn(pipe: Any, listed: Sequence[Job], folder: Path) -> list[Image.Image]:
    """Draws the samples and keeps them in their folder."""
    from lorafit.diffusion import drawing

    images: list[Image.Image] = []
    for prompt, seeds in _by_prompt(listed):
        images += drawing.draw(pipe, [prompt], seeds=seeds, steps=STEPS, guidance=GUIDANCE, batch=BATCH)
    for image, place in zip(images, places(folder, listed), strict=True):
        drawing.write_png(image, place)
    return images


def _by_prompt(listed: Iterable[Job]) -> list[tuple[str, list[int]]]:
    found: list[tuple[str, list[int]]] = []
    for _, prompt, seed in listed:
        if found and found[-1][0] == prompt:
            found[-1][1].append(seed)
        else:
            found.append((prompt, [seed]))
    return found


def places(folder: Path, listed: Sequence[Job]) -> list[Path]:
    """The files of samples in a folder."""
    return [folder / f"{number:03d}-{what}-{seed}.png" for number, (what, _, seed) in enumerate(listed)]


def opened(paths: Iterable[Path]) -> list[Image.Image]:
    """The pictures of files, in RGB."""
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images
