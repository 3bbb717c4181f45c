"""Every method in a whole run: it learns, is killed in the middle of its schedule, and ends bit for bit the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.report import write_report
from lorafit.training.config import resolve
from lorafit.training.outcome import Outcome
from lorafit.training.run import train
from lorafit.training.trainer import AdapterTrainer

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora-plus": {"r": 4, "ratio": 2.0},
    "lora-fa": {"r": 4},
    "vera": {"r": 16, "d_init": 0.5},
    "lora-drop": {"r": 4, "threshold": 0.7, "sample": 0.3},
    "adalora": {"init_r": 4, "target_r": 2, "final": 3},
    "dora": {"r": 4},
    "delta-lora": {"r": 4, "start": 4},
    "intrinsic": {"d": 64},
}
INSIDE: dict[str, dict[str, Any]] = {
    "dora around adalora": {"method": "dora", "inner": "adalora", "init_r": 4, "target_r": 2},
    "lora-plus around dora": {"method": "lora-plus", "inner": "dora", "r": 4},
    "dora around vera": {"method": "dora", "inner": {"method": "vera", "r": 16, "d_init": 0.5}},
    "lora from pissa": {"method": "lora", "init": "pissa", "r": 4},
    "lora from eva": {"method": "lora", "init": "eva", "r": 4},
    "lora from lora_ga": {"method": "lora", "init": "lora_ga", "r": 4},
}
CASES = {**{name: {"method": name, **fields} for name, fields in METHODS.items()}, **INSIDE}


class Killed(BaseException):
    """Stands for a kill: nothing in the run may catch it and tidy up."""


@pytest.fixture
def run(model_dir: Path, write: Callable[[str, Any], str], tmp_path: Path) -> Callable[..., Outcome]:
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}" + "!" * (n % 5)} for n in range(60)]
    settings = {
        "model": str(model_dir),
        "data": write("sums.jsonl", rows),
        "eval_split": 12,
        "max_steps": 10,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "samples": 0,
        "use_cpu": True,
    }

    said: list[str] = []

    def run(name: str, **changes: Any) -> Outcome:
        resolved = resolve([("test", {**settings, "output_dir": str(tmp_path / name), **changes})])
        return train(resolved, command="test", notify=said.append, console=Console(quiet=True))

    run.said = said  # type: ignore[attr-defined]

    return run


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_there_is_a_case_for_every_method() -> None:
    assert list(METHODS) == list(lf.METHODS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_learns_and_a_killed_one_ends_the_same(
    run: Callable[..., Outcome], case: dict[str, Any], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    whole = run("whole", **case)
    assert whole.status == "done" and whole.eval_after < whole.eval_before  # type: ignore[operator]
    original = AdapterTrainer.training_step

    def step_then_kill(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7 and self.state.max_steps == 10:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", step_then_kill)
        with pytest.raises(Killed):
            run("cut", **case)
    resumed = run("cut", **case)
    assert resumed.resumed_from == 6
    assert resumed.eval_after == whole.eval_after
    first, second = (load_file(outcome.adapter / "adapter_model.safetensors") for outcome in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    handle = lf.load(AutoModelForCausalLM.from_pretrained(model_dir), whole.adapter)
    assert handle.method.name == case["method"]
    assert write_report(resumed.folder.records, resumed.folder.path / "again.html").stat().st_size > 100_000


def test_ranks_are_recorded_and_pruned_in_the_end(run: Callable[..., Outcome]) -> None:
    outcome = run("run", **CASES["adalora"])
    ranks = [record["ranks"] for record in records(outcome.folder.path, "schedule")]
    assert len(ranks) == 2 and sum(ranks[-1].values()) == 2 * 14
    config = json.loads((outcome.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "ADALORA" and config["total_step"] > 0


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ({**CASES["adalora"], "final": 2}, "AdaLoRA: 56 → 28 triplets, pruned every"),
        (CASES["dora around adalora"], "AdaLoRA: 56 → 28 triplets, pruned every"),
        (CASES["delta-lora"], "Delta-LoRA: the weights move from step 5 on"),
    ],
)
def test_the_plan_of_a_schedule_is_told(run: Callable[..., Outcome], case: dict[str, Any], told: str) -> None:
    run("run", **case)
    said = [line for line in run.said if line.startswith(told)]  # type: ignore[attr-defined]
    assert len(said) == 1 and (said[0] == told or said[0].endswith(" from 2 to 8 of 10"))


def test_a_best_adapter_from_before_the_budget_was_reached_is_told(run: Callable[..., Outcome]) -> None:
    outcome = run(
        "run",
        **CASES["adalora"],
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="supervised_tokens",  # always the same: the first evaluation is the best
        samples=0,
    )
    assert (
        "the best adapter is of step 1, before the budget was reached: 56 triplets, not 28" in run.said  # type: ignore[attr-defined]
    )
    last = records(outcome.folder.path, "schedule")[-1]
    assert last["step"] == 10 and last["budget"] == 28 and sum(last["ranks"].values()) == 56


def test_lengths_and_directions_are_recorded(run: Callable[..., Outcome]) -> None:
    outcome = run("run", **CASES["dora"])
    moved = records(outcome.folder.path, "anatomy")
    assert [record["step"] for record in moved] == [5, 10]
    assert len(moved[-1]["magnitude"]) == 14 and all(value > 0 for value in moved[-1]["direction"].values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "dora", "inner": "delta-lora"}, "DoRA cannot be put around DeltaLoRA"),
        ({"method": "lora-plus", "inner": "vera"}, "VeRA"),
        ({"method": "vera", "rank_pattern": {"q_proj": 4}}, "one rank"),
        ({"method": "adalora", "ratio": 3.0}, "unknown setting"),
        ({"method": "dora", "inner": "nothing"}, "unknown method"),
        ({"method": "lora", "inner": "dora"}, "unknown setting"),
    ],
)
def test_what_does_not_go_together_is_refused(run: Callable[..., Outcome], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(lf.ConfigError) as caught:
        run("run", **changes)
    assert said in str(caught.value)


def test_what_is_trained_in_full_has_loras_rate(model_dir: Path) -> None:
    """A method's own rate is for its vectors: a new head at 50 times LoRA's would run away."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    handle = lf.attach(model, lf.VeRA(r=4), modules_to_save=["lm_head"], seed=0)
    groups = handle.optimizer(torch.optim.AdamW, lr=5e-2, copies_lr=1e-3).param_groups
    assert [group["lr"] for group in groups] == [5e-2, 1e-3]
    assert [id(parameter) for parameter in groups[1]["params"]] == [id(handle.copies["lm_head"].weight)]
