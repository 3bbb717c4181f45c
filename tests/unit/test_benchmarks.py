"""The benchmarks measure what they say, and the page says what they measured."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bars, cases, child, pictures, report, rounds, sections, stored, storing, sweep, train, variants
from benchmarks.__main__ import COMMANDS, main, parser
from benchmarks.quiet import quiet
from benchmarks.statistic import Spread, ratios
from benchmarks.stored import ResultsError

ROOT = Path(__file__).parents[2]
TINY = cases.CASES["tiny"]
Documents = dict[str, dict[str, Any]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process what has one of its own otherwise; importing the packages there takes seconds."""

    def call(function: str, *, threads: int, instructions: str = "all", **arguments: Any) -> Any:
        module, _, name = function.partition(":")
        plain = json.loads(json.dumps(arguments))
        with quiet():
            result = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**plain, threads=threads)
        return json.loads(json.dumps(result))

    monkeypatch.setattr(child, "call", call)


def options(folder: Path) -> list[str]:
    return ["--output", str(folder), "--threads", str(torch.get_num_threads())]


# What is measured ----------------------------------------------------------------


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_trains_what_it_says_and_nothing_else(name: str) -> None:
    variant = replace(variants.VARIANTS[name], r=4)
    made = rounds.trainees(TINY, {name: variant}, 0)[name]
    before = values(made.model)
    trained = {key for key, value in made.model.named_parameters() if value.requires_grad}
    batches = TINY.batches(0)
    with quiet():
        losses = [made.step(next(batches)) for _ in range(3)]
    assert all(loss > 0 for loss in losses)
    changed = {key for key, value in values(made.model).items() if not torch.equal(value, before[key])}
    if name == "floor":
        assert not trained and not changed
    else:
        assert trained and changed == trained
    assert all(value.grad is None for value in made.model.parameters()), "zero_grad is a part of the step"


def test_delta_lora_is_measured_before_and_after_its_start() -> None:
    losses = {}
    for name in ("lora", "delta-lora", "delta-lora waiting"):
        made, batches = rounds.trainees(TINY, {name: variants.VARIANTS[name]}, 0)[name], TINY.batches(0)
        losses[name] = [made.step(next(batches)) for _ in range(4)]
    assert losses["delta-lora waiting"] == pytest.approx(losses["lora"], rel=1e-6)
    assert losses["delta-lora"][:2] == pytest.approx(losses["lora"][:2], rel=1e-6)
    assert losses["delta-lora"][3] != pytest.approx(losses["lora"][3], rel=1e-6)


def test_what_the_variants_train_differs_as_their_methods_do() -> None:
    trained = {}
    for name in ("full", "lora", "peft lora", "lora-fa", "peft lora-fa", "vera r256", "peft vera r256", "dora"):
        made = rounds.trainees(TINY, {name: replace(variants.VARIANTS[name], r=4)}, 0)[name]
        trained[name] = sum(value.numel() for value in made.model.parameters() if value.requires_grad)
    for method in ("lora", "lora-fa", "vera r256"):
        assert trained[method] == trained[f"peft {method}"]
    assert trained["vera r256"] < trained["lora-fa"] < trained["lora"] < trained["dora"] < trained["full"]


def test_the_floor_goes_back_to_the_embeddings() -> None:
    made = rounds.trainees(TINY, {"floor": variants.VARIANTS["floor"]}, 0)["floor"]
    seen: list[torch.Tensor] = []
    made.model.get_input_embeddings().register_forward_hook(lambda _, __, output: seen.append(output))
    made.step(next(TINY.batches(0)))
    assert seen[0].grad is not None and seen[0].grad.abs().sum() > 0


def test_both_sides_drop_with_the_same_probability() -> None:
    for name in ("lora dropout 0.05", "dora dropout 0.05"):
        ours, theirs = variants.VARIANTS[name], variants.VARIANTS[variants.PEFT + name]
        assert replace(ours, side="peft") == theirs and ours.dropout == 0.05


def test_lorafits_training_loss_is_that_of_the_model() -> None:
    model, batch = TINY.model(0), next(TINY.batches(0))
    torch.testing.assert_close(variants.train_loss(model, 1.0)(batch), variants.own_loss(model)(batch))
    half = variants.train_loss(model, 0.5)(batch)
    assert not torch.isclose(half, variants.own_loss(model)(batch))


