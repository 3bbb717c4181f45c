"""A whole run on a tiny model: it learns, resumes bit for bit, and keeps to its folder."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.training.config import resolve
from lorafit.training.outcome import Outcome
from lorafit.training.run import train

QUIET = Console(quiet=True)
Run = Callable[..., Outcome]


@pytest.fixture
def settings(model_dir: Path, data: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model_dir),
        "data": data,
        "eval_split": 12,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 10,
        "learning_rate": 1e-2,
        "dropout": 0.1,
        "r": 4,
        "save_steps": 3,
        "samples": 2,
        "max_new_tokens": 4,
        "use_cpu": True,
    }


@pytest.fixture
def run(settings: dict[str, Any]) -> Iterator[Run]:
    said: list[str] = []

    def run(**changes: Any) -> Outcome:
        resolved = resolve([("test", {**settings, **changes})])
        return train(resolved, command="test", notify=said.append, console=QUIET)

    run.said = said  # type: ignore[attr-defined]
    yield run


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_an_adapter_that_loads(run: Run, tmp_path: Path, model_dir: Path) -> None:
    outcome = run()
    assert outcome.status == "done" and outcome.steps == 10
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before - 0.2
    assert len(outcome.shown) == 2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    handle = lf.load(model, outcome.adapter)
    assert len(handle.sites) == 14
    assert AutoTokenizer.from_pretrained(outcome.adapter).chat_template is not None
    events = [record["event"] for record in records(outcome.folder.path)]
    assert events[:4] == ["run", "config", "environment", "data"]
    assert events.count("step") == 10 and events.count("evaluation") >= 2 and events[-1] == "end"
    assert [event for event in events if event == "sample"] == ["sample"] * 4
    config = next(record for record in records(outcome.folder.path) if record["event"] == "config")
    assert config["resolved"]["sites"] == 14 and config["resolved"]["scale"] == 2.0
    assert any("training will take about" in line for line in run.said)  # type: ignore[attr-defined]
    assert any("4,448 of" in line or "numbers trained" in line for line in run.said)  # type: ignore[attr-defined]


def test_a_whole_record_shows_which_layers_read_the_same_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.handle import Handle

    shown: list[tuple[dict[str, torch.Tensor], int]] = []
    original = Handle.fuse

    def fuse(self: Handle, **batch: torch.Tensor) -> list[tuple[str, ...]]:
        groups = original(self, **batch)
        shown.append((batch, len(groups)))
        return groups

    monkeypatch.setattr(Handle, "fuse", fuse)
    run(max_steps=1)
    ((batch, groups),) = shown
    assert groups == 4  # q, k, v and gate, up in two layers
    assert set(batch) == {"input_ids", "attention_mask"}  # models that look for an end of text find one
    assert batch["input_ids"].shape[0] == 1 and batch["attention_mask"].all()


def test_loss_is_by_supervised_token_over_the_accumulated_batch(run: Run, tmp_path: Path) -> None:
    together = run(output_dir=str(tmp_path / "a"), per_device_train_batch_size=8, dropout=0.0, max_steps=1)
    apart = run(
        output_dir=str(tmp_path / "b"),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        dropout=0.0,
        max_steps=1,
    )
    steps = [next(r for r in records(o.folder.path) if r["event"] == "step") for o in (together, apart)]
    assert steps[1]["supervised_tokens"] > steps[0]["supervised_tokens"]
    # A mean over tokens does not grow with accumulation: it would double if each batch were averaged and added up.
    assert abs(steps[1]["loss"] - steps[0]["loss"]) < 0.3


class Killed(BaseException):
    """Stands for a kill: nothing in the run may catch it and tidy up."""


def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training.trainer import AdapterTrainer

    whole = run(output_dir=str(tmp_path / "whole"))
    steps = 0
    original = AdapterTrainer.training_step

    def step_then_kill(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_then_kill)
    with pytest.raises(Killed):
        run(output_dir=str(tmp_path / "cut"))
    monkeypatch.undo()
    resumed = run(output_dir=str(tmp_path / "cut"))
    assert any("goes on from step 6" in line for line in run.said)  # type: ignore[attr-defined]
    first, second = (load_file(o.adapter / "adapter_model.safetensors") for o in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.eval_before == pytest.approx(whole.eval_before, abs=0)
    assert resumed.eval_after == whole.eval_after
    assert (whole.resumed_from, resumed.resumed_from) == (0, 6)
    by_step = {r["step"]: r["loss"] for r in records(resumed.folder.path) if r["event"] == "step"}
    assert by_step == {r["step"]: r["loss"] for r in records(whole.folder.path) if r["event"] == "step"}
    assert [shown.before for shown in resumed.shown] == [shown.before for shown in whole.shown]


def test_a_checkpoint_that_was_cut_off_is_removed_and_the_one_before_is_used(run: Run, tmp_path: Path) -> None:
    outcome = run(save_total_limit=5)
    folder = outcome.folder.path
    (folder / "result.json").unlink()
    (folder / "checkpoint-10" / "complete.json").unlink()
    again = run(save_total_limit=5)
    assert any("checkpoint-10 was cut off" in line for line in run.said)  # type: ignore[attr-defined]
    assert any("goes on from step 9" in line for line in run.said)  # type: ignore[attr-defined]
    assert again.steps == 10


@pytest.fixture
def stopped(run: Run, settings: dict[str, Any]) -> Path:
    """The folder of a run with checkpoints of steps 2 and 4 that seems to have been stopped after them."""
    outcome = run(max_steps=4, save_steps=2, save_total_limit=5)
    (outcome.folder.path / "result.json").unlink()
    shutil.rmtree(outcome.adapter)
    return outcome.folder.path


FROM_2 = "remove checkpoint-4: the same command then goes on from checkpoint-2"


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "lorafit_state.safetensors"]
)
def test_a_checkpoint_that_lacks_a_file_is_not_resumed_from(run: Run, stopped: Path, name: str) -> None:
    (stopped / "checkpoint-4" / name).unlink()
    with pytest.raises(lf.CheckpointError, match=f"not a whole one(.|\n)*{name}(.|\n)*{FROM_2}"):
        run(max_steps=4, save_steps=2, save_total_limit=5)
    shutil.rmtree(stopped / "checkpoint-4")
    assert run(max_steps=4, save_steps=2, save_total_limit=5).resumed_from == 2


def test_what_to_do_about_the_only_checkpoint_is_to_begin_anew(run: Run, stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoint-2")
    (stopped / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(lf.CheckpointError, match="remove checkpoint-4: the same command then goes on from the start"):
        run(max_steps=4, save_steps=2, save_total_limit=5)


def test_a_checkpoint_of_the_model_alone_cannot_be_asked_for(run: Run) -> None:
    with pytest.raises(lf.ConfigError, match="save_only_model is not yours to set"):
        run(save_only_model=True)


@pytest.mark.parametrize("content", ["cut", b"", b"[]"], ids=["cut", "empty", "other"])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "lorafit_state.safetensors"]
)
def test_a_damaged_file_of_a_checkpoint_is_told_with_a_way_on(
    run: Run, stopped: Path, name: str, content: str | bytes
) -> None:
    path = stopped / "checkpoint-4" / name
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(lf.CheckpointError, match=f"checkpoint-4(.|\n)*{name}(.|\n)*{FROM_2}"):
        run(max_steps=4, save_steps=2, save_total_limit=5)
    shutil.rmtree(stopped / "checkpoint-4")
    assert run(max_steps=4, save_steps=2, save_total_limit=5).status == "done"


def test_a_state_without_a_key_is_told_with_a_way_on(run: Run, stopped: Path) -> None:
    path = stopped / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    del state["param_groups"]
    torch.save(state, path)
    with pytest.raises(lf.CheckpointError, match=f"KeyError(.|\n)*{FROM_2}"):
        run(max_steps=4, save_steps=2, save_total_limit=5)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"], ids=["cut", "list", "noise"])
@pytest.mark.parametrize("name", ["settings.json", "data.json", "result.json"])
def test_a_damaged_file_of_the_folder_is_named(run: Run, stopped: Path, name: str, content: str) -> None:
    (stopped / name).write_text(content)
    with pytest.raises(lf.CheckpointError, match=rf"{name} is damaged(.|\n)*fix: +restore the file"):
        run(max_steps=4, save_steps=2, save_total_limit=5)


def test_a_run_of_one_step_trains(run: Run) -> None:
    outcome = run(max_steps=1)
    (step,) = (record for record in records(outcome.folder.path) if record["event"] == "step")
    assert step["learning_rate"] == pytest.approx(1e-2)
    stored = load_file(outcome.adapter / "adapter_model.safetensors")
    assert all(value.any() for key, value in stored.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("warmup", "planned", "kept"), [(0.03, 33, 0), (0.03, 34, 0.03), (0.5, 2, 0.5), (0, 9, 0), (1, 1, 1), (7, 3, 7)]
)
def test_a_warm_up_of_less_than_one_step_is_none(tmp_path: Path, warmup: float, planned: int, kept: float) -> None:
    from transformers import TrainingArguments

    from lorafit.training.trainer import settle_warmup

    arguments = TrainingArguments(str(tmp_path), warmup_steps=warmup, max_steps=planned, use_cpu=True)
    settle_warmup(arguments, records=100)
    assert arguments.warmup_steps == kept


def test_the_same_run_writes_the_same_bytes(run: Run, tmp_path: Path) -> None:
    files = [run(output_dir=str(tmp_path / str(k)), max_steps=1).adapter for k in range(3)]
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in files}) == 1


def test_ctrl_c_at_the_end_of_an_epoch_saves_and_evaluates_nothing_more(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training.trainer import AdapterTrainer

    original = AdapterTrainer.training_step

    def step_then_stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:  # the last of the first epoch: 48 records
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_then_stop)
    outcome = run(max_steps=12, save_strategy="epoch")
    assert outcome.status == "interrupted" and outcome.steps == 6
    found = records(outcome.folder.path)
    assert [record["step"] for record in found if record["event"] == "evaluation"] == [0]
    assert [record["step"] for record in found if record["event"] == "saved"] == [6]


def test_a_stop_asked_for_after_the_last_step_of_an_epoch_saves() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from lorafit.training.callbacks import Interrupt

    interrupt = Interrupt(lambda _: None)
    arguments, state = TrainingArguments("none", use_cpu=True), TrainerState(global_step=6, max_steps=12)
    control = interrupt.on_epoch_end(arguments, state, TrainerControl(should_evaluate=True))
    assert control.should_evaluate and not control.should_training_stop
    interrupt.requested = True
    control = interrupt.on_epoch_end(arguments, state, control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate


def test_a_full_disk_is_told_and_costs_the_last_steps_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    from lorafit.training.trainer import AdapterTrainer

    original = AdapterTrainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 6:
            raise RuntimeError("unexpected pos 26182656 vs 26182548")  # what torch.save says
        original(self, folder)

    monkeypatch.setattr(AdapterTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(lf.TrainingError, match=r"cannot be written(.|\n)*checkpoint-6(.|\n)*free(.|\n)*goes on"):
        run()
    assert [path.name for path in Path(settings["output_dir"]).glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    assert run().status == "done"
    assert any("goes on from step 3" in line for line in run.said)  # type: ignore[attr-defined]


def test_a_finished_run_is_not_run_again(run: Run) -> None:
    first = run(max_steps=2)
    before = (first.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    again = run(max_steps=2)
    assert again.status == "already done"
    assert again.eval_after == first.eval_after and again.shown == first.shown
    assert (again.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_the_folder_of_another_run_is_refused_and_untouched(run: Run, settings: dict[str, Any]) -> None:
    run(max_steps=2)
    kept = (Path(settings["output_dir"]) / "records.jsonl").read_bytes()
    with pytest.raises(lf.ConfigError, match=r"output directory of another run(.|\n)*r was 4 and is 8"):
        run(max_steps=2, r=8)
    assert (Path(settings["output_dir"]) / "records.jsonl").read_bytes() == kept


def test_a_folder_that_holds_something_else_is_refused(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("precious")
    with pytest.raises(lf.ConfigError, match=r"holds something else(.|\n)*chapter\.tex"):
        run(output_dir=str(other))
    assert (other / "chapter.tex").read_text() == "precious"


def test_a_run_does_not_go_on_with_other_data(run: Run, data: str, settings: dict[str, Any]) -> None:
    run(max_steps=4, save_steps=2)
    (Path(settings["output_dir"]) / "result.json").unlink()
    lines = Path(data).read_text().splitlines()
    Path(data).write_text("\n".join([lines[0].replace("plus", "and"), *lines[1:]]) + "\n")
    with pytest.raises(lf.ConfigError, match="data are not those that this run was begun with"):
        run(max_steps=4, save_steps=2)


def test_data_are_looked_at_before_a_model_is_loaded(
    run: Run, write: Callable[[str, Any], str], tmp_path: Path, model_dir: Path
) -> None:
    empty = tmp_path / "model-without-weights"
    shutil.copytree(model_dir, empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises(lf.DataError):
        run(model=str(empty), data=write("empty.jsonl", ""))


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.training.objectives import NextToken

    monkeypatch.setattr(NextToken, "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(lf.TrainingError, match=r"not finite(.|\n)*step 1(.|\n)*learning rate"):
        run()


def test_the_default_rate_comes_from_the_width_and_is_announced(run: Run, settings: dict[str, Any]) -> None:
    del settings["learning_rate"]
    run(max_steps=1)
    assert any("from the model's width" in line for line in run.said)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "dropout": 0.0},
        {"gradient_accumulation_steps": 2, "dropout": 0.0},
        {"dtype": "bfloat16"},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True},
        {"targets": ["q_proj", "lm_head", "embed_tokens"]},
        {"rslora": True, "rank_pattern": {"layers.0.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
        {"modules_to_save": ["norm"]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_of_the_trainer_and_of_the_method_work_together(run: Run, changes: dict[str, Any]) -> None:
    outcome = run(**changes)
    assert outcome.status == "done"
    assert outcome.eval_before is not None and outcome.eval_after is not None
    assert outcome.eval_after < outcome.eval_before


def test_the_best_adapter_is_what_is_saved_and_what_is_reported(run: Run) -> None:
    # The highest loss is called the best: surely not the last evaluation of a run that learns.
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    outcome = run(**best, metric_for_best_model="loss", greater_is_better=True, dropout=0.0)
    during = [r for r in records(outcome.folder.path) if r["event"] == "evaluation" and r["step"] > 0]
    highest = max(record["loss"] for record in during)
    assert during[9]["loss"] < highest - 0.1  # step 10, the last
    assert outcome.eval_after == pytest.approx(highest, rel=1e-6)


def test_gradient_checkpointing_changes_no_number(run: Run, tmp_path: Path) -> None:
    plain, recomputed = (
        run(output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, max_steps=3) for on in (False, True)
    )
    first, second = (load_file(o.adapter / "adapter_model.safetensors") for o in (plain, recomputed))
    assert all(torch.allclose(first[key], second[key], rtol=1e-5, atol=1e-7) for key in first)


def test_trackers_work_because_the_trainers_do(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run(report_to="tensorboard", max_steps=2)
    assert list((tmp_path / "events").rglob("events.out.tfevents.*"))


@pytest.fixture(scope="module")
def encoder_dir(encoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    encoder_tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(encoder_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_classifier_learns_and_its_new_head_is_saved_with_the_adapter(
    run: Run, encoder_dir: Path, write: Callable[[str, Any], str]
) -> None:
    words = {"pos": "good", "neg": "bad"}
    fillers = list(itertools.product(["it", "is", "very", "film"], repeat=3))
    rows = [
        {"text": f"{first} {words[label]} {second} {third}", "label": label}
        for first, second, third in fillers
        for label in words
    ]
    outcome = run(model=str(encoder_dir), data=write("films.jsonl", rows), eval_split=0.25, max_steps=60, dropout=0.0)
    assert outcome.eval_before == pytest.approx(0.69, abs=0.2)
    assert outcome.eval_after is not None and outcome.eval_after < 0.4
    assert outcome.shown == ()
    stored = load_file(outcome.adapter / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in stored
    evaluations = [r for r in records(outcome.folder.path) if r["event"] == "evaluation"]
    assert evaluations[-1]["accuracy"] == 1.0
    assert any("new in this model, and trained in full: classifier" in line for line in run.said)  # type: ignore[attr-defined]


def test_a_new_head_can_have_a_rate_of_its_own(
    run: Run, encoder_dir: Path, write: Callable[[str, Any], str], tmp_path: Path
) -> None:
    data = write("films.jsonl", [{"text": f"it is film {n}", "label": n % 2} for n in range(16)])

    def head(folder: str, **given: Any) -> torch.Tensor:
        flat = {"model": str(encoder_dir), "data": data, "max_steps": 1, "eval_split": 4, "output_dir": folder}
        outcome = run(**flat, dropout=0.0, keep_best=False, **given)
        return load_file(outcome.adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]

    low, high = (
        head(str(tmp_path / f"{n}"), learning_rate=rate, full_learning_rate=1e-3) for n, rate in enumerate((1e-4, 1e-1))
    )
    same = head(str(tmp_path / "same"), learning_rate=1e-1)
    assert torch.equal(low, high), "the first step of Adam is as long as the rate"
    assert (same - low).abs().max() == pytest.approx(0.1 - 1e-3, rel=1e-3)
    assert any("(modules trained in full: 0.001)" in line for line in run.said)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("eval_split", "held"), [(None, 6), (0, 0), (0.2, 12), (5, 5)])
def test_a_tenth_is_held_out_unless_the_user_says_otherwise(run: Run, eval_split: float | None, held: int) -> None:
    outcome = run(eval_split=eval_split, max_steps=1)
    found = next(record for record in records(outcome.folder.path) if record["event"] == "data")
    assert found["eval_records"] == held and found["train_records"] == 60 - held
    assert (outcome.eval_after is None) == (held == 0)


def test_an_evaluation_that_a_stop_came_before_is_made_when_the_run_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run stopped at its best step would end with another adapter."""
    from lorafit.training.callbacks import Interrupt

    changes: dict[str, Any] = {"max_steps": 8, "eval_split": 36, "samples": 0, "general": "none"}  # 3 steps an epoch
    whole = run(**changes, output_dir=str(tmp_path / "whole"))
    original = Interrupt.on_step_end

    def stop(self: Interrupt, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.requested = state.global_step == 3
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Interrupt, "on_step_end", stop)
    assert run(**changes).status == "interrupted"
    monkeypatch.undo()
    resumed = run(**changes)
    assert resumed.resumed_from == 3
    first, second = (
        {one["step"]: one["losses"] for one in records(outcome.folder.path) if one["event"] == "held_out"}
        for outcome in (whole, resumed)
    )
    assert list(first) == [0, 3, 6, 8] and first == second
    assert whole.verdict == resumed.verdict


SCRIPT = """
import json, sys
from rich.console import Console
from lorafit.training.config import resolve
from lorafit.training.run import train
outcome = train(resolve([("t", json.loads(sys.argv[1]))]), command="t", notify=lambda s: print(s, flush=True),
                console=Console(quiet=True))
print("status", outcome.status, flush=True)
"""


def start(settings: dict[str, Any]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)], stdout=subprocess.PIPE, text=True, env=environment
    )


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        path = folder / "records.jsonl"
        if path.exists() and path.read_text().count('"event": "step"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{count} steps did not come (exit status {process.poll()})")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_process_goes_on_with_the_same_command(
    number: signal.Signals, settings: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    settings |= {"max_steps": 300, "save_steps": 20, "output_dir": str(tmp_path / "stopped"), "eval_split": 4}
    process = start(settings)
    try:
        wait_for_steps(Path(settings["output_dir"]), 25, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert ("status interrupted" in output) == (number is signal.SIGINT)
    assert list(Path(settings["output_dir"]).glob("checkpoint-*"))
    resumed = run()
    whole = run(output_dir=str(tmp_path / "whole"))
    first, second = (load_file(o.adapter / "adapter_model.safetensors") for o in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
