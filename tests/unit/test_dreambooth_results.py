"""The benchmark of DreamBooth: what it runs and measures, and that its section says what the kept results say."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import child, dreambooth, dreambooth_measure, dreambooth_page, dreambooth_pictures, dreambooth_trials
from benchmarks.__main__ import main
from benchmarks.dreambooth_trials import CANDIDATES, FIGURES, LORA, Pretrained, Trials
from benchmarks.machine import ROOT
from benchmarks.quiet import quiet
from benchmarks.stored import ResultsError

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns a lot
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (120, 120, 120)}


@pytest.mark.parametrize("name", ["dreambooth_trials", "dreambooth_measure", "dreambooth_pictures"])
def test_docstrings(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert tried.attempted > 0 and tried.failed == 0


def plain(colour: str, path: Path | None = None, side: int = 32) -> Image.Image:
    image = Image.new("RGB", (side, side), COLOURS[colour])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return image


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """What the pre-training leaves, without a pipeline worth the name: the cat is red, its class green, others grey."""
    folder = tmp_path / "pretrained"
    (folder / "pipeline" / "unet").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    plan = {"minutes": 20.0, "steps": None, "seed": 0, "sizes": {"pixels": 32}}
    stage = {"steps": 1000, "seconds": 600.0, "batch": 16, "parameters": 1_500_000, "engine": "float32/contiguous"}
    done = {
        "learnt": 3,
        "decibels": {"learnt": 24.0, "cat": 21.5, "monkey": 22.0},
        "stages": {"autoencoder": stage, "denoiser": stage},
        "weights": {"unet": "0123456789abcdef"},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "pretraining.json").write_text(json.dumps(done))
    about = {}
    for word, identifier, colour in (("cat", "sks", "red"), ("monkey", "zwx", "blue")):
        place = folder / "data" / "subjects" / word
        (place / "unseen").mkdir(parents=True)
        for number in range(2):
            plain(colour, place / "seen" / f"{number}.png")
        if word == "cat":
            plain(colour, place / "unseen" / "2.png")
        about[word] = {
            "instance_prompt": f"a picture of {identifier} face, animal mammal",
            "class_prompt": "a picture of face, animal mammal",
        }
    (folder / "data" / "subjects.json").write_text(json.dumps(about))
    rows = []
    for file, name, head, kind, colour in (
        ("1f436", "dog face", "face", "animal mammal", "green"),
        ("1f34e", "red apple", "apple", "food fruit", "grey"),
        ("1f697", "automobile", "automobile", "transport ground", "grey"),
    ):
        plain(colour, folder / "data" / "pictures" / f"{file}.png")
        caption = f"a picture of {name}, {kind}"
        rows.append({"file": file, "name": name, "head": head, "kind": kind, "category": "", "caption": caption})
    (folder / "data" / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


class Colours:
    """An eye that sees the mean colour alone."""

    def features(self, images: list[Image.Image]) -> Tensor:
        means = dreambooth_measure.bytes_of(images).double().mean((2, 3))
        return nn.functional.normalize(means, dim=1)


# What is run -------------------------------------------------------------------------


def trials(folder: Path, tmp_path: Path) -> Trials:
    pretrained = Pretrained(folder)
    return Trials(pretrained, pretrained.subject("cat"), tmp_path / "work", 200, 1, ("a picture of red apple",))


def test_a_run_is_the_command_that_a_user_would_give(started: Path, tmp_path: Path) -> None:
    own = trials(started, tmp_path)
    command = own.command(CANDIDATES["dora"], 1e-3, 2)
    said = " ".join(command)
    assert command[0] == "dreambooth" and "--method dora --r 8" in said and "--resolution 32" in said
    assert "--class-prompt" in command and "--seed 2" in said and "--learning-rate 0.001" in said
    assert "--keep-prompt a picture of red apple" in said
    assert "--class-prompt" not in own.command(CANDIDATES["lora-no-prior"], 1e-3, 2)
    alone = own.command(CANDIDATES["lora-class-alone"], 1e-3, 2)
    assert "--class-prompt" in alone and "--keep-prompt" not in alone
    # Pictures of the class are drawn once for the runs of all seeds.
    commands = [own.command(CANDIDATES[LORA], 1e-3, seed) for seed in (0, 1)]
    assert len({one[one.index("--class-images") + 1] for one in (*commands, command)}) == 1
    assert alone[alone.index("--class-images") + 1] not in said


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_options_of_a_run_are_settings(started: Path, tmp_path: Path, name: str) -> None:
    from lorafit.diffusion.settings import resolve

    words = trials(started, tmp_path).command(CANDIDATES[name], 1e-3, 0)[1:]
    flags: dict[str, Any] = {}
    while words:
        key = words.pop(0)
        value = words.pop(0) if words and not words[0].startswith("--") else True
        flags[key.removeprefix("--")] = [value] if key == "--keep-prompt" else value
    del flags["json"]
    if "keep-prompt" in flags:
        flags["keep_prompts"] = flags.pop("keep-prompt")
    settings = resolve([("the test", flags)], lambda _: None)
    assert settings.max_steps == 200 and settings.method == CANDIDATES[name].options[1]


def test_a_finished_run_is_not_run_again(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    losses = iter([0.5, 0.2, 0.4])

    def ran(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        place = Path(command[command.index("--output-dir") + 1])
        place.mkdir(parents=True)
        (place / "records.jsonl").write_text('{"event": "config", "resolved": {"trainable": 1234}}\n')
        figures = {**dict.fromkeys(FIGURES, 1.0), "eval_loss_after": next(losses), "prior_loss_after": 0.1}
        return subprocess.CompletedProcess(command, 0, f"a word\n{json.dumps(figures)}\n", "")

    monkeypatch.setattr(dreambooth_trials.subprocess, "run", ran)
    own = trials(started, tmp_path)
    search = own.search(CANDIDATES[LORA], 3, 0)
    assert [round(one["loss"], 3) for one in search] == [0.6, 0.3, 0.5]
    assert [one["rate"] for one in search] == [1e-3, 3.16e-3, 9.99e-3], "beyond the best one, as long as that helps"
    assert dreambooth_trials.best(search, LORA) == 3.16e-3
    assert own.ran(CANDIDATES[LORA], search[1]["rate"], 0)["trainable"] == 1234
    assert len(calls) == 3
    place = own.place(CANDIDATES[LORA], search[1]["rate"], 0)
    longer = replace(own, steps=600)
    assert (place / "benchmark.json").is_file()
    assert not (longer.place(CANDIDATES[LORA], search[1]["rate"], 0) / "benchmark.json").is_file(), "of other steps"


def test_a_run_that_fails_is_told_with_its_last_words(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "loading\nerror: no such pipeline\n")
    monkeypatch.setattr(dreambooth_trials.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(child.ChildError, match="no such pipeline"):
        trials(started, tmp_path).ran(CANDIDATES[LORA], 1e-3, 0)


def test_a_rate_that_is_too_high_does_not_end_the_search(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        place = Path(command[command.index("--output-dir") + 1])
        place.mkdir(parents=True)
        end = {"event": "end", "status": "failed", "message": "TrainingError: the loss is not finite"}
        (place / "records.jsonl").write_text(json.dumps(end) + "\n")
        return subprocess.CompletedProcess(command, 1, "", "error: the loss is not finite")

    monkeypatch.setattr(dreambooth_trials.subprocess, "run", run)
    for _ in range(2):
        assert [one["loss"] for one in trials(started, tmp_path).search(CANDIDATES[LORA], 2, 0)] == [None, None]
    assert len(ran) == 2, "what diverged is not run again"


def test_rates_that_came_to_nothing_are_told() -> None:
    with pytest.raises(ResultsError, match="finite at no rate"):
        dreambooth_trials.best([{"rate": 1.0, "loss": None}], LORA)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--candidates", "lora,nothing"], "no such candidate: nothing"),
        (["--candidates", "dora"], "lora has to be among them"),
        (["--seeds", "0"], "--seeds 0"),
        (["--second", "cat"], "the subject itself"),
    ],
    ids=["candidate", "without-lora", "seeds", "second"],
)
def test_wrong_options_are_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dreambooth", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_without_a_pipeline_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dreambooth", str(tmp_path)]) == 1
    assert "pretrain.py" in capsys.readouterr().err


# What is measured --------------------------------------------------------------------


def test_distances_to_the_subject_and_to_its_class(started: Path) -> None:
    pretrained = Pretrained(started)
    subject, learnt = pretrained.subject("cat"), pretrained.learnt()
    assert [path.stem for path in dreambooth_measure.of_the_class(subject, learnt)] == ["1f436"]
    found = dreambooth_measure.near(Colours(), subject, learnt, [plain("red"), plain("green")])
    assert set(found["features"]) == {"seen", "unseen", "class"}
    assert found["features"]["unseen"][0] == pytest.approx(0, abs=1e-6)
    assert found["features"]["class"][0] > 0.5 > found["features"]["class"][1]
    assert found["pixels"]["seen"][0] == 0 and found["pixels"]["class"][1] == 0


def test_drift_is_taken_from_the_same_seeds(started: Path, tmp_path: Path) -> None:
    pretrained = Pretrained(started)
    subject, learnt = pretrained.subject("cat"), pretrained.learnt()
    listed = dreambooth_measure.jobs(subject, dreambooth_measure.others(learnt))
    assert len(listed) == 2 * dreambooth_measure.SAMPLES + 3 * dreambooth_measure.OTHER_SEEDS
    places = dreambooth_measure.places(tmp_path / "before", listed)
    assert len({place.name for place in places}) == len(places)
    for place in places:
        plain("grey", place)
    drawn = [plain("grey") for _ in listed]
    drawn[-1] = plain("red")
    found = dreambooth_measure.drift(Colours(), drawn, listed, tmp_path / "before")
    assert found["features"][:-1] == pytest.approx([0.0] * 5, abs=1e-6)
    assert found["features"][-1] > 0.1 and found["pixels"][-1] > 0.1


def test_what_is_kept_is_not_what_is_measured() -> None:
    learnt = [{"file": f"{number:x}", "caption": f"thing {number}"} for number in range(100)]
    learnt += [{"file": file, "caption": f"measured {file}"} for file in dreambooth_measure.OTHERS]
    keep = dreambooth_measure.to_keep(learnt)
    assert len(keep) == len(set(keep)) == dreambooth_measure.TOLD and not any(one.startswith("me") for one in keep)
    step = len(learnt) // dreambooth_measure.KEPT
    assert not {row["caption"] for row in learnt[::step]} & set(keep)
    assert dreambooth_measure.to_keep(learnt[:3]) == (), "all of a few are measured"


def test_each_prompt_is_drawn_once_with_all_its_seeds(started: Path) -> None:
    pretrained = Pretrained(started)
    listed = dreambooth_measure.jobs(pretrained.subject("cat"), dreambooth_measure.others(pretrained.learnt()))
    grouped = dreambooth_measure._by_prompt(listed)
    assert [len(seeds) for _, seeds in grouped] == [16, 16, 2, 2, 2]
    assert [(prompt, seed) for prompt, seeds in grouped for seed in seeds] == [job[1:] for job in listed]


# Pictures ----------------------------------------------------------------------------


def test_a_picture_gets_by_with_fewer_colours_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy())
    assert dreambooth_pictures.write(noise, tmp_path / "all.png") > 10_000
    monkeypatch.setattr(dreambooth_pictures, "LARGEST", 6_000)
    assert dreambooth_pictures.write(noise, tmp_path / "few.png") <= 6_000
    with Image.open(tmp_path / "few.png") as opened:
        assert opened.size == (64, 64)
    monkeypatch.setattr(dreambooth_pictures, "LARGEST", 100)
    with pytest.raises(ResultsError, match="100 are allowed"):
        dreambooth_pictures.write(noise, tmp_path / "none.png")


def test_rows_are_filled_up_and_enlarged() -> None:
    pictures, said = dreambooth_pictures.placed([("a", [plain("red", side=8)]), ("b", [])], 2)
    assert said == ["a", "b"] and len(pictures) == 4
    assert pictures[0].size == (16, 16) and pictures[1].getpixel((0, 0)) == (255, 255, 255)


def test_committed_pictures_are_small() -> None:
    for path in (ROOT / "docs" / "results" / "pictures").glob("dreambooth-*.png"):
        assert path.stat().st_size <= dreambooth_pictures.LARGEST, path.name


# The section -------------------------------------------------------------------------


def near(subject: float, other: float) -> dict[str, Any]:
    features = {"seen": [subject] * 4, "unseen": [subject + 0.01 * place for place in range(4)], "class": [other] * 4}
    return {"features": features, "pixels": features}


def measured(seed: int, subject: float, drift: float) -> dict[str, Any]:
    own = subject + 0.01 * seed
    return {
        "seed": seed,
        **dict.fromkeys(FIGURES, 0.5),
        "trainable": 1234,
        "adapter_bytes": 5000,
        "near": near(own, 0.3),
        "class_near": near(0.5, 0.2),
        "drift": {"features": [drift, drift / 2, drift, drift + 0.01 * seed], "pixels": [0.1] * 4},
        "errors": {"subject": [0.2, 0.3], "learnt": [0.1]},
    }


@pytest.fixture
def kept(started: Path, tmp_path: Path) -> Path:
    """A file of results as the command leaves it."""
    before = {key: value for key, value in measured(0, 0.6, 0).items() if key in ("near", "class_near", "errors")}
    candidates = [
        {
            "name": name,
            "options": list(CANDIDATES[name].options),
            "rate": 1e-3,
            "search": [] if CANDIDATES[name].like else [{"rate": rate, "loss": 0.5} for rate in (3e-4, 1e-3)],
            "seeds": [measured(seed, subject, drift) for seed in range(3)],
        }
        for name, subject, drift in (
            (LORA, 0.2, 0.1),
            ("dora", 0.25, 0.12),
            ("lora-no-prior", 0.15, 0.4),
            ("lora-class-alone", 0.18, 0.3),
        )
    ]
    scales = [{"scale": scale, "near": near(0.6 - 0.3 * scale, 0.3), "sample": "x.png"} for scale in (0.0, 1.0)]
    found = {
        "about": Pretrained(started).about,
        "settings": {
            "rates": 2, "seeds": 3, "steps": 200, "subject": "cat", "second": "monkey", "pixels": 32,
            "instance_prompt": "a picture of sks face", "class_prompt": "a picture of face", "diffusers": "0.42.1",
            "keep_prompts": ["a picture of red apple, food fruit"],
        },
        "before": before,
        "reference": {"real": near(0.12, 0.33), "another_seed": {"features": [0.35], "pixels": [0.2]}},
        "candidates": candidates,
        "ranking": dreambooth.ranking(before, candidates),
        "strengths": {"rows": [{"adapters": "cat", "prompt": "cat", "scales": scales}]},
        "pictures": {"dreambooth-cat-subject.png": 1000},
    }  # fmt: skip
    where = {
        "date": "2026-01-02T03:04:05",
        "commit": {"hash": "0123456789abcdef", "changed": False},
        "versions": {"torch": "2.13.0"},
        "machine": {"processor": "A processor", "cores": 2, "threads": 2},
    }
    folder = tmp_path / "kept"
    folder.mkdir()
    document = {"kind": "dreambooth", "name": "dreambooth-cat", "command": "python -m benchmarks dreambooth", **where}
    (folder / "dreambooth-cat.json").write_text(json.dumps({**document, "seed": 0, "found": found}))
    return folder


def test_nothing_is_claimed_before_anything_is_measured(tmp_path: Path) -> None:
    lines = dreambooth.section(tmp_path)
    assert lines[0].startswith("## ") and "Not measured yet" in lines[-1]


def test_the_section_says_what_was_kept(kept: Path) -> None:
    text = "\n".join(dreambooth.section(kept))
    found: Mapping[str, Any] = json.loads((kept / "dreambooth-cat.json").read_text())["found"]
    for place in found["ranking"]["near"]["places"]:
        assert f"{place['score']:.3f} | {place['low']:.3f}–{place['high']:.3f}" in text
    assert "| `lora` | 0.001 |" in text and "| before |" in text and "1,234" in text
    assert "0.2500 | 0.1000" in text  # the errors
    said = " ".join(text.split())
    assert "Real pictures of the subject that nothing was shown are 0.120 from the five, and 0.330" in said
    assert "another seed alone changes a sample by 0.350" in said and "highest rate" in said
    assert "under 1 captions such as “a picture of red apple, food fruit”" not in said, "one is no several"
    assert "under the caption “a picture of red apple, food fruit”" in said
    assert "Without any pictures beside the subject's the drift of other prompts is" in said
    assert "Without pictures of other things the drift" in said
    assert "--minutes 20 --pixels 32" in text and "pictures/dreambooth-cat-subject.png" in text
    assert "dreambooth-cat-prior.png" not in text  # was not drawn
    assert "3.0 million numbers" in said and "in 20 minutes" in said


def test_lines_of_the_section_are_not_too_long(kept: Path) -> None:
    lines = "\n".join(dreambooth.section(kept)).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(tables)) == 2  # two tables, each of one width


def test_a_subject_without_unseen_pictures_is_measured_by_the_seen_ones(kept: Path) -> None:
    path = kept / "dreambooth-cat.json"
    document = json.loads(path.read_text())
    found = document["found"]
    for one in (found["before"], *(seed for each in found["candidates"] for seed in each["seeds"])):
        for key in ("near", "class_near"):
            del one[key]["features"]["unseen"]
        del one["errors"]["subject"]
    found["reference"]["real"] = None
    found["ranking"] = dreambooth.ranking(found["before"], found["candidates"])
    path.write_text(json.dumps(document))
    text = " ".join("\n".join(dreambooth.section(kept)).split())
    assert "the nearest of its five pictures" in text and "Real pictures" not in text


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "dreambooth-cat.json").write_text("{")
    with pytest.raises(ResultsError, match=r"dreambooth-cat\.json"):
        dreambooth_page.read(tmp_path)


def test_candidates_come_in_the_order_of_their_distance(kept: Path) -> None:
    found = json.loads((kept / "dreambooth-cat.json").read_text())["found"]
    again = dreambooth.ranking(found["before"], copy.deepcopy(found["candidates"]))
    assert [place["name"] for place in again["near"]["places"]] == [
        "lora-no-prior", "lora-class-alone", "lora", "dora", "before",
    ]  # fmt: skip
    assert [place["name"] for place in again["drift"]["places"]] == [
        "lora",
        "dora",
        "lora-class-alone",
        "lora-no-prior",
    ]


# All of it ---------------------------------------------------------------------------


class Eyelet(nn.Module):
    """A network for features: one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 3)

    def extract_features(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


@pytest.fixture
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "emoji_diffusion"))
        yield importlib.import_module("emoji_networks")