@pytest.mark.parametrize("sites", cases.SITES)
def test_the_shapes_of_a_case_are_those_of_its_layers(sites: str) -> None:
    for case in (TINY, sweep.wide(128, 16)):
        layers = [
            tuple(module.weight.shape)
            for path, module in case.model(0).named_modules()
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in cases.SITES[sites]
        ]
        assert sorted(layers) == sorted(case.shapes(sites))


def test_the_formula_of_the_added_operations() -> None:
    case = cases.Case("one", 1, 4, 8, 1, 1, 16, batch=1, length=100)
    square, high = (6 * 100 * 8, 4 * 100 * 8 + 4 * 16), (6 * 100 * 12, 4 * 100 * 12 + 4 * 32)
    assert case.adapter_operations(1) == 4 * min(square) + 3 * min(high)
    assert case.adapter_operations(3, merging=False) == 3 * (4 * square[0] + 3 * high[0])
    assert case.adapter_operations(1, "q, v", merging=False) == 2 * square[0]


def test_a_loss_that_is_not_finite_stops_the_measurement() -> None:
    broken = variants.Trainee(nn.Identity(), lambda _: torch.tensor(float("nan"), requires_grad=True), None)
    with pytest.raises(ArithmeticError, match="lost: the loss is nan"):
        rounds.interleave({"lost": broken}, TINY.batches(0), rounds=1, warmup=0, seed=0)


