"""DreamBooth runs on tiny pipelines: what they leave, any method, going on to the bit, class pictures, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lorafit as lf

pytest.importorskip("diffusers", reason="pipelines need diffusers")

from lorafit.diffusion import heldout, prior
from lorafit.diffusion.family import Family
from lorafit.diffusion.heldout import Held
from lorafit.diffusion.pipelines import family, open_pipeline
from lorafit.diffusion.pools import Pool, Pools
from lorafit.diffusion.reading import load
from lorafit.diffusion.stepping import seeded
from lorafit.diffusion.subjects import paths_of, read_gallery
from lorafit.exporting.diffusers import WEIGHTS
from tests.diffusion import tiny
from tests.diffusion.tiny import adapter_of, events, same

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns a lot, and some methods say what files cannot hold
Run = Callable[..., Any]


# What a run leaves


def test_a_run_from_settings_to_adapter(train: Run, settings: Run, tmp_path: Path) -> None:
    said: list[str] = []
    given = settings(class_prompt="a disc", num_class_images=2, sample_every=2, max_steps=6, learning_rate=3e-2)
    outcome = train(given, said)
    folder = tmp_path / "run"
    assert outcome.status == "done" and outcome.steps == 6 and outcome.adapter == folder / "adapter"
    assert [path.name for path in outcome.sheets] == [f"step-00000{step}.png" for step in (0, 2, 4, 6)]
    assert Image.open(outcome.sheets[0]).size == (1 * 16 + 8, 2 * 16 + 12), "two prompts, one seed"
    assert len(list((folder / "class").glob("drawn-*.png"))) == 2
    steps = events(folder, "step")
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5, 6]
    for one in steps:
        assert one["loss"] == pytest.approx(one["instance_loss"] + one["prior_loss"])
        assert one["learning_rate"] == 3e-2 and one["grad_norm"] > 0
    evaluations = events(folder, "evaluation")
    assert [one["step"] for one in evaluations] == [0, 2, 4, 6]
    assert outcome.eval_before == evaluations[0]["loss"] and outcome.prior_after == evaluations[-1]["prior_loss"]
    assert [one["step"] for one in events(folder, "saved")] == [2, 4, 6]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert outcome.verdict is not None and events(folder, "end")[-1]["status"] == "done"
    assert any("pictures of the class" in line for line in said) and any("subject: 3 pictures" in line for line in said)
    assert (folder / "adapter" / "README.md").is_file()
    pipe = open_pipeline(given.pipeline, device="cpu")
    base = tiny.denoised(pipe)
    handles = load(pipe, folder)
    assert list(handles) == ["unet"] and not torch.allclose(tiny.denoised(pipe), base, atol=1e-3)
    again = train(given)
    assert again.status == "already done" and again.steps == 6 and again.verdict == outcome.verdict
    assert len(again.sheets) == 4 and again.eval_after == outcome.eval_after


def test_the_loss_on_the_subject_falls(train: Run, settings: Run) -> None:
    options = {"targets": ["attention", "convolutions"], "r": 4, "max_steps": 40, "evaluate_every": 10, "batch_size": 2}
    alone = train(settings(**options))
    assert alone.eval_after < 0.95 * alone.eval_before, "a network of random numbers has much to learn"
    assert alone.verdict is not None and alone.verdict.kind in ("still improving", "converged", "undecided")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "targets": ["attention", "convolutions"], "dropout": 0.2},
        {"method": "lora", "init": "pissa"},
        {"method": "lora", "init": "eva"},
        {"method": "lora-plus"},
        {"method": "lora-fa"},
        {"method": "vera", "r": 4},
        {"method": "dora"},
        {"method": "delta-lora", "start": 2},
        {"method": "adalora", "r": None, "init_r": 4, "target_r": 2, "interval": 1, "max_steps": 10},
        {"method": "intrinsic", "r": None, "d": 60},
        {"method": "lora-drop", "sample": 0.5, "threshold": 0.5},
    ],
    ids=lambda options: "-".join(str(options[key]) for key in ("method", "init") if key in options),
)
def test_any_method_of_the_household(train: Run, settings: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    given = settings(**options)
    outcome = train(given)
    assert outcome.status == "done"
    pipe = open_pipeline(given.pipeline, device="cpu")
    base = tiny.denoised(pipe)
    load(pipe, outcome.adapter)
    assert not torch.equal(tiny.denoised(pipe), base)
    assert (outcome.adapter / WEIGHTS).is_file() == (options["method"] != "intrinsic")
    if options["method"] == "lora-drop":
        (drop,) = events(tmp_path / "run", "drop")
        assert 0 < len(drop["kept"]) < len(drop["scores"]) and sum(drop["scores"].values()) == pytest.approx(1)
        assert json.loads((tmp_path / "run" / "drop.json").read_text())["kept"] == drop["kept"]
    if options["method"] == "adalora":
        assert events(tmp_path / "run", "schedule")


@pytest.mark.parametrize("name", list(tiny.MADE))
@pytest.mark.parametrize("more", [{}, {"train_text_encoder": True}], ids=["denoiser", "text"])
def test_every_family_with_and_without_text_encoders(
    train: Run, settings: Run, name: str, more: dict[str, Any]
) -> None:
    given = settings(name, gradient_checkpointing=True, class_prompt="a disc", num_class_images=2, **more)
    outcome = train(given)
    pipe = open_pipeline(given.pipeline, device="cpu")
    kind = family(pipe)
    handles = load(pipe, outcome.adapter)
    assert tuple(handles) == (kind.components if more else (kind.denoiser,))
    for handle in handles.values():
        assert any(float(handle.delta(path).abs().max()) > 0 for path in handle.sites)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"min_snr": 5.0}, {"crop": "random", "views": 3, "flip": True}], ids=str
)
def test_other_settings_of_a_run(train: Run, settings: Run, options: dict[str, Any]) -> None:
    outcome = train(settings(**options, gradient_accumulation_steps=2, batch_size=2, lr_scheduler_type="cosine"))
    assert outcome.status == "done" and all(value.dtype is torch.float32 for value in adapter_of(outcome).values())


def test_gradient_checkpointing_changes_nothing_but_rounding(train: Run, settings: Run, tmp_path: Path) -> None:
    found = [
        adapter_of(train(settings(output_dir=str(tmp_path / str(cheap)), gradient_checkpointing=cheap)))
        for cheap in (False, True)
    ]
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-3, atol=1e-5)


def test_a_trial_needs_no_more_room_than_a_step(train: Run, settings: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def error(self: Family, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append((self.model.training, self.model.is_gradient_checkpointing))
        return plain(self, *args, **kwargs)

    plain = Family.error
    monkeypatch.setattr(Family, "error", error)
    train(settings(method="lora-drop", gradient_checkpointing=True))
    assert len(seen) > 4 and set(seen) == {(True, True)}


def test_what_is_said_of_other_pictures_rests_on_so_many_pictures(train: Run, settings: Run, tmp_path: Path) -> None:
    held = tiny.discs(tmp_path / "held", 2, (30, 160, 40))
    train(settings(eval_images=str(held), evaluation_draws=3, max_steps=2))
    progress = json.loads((tmp_path / "run" / "checkpoint-2" / "progress.json").read_text())
    sums = progress["evaluations"][0][1]
    assert len(sums) == 2
    train(settings(evaluation_draws=3, max_steps=2, output_dir=str(tmp_path / "other")))
    progress = json.loads((tmp_path / "other" / "checkpoint-2" / "progress.json").read_text())
    assert len(progress["evaluations"][0][1]) == 9  # three noises for each of the learnt three


def test_gradients_that_are_never_finite_end_a_run_in_half_precision(
    train: Run, settings: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(self: Family, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = plain(self, *args, **kwargs)
        if losses.requires_grad:
            losses.register_hook(lambda grad: grad * math.inf)
        return losses

    plain = Family.error
    monkeypatch.setattr(Family, "error", error)
    with pytest.raises(lf.TrainingError, match="gradients are not finite") as caught:
        train(settings(dtype="float16", max_steps=100, sample_count=0, save_every=100, evaluate_every=100))
    assert 10 < int(str(caught.value.where).rpartition(" ")[2]) < 30, "not before the scale has had its chance"


def test_held_out_pictures_of_the_subject(train: Run, settings: Run, tmp_path: Path) -> None:
    held = tiny.discs(tmp_path / "held", 2, (30, 160, 40))
    outcome = train(settings(eval_images=str(held)))
    assert events(tmp_path / "run", "data")[0]["held_out_pictures"] == 2 and outcome.eval_before is not None


def test_samples_change_nothing(train: Run, settings: Run, tmp_path: Path) -> None:
    plain = train(settings(output_dir=str(tmp_path / "plain"), dropout=0.3))
    drawn = train(settings(output_dir=str(tmp_path / "drawn"), dropout=0.3, sample_every=1, evaluate_every=1))
    assert same(adapter_of(plain), adapter_of(drawn))


# Pictures of the class


def test_class_pictures_are_used_drawn_and_not_mixed_up(train: Run, settings: Run, tmp_path: Path) -> None:
    place = tiny.discs(tmp_path / "class", 1, (20, 30, 200))
    given = {"class_prompt": "a disc", "class_images": str(place), "num_class_images": 3}
    train(settings(**given))
    names = sorted(path.name for path in place.iterdir())
    assert names == ["0.png", "drawn-000000.png", "drawn-000001.png"]
    first = (place / "drawn-000000.png").read_bytes()
    origin = json.loads(Image.open(place / "drawn-000000.png").info["lorafit"])
    assert origin["prompt"] == "a disc" and origin["size"] == 16 and isinstance(origin["seed"], int)
    (place / "drawn-000000.png").unlink()
    said: list[str] = []
    train(settings(**given, output_dir=str(tmp_path / "again"), seed=99), said)
    assert (place / "drawn-000000.png").read_bytes() == first, "drawn again as it was, by a run with another seed, too"
    assert any("draws 1 picture of the class" in line for line in said)
    said.clear()
    train(settings(**{**given, "num_class_images": 2}, output_dir=str(tmp_path / "fewer"), seed=5), said)
    assert not any(line.startswith("draws") for line in said), "runs of any seed share what is there"
    with pytest.raises(lf.ConfigError, match="drawn from something else"):
        train(settings(**{**given, "class_prompt": "a ring"}, output_dir=str(tmp_path / "other")))
    assert train(settings(**given, output_dir=str(tmp_path / "other"))).status == "done", "what failed is cleared up"


def test_other_prompts_are_kept_beside_the_class(train: Run, settings: Run, tmp_path: Path) -> None:
    place = tiny.discs(tmp_path / "class", 1, (20, 30, 200))
    given = {"class_prompt": "a disc", "class_images": str(place), "keep_prompts": ["an apple", "a car"]}
    said: list[str] = []
    train(settings(**given, num_class_images=6), said)
    drawn = [json.loads(Image.open(path).info["lorafit"])["prompt"] for path in sorted(place.glob("drawn-*.png"))]
    assert drawn == ["a disc", "an apple", "a disc", "a car", "a disc"]
    assert any("'a disc' and of 2 other prompts, into" in line for line in said)
    run = settings(**given, num_class_images=6)
    assert "class: 6 pictures, 2 with a caption of their own" in said
    pipe = tiny.made("sd")
    gallery = prior.gather(pipe, run, said.append)
    assert gallery.captions("a disc") == ["a disc", *drawn]
    (place / "0.txt").write_text("a blue disc")
    assert prior.gather(pipe, run, said.append).captions("a disc") == ["a blue disc", *drawn]
    with pytest.raises(lf.ConfigError, match=r"drawn from something else[\s\S]*prompt 'an apple'[\s\S]*'a pear'"):
        train(settings(**{**given, "keep_prompts": ["a pear"]}, output_dir=str(tmp_path / "other")))


def test_no_prompt_to_keep_is_left_without_a_picture(train: Run, settings: Run, tmp_path: Path) -> None:
    place = tiny.discs(tmp_path / "class", 2, (20, 30, 200))
    given = {"class_prompt": "a disc", "keep_prompts": ["an apple", "a car"]}
    with pytest.raises(lf.ConfigError, match=r"num_class_images[\s\S]*at least 4"):
        train(settings(**given, num_class_images=3))
    with pytest.raises(lf.ConfigError, match=r"beside 2 in[\s\S]*--num-class-images 6"):
        train(settings(**given, class_images=str(place), num_class_images=5))
    assert sorted(path.name for path in place.iterdir()) == ["0.png", "1.png"], "told before anything is drawn"


def test_the_loss_on_the_class_is_of_all_that_is_kept() -> None:
    chosen = {tuple(heldout._chosen(64, 8, torch.Generator().manual_seed(seed))) for seed in range(5)}
    assert len(chosen) == 5
    for places in chosen:
        assert [place // 8 for place in places] == list(range(8))
    assert {place % 2 for places in chosen for place in places} == {0, 1}


def test_pictures_that_come_to_a_shared_folder_later_change_nothing(train: Run, settings: Run, tmp_path: Path) -> None:
    place = tmp_path / "class"
    tiny.discs(place, 1, (20, 30, 200))
    (place / "0.png").rename(place / "own.png")  # whose name comes after those of drawn ones
    given = {"class_prompt": "a disc", "class_images": str(place), "num_class_images": 2}
    first = train(settings(**given))
    train(settings(**{**given, "num_class_images": 4}, output_dir=str(tmp_path / "more")))
    assert [path.name for path in paths_of(place)] == [
        "own.png", "drawn-000000.png", "drawn-000001.png", "drawn-000002.png",
    ]  # fmt: skip
    (tmp_path / "run" / "result.json").unlink()
    again = train(settings(**given))
    assert again.resumed_from == 4 and again.prior_after == first.prior_after


def test_prior_loss_weight_of_nought_is_no_prior(train: Run, settings: Run, tmp_path: Path) -> None:
    train(settings(class_prompt="a disc", num_class_images=2, prior_loss_weight=0.0))
    for step in events(tmp_path / "run", "step"):
        assert step["loss"] == pytest.approx(step["instance_loss"]) and step["prior_loss"] > 0


# Parts


def test_batches_depend_on_their_number_alone(settings: Run, subject: Path) -> None:
    given = settings(batch_size=2, crop="random", views=3)
    kind = family(tiny.made("sd"))
    gallery = read_gallery(subject)
    pool = Pool.of("subject", kind, gallery, ["a", "b", "c"], given)
    places = [pool.place(number) for number in range(9)]
    assert [sorted(places[start : start + 3]) for start in (0, 3, 6)] == [[0, 1, 2]] * 3
    pools = Pools(kind, pool, None, given)
    first = pools.batch(5)
    for number in range(5):
        pools.batch(number)
    torch.randn(7)
    again = pools.batch(5)
    assert first.prompts == again.prompts and torch.equal(first.latents, again.latents)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.shares, again.shares)
    assert not torch.equal(first.noise, pools.batch(6).noise)
    held = Held("subject", pool, kind, given)
    assert len(held) == 6 and not torch.equal(held._noise[0], first.noise[0])
    shares = held._shares.view(3, 2)
    assert bool(((shares[:, 0] < 0.5) & (shares[:, 1] >= 0.5)).all()), "one time from each half of the schedule"


def test_dropout_is_seeded_and_torch_left_alone() -> None:
    before = torch.random.get_rng_state()
    with seeded(5, torch.device("cpu")):
        first = torch.rand(3)
    with seeded(5, torch.device("cpu")):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.random.get_rng_state())


# Refusals


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"resolution": 20}, lf.ConfigError, ["multiple of 8", "--resolution"]),
        ({"instance_images": "nowhere"}, lf.DataError, ["nowhere"]),
        ({"eval_images": "nowhere"}, lf.DataError, ["held-out"]),
        ({"pipeline": "."}, lf.ConfigError, ["model_index.json"]),
        ({"targets": ["to_x"]}, lf.TargetError, ["to_x", "to_q"]),
        (
            {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 8},
            lf.TrainingError,
            ["not finite", "learning rate"],
        ),
    ],
    ids=["size", "pictures", "held-out", "pipeline", "targets", "diverged"],
)
def test_what_cannot_be_is_named(
    train: Run, settings: Run, tmp_path: Path, options: dict[str, Any], kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as error:
        train(settings(**options))
    assert all(word in str(error.value) for word in words), error.value
    assert events(tmp_path / "run", "end")[-1]["status"] == "failed"


def test_min_snr_has_no_meaning_for_flow_matching(train: Run, settings: Run) -> None:
    with pytest.raises(lf.ConfigError, match="flow matching"):
        train(settings("sd3", min_snr=5.0))


def test_several_processes_are_refused(train: Run, settings: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(lf.ConfigError, match="one process"):
        train(given)
