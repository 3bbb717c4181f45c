"""The example that pre-trains a tiny pipeline: what it holds out, its words and networks, and what a kill costs.

Nothing here fetches anything: the package of the emoji is one of discs in a few colours.
"""

from __future__ import annotations

import doctest
import importlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from lorafit.errors import DataError, TrainingError

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns a lot
FOLDER = Path(__file__).parents[2] / "examples" / "emoji_diffusion"
OTHERS = {
    "1f436": ("DOG FACE", "Animals & Nature", "animal-mammal"),
    "1f98a": ("FOX FACE", "Animals & Nature", "animal-mammal"),
    "1f42f": ("TIGER FACE", "Animals & Nature", "animal-mammal"),
    "1f600": ("GRINNING FACE", "Smileys & Emotion", "face-smiling"),
    "1f602": ("FACE WITH TEARS OF JOY", "Smileys & Emotion", "face-smiling"),
    "1f34e": ("RED APPLE", "Food & Drink", "food-fruit"),
    "1f697": ("AUTOMOBILE", "Travel & Places", "transport-ground"),
    "1f408": ("CAT", "Animals & Nature", "animal-mammal"),
    "1f1eb-1f1f7": ("FRANCE FLAG", "Flags", "country-flag"),
    "1f3fb": ("EMOJI MODIFIER", "Component", "skin-tone"),
    "2795": ("HEAVY PLUS SIGN", "Symbols", "math"),
}
LEARNT = {"dog face", "fox face", "tiger face", "grinning face", "face with tears of joy", "red apple", "automobile"}
Example = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    """Imports a module of the example: the folder is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


@pytest.fixture(scope="module")
def archive(example: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as npm packs it, with both subjects and a few others."""
    listed = dict(OTHERS)
    for subject in example("emoji_pictures").SUBJECTS:
        for number, file in enumerate((*subject.seen, *subject.unseen)):
            listed[file] = (f"{subject.word} face {number}", "Smileys & Emotion", f"{subject.word}-face")
    path = tmp_path_factory.mktemp("npm") / "emoji.tgz"
    with tarfile.open(path, "w:gz") as opened:
        for number, file in enumerate(listed):
            add(opened, f"package/img/google/64/{file}.png", disc(number))
        add(opened, "package/emoji.json", json.dumps([record(*each) for each in listed.items()]).encode())
    return path


def record(file: str, told: tuple[str, str, str]) -> dict[str, Any]:
    name, category, kind = told
    return {"name": name, "image": f"{file}.png", "category": category, "subcategory": kind, "has_img_google": True}


def disc(number: int) -> bytes:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 40 + number % 17), fill=(50 * number % 256, 90, 200, 255))
    raw = io.BytesIO()
    image.save(raw, "PNG")
    return raw.getvalue()