def test_every_variant_takes_one_step_a_round_on_the_same_batch() -> None:
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": [], "c": []}
    order: list[str] = []

    def loss(name: str) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
        def of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            seen[name].append(batch["input_ids"])
            order.append(name)
            return torch.ones((), requires_grad=True)

        return of

    made = {name: variants.Trainee(nn.Identity(), loss(name), None) for name in seen}
    seconds = rounds.interleave(made, TINY.batches(0), rounds=6, warmup=2, seed=0)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 6, "b": 6, "c": 6}
    turns = [tuple(order[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    for first, second in zip(seen["a"], seen["b"], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen["a"][0], seen["a"][1])


# Files ---------------------------------------------------------------------------


def test_steps_writes_its_schema(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["steps", "tiny", "--rounds", "2", "--warmup", "1", "--variants", "lora; peft lora", *options(tmp_path)])
        == 0
    )
    document = stored.read(tmp_path)["steps-tiny"]
    assert stored.KEYS.keys() == document.keys()
    assert document["versions"]["torch"] == torch.__version__ and document["machine"]["cores"] >= 1
    assert document["seed"] == 0 and document["machine"]["threads"] == torch.get_num_threads()
    (group,) = document["results"]["groups"]
    assert {name: len(each) for name, each in group["seconds"].items()} == {"floor": 2, "lora": 2, "peft lora": 2}
    assert min(min(each) for each in group["seconds"].values()) > 0 and group["gemm_rate"] > 0
    assert set(document["results"]["variants"]) == {"floor", "lora", "peft lora"}
    assert "peft lora" in capsys.readouterr().out
    assert "| peft lora |" in report.text({"steps-tiny": document})


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert main(["memory", "tiny", "--variants", "floor", "--repeats", "1", "--steps", "1", *options(tmp_path)]) == 0
    (one,) = stored.read(tmp_path)["memory-tiny"]["results"]["peaks"]["floor"]
    assert 0 < one["imported"] <= one["built"] <= one["peak"]


def test_a_process_that_fails_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(child.ChildError, match="machine:nothing ended with status 1"):
        child.call("machine:nothing", threads=1)


def test_sweep(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "GRID", {64: sweep.Axes(sweep.Point(64, tokens=16, r=4), r=(2,), sites=("q, v",))})
    given = Namespace(
        hidden=[64],
        rounds=1,
        warmup=0,
        layers=1,
        memory=False,
        seed=0,
        threads=torch.get_num_threads(),
        output=tmp_path,
    )
    sweep.run(given)
    document = stored.read(tmp_path)["sweep"]
    points = document["results"]["points"]
    assert [point["point"]["r"] for point in points] == [4, 2, 4, 4]
    for point in points:
        assert ("lora-fa" in point["seconds"]) == (not point["point"]["dropout"])
    assert [point["point"]["r"] for point in pictures.along(points, "r", 64)] == [2, 4]
    assert [point["point"]["sites"] for point in pictures.along(points, "sites", 64)] == ["q, v", "all"]
    drawn = pictures.figure(points, "r", "rank")
    assert {trace.name for trace in drawn.data} >= {"lora", "peft lora", "LoRA by the formula"}
    assert "rank 2, sites: all" in report.text({"sweep": document})


@pytest.mark.parametrize("side", storing.SIDES)
def test_files_are_timed(side: str) -> None:
    with quiet():
        times = storing.times(side, 3, 0, torch.get_num_threads())
    assert list(times) == ["attach", "attach 9 more", "save", "load", "load 9 more"] and min(times.values()) > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "schema 99"),
        ({"seed": "0"}, "seed is a str"),
        ({"results": None}, "results is a NoneType"),
    ],
    ids=str,
)
def test_a_file_that_is_none_of_these(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole = document({})
    assert stored.checked(whole, "here") is whole
    with pytest.raises(ResultsError, match=said):
        stored.checked({**whole, **change}, "here")
    with pytest.raises(ResultsError, match="seconds is missing"):
        stored.checked({key: value for key, value in whole.items() if key != "seconds"}, "here")
    (tmp_path / "cut.json").write_text('{"schema": 1')
    assert main(["report", "--output", str(tmp_path), "--page", str(tmp_path / "speed.md")]) == 1


# The page ------------------------------------------------------------------------


def document(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": stored.SCHEMA,
        "kind": "steps",
        "name": "steps-six",
        "command": "python -m benchmarks steps",
        "date": "2026-01-01T00:00:00+00:00",
        "commit": {"hash": "0" * 40, "changed": False},
        "versions": {"python": "3.11"},
        "machine": {
            "processor": "one",
            "capability": "AVX2",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 2**34,
            "platform": "Linux",
        },
        "seed": 0,
        "load": {"averages": [0.0, 0.0, 0.0], "others": 0},
        "warnings": [],
        "seconds": 60.0,
        "results": results,
    }


@pytest.fixture
def made_up() -> Documents:
    six = {**vars(cases.CASES["six"]), "about": "six layers"}
    seconds = {
        "floor": [1.0, 2.0, 4.0],  # the machine slows down from round to round
        "lora": [1.05, 2.1, 4.4],
        "peft lora": [1.2, 2.4, 4.8],
        "dora": [1.3, 2.6, 5.2],
        "peft dora": [1.25, 2.5, 5.0],
    }
    steps = {"case": six, "rounds": 3, "warmup": 1, "instructions": "all", "variants": {}, "groups": []}
    steps["groups"] = [{"gemm_rate": 1e11, "seconds": seconds}]

    def peaks(*found: int) -> list[dict[str, int]]:
        return [{"imported": 100, "built": 200, "peak": peak} for peak in found]

    held = {"lora": peaks(750, 750), "peft lora": peaks(1000, 1000), "lora-fa": peaks(750, 750)}
    memory = {"case": six, "steps": 3, "repeats": 2, "variants": {}, "peaks": held}

    def once(each: float, last: float) -> dict[str, Any]:
        return {
            "ends": [each * step for step in (1, 2, 3, 4)],
            "losses": [[2, 3.0], [4, last]],
            "process": 9.0,
            "peak": 2**30,
            "tokens": 100,
        }

    runs = {"lorafit": [once(1.0, 2.0)], "trl": [once(3.0, 2.5)], "trl bf16": [once(1.5, 2.5)]}
    whole = {
        "steps": 4,
        "r": 16,
        "rate": 1e-3,
        "batch": 8,
        "about": dict.fromkeys(runs, "a run"),
        "single": ["lorafit", "trl"],
        "runs": runs,
    }
    return {"steps-six": document(steps), "memory-six": document(memory), "train": document(whole)}


def test_ratios_are_those_of_the_same_round(made_up: Documents) -> None:
    seconds = made_up["steps-six"]["results"]["groups"][0]["seconds"]
    assert ratios(seconds, "lora", "floor") == pytest.approx([1.05, 1.05, 1.1])
    assert Spread.of(ratios(seconds, "lora", "floor")) == Spread(*map(pytest.approx, (1.05, 1.05, 1.075)))
    assert Spread.of([2.0]).width == 0


def test_verdicts(made_up: Documents) -> None:
    found = {bar.what: bar for bar in bars.bars(made_up)}
    verdicts = {what: bar.verdict for what, bar in found.items()}
    assert verdicts["step of lora / floor, `six`"] == bars.PASSED
    assert verdicts["step of dora / floor, `six`"] == bars.MISSED
    assert verdicts["step of adalora / floor, `six`"] == bars.OPEN
    assert verdicts["peak memory of lora / PEFT's, `six`"] == bars.PASSED  # at most: 0.75 is 0.75
    assert verdicts["peak memory of lora-fa / lora, `six`"] == bars.MISSED  # less: 1 is not less than 1
    assert verdicts["peak memory of lora / PEFT's, `smollm2`"] == bars.OPEN
    worst = found["step / PEFT's, the worst of all that were measured"]
    assert worst.verdict == bars.MISSED and worst.measured is not None
    assert worst.measured.median == pytest.approx(1.04) and worst.note == (
        "dora, `six`; slower at 1 of 2 comparisons, by more than the spread at 1"
    )


def test_a_bar_is_not_passed_by_rounding() -> None:
    assert bars.Bar("a step", 1.09, Spread(1.0901, 1.0, 1.1)).verdict == bars.MISSED


def test_seconds_to_the_same_loss(made_up: Documents) -> None:
    runs = made_up["train"]["results"]["runs"]
    loss, spread = train.compared(runs, "lorafit", "trl")
    assert loss == 2.5 and spread.median == pytest.approx(3 / 12)
    assert train.seconds_to(runs["lorafit"][0], 9.0) == 2.0  # the first adapter that was saved is good enough
    with pytest.raises(ValueError, match="did not reach"):
        train.seconds_to(runs["trl"][0], 1.0)
    single, anyhow = (bar for bar in bars.bars(made_up) if "TRL" in bar.what)
    assert single.note.startswith("lorafit / trl,") and single.verdict == bars.PASSED
    assert anyhow.note.startswith("lorafit / trl bf16,") and anyhow.measured == Spread.of([pytest.approx(0.5)])


def test_the_page_says_what_was_measured(made_up: Documents, tmp_path: Path) -> None:
    for name, one in made_up.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    page = tmp_path / "page" / "speed.md"
    assert main(["report", "--output", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| step of lora / floor, `six` | ≤ 1.09 | 1.050 (1.050–1.075) | passed |" in text
    assert "| step of dora / floor, `six` | ≤ 1.14 | 1.300 (1.300–1.300) | missed |" in text
    assert "| step of adalora / floor, `six` | ≤ 1.12 | – | not measured |" in text
    assert "| lora | 1.050 (1.050–1.075) | 0.875 (0.875–0.896) | 2100 |" in text
    assert "3.0 |" in text and "Of 38 bars" in text
    plain = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, plain)) <= 120
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ") and " bar " in line}
    assert len(widths) == 1


def test_the_page_in_the_documentation_is_that_of_the_stored_measurements() -> None:
    expected = report.text(stored.read())
    assert report.PAGE.read_text(encoding="utf-8") == expected, "run: python -m benchmarks report"


def test_a_table_cannot_be_broken_by_its_cells() -> None:
    assert sections.table(("a", "b"), [("1|2", "3")]) == "| a | b |\n| --- | --- |\n| 1/2 | 3 |"


# The program ---------------------------------------------------------------------


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = parser().format_help()
    assert {module.NAME for module in COMMANDS} <= set(shown.split())
    for module in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([module.NAME, "--help"])
        assert ended.value.code == 0
        assert "--threads" in capsys.readouterr().out


def test_variants_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no such variants.*lorra"):
        main(["steps", "tiny", "--variants", "lorra"])


def test_every_group_names_variants() -> None:
    for groups in variants.GROUPS.values():
        assert {name for group in groups for name in group} <= set(variants.VARIANTS)
    assert set(bars.STEP_BARS) <= set(variants.GROUPS["six"][0])


def test_the_library_does_not_import_its_benchmarks() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "benchmarks" for name in names), path


@pytest.mark.parametrize("name", ["statistic", "bars", "sections", "train"])
def test_doctests(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert found.attempted and not found.failed
