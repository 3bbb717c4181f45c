"""The measurements on pictures and sentences: each candidate learns, and a kill loses one run at most."""

from __future__ import annotations

import doctest
import importlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import child, vision, vision_candidates, vision_data, vision_encoders
from benchmarks.__main__ import main
from benchmarks.child import ChildError
from benchmarks.stored import ResultsError
from benchmarks.vision_candidates import CANDIDATES, DEFAULT, ready
from benchmarks.vision_data import Part, Pictures

ROOT = Path(__file__).parents[2]
SIZE = 16


class Padded(nn.Conv2d):
    """Pads inside of its forward, as the convolutions of EfficientNet-Lite do."""

    def __init__(self, inn: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inn, out, kernel, stride=stride, groups=groups, bias=False)
        edge = (kernel - 1) // 2
        self.edges = nn.ZeroPad2d((0, kernel - 1, 0, kernel - 1)) if stride > 1 else nn.ZeroPad2d(edge)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.edges(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def tiny(classes: int = 3, seed: int = 0) -> nn.Module:
    """A network of the kind, small."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("stem", Padded(3, 16, 3, stride=2))
    model.add_module("norm", nn.BatchNorm2d(16))
    model.add_module("expand", Padded(16, 24, 1))
    model.add_module("act", nn.ReLU6())
    model.add_module("depthwise", Padded(24, 24, 3, groups=24))
    model.add_module("project", Padded(24, 16, 1))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(16, classes))
    return model.eval()


def part(count: int, seed: int) -> Part:
    """Pictures whose class is the channel that is bright; two of them are a family."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 120, (count, 3, 12, 12), generator=generator)
    pixels[torch.arange(count), labels] += 120
    families = torch.arange(count)
    families[1:] -= 1
    return Part(pixels.to(torch.uint8), labels, families)


@pytest.fixture
def coloured(monkeypatch: pytest.MonkeyPatch) -> Pictures:
    """Stands in for the packages."""
    facts = {
        "source": "nothing",
        "train_records": 48,
        "validation_records": 24,
        "test_records": 29,
        "test_pictures": 30,
        "majority": 1 / 3,
    }
    parts = {"train": part(48, 1), "validation": part(24, 2), "test": part(30, 3)}
    made = Pictures(("red", "green", "blue"), facts, parts)
    monkeypatch.setattr(vision_data, "pictures", lambda name, folder: made)
    monkeypatch.setattr(vision_candidates, "network", lambda folder, classes, size, seed: tiny(classes, seed))
    monkeypatch.setattr(vision_candidates, "HEAD", "head")
    return made


# Fits ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_learns_at_convolutions_that_pad_inside_of_forward(name: str, tmp_path: Path) -> None:
    from benchmarks import vision_fits

    model, data, candidate = tiny(), part(48, 1), CANDIDATES[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = vision_fits.Task(candidate, candidate.rate, 1e-2, 12, 8, SIZE, 3, "head")
    start = vision_fits.measure(model, data, SIZE)[0].mean()
    fit = vision_fits.WAYS[candidate.kind](model, task, data)
    held = [each for group in fit.optimizer.param_groups for each in group["params"]]
    assert fit.trainable == sum(each.numel() for each in held)
    assert vision_fits.train(model, fit, data, task) > 0
    end, right = vision_fits.measure(model, data, SIZE)
    assert end.mean() < start and len(right) == 48
    assert fit.stored_bytes(tmp_path / "before") == fit.stored_bytes(tmp_path / "again")
    fit.merge(ready(data.pixels[:8], SIZE))
    torch.testing.assert_close(vision_fits.measure(model, data, SIZE)[0], end, atol=1e-3, rtol=1e-3)
    if candidate.kind == "adapter":
        assert fit.facts["apart"] < 1e-4
        assert fit.facts["sites"] == (4 if candidate.depthwise else 3) and "unsaved" not in fit.facts
    assert (fit.stored_bytes(tmp_path / "end") or 0) > 0
    if candidate.kind != "full":  # the last file unmerged it: the base is what it was
        own = {key: value for key, value in model.state_dict().items() if key in before and "head" not in key}
        assert own and all(torch.equal(value, before[key]) for key, value in own.items())


def test_the_head_begins_alike_beside_every_candidate() -> None:
    from benchmarks import vision_fits

    data, scores = part(6, 1), []
    for name in ("probe", "lora", "vera", "full"):
        model = tiny(seed=5)
        task = vision_fits.Task(CANDIDATES[name], 1e-3, 1e-2, 4, 4, SIZE, 5, "head")
        vision_fits.WAYS[CANDIDATES[name].kind](model, task, data)
        scores.append(vision_fits.measure(model, data, SIZE)[0])
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-5, rtol=1e-5)


def test_lora_drop_chooses_after_a_trial_of_its_own() -> None:
    from benchmarks import vision_fits

    task = vision_fits.Task(CANDIDATES["lora-drop"], 1e-2, 1e-2, 8, 8, SIZE, 1, "head")
    fit = vision_fits.Adapted(tiny(), task, part(48, 1))
    assert fit.extra_steps == 1 and fit.seconds > 0
    assert set(fit.facts["kept"]) <= {"stem", "expand", "project"} and fit.facts["kept"]


def test_every_picture_is_seen_once_before_any_is_seen_twice() -> None:
    from benchmarks import vision_fits

    seen = torch.cat(list(vision_fits.order(10, 5, 4, seed=0)))
    assert seen[:10].sort().values.tolist() == list(range(10)) == seen[10:].sort().values.tolist()
    assert not torch.equal(seen, torch.cat(list(vision_fits.order(10, 5, 4, seed=1))))


def trial(**changed: Any) -> dict[str, Any]:
    from benchmarks import vision_trial

    asked: dict[str, Any] = {
        "threads": 1,
        "data": "unused",
        "name": "colours",
        "candidate": "lora",
        "rate": 1e-2,
        "head_rate": 1e-2,
        "seed": 1,
        "steps": 4,
        "batch": 8,
        "size": SIZE,
        "test": True,
    }
    return vision_trial.run(**{**asked, **changed})


def test_a_run_has_what_a_ranking_needs(coloured: Pictures) -> None:
    found = trial()
    assert found["failed"] is None and found["steps"] == 4 and found["seed"] == 1
    assert len(found["losses"]) == len(found["counts"]) == len(found["correct"]) == 29
    assert sum(found["counts"]) == 30 and found["counts"][0] == 2, "a family is one record"
    assert found["trainable"] > 0 and found["adapter_bytes"] > 0 and found["peak_rss_bytes"] > 0
    assert 0 < found["seconds"] < found["total_seconds"]
    json.dumps(found, allow_nan=False)
    again = trial()
    assert again["losses"] == found["losses"] and again["validation"] == found["validation"]
    assert trial(seed=2)["losses"] != found["losses"]
    assert trial(test=False)["losses"] == []


def test_a_run_that_diverges_is_a_result(coloured: Pictures) -> None:
    found = trial(candidate="probe", rate=3e38)
    assert "not finite" in found["failed"] and found["validation"] is None and found["losses"] == []
    json.dumps(found, allow_nan=False)


# The command ---------------------------------------------------------------------


@pytest.fixture
def calls(coloured: Pictures, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs that were made, in this process instead of one of their own."""
    made: list[dict[str, Any]] = []

    def call(function: str, *, threads: int, **arguments: Any) -> Any:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**arguments, threads=threads)
        made.append(arguments)
        return json.loads(json.dumps(result))

    monkeypatch.setattr(child, "call", call)
    return made


def words(folder: Path) -> list[str]:
    return [
        *("vision", "emoji", "--candidates", "lora,full", "--rates", "2", "--steps", "3", "--batch", "8"),
        *("--size", str(SIZE), "--threads", "1", "--data", str(folder / "data"), "--output", str(folder / "results")),
    ]


def test_the_command_compares_and_goes_on_where_it_was_stopped(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, budget = child.call, iter(range(4))

    def stopped(function: str, **arguments: Any) -> Any:
        if next(budget, None) is None:
            raise ChildError("killed")
        return whole(function, **arguments)

    monkeypatch.setattr(child, "call", stopped)
    assert main(words(tmp_path)) == 1
    assert len(calls) == 4 and not (tmp_path / "results").exists()
    monkeypatch.setattr(child, "call", whole)
    assert main(words(tmp_path)) == 0
    assert len(calls) == 3 * (2 + 3), "no run is made twice"
    kept = json.loads((tmp_path / "results" / "emoji.json").read_text())
    found = kept["found"]
    assert [one["name"] for one in found["candidates"]] == ["probe", "lora", "full"]
    assert all(len(one["search"]) == 2 and len(one["seeds"]) == 3 for one in found["candidates"])
    assert [one["seed"] for one in found["candidates"][0]["seeds"]] == [1, 2, 3] == found["budget"]["seeds"]
    assert found["ranking"]["metric"] == "accuracy" and found["ranking"]["records"] == 29
    assert found["budget"]["head_rate"] == found["candidates"][0]["rate"]
    heads = {one["head_rate"] for one in calls if one["candidate"] != "probe"}
    assert heads == {found["candidates"][0]["rate"]}, "every head learns at the probe's rate"
    assert all(one["test"] == (one["seed"] != 0) for one in calls), "rates are chosen without the test part"
    assert kept["commit"]["hash"] and kept["machine"]["threads"] == 1 and kept["versions"]["torch"]
    assert kept["command"].startswith("python -m benchmarks vision emoji --rates 2") and str(tmp_path) not in str(kept)
    assert main(words(tmp_path)) == 0 and len(calls) == 15


def test_no_command_writes_into_the_folder_of_another() -> None:
    from benchmarks import stored
    from benchmarks.__main__ import parser

    assert parser().parse_args(["vision"]).output == str(stored.FOLDER / "vision")
    assert parser().parse_args(["steps"]).output == str(stored.FOLDER)


def test_other_settings_are_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    assert vision.finished(path, {"steps": 3}) is None
    path.write_text(json.dumps({"asked": {"steps": 3}, "result": {"failed": None}}))
    assert vision.finished(path, {"steps": 3}) == {"failed": None}
    assert vision.finished(path, {"steps": 4}) is None and "other settings" in capsys.readouterr().err
    path.write_text('{"asked": {')
    with pytest.raises(ResultsError, match="damaged"):
        vision.finished(path, {"steps": 3})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["emojis"], "no such set: emojis"),
        (["emoji", "--candidates", "lorra"], "no such candidate: lorra"),
        (["emoji", "--seeds", "2"], "--seeds 2: at least 3"),
        (["emoji", "--rates", "0"], "--rates 0: at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_told(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vision", *given]) == 1
    assert said in capsys.readouterr().err


def test_a_rate_that_failed_is_not_chosen() -> None:
    one = vision.Standing(CANDIDATES["lora"])
    one.search = [
        {"rate": 1.0, "validation": None, "total_seconds": 1.0, "failed": "the loss was not finite"},
        {"rate": 0.1, "validation": 0.5, "total_seconds": 1.0, "failed": None},
        {"rate": 0.01, "validation": 0.7, "total_seconds": 1.0, "failed": None},
    ]
    one.choose()
    assert one.rate == 0.1 and one.failed is None
    assert one.as_json()["search"][0] == {
        "rate": 1.0,
        "validation": None,
        "seconds": 1.0,
        "failed": "the loss was not finite",
    }
    one.search = one.search[:1]
    one.choose()
    assert one.rate is None and "not finite" in str(one.as_json()["failed"])


def test_default_candidates_are_those_that_the_results_promise() -> None:
    assert {"probe", "lora", "lora-depthwise", "dora", "vera", "adalora", "lora-drop", "full"} == set(DEFAULT)
    assert set(DEFAULT) <= set(CANDIDATES)


# Encoders ------------------------------------------------------------------------


@pytest.mark.parametrize("name", vision_encoders.SETS)
def test_the_command_for_sentences_is_one_that_there_is(name: str) -> None:
    from lorafit.cli.app import command
    from lorafit.experiments.candidates import REFERENCES
    from lorafit.methods import METHODS

    options = Namespace(rates=3, seeds=3, seed=0)
    given = vision_encoders.asked(name, options, Path("minilm"), Path("sentences"))
    known = {option for one in command().commands["compare"].params for option in one.opts}
    assert {word for word in given if word.startswith("--")} <= known
    assert set(vision_encoders.REFERENCES) <= set(REFERENCES)
    assert set(vision_encoders.METHODS) <= set(METHODS)
    script = (ROOT / "scripts" / "make_sentiment.py").read_text(encoding="utf-8")
    assert f'"{vision_encoders.SETS[name].form}"' in script, "a form of scripts/make_sentiment.py"


def comparison(correct: bool) -> dict[str, Any]:
    """Of two candidates, as `lorafit compare` leaves it."""
    losses = {"lora": [0.1, 0.2, 0.3, 0.6], "probe": [0.2, 0.4, 0.4, 0.6]}
    candidates = [
        {
            "name": name,
            "kind": "adapter",
            "options": {},
            "rate": 0.001,
            "search": [],
            "failed": None,
            "seeds": [
                {
                    "seed": seed,
                    "losses": [one + 0.01 * seed for one in values],
                    "counts": [1] * 4,
                    "correct": [float(one < 0.35) for one in values] if correct else None,
                    "steps": 8,
                    "seconds": 1.0,
                    "total_seconds": 10.0,
                    "peak_rss_bytes": 2**30,
                    "trainable": 100,
                    "adapter_bytes": 400,
                    "curve": [[0, 1.0]],
                    "pairs": None if correct else [[1.0, 2.0]] * 4,
                    "agreement": None if correct else {"mean_absolute_error": 1.0},
                    "trial": "lora/seed-1",
                    "tokens": 9,
                    "failed": None,
                }
                for seed in (1, 2, 3)
            ],
        }
        for name, values in losses.items()
    ]
    return {"budget": {"rates": 3, "seeds": [1, 2, 3], "steps": 8}, "candidates": candidates}


@pytest.mark.parametrize("correct", [True, False], ids=["classes", "numbers"])
def test_classes_are_ranked_by_accuracy_and_numbers_by_loss(correct: bool) -> None:
    found = vision_encoders.compared(comparison(correct))
    assert found["ranking"]["metric"] == ("accuracy" if correct else "loss")
    assert found["counts"] == [1, 1, 1, 1] and found["minutes"] == 1.0
    assert not {"curve", "pairs"} & set(found["candidates"][0]["seeds"][0])
    assert found["candidates"][0]["seeds"][0]["agreement"] == (None if correct else {"mean_absolute_error": 1.0})
    assert found["candidates"][0]["seeds"][0]["losses"] == pytest.approx([0.11, 0.21, 0.31, 0.61])


# Modules -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rates", "vision_fits"])
def test_doctests(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert found.attempted and not found.failed