def add(opened: tarfile.TarFile, name: str, raw: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(raw)
    opened.addfile(about, io.BytesIO(raw))


@pytest.mark.parametrize("name", ["emoji_pictures", "emoji_words", "emoji_training"])
def test_docstrings(example: Example, name: str) -> None:
    tried = doctest.testmod(example(name))
    assert tried.attempted > 0 and tried.failed == 0


# What is learnt from -----------------------------------------------------------------


def test_subjects_and_their_relatives_are_held_out(example: Example, archive: Path, tmp_path: Path) -> None:
    pictures = example("emoji_pictures")
    pictures.write(archive, tmp_path / "data", 48)
    learnt = pictures.listed(tmp_path / "data")
    assert {one.name for one in learnt} == LEARNT
    assert {path.stem for path in (tmp_path / "data" / "pictures").iterdir()} == {one.file for one in learnt}
    about = json.loads((tmp_path / "data" / "subjects.json").read_text())
    assert "cat" in about["cat"]["held_out"] and len(about["cat"]["held_out"]) == 11
    for subject in pictures.SUBJECTS:
        for part in ("seen", "unseen"):
            found = {path.stem for path in (tmp_path / "data" / "subjects" / subject.word / part).iterdir()}
            assert found == set(getattr(subject, part))
    assert not (tmp_path / "data.partial").exists()


def test_five_pictures_to_learn_from_and_none_of_them_twice(example: Example) -> None:
    files = [file for each in example("emoji_pictures").SUBJECTS for file in (*each.seen, *each.unseen)]
    assert len(files) == len(set(files))
    assert all(len(each.seen) == 5 for each in example("emoji_pictures").SUBJECTS)


def test_what_is_transparent_is_white(example: Example) -> None:
    image = example("emoji_pictures").on_white(disc(3), 48)
    assert image.size == (48, 48) and image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((24, 20)) == (150, 90, 200)


def test_another_file_than_the_package_is_told(example: Example, tmp_path: Path) -> None:
    (tmp_path / "emoji.tgz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="not the package of the emoji"):
        example("emoji_pictures").write(tmp_path / "emoji.tgz", tmp_path / "data", 48)
    assert not (tmp_path / "data").exists()


# Words -------------------------------------------------------------------------------


def test_a_frequent_word_is_one_piece_and_any_word_can_be_spelled(example: Example, tmp_path: Path) -> None:
    words = example("emoji_words")
    captions = ["a picture of dog face, animal mammal", "a picture of fox face, animal mammal"]
    tokenizer = words.tokenizer(words.merges(words.counted(captions)), 24)
    pieces = tokenizer.tokenize(captions[0])
    assert pieces[:3] == ["a</w>", "picture</w>", "of</w>"] and pieces[-1] == "mammal</w>"
    end = tokenizer.eos_token_id
    for text in ("sks", "zwx 7-9!", "qqq"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == 0 and ids[-1] == end == 1
        assert end not in ids[1:-1], f"{text}: a piece of it is not known"
    assert tokenizer("").input_ids == [0, 1]
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.model_max_length == 24
    for text in (*captions, "sks", ""):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_captions_of_all_forms_are_numbered_and_cut_ones_counted(example: Example) -> None:
    pictures, words, pretrain = (example(name) for name in ("emoji_pictures", "emoji_words", "pretrain"))
    one = pictures.Emoji("1f436", "dog face", "face", "animal mammal", "")
    tokenizer = words.tokenizer(words.merges(words.counted([one.caption("full")] * 2)), 24)
    ids, cut = pretrain.numbered(tokenizer, [one, one], 24)
    assert ids.shape == (2, len(pictures.FORMS), 24) and cut == 0
    assert ids[0, -1].tolist() == [0] + [1] * 23  # the empty one: beginning, end, and what fills up
    _, cut = pretrain.numbered(tokenizer, [one], 6)
    assert cut == 3  # the empty one is short enough


# Networks ----------------------------------------------------------------------------


def test_whitening_changes_no_picture(example: Example) -> None:
    networks = example("emoji_networks")
    torch.manual_seed(0)
    vae = networks.autoencoder(networks.TINY).eval()
    mean, deviation = torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.tensor([0.2, 3.0, 1.0, 0.7])
    shown = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, spread = networks.moments(vae, shown)
        drawn = vae.decode(before).sample
        networks.whiten(vae, mean, deviation)
        after, narrower = networks.moments(vae, shown)
        again = vae.decode(after).sample
    shape = (1, -1, 1, 1)
    torch.testing.assert_close(after, (before - mean.view(shape)) / deviation.view(shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrower, spread / deviation.view(shape), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, drawn, atol=1e-5, rtol=1e-4)


def test_latents_have_mean_zero_and_deviation_one(example: Example) -> None:
    networks, pretrain = example("emoji_networks"), example("pretrain")
    torch.manual_seed(0)
    vae = networks.autoencoder(networks.TINY).eval()
    shown = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = pretrain.latents_of(vae, shown)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    spread = mean.var((0, 2, 3)) + deviation.square().mean((0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-4, rtol=0)
    again = pretrain.encoded(vae, shown)
    torch.testing.assert_close(again[0], mean, atol=1e-4, rtol=1e-3)


def test_the_networks_cost_what_is_said_of_them(example: Example) -> None:
    networks = example("emoji_networks")
    sizes = networks.Sizes()
    said = " ".join(networks.__doc__.split())
    vae, unet = networks.autoencoder(sizes).eval(), networks.denoiser(sizes).eval()
    side = sizes.pixels // networks.SMALLER
    latents, told = torch.randn(1, 4, side, side), torch.randn(1, sizes.words, sizes.text)
    with torch.no_grad():
        for what, call, billions in (
            ("the encoder takes 0.11 billion", lambda: vae.encode(torch.randn(1, 3, sizes.pixels, sizes.pixels)), 0.11),
            ("the decoder 0.28", lambda: vae.decode(latents), 0.28),
            ("the UNet 0.25", lambda: unet(latents, torch.tensor([5]), told), 0.25),
        ):
            assert what in said
            with FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() == pytest.approx(billions * 1e9, rel=0.15), what


def test_noise_ends_in_noise_alone(example: Example) -> None:
    schedule = example("emoji_networks").scheduler()
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-6)
    noise = torch.randn(1, 4, 8, 8)
    found = schedule.add_noise(torch.full((1, 4, 8, 8), 9.0), noise, torch.tensor([999]))
    torch.testing.assert_close(found, noise, atol=1e-2, rtol=0)


# Training ----------------------------------------------------------------------------


def test_budgets(example: Example) -> None:
    training = example("emoji_training")
    assert training.Minutes(2.0).progress(10_000, 60.0) == 0.5
    assert training.Steps(8).progress(2, 1e9) == 0.25


def test_a_plan_shares_the_minutes(example: Example) -> None:
    pretrain, networks = example("pretrain"), example("emoji_networks")
    settings = pretrain.Settings(30.0, None, 0, "auto", (1e-3, 1e-3), networks.TINY)
    minutes = [settings.plan(name).budget.minutes for name in pretrain.SHARES]
    assert 25 < sum(minutes) < 28.5  # what is left is for what is no training


def test_other_settings_do_not_go_on(example: Example, tmp_path: Path) -> None:
    pretrain, training = example("pretrain"), example("emoji_training")
    settings = pretrain.Settings(30.0, None, 0, "auto", (1e-3, 1e-3), example("emoji_networks").TINY)
    training.settled(tmp_path, settings)
    training.settled(tmp_path, settings)
    other = pretrain.Settings(30.0, None, 1, "auto", (1e-3, 1e-3), example("emoji_networks").TINY)
    with pytest.raises(TrainingError, match="other settings") as caught:
        training.settled(tmp_path, other)
    assert "seed = 1" in str(caught.value)


def test_trying_engines_changes_nothing(example: Example) -> None:
    pretrain, networks, training = (example(name) for name in ("pretrain", "emoji_networks", "emoji_training"))
    torch.manual_seed(0)
    vae = networks.autoencoder(networks.TINY)
    stage = pretrain.Autoencoding(vae, torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8))
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    said: list[str] = []
    engine = training._engine(stage, training.Plan(training.Steps(1), 2, 1e-3, 0, "auto"), said.append)
    assert engine in training.ENGINES.values() and engine.name in said[-1]
    for parameter, own in zip(stage.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, own)


@pytest.mark.parametrize("engine", ["float32/contiguous", "float32/channels-last", "bfloat16/channels-last"])
def test_the_autoencoder_learns(example: Example, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain, networks, training = (example(name) for name in ("pretrain", "emoji_networks", "emoji_training"))
    monkeypatch.setattr(training, "WARMUP", 1)
    torch.manual_seed(0)
    vae = networks.autoencoder(networks.TINY)
    shown = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    before = pretrain.fidelity(vae.eval(), shown)
    plan = training.Plan(training.Steps(40), 4, 1e-2, 0, engine)
    about = training.train(pretrain.Autoencoding(vae, shown), plan, tmp_path, lambda _: None)
    assert about["steps"] == 40 and about["engine"] == engine
    assert pretrain.fidelity(vae, shown) > before + 1
    assert all(parameter.is_contiguous() for parameter in vae.parameters())


@pytest.mark.slow
def test_pretraining_goes_on_after_a_kill_as_if_nothing_had_been(
    example: Example, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.diffusion.drawing import draw
    from lorafit.diffusion.pipelines import open_pipeline

    pretrain, networks, training = (example(name) for name in ("pretrain", "emoji_networks", "emoji_training"))
    monkeypatch.setattr(training, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(training, "SAID_EVERY", 1)
    monkeypatch.setattr(pretrain, "SAMPLER", {"steps": 2, "guidance": 4.0})

    def ran(name: str, stop: str | None = None) -> int:
        def say(message: str) -> None:
            if stop is not None and message.startswith(stop):
                raise KeyboardInterrupt

        monkeypatch.setattr(pretrain, "say", say)
        common = ["--emoji", str(archive), "--steps", "3,3", "--engine", "float32/contiguous"]
        status: int = pretrain.main([*common, "--output", str(tmp_path / name)], sizes=networks.TINY)
        return status

    assert ran("whole") == 0
    assert ran("killed", "autoencoder: step 2") == 130
    assert ran("killed", "denoiser: step 2") == 130
    assert not (tmp_path / "killed" / "pipeline").exists()
    assert ran("killed") == 0
    found = {name: json.loads((tmp_path / name / "pretraining.json").read_text()) for name in ("whole", "killed")}
    assert set(found["whole"]["weights"]) == {"unet", "text_encoder", "vae"}
    assert found["killed"]["weights"] == found["whole"]["weights"]
    assert found["whole"]["stages"]["denoiser"]["steps"] == 3
    assert ran("whole") == 0  # it is there already

    pipe = open_pipeline(tmp_path / "whole" / "pipeline", dtype=torch.float32, device="cpu")
    drawn = draw(pipe, ["a picture of dog face, animal mammal"], seeds=[0], steps=2)
    assert drawn[0].size == (32, 32)
    assert (tmp_path / "whole" / "sheet.png").is_file()