@pytest.mark.slow
def test_all_of_it_on_an_untrained_pipeline(
    started: Path, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = importlib.import_module("emoji_words")
    pairs = words.merges(words.counted(["a picture of dog face, animal mammal"] * 2))
    torch.manual_seed(0)
    pipe = example.pipeline(
        example.autoencoder(example.TINY),
        example.text_encoder(example.TINY, len(words.vocabulary(pairs))),
        words.tokenizer(pairs, example.TINY.words),
        example.denoiser(example.TINY),
    )
    pipe.save_pretrained(started / "pipeline")

    def call(function: str, *, threads: int, **arguments: Any) -> Any:
        module, _, name = function.partition(":")
        with quiet():
            found = getattr(importlib.import_module(f"benchmarks.{module}"), name)(
                **json.loads(json.dumps(arguments)), threads=threads
            )
        return json.loads(json.dumps(found))

    monkeypatch.setattr(child, "call", call)
    eyelet = Eyelet().eval()  # one and the same: what two eyes see could not be compared
    monkeypatch.setattr(dreambooth_measure.vision_candidates, "network", lambda *_: eyelet)
    monkeypatch.setattr(dreambooth_measure, "STEPS", 2)
    monkeypatch.setattr(dreambooth_measure, "SAMPLES", 4)
    monkeypatch.setattr(dreambooth_trials, "CLASS_PICTURES", 4)
    monkeypatch.setattr(dreambooth, "SCALES", (0.0, 1.0))
    arguments = [
        "--rates",
        "1",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--candidates",
        "lora,lora-class-alone,lora-no-prior,vera",
    ]
    places = [
        "--data",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "kept"),
        "--pictures",
        str(tmp_path / "shown"),
    ]
    assert main(["dreambooth", str(started), *arguments, *places, "--threads", "1"]) == 0
    text = "\n".join(dreambooth.section(tmp_path / "kept"))
    assert "`lora-no-prior`" in text and "`vera`" in text
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {
        f"dreambooth-cat-{key}.png" for key in ("subject", "prior", "strengths")
    }
    found = json.loads((tmp_path / "kept" / "dreambooth-cat.json").read_text())["found"]
    first = found["strengths"]["rows"][0]["scales"][0]
    assert first["scale"] == 0  # the pipeline as it was: the samples before training
    before = found["before"]["near"]["features"]["seen"][:2]
    assert first["near"]["features"]["seen"] == pytest.approx(before, abs=5e-3)  # other batches round otherwise
    assert str(tmp_path) not in (tmp_path / "kept" / "dreambooth-cat.json").read_text()
