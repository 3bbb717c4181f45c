"""LoRA-drop in a run: trial, choice, run proper; killed anywhere, it goes on with the same numbers."""

from __future__ import annotations

import io
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.report import read_records, write_report
from lorafit.training import dropping
from lorafit.training.config import resolve
from lorafit.training.outcome import Outcome
from lorafit.training.run import train
from lorafit.training.trainer import AdapterTrainer

Run = Callable[..., Outcome]


class Killed(BaseException):
    """Stands for a kill: nothing in the run may catch it and tidy up."""


@pytest.fixture
def settings(model_dir: Path, write: Callable[[str, Any], str], tmp_path: Path) -> dict[str, Any]:
    rows = [{"question": f"what is {n} plus one?", "answer": f"it is {n + 1}" + "!" * (n % 5)} for n in range(60)]
    return {
        "model": str(model_dir),
        "data": write("sums.jsonl", rows),
        "method": "lora-drop",
        "threshold": 0.6,
        "sample": 0.5,
        "dropout": 0.1,
        "r": 4,
        "eval_split": 12,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "samples": 1,
        "max_new_tokens": 4,
        "use_cpu": True,
    }


@pytest.fixture
def run(settings: dict[str, Any]) -> Iterator[Run]:
    said: list[str] = []

    def run(console: Console | None = None, **changes: Any) -> Outcome:
        resolved = resolve([("test", {**settings, **changes})])
        return train(resolved, command="test", notify=said.append, console=console or Console(quiet=True))

    run.said = said  # type: ignore[attr-defined]
    yield run


def records(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.adapter / "adapter_model.safetensors")


