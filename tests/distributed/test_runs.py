"""`lorafit train` under torchrun: one run in two processes, and the same run as in one."""

from __future__ import annotations

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
from rich.console import Console
from safetensors.torch import load_file

import lorafit as lf
from lorafit.training import ranks
from lorafit.training.callbacks import terminated
from lorafit.training.config import resolve
from lorafit.training.outcome import Outcome
from lorafit.training.run import train
from tests.distributed.conftest import SETTINGS, arguments, environment, records, torchrun

Alone = Callable[..., Outcome]
BY_TWO = {"per_device_train_batch_size": 4}
HOW = {"ddp": {}, "fsdp": {"shard": True}}


@pytest.fixture(scope="module")
def alone(place: Path) -> Alone:
    """A run in this process."""

    def alone(**settings: Any) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            resolved = resolve([("test", {**SETTINGS, **settings})])
            return train(resolved, command="test", notify=lambda text: None, console=Console(quiet=True))

    return alone


@pytest.fixture(scope="module")
def one(alone: Alone, place: Path) -> Path:
    """A run of one process."""
    alone(output_dir="one")
    return place / "one"


@pytest.fixture(scope="module", params=list(HOW))
def two(request: pytest.FixtureRequest, place: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same by two, DistributedDataParallel and FSDP2."""
    done = torchrun(place, *arguments(output_dir=request.param, **BY_TWO, **HOW[request.param]))
    assert done.returncode == 0, done.stderr[-3000:]
    return place / request.param, done


def distance(first: Path, second: Path) -> float:
    """Of two adapters, by their tensors."""
    tensors, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert tensors.keys() == others.keys()
    return max(float((tensor - others[key]).abs().max()) for key, tensor in tensors.items())


def same_run(first: Path, second: Path) -> None:
    """The same steps, evaluations and adapter, to rounding."""
    steps, others = ({one["step"]: one for one in records(folder, "step")} for folder in (first, second))
    assert steps.keys() == others.keys()
    for step, figures in steps.items():
        other = others[step]
        assert other["loss"] == pytest.approx(figures["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-4)
        for key in ("tokens", "supervised_tokens", "learning_rate"):
            assert other[key] == figures[key], key
        # Of an epoch's last step, which is not full, the share depends on how it is divided.
        assert other["epoch"] == pytest.approx(figures["epoch"], abs=0.1)
    held, rest = ({one["step"]: one["loss"] for one in records(folder, "evaluation")} for folder in (first, second))
    assert rest == pytest.approx(held, rel=1e-5)
    assert distance(first, second) < 1e-4


def test_two_processes_do_the_run_of_one(one: Path, two: tuple[Path, Any]) -> None:
    folder, _ = two
    same_run(one, folder)
    events = [record["event"] for record in records(one)]
    assert [record["event"] for record in records(folder)] == events
    for mine, theirs in zip(records(one), records(folder), strict=True):
        assert mine.keys() == theirs.keys(), mine["event"]
    resolved = records(folder, "config")[0]["resolved"]
    assert resolved["records_per_step"] == 8 and resolved["processes"] == 2
    assert records(one, "config")[0]["resolved"]["records_per_step"] == 8
    assert [each["losses"] for each in records(folder, "held_out")] == [
        pytest.approx(each["losses"], rel=1e-4) for each in records(one, "held_out")
    ]
    assert records(folder, "forgetting")[0]["loss"]["records"] == records(one, "forgetting")[0]["loss"]["records"]
    assert records(folder, "end")[0]["peak_rss_bytes"] > 10**8
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {*(path.name for path in one.iterdir()), "report.html"}
    )


def test_one_process_speaks(two: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = two
    assert done.stderr == "", "warnings, or a second voice"
    for said in ("sums.jsonl: JSON Lines", "held-out loss before training", "try it: ", "report: "):
        assert done.stdout.count(said) == 1, said
    assert "14 steps of 8 records (4 in each of 2 processes)" in done.stdout
    assert done.stdout.count("the model is sharded over 2 processes: 2 blocks") == (folder.name == "fsdp")


def test_the_adapter_loads_in_one_process(place: Path, two: tuple[Path, Any]) -> None:
    from transformers import AutoModelForCausalLM

    handle = lf.load(AutoModelForCausalLM.from_pretrained(place / "model"), two[0] / "adapter")
    assert len(handle.sites) == 14 and all(float(handle.delta(path).abs().max()) > 0 for path in handle.sites)


def cut(folder: Path, name: str) -> Path:
    """A copy of a run that was stopped after its checkpoint of step 12."""
    copied = folder.parent / name
    shutil.copytree(folder, copied)
    for path in ("adapter", "checkpoint-14"):
        shutil.rmtree(copied / path)
    for path in ("result.json", "report.html"):
        (copied / path).unlink(missing_ok=True)
    return copied


def test_two_processes_go_on_as_one(one: Path, two: tuple[Path, Any], alone: Alone) -> None:
    folder = cut(two[0], f"{two[0].name}-then-one")
    outcome = alone(output_dir=folder.name, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert outcome.status == "done" and outcome.resumed_from == 12
    same_run(one, folder)


def test_one_process_goes_on_as_two(one: Path, place: Path) -> None:
    folder = cut(one, "one-then-two")
    done = torchrun(place, *arguments(output_dir=folder.name, **BY_TWO, shard=True))
    assert done.returncode == 0 and "goes on from step 12" in done.stdout, done.stderr
    same_run(one, folder)


def test_another_number_of_records_in_a_step_is_another_run(two: tuple[Path, Any], alone: Alone) -> None:
    folder = cut(two[0], f"{two[0].name}-then-fewer")
    with pytest.raises(lf.ConfigError, match="another run") as caught:
        alone(output_dir=folder.name, per_device_train_batch_size=4)
    assert caught.value.found == "records of a step were 8 and are 4"


def begun(place: Path, name: str, **settings: Any) -> tuple[Path, subprocess.Popen[str]]:
    """A long run in two processes that has written a checkpoint."""
    folder = place / name
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = arguments(output_dir=name, max_steps=1000, eval_strategy="no", save_steps=3, **BY_TWO, **settings)
    running = subprocess.Popen(
        [*launcher, "-m", "lorafit", "train", *words],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not (folder / "checkpoint-6").is_dir() and time.monotonic() < until:
        time.sleep(0.02)
    return folder, running


@pytest.fixture
def two_of_us(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process says it is one of two; what it makes of signals is undone."""
    monkeypatch.setattr(ranks, "count", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def stopped() -> None:
    """What a launcher does to all others when one has ended."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("two_of_us")
def test_the_launchers_signal_does_not_cut_off_what_is_to_be_said_of_a_death() -> None:
    """It comes some tenths of a second after a death: before this process notices, or on the error's way out."""
    with pytest.raises(ranks.ElsewhereError, match="ended, or did not answer") as caught, terminated():  # noqa: SIM117
        with ranks.lost("lorafit train"):
            try:
                raise RuntimeError("[..] Connection closed by peer")
            finally:
                stopped()
    assert "Connection closed by peer" in str(caught.value.found)
    stopped()  # while it is written and said: nothing happens


@pytest.mark.usefixtures("two_of_us")
def test_the_launchers_signal_does_not_cut_off_an_error_of_ones_own() -> None:
    with pytest.raises(lf.ConfigError), terminated(), ranks.lost("lorafit train"):
        raise lf.ConfigError("this cannot be", found="that", fix="do it")
    stopped()


@pytest.mark.usefixtures("two_of_us")
def test_a_signal_alone_is_an_interruption_and_the_next_one_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminated(), ranks.lost("lorafit train"):
        stopped()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_death_of_a_process_ends_the_run_and_says_so(place: Path, how: str, alone: Alone) -> None:
    folder, running = begun(place, f"killed-{how}", **HOW[how])
    os.kill(process_of_rank(1, running.pid), signal.SIGKILL)
    started = time.monotonic()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1 and time.monotonic() - started < 35
    assert said.count("error: another process of this run ended, or did not answer in time") == 1
    assert "process 0 of 2" in said and "lorafit train --set model=model" in said
    last = records(folder)[-1]
    assert last["event"] == "end" and last["status"] == "failed" and "another process" in last["message"]
    # and the run goes on, alone, to an end that is nearer than the one it had
    step = records(folder, "step")[-1]["step"]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["processes"] == 2
    settings["training"]["max_steps"] = step + 3
    (folder / "settings.json").write_text(json.dumps(settings))
    outcome = alone(output_dir=folder.name, max_steps=step + 3, eval_strategy="no", save_steps=3)
    assert outcome.status == "done" and 3 <= outcome.resumed_from <= step and outcome.steps == step + 3


@pytest.mark.slow
@pytest.mark.parametrize("how", list(HOW))
def test_a_process_that_hangs_is_given_up(place: Path, how: str) -> None:
    folder, running = begun(place, f"hung-{how}", ddp_timeout=5, **HOW[how])
    hung = process_of_rank(1, running.pid)
    os.kill(hung, signal.SIGSTOP)
    try:
        until = time.monotonic() + 30
        while records(folder)[-1]["event"] != "end" and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        os.kill(hung, signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1 and "another process" in records(folder)[-1]["message"]
    assert said.count("error: another process of this run ended, or did not answer in time") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", list(HOW))
def test_an_interruption_stops_all_processes_after_the_same_step(place: Path, how: str, alone: Alone) -> None:
    folder, running = begun(place, f"interrupted-{how}", **HOW[how])
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    last = records(folder)[-1]
    assert last["status"] == "interrupted" and (folder / last["adapter"] / "complete.json").is_file()
    assert said.count("stopped after step") == 1


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 6000ms for recv operation to complete"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (lf.TrainingError("Connection reset by peer"), False),
        (ValueError("Connection reset by peer"), False),
    ],
)
def test_what_libraries_say_of_a_process_that_does_not_answer(error: Exception, lost: bool) -> None:
    assert ranks.is_lost(error) is lost


def process_of_rank(rank: int, launcher: int) -> int:
    """The process that a launcher started for a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"no process of rank {rank}")


# What is refused --------------------------------------------------------------


def test_one_process_has_nobody_to_share_with(alone: Alone) -> None:
    with pytest.raises(lf.ConfigError, match="nobody to share") as caught:
        alone(output_dir="nobody", shard=True)
    assert "torchrun --nproc-per-node 2" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"quantise": "int8"}, "shard, quantise"),
        ({"compile": True}, "shard, compile"),
        ({"recompute": "cheap"}, "shard, recompute"),
        ({"prefix_cache": True}, "shard, prefix_cache"),
        ({"shard": False, "fsdp": "full_shard"}, "fsdp"),
    ],
)
def test_what_does_not_go_with_a_sharded_model(alone: Alone, settings: dict[str, Any], where: str) -> None:
    with pytest.raises(lf.ConfigError) as caught:
        alone(**{"output_dir": "refused", "shard": True, **settings})
    assert caught.value.where == where and caught.value.fix


def test_a_mistake_is_said_once(place: Path) -> None:
    done = torchrun(place, *arguments(output_dir="mistake", data="nothing.jsonl", **BY_TWO))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "nothing.jsonl" in done.stderr
    done = torchrun(place, *arguments(output_dir="mistake"), "--shard", "--quantise", "int8")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "a quantised base" in done.stderr


def test_other_commands_run_in_one_process(place: Path) -> None:
    command = [sys.executable, "-m", "lorafit", "methods"]
    done = subprocess.run(
        command, env=environment(WORLD_SIZE="2", RANK="0"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "this command runs in one process" in done.stderr
    done = subprocess.run(
        command, env=environment(WORLD_SIZE="2", RANK="1"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr == ""


def test_accelerate_is_not_to_shard_by_itself(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", "train", *arguments(output_dir="accelerate")],
        cwd=place,
        env=environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", ACCELERATE_USE_FSDP="true"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "examples/distributed/fsdp2.yaml" in done.stderr


# Slower ones ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "adalora", "init_r": 4, "target_r": 2},
        {"method": "lora-drop", "inner": {"method": "lora", "r": 4}, "sample": 0.5},
        {"method": "dora"},
        {"method": "delta-lora", "start": 3},
        {"method": "lora-fa"},
        {"method": "vera", "r": 8},
        {"method": "intrinsic", "d": 60},
        {"method": "lora", "init": "pissa", "modules_to_save": ["lm_head"]},
        {"method": "lora", "data": "texts.jsonl", "task": "sequence-classification"},
        {"method": "lora", "recompute": "blocks", "packing": True},
    ],
    ids=lambda settings: "-".join(map(str, list(settings.values())[:2])),
)
def test_runs_of_other_kinds(place: Path, alone: Alone, settings: dict[str, Any], how: str) -> None:
    words = [str(value) for value in settings.values() if isinstance(value, str)]
    name = "-".join(words[:2]).replace(".", "")
    asked = {**settings, "max_steps": 8}
    if not (place / f"{name}-one").exists():
        alone(output_dir=f"{name}-one", **asked)
    words = arguments(output_dir=f"{name}-{how}", **{**asked, **BY_TWO, **HOW[how]})
    done = torchrun(place, *[word.replace("'", '"') for word in words])
    assert done.returncode == 0, done.stderr[-3000:]
    steps, others = ([one["loss"] for one in records(place / f"{name}-{run}", "step")] for run in ("one", how))
    assert others == pytest.approx(steps, rel=1e-4)
    held, rest = ([one["loss"] for one in records(place / f"{name}-{run}", "evaluation")] for run in ("one", how))
    assert rest == pytest.approx(held, rel=1e-4)
