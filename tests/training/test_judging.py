"""The verdict on whole runs: from records, after a kill, with the best adapter kept, stopped early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorafit.training.config import resolve
from lorafit.training.outcome import Outcome
from lorafit.training.run import train

Run = Callable[..., Outcome]


@pytest.fixture
def settings(model_dir: Path, data: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model_dir),
        "data": data,
        "eval_split": 12,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 12,
        "learning_rate": 1e-2,
        "r": 4,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "samples": 0,
        "use_cpu": True,
    }


@pytest.fixture
def run(settings: dict[str, Any]) -> Run:
    said: list[str] = []

    def run(**changes: Any) -> Outcome:
        made = resolve([("test", {**settings, **changes})])
        return train(made, command="test", notify=said.append, console=Console(quiet=True))

    run.said = said  # type: ignore[attr-defined]
    return run


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def overfits(settings: dict[str, Any]) -> dict[str, Any]:
    """A run that learns four records by heart, at a rate that is far too high for the others."""
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    few = Path(settings["data"]).with_name("few.jsonl")
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    held = few.with_name("held.jsonl")
    held.write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    changes = {"data": str(few), "eval_data": str(held), "eval_split": None, "max_steps": 40, "learning_rate": 5e-2}
    return {**changes, "eval_steps": 4, "save_steps": 8, "lr_scheduler_type": "constant"}


def test_the_losses_of_each_record_add_up_to_those_that_are_reported(run: Run) -> None:
    outcome = run()
    told = {one["step"]: one for one in records(outcome.folder.path, "held_out")}
    reported = {one["step"]: one for one in records(outcome.folder.path, "evaluation")}
    assert sorted(told) == sorted(reported) == [0, 2, 4, 6, 8, 10, 12]
    for step, one in told.items():
        assert len(one["losses"]) == 12
        assert sum(one["losses"]) / sum(one["counts"]) == pytest.approx(reported[step]["loss"], rel=1e-5)
    assert sum(told[0]["counts"]) == reported[0]["supervised_tokens"]


@pytest.mark.parametrize("packing", [True, False])
def test_records_in_one_row_have_their_own_losses(run: Run, packing: bool, tmp_path: Path) -> None:
    outcome = run(packing=packing, max_steps=1, eval_steps=1, output_dir=str(tmp_path / str(packing)))
    plain = run(packing=False, max_steps=1, eval_steps=1, output_dir=str(tmp_path / "plain"))
    mine, expected = (records(one.folder.path, "held_out")[0] for one in (outcome, plain))
    assert mine["counts"] == expected["counts"]
    assert mine["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_a_run_says_what_became_of_it(run: Run) -> None:
    outcome = run()
    assert outcome.verdict is not None
    (record,) = records(outcome.folder.path, "verdict")
    assert (record["kind"], record["sentence"]) == (outcome.verdict.kind, outcome.verdict.sentence)
    assert run().verdict == outcome.verdict  # of a run that is finished already
    assert run().status == "already done"


def test_the_best_adapter_is_kept(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    changes = overfits(settings)
    outcome = run(**changes, output_dir=str(tmp_path / "kept"))
    losses = {one["step"]: one["loss"] for one in records(outcome.folder.path, "evaluation")}
    best = min(losses, key=losses.__getitem__)
    assert best < 40 and outcome.verdict is not None
    assert (outcome.verdict.kept, outcome.verdict.kind) == (best, "overfitting")
    assert outcome.eval_after == pytest.approx(losses[best], rel=1e-5)
    assert not (outcome.folder.path / "best").exists()
    same = run(**{**changes, "lr_scheduler_type": "constant"}, keep_best=False, output_dir=str(tmp_path / "last"))
    assert same.verdict is not None and same.verdict.kept is None
    assert same.eval_after == pytest.approx(losses[40], rel=1e-5)
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (outcome, same))
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_overfits_stops_if_it_is_asked_to(run: Run, settings: dict[str, Any]) -> None:
    outcome = run(**overfits(settings), early_stopping=True)
    assert outcome.status == "done" and outcome.steps < 40
    assert outcome.verdict is not None and outcome.verdict.kind == "overfitting"
    assert any(line.startswith(f"stopped at step {outcome.steps}") for line in run.said)  # type: ignore[attr-defined]


class Killed(BaseException):
    """Stands for a kill."""


def test_a_run_killed_where_it_was_stopped_trains_no_further(
    run: Run, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training.judging import Judging

    changes = {**overfits(settings), "save_steps": 4, "early_stopping": True}
    whole = run(**changes, output_dir=str(tmp_path / "whole"))

    def kill(self: Judging) -> None:
        raise Killed

    monkeypatch.setattr(Judging, "verdict", kill)
    with pytest.raises(Killed):
        run(**changes, output_dir=str(tmp_path / "cut"))
    assert (tmp_path / "cut" / f"checkpoint-{whole.steps}").is_dir()
    monkeypatch.undo()
    resumed = run(**changes, output_dir=str(tmp_path / "cut"))
    assert (resumed.steps, resumed.verdict, resumed.resumed_from) == (whole.steps, whole.verdict, whole.steps)
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("step", [5, 17, 30])
def test_a_killed_run_is_judged_as_if_it_had_not_been(
    run: Run, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from lorafit.training.trainer import AdapterTrainer

    changes = overfits(settings)
    whole = run(**changes, output_dir=str(tmp_path / "whole"))
    steps, original = 0, AdapterTrainer.training_step

    def step_then_kill(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_then_kill)
    with pytest.raises(Killed):
        run(**changes, output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    resumed = run(**changes, output_dir=str(tmp_path / "cut"))
    assert resumed.verdict == whole.verdict
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_without_held_out_data_there_is_no_verdict(run: Run) -> None:
    assert run(eval_split=0, eval_strategy="no").verdict is None