def same(first: Outcome, second: Outcome) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def kill(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the step-th batch, over trial and run, kill the process."""
    original, count = AdapterTrainer.training_step, 0

    def step_then_kill(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_then_kill)


def test_a_run_keeps_what_matters_and_tells_it(run: Run, tmp_path: Path, model_dir: Path) -> None:
    outcome = run(per_kind=False)
    assert outcome.status == "done" and outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before - 0.1
    (drop,) = records(outcome.folder.path, "drop")
    assert len(drop["scores"]) == 14 and math.fsum(drop["scores"].values()) == pytest.approx(1)
    assert drop["threshold"] == 0.6 and drop["sample_records"] == 24 and drop["steps"] == 3
    kept = set(drop["kept"])
    assert 0 < len(kept) < 14
    assert math.fsum(drop["scores"][path] for path in kept) >= 0.6
    assert min(drop["scores"][path] for path in kept) >= max(
        score for path, score in drop["scores"].items() if path not in kept
    )
    assert sum(drop["shared"].values()) == 14 - len(kept)
    assert any(f"keeps {len(kept)} of 14 sites with " in line for line in run.said)  # type: ignore[attr-defined]
    assert any("trial: 3 steps on 24 of 48 records" in line for line in run.said)  # type: ignore[attr-defined]
    events = [record["event"] for record in records(outcome.folder.path)]
    assert events[:5] == ["run", "drop", "config", "environment", "data"] and events.count("step") == 6
    (config,) = records(outcome.folder.path, "config")
    assert config["resolved"]["sites"] == 14 and config["resolved"]["kept"] == len(kept)
    assert config["resolved"]["trainable"] < 4 * (4 * 32 + 2 * 48 + 3 * 96) * 2
    from transformers import AutoModelForCausalLM

    handle = lf.load(AutoModelForCausalLM.from_pretrained(model_dir), outcome.adapter)
    assert len(handle.sites) == 14
    told = read_records(outcome.folder.records)
    assert told.remarks == () and told.drop is not None and set(told.drop.kept) == kept
    page = write_report(outcome.folder.records, tmp_path / "report.html").read_text()
    assert "Importance of the sites" in page and f"{len(kept)} of 14 sites have an adapter of their own" in page


def test_a_kill_in_the_run_proper_goes_on_bit_for_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(output_dir=str(tmp_path / "whole"))
    kill(monkeypatch, 3 + 6)
    with pytest.raises(Killed):
        run(output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    monkeypatch.setattr(dropping.Trial, "run", lambda *_: pytest.fail("the trial is not repeated"))
    resumed = run(output_dir=str(tmp_path / "cut"))
    assert resumed.resumed_from == 4
    assert any("found before" in line for line in run.said)  # type: ignore[attr-defined]
    assert same(whole, resumed)
    assert (resumed.eval_before, resumed.eval_after) == (whole.eval_before, whole.eval_after)
    assert [shown.before for shown in resumed.shown] == [shown.before for shown in whole.shown]
    losses = [{r["step"]: r["loss"] for r in records(o.folder.path, "step")} for o in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(records(resumed.folder.path, "drop")) == 2, "each process says with what choice it works"
    assert read_records(resumed.folder.records).drop == read_records(whole.folder.records).drop


def test_a_kill_in_the_trial_repeats_it_with_the_same_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(output_dir=str(tmp_path / "whole"))
    kill(monkeypatch, 2)
    with pytest.raises(Killed):
        run(output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    assert not (tmp_path / "cut" / dropping.DROP).exists()
    assert not list((tmp_path / "cut").glob("checkpoint-*"))
    again = run(output_dir=str(tmp_path / "cut"))
    first, second = (json.loads((o.folder.path / dropping.DROP).read_text()) for o in (whole, again))
    assert {**first, "fingerprint": ""} == {**second, "fingerprint": ""}
    assert same(whole, again)


def test_the_run_proper_is_the_same_whether_or_not_the_trial_ran_before_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run()
    kill(monkeypatch, 3 + 1)
    with pytest.raises(Killed):
        run(output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    assert same(whole, run(output_dir=str(tmp_path / "cut")))


def test_the_choice_given_by_hand_is_the_same_run(run: Run, tmp_path: Path) -> None:
    whole = run()
    (drop,) = records(whole.folder.path, "drop")
    by_hand = run(keep=tuple(drop["kept"]), output_dir=str(tmp_path / "hand"))
    assert not (by_hand.folder.path / dropping.DROP).exists()
    assert same(whole, by_hand)


def test_threshold_1_is_lora(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    everything = run(threshold=1.0, max_steps=3)
    assert any("keeps all 14 sites" in line for line in run.said)  # type: ignore[attr-defined]
    for name in ("threshold", "sample"):
        del settings[name]
    assert same(everything, run(method="lora", max_steps=3, output_dir=str(tmp_path / "lora")))


def test_the_trial_leaves_model_and_generators_as_they_were(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = dropping.Trial.run
    seen: list[bool] = []

    def watched(self: dropping.Trial, *args: Any) -> Any:
        model = self.task.model
        state = {key: value.clone() for key, value in model.state_dict().items()}
        own, modes = set(vars(model)), [module.training for module in model.modules()]
        trains = [parameter.requires_grad for parameter in model.parameters()]
        generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        choice = original(self, *args)
        after = model.state_dict()
        seen.append(state.keys() == after.keys() and all(torch.equal(state[key], after[key]) for key in state))
        assert set(vars(model)) == own
        seen.append(modes == [module.training for module in model.modules()])
        seen.append(trains == [parameter.requires_grad for parameter in model.parameters()])
        seen.append(torch.equal(generators[0], torch.get_rng_state()))
        seen.append(generators[1:] == (random.getstate(), numpy.random.get_state()[1].tolist()))
        return choice

    monkeypatch.setattr(dropping.Trial, "run", watched)
    run(max_steps=1)
    run(max_steps=1, bf16=True, output_dir=str(tmp_path / "half"))
    assert seen == [True] * 10


@pytest.mark.parametrize(
    "changes",
    [
        {"rest": "freeze"},
        {"inner": "dora"},
        {"per_kind": False},
        {"targets": ["lm_head", "q_proj", "embed_tokens"]},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"rank_pattern": {"layers.0.mlp.up_proj": 2}, "modules_to_save": ["norm"]},
        {"num_train_epochs": 1, "max_steps": -1, "report_to": "none", "sample": 0.01},
        {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 3},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_it_goes_together_with_other_settings(run: Run, changes: dict[str, Any]) -> None:
    outcome = run(**changes)
    assert outcome.status == "done"
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before
    (drop,) = records(outcome.folder.path, "drop")
    (config,) = records(outcome.folder.path, "config")
    if changes.get("rest") == "freeze":
        assert config["resolved"]["sites"] == len(drop["kept"]) and drop["shared"] == {}
        assert any("stay as they are" in line for line in run.said)  # type: ignore[attr-defined]
    if changes.get("sample") == 0.01:
        assert drop["sample_records"] == 8, "at least one step's worth"


def test_lora_plus_around_it_has_a_trial_too(run: Run) -> None:
    outcome = run(method="lora-plus", ratio=2.0, inner="lora-drop", max_steps=2)
    (drop,) = records(outcome.folder.path, "drop")
    assert 0 < len(drop["kept"]) < 14


def test_a_choice_made_with_other_settings_is_made_again(run: Run) -> None:
    outcome = run(max_steps=2)
    path = outcome.folder.path / dropping.DROP
    made = json.loads(path.read_text())
    (outcome.folder.path / "result.json").unlink()
    for damage in (
        {**made, "fingerprint": "another", "kept": []},
        [],
        {"fingerprint": made["fingerprint"]},
        {**made, "kept": ["model.layers.9.mlp.up_proj"]},
        {**made, "kept": made["kept"][0]},
        {**made, "kept": [*made["kept"], 3]},
        {**made, "kept": []},
        {**made, "scores": {}},
        {**made, "scores": dict.fromkeys(made["scores"], "much")},
        {**made, "scores": {"elsewhere": 1.0}, "kept": ["elsewhere"]},
        {**made, "shared": 3},
        {**made, "threshold": None},
        {**made, "rest": []},
    ):
        path.write_text(json.dumps(damage))
        (outcome.folder.path / "result.json").unlink(missing_ok=True)
        run(max_steps=2)
        assert json.loads(path.read_text()) == made


def test_a_trial_that_learns_nothing_is_told(run: Run) -> None:
    with pytest.raises(lf.DataError, match="learnt nothing"):
        run(learning_rate=0.0)


def test_the_trial_tells_its_steps_as_its_own_and_their_speed(run: Run) -> None:
    text = io.StringIO()
    run(console=Console(file=text, width=200), max_steps=2, eval_strategy="no")
    lines = [line for line in text.getvalue().splitlines() if "tokens/s" in line]
    assert lines[0].startswith("trial, step 1 of 1: ") and lines[-1].startswith("step 2 of 2: ")
    assert all(int(line.rpartition(", ")[2].split()[0].replace(",", "")) > 0 for line in lines)


def test_sigterm_in_the_trial_ends_the_records(
    run: Run, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [(r["event"], r.get("status")) for r in records(Path(settings["output_dir"]))] == [
        ("run", None),
        ("end", "interrupted"),
    ]
    assert signal.getsignal(signal.SIGTERM) is before
