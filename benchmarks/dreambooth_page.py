"""The section on DreamBooth of docs/results/vision.md, from the stored measurements and from nothing else."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dreambooth_trials import ALONE, CLASS, LORA
from benchmarks.sections import MIB, NOTHING, table, wrapped
from benchmarks.stored import ResultsError

TITLE = "## DreamBooth: a subject out of five pictures"
PRETRAIN = "python examples/emoji_diffusion/pretrain.py"
SHOWN = {
    "subject": "The pictures of the subject, and samples for its prompt before and after",
    "prior": "Samples for other prompts, before and after, from the same seeds",
    "strengths": "Subjects alone and together, at strengths from 0 to 1.25",
}
"""Key of a picture → what it shows."""

Kept = Mapping[str, Any]


def section(results_folder: Path) -> list[str]:
    """The section's lines: a part for each subject that was measured."""
    kept = read(results_folder)
    if not kept:
        return [TITLE, "", f"Not measured yet: `{PRETRAIN}`, then `python -m benchmarks dreambooth`."]
    lines = [TITLE, ""]
    for one in kept:
        lines += [*_part(one), ""]
    return lines


def read(folder: Path) -> list[Kept]:
    """The kept files, by the alphabet of their names."""
    found = []
    for path in sorted(folder.glob("dreambooth-*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ResultsError(f"{path}: {error}") from None
    return found


def _part(one: Kept) -> Iterator[str]:
    found = one["found"]
    settings = found["settings"]
    yield wrapped(_started(found["about"], settings))
    yield ""
    yield f"```bash\n{PRETRAIN}{_asked(found['about']['plan'])}\n{one['command']}\n```"
    yield ""
    yield wrapped(_how(found))
    yield ""
    yield _table(found)
    yield ""
    yield from _bullets(_told(found))
    yield ""
    for key, what in SHOWN.items():
        name = f"dreambooth-{settings['subject']}-{key}.png"
        if name in found["pictures"]:
            yield f"![{what}](pictures/{name})\n"
    yield wrapped(
        "At strength 0 a row shows the pipeline as it was. The sums are exact (`combine`). The samples' mean distance "
        "to the five pictures that the subject was learnt from:"
    )
    yield ""
    yield _strengths(found["strengths"])
    yield ""
    yield wrapped(_where(one))


def _started(about: Kept, settings: Kept) -> str:
    stages = about["stages"]
    count = sum(stage["parameters"] for stage in stages.values())
    minutes = sum(stage["seconds"] for stage in stages.values()) / 60
    word = settings["subject"]
    return (
        f"The pipeline is a Stable Diffusion of {count / 1e6:.1f} million numbers for pictures of {settings['pixels']} "
        f"pixels, trained from nothing on {about['learnt']:,} of Noto's emoji in {minutes:.0f} minutes "
        f"({stages['autoencoder']['steps']:,} steps of {stages['autoencoder']['batch']} pictures for the autoencoder, "
        f"{stages['denoiser']['steps']:,} of {stages['denoiser']['batch']} for UNet and text encoder). No {word} and "
        f"no word for one was among them; what the autoencoder makes of pictures is {about['decibels']['learnt']:.1f} "
        f"dB from those it has learnt, and {about['decibels'][word]:.1f} dB from the {word}s. `lorafit dreambooth` is "
        f"given five pictures under “{settings['instance_prompt']}” and, for the prior, pictures that the pipeline "
        f"itself draws under “{settings['class_prompt']}”{_kept(settings)}."
    )


def _kept(settings: Kept) -> str:
    """What else it is told to keep."""
    keep = settings["keep_prompts"]
    if not keep:
        return ""
    what = f"the caption “{keep[0]}”" if len(keep) == 1 else f"{len(keep)} captions such as “{keep[0]}”"
    return f" and, to be kept as well, under {what}, by which nothing is measured"


def _asked(plan: Kept) -> str:
    """The options of the pre-training that are not its defaults."""
    given = []
    if plan["steps"] is not None:
        given.append(f" --steps {','.join(map(str, plan['steps']))}")
    elif plan["minutes"] != 30:
        given.append(f" --minutes {plan['minutes']:g}")
    given += [f" --pixels {plan['sizes']['pixels']}"] if plan["sizes"]["pixels"] != 48 else []
    return "".join([*given, *([f" --seed {plan['seed']}"] if plan["seed"] else [])])


def _how(found: Kept) -> str:
    settings = found["settings"]
    side = "five other pictures of it that nothing was ever shown" if _own(found) == "unseen" else "its five pictures"
    return (
        f"{settings['steps']} steps each; of {settings['rates']} rates the one with the lowest loss under noise that "
        f"training never draws, then {settings['seeds']} seeds. Distances are between features of EfficientNet-Lite0 "
        f"(cosine). To the subject: of a sample for its prompt to the nearest of {side}; nearer: the share of samples "
        "that are nearer to those than to any picture of the class. The class: the share of samples for the class's "
        "prompt that have become nearer to the subject. Drift: of samples for eight other prompts to those from the "
        "same seeds before. Errors are those of the prediction under fixed noise: on the subject's pictures never "
        "shown, and on pictures of the pre-training with their own captions. `=` marks the nearest and what is not "
        "significantly farther (Holm over all pairs; samples and seeds drawn anew)."
    )


def _table(found: Kept) -> str:
    by = {one["name"]: one for one in found["candidates"]}
    drifts = {place["name"]: place for place in found["ranking"]["drift"]["places"]}
    header = ("", "candidate", "rate", "to the subject", "95 %", "nearer", "class lost", "drift", "95 %",
              "error, subject", "error, learnt", "numbers", "seconds", "peak, MiB")  # fmt: skip
    rows = []
    for place in found["ranking"]["near"]["places"]:
        one = by.get(place["name"])
        seeds = [found["before"]] if one is None else one["seeds"]
        own = drifts.get(place["name"])
        cost = place["cost"]
        rows.append(
            [
                "=" if place["tied"] else str(place["place"]),
                place["name"] if one is None else f"`{place['name']}`",
                NOTHING if one is None else f"{one['rate']:.2g}",
                f"{place['score']:.3f}",
                f"{place['low']:.3f}–{place['high']:.3f}",
                f"{_mean([_nearer(each['near'], _own(found)) for each in seeds]):.0%}",
                f"{_mean([_nearer(each['class_near'], None) for each in seeds]):.0%}",
                NOTHING if own is None else f"{own['score']:.3f}",
                NOTHING if own is None else f"{own['low']:.3f}–{own['high']:.3f}",
                *(_error(seeds, side) for side in ("subject", "learnt")),
                f"{cost['trainable']:,.0f}" if cost["trainable"] else NOTHING,
                f"{cost['seconds']:.0f}" if cost["seconds"] else NOTHING,
                NOTHING if cost["memory"] is None else f"{cost['memory'] / MIB:,.0f}",
            ]
        )
    return table(header, rows)


def _own(found: Kept) -> str:
    return "unseen" if "unseen" in found["before"]["near"]["features"] else "seen"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _nearer(near: Kept, side: str | None) -> float:
    """The share of samples that are nearer to the subject than to its class; None: to any picture of the subject."""
    features = near["features"]
    subject = features[side] if side else [min(rows) for rows in zip(*_subject(features), strict=True)]
    return _mean([float(own < other) for own, other in zip(subject, features["class"], strict=True)])


def _subject(features: Kept) -> list[list[float]]:
    return [features[side] for side in ("seen", "unseen") if side in features]


def _error(seeds: Sequence[Kept], side: str) -> str:
    values = [_mean(each["errors"][side]) for each in seeds if side in each["errors"]]
    return f"{_mean(values):.4f}" if values else NOTHING


def _told(found: Kept) -> Iterator[str]:
    """What the table says, in words."""
    near, drift = found["ranking"]["near"]["places"], found["ranking"]["drift"]["places"]
    before = next(place for place in near if place["kind"] == "base")
    first = next(place for place in near if place["kind"] != "base")
    beside = first["to_base"]
    clear = "" if beside is None or beside["significant"] else ", which is no significant difference"
    yield (
        f"Nearest to the subject comes {first['name']}: {first['score']:.3f} after {before['score']:.3f} before "
        f"training{clear}"
    )
    if found["reference"]["real"] is not None:
        real = found["reference"]["real"]["features"]
        yield (
            f"Real pictures of the subject that nothing was shown are {_mean(real['seen']):.3f} from the five, and "
            f"{_mean(real['class']):.3f} from the class: a sample cannot be asked to come nearer than that"
        )
    copies = found["candidates"][0]
    copied = _mean([_mean(each["near"]["features"]["seen"]) for each in copies["seeds"]])
    yield f"To the five pictures themselves the samples of {copies['name']} are {copied:.3f}: 0 would be copies of them"
    least = drift[0]
    yield (
        f"Other prompts change least by {least['name']} ({least['score']:.3f}); another seed alone changes a sample by "
        f"{_mean(found['reference']['another_seed']['features']):.3f}"
    )
    yield from _prior(found, {place["name"]: place for place in drift})
    yield from _edges(found["candidates"])


def _prior(found: Kept, drifts: Mapping[str, Kept]) -> Iterator[str]:
    """What pictures of the class and of other things are good for."""
    pairs = {frozenset((each["name"], each["other"])): each for each in found["ranking"]["drift"]["differences"]}
    by = {one["name"]: one for one in found["candidates"]}
    for name, without in ((ALONE, "any pictures beside the subject's"), (CLASS, "pictures of other things")):
        if name not in drifts or LORA not in drifts:
            continue
        clear = pairs[frozenset((name, LORA))]["significant"]
        lost = [_mean([_nearer(each["class_near"], None) for each in by[one]["seeds"]]) for one in (name, LORA)]
        yield (
            f"Without {without} the drift of other prompts is {drifts[name]['score']:.3f}, with them "
            f"{drifts[LORA]['score']:.3f} ({'a' if clear else 'no'} significant difference); of the class's own "
            f"samples {lost[0]:.0%} are nearer to the subject without them, {lost[1]:.0%} with them"
        )


def _edges(candidates: Sequence[Kept]) -> Iterator[str]:
    for end, pick in (("highest", max), ("lowest", min)):
        own = [
            f"{one['name']} ({one['rate']:.2g})"
            for one in candidates
            if len(one["search"]) > 1 and one["rate"] == pick(each["rate"] for each in one["search"])
        ]
        if own:
            yield f"The {end} rate that was tried was the best for {', '.join(own)}; one beyond it may be better still"


def _bullets(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield textwrap.fill(f"- {line}.", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _strengths(strengths: Kept) -> str:
    scales = [f"{one['scale']:g}" for one in strengths["rows"][0]["scales"]]
    rows = []
    for row in strengths["rows"]:
        cells = [f"{_mean(one['near']['features']['seen']):.3f}" for one in row["scales"]]
        rows.append([row["adapters"], row["prompt"], *cells])
    return table(("adapters", "prompt of", *scales), rows)


def _where(one: Kept) -> str:
    at = one["machine"]
    commit = (one["commit"]["hash"] or "unknown")[:9] + (", changed" if one["commit"]["changed"] else "")
    packages = {**one["versions"], "diffusers": one["found"]["settings"]["diffusers"]}
    said = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return (
        f"Measured on {one['date'][:10]} at commit {commit}: {at['processor']}, {at['cores']} cores, {at['threads']} "
        f"threads; {said}. Weights of the UNet: {one['found']['about']['weights']['unet']}."
    )
