"""A trial is run once, in a process of its own, and goes on where it was stopped."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafit.errors import CheckpointError, ConfigError
from lorafit.experiments import ray_runner
from lorafit.experiments.ray_runner import Ray
from lorafit.experiments.runner import Local
from lorafit.experiments.trial import RESULT, Kind, Result, Trial, finished, keep, run_trial


def quiet(line: str) -> None:
    """Nobody listens."""


def test_a_trial_is_measured_record_by_record_and_never_run_again(settings, sums, tmp_path):
    trial = Trial("lora/seed-0", settings(seed=0), measured=str(sums))
    result = run_trial(trial, tmp_path, quiet)
    assert result.failed is None and result.steps == 6 and result.trainable > 0 and result.adapter_bytes > 0
    assert len(result.measured.losses) == len(result.measured.counts) == 80 and result.measured.correct is None
    assert result.measured.mean < 5.5 and result.curve[-1] == (6, result.validation)
    assert result.tokens > 0 and 0 < result.seconds < result.total_seconds
    assert finished(trial, tmp_path) == result
    assert run_trial(trial, tmp_path / ".", lambda line: pytest.fail(line)) == result


def test_the_base_is_measured_and_nothing_is_trained(settings, sums, tmp_path):
    trial = Trial("base", settings(), measured=str(sums), kind=Kind.BASE)
    result = run_trial(trial, tmp_path, quiet)
    assert (result.steps, result.trainable, result.seconds, result.adapter_bytes) == (0, 0, 0.0, None)
    assert result.measured.mean == pytest.approx(math.log(258), rel=0.05)  # a random model over 258 tokens


def test_a_run_that_diverges_is_a_result(settings, sums, tmp_path):
    trial = Trial("lora/wild", settings(learning_rate=1e12, warmup_steps=0), measured=str(sums))
    result = run_trial(trial, tmp_path, quiet)
    assert "not finite" in result.failed and result.measured is None
    assert finished(trial, tmp_path) == result


def test_a_process_of_its_own_comes_to_the_same(settings, sums, tmp_path):
    trials = [Trial(f"lora/seed-{seed}", settings(seed=seed), measured=str(sums), forget=True) for seed in (0, 1)]
    told = []
    runner = Local(tmp_path / "there", told.append)
    there = list(runner.run(trials))
    assert [one.name for one in there] == ["lora/seed-0", "lora/seed-1"] == [line.split()[-1] for line in told]
    here = run_trial(trials[0], tmp_path / "here", quiet)
    assert here.measured == there[0].measured and here.curve == there[0].curve
    assert not list(trials[0].folder(tmp_path / "there").glob("checkpoint-*"))
    told.clear()
    assert list(runner.run(trials)) == there and told == []


def test_an_error_of_a_trial_is_the_runners(settings, tmp_path):
    with pytest.raises(ConfigError, match="no such model directory"):
        list(Local(tmp_path, quiet).run([Trial("one", settings(model="./nowhere"))]))


def test_a_damaged_result_is_named(settings, tmp_path):
    trial = Trial("one", settings())
    trial.folder(tmp_path).mkdir(parents=True)
    (trial.folder(tmp_path) / RESULT).write_text(json.dumps({"name": "one"}))
    with pytest.raises(CheckpointError, match="damaged"):
        finished(trial, tmp_path)


def test_the_result_of_other_settings_is_not_taken_for_this_ones(settings, sums, tmp_path):
    """Nor is that of other files; but the experiment's own may have been moved together with it."""
    old, new = tmp_path / "old", tmp_path / "new"
    trial = Trial("one", settings(data=str(old / "data.jsonl")), str(old / "test.jsonl"))
    result = Result("one", 6, 1, 1, 1.0, 1.0, None, None, 2.0, (), None, None)
    trial.folder(old).mkdir(parents=True)
    keep(trial, old, result)
    assert finished(trial, old) == result
    free = trial.settings.model_copy(update={"output_dir": "elsewhere", "samples": 3})
    assert finished(replace(trial, settings=free), old) == result
    old.rename(new)
    assert finished(Trial("one", settings(data=str(new / "data.jsonl")), str(new / "test.jsonl")), new) == result
    for other in (
        replace(trial, settings=settings(data=str(new / "data.jsonl"), r=5), measured=str(new / "test.jsonl")),
        Trial("one", settings(data=str(sums)), str(new / "test.jsonl")),
        Trial("one", settings(data=str(new / "data.jsonl")), str(sums)),
    ):
        with pytest.raises(ConfigError, match="done with other settings"):
            finished(other, new)


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize("times", [1, 2])
def test_a_trial_that_is_killed_goes_on_once_and_then_is_given_up(settings, tmp_path, times):
    """As where memory runs out: the others are not lost with it."""
    trial = Trial("one", settings(max_steps=40, save_steps=5), forget=True)
    folder, told, hunted = trial.folder(tmp_path), [], []

    def hunt():
        for number in range(times):
            checkpoint = folder / f"checkpoint-{5 * (number + 1)}" / "complete.json"
            wait(checkpoint.is_file)
            [child] = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)
            hunted.append(child.pid)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    [result] = Local(tmp_path, told.append).run([trial])
    hunter.join()
    assert len(hunted) == times and told[1].startswith("the process of one was killed (signal 9, as where memory")
    assert finished(trial, tmp_path) == result and not list(folder.glob("checkpoint-*"))
    if times == 1:
        assert result.failed is None and result.steps == 40
    else:
        assert result.failed == "its process was killed 2 times (signal 9, as where memory runs out)"
        assert 5 <= result.steps < 40 and result.validation is None and result.trainable > 0


def test_a_trial_whose_machines_are_lost_is_a_result(settings, tmp_path, monkeypatch):
    class WorkerCrashedError(Exception):
        """As Ray's, after all its retries."""

    class OtherError(Exception):
        """Another one of Ray's."""

    def get(reference):
        raise WorkerCrashedError("The worker died unexpectedly.\nSee the logs.")

    errors = SimpleNamespace(
        WorkerCrashedError=WorkerCrashedError,
        RayTaskError=OtherError,
        OutOfMemoryError=OtherError,
        NodeDiedError=OtherError,
    )
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        remote=lambda **_: lambda _: SimpleNamespace(remote=lambda trial, folder, here: trial.name),
        wait=lambda waiting, num_returns: (waiting[:num_returns], waiting[num_returns:]),
        get=get,
        exceptions=errors,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    trials = [Trial(name, settings()) for name in ("one", "two")]
    results = list(Ray(tmp_path, None, quiet).run(trials))
    lost = "its process was lost each time: WorkerCrashedError: The worker died unexpectedly."
    assert [(one.name, one.failed) for one in results] == [("one", lost), ("two", lost)]
    assert [finished(trial, tmp_path) for trial in trials] == results


def test_a_clusters_task_reads_relative_paths_as_the_command_does(settings, tmp_path, monkeypatch):
    (tmp_path / "asked").mkdir()
    seen = []
    monkeypatch.chdir(tmp_path)  # where the cluster's process is; undone at the end
    monkeypatch.setattr(ray_runner, "run_trial", lambda *_: seen.append(Path.cwd()))
    ray_runner._run(Trial("one", settings()), str(tmp_path), str(tmp_path / "asked"))
    ray_runner._run(Trial("one", settings()), str(tmp_path), str(tmp_path / "not on this machine"))
    assert seen == [tmp_path / "asked", tmp_path / "asked"]


def test_a_trial_without_room_is_a_result(settings, sums, tmp_path, monkeypatch):
    from lorafit.experiments import running

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nat line 3")

    monkeypatch.setattr(running, "measure", full)
    for kind in (Kind.BASE, Kind.ADAPTER):
        result = run_trial(Trial(kind.value, settings(), str(sums), kind), tmp_path, quiet)
        assert result.failed is not None and result.failed.startswith("memory ran out: DefaultCPUAllocator")
        assert "line 3" not in result.failed and result.measured is None


PARENT = """
import json, sys
from pathlib import Path
from lorafit.experiments.runner import Local
from lorafit.experiments.trial import Trial
from lorafit.training.config import Settings

if __name__ == "__main__":
    folder, settings, measured = sys.argv[1:]
    trial = Trial("one", Settings(**json.loads(settings)), measured)
    for result in Local(Path(folder), print).run([trial]):
        print(json.dumps(result.curve))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_trial_ends_with_its_killed_parent_and_goes_on_with_the_next(settings, sums, tmp_path):
    wanted = settings(max_steps=60, save_steps=5)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path / "killed"), json.dumps(wanted.model_dump()), str(sums)]
    folder = tmp_path / "killed" / "trials" / "one"
    for checkpoint in (10, 30):
        parent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait(lambda step=checkpoint: (folder / f"checkpoint-{step}" / "complete.json").is_file())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        at_death = (folder / "records.jsonl").stat().st_size
        time.sleep(1)
        later = (folder / "records.jsonl").stat().st_size
        time.sleep(1)
        assert (folder / "records.jsonl").stat().st_size == later, at_death
        assert not (folder / RESULT).exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [one["resumed_from_step"] > 0 for one in records if one["event"] == "run"] == [False, True, True]
    disturbed = Result.of(json.loads((folder / RESULT).read_text()))
    undisturbed = run_trial(Trial("one", wanted, str(sums)), tmp_path / "quiet", quiet)
    assert disturbed.measured == undisturbed.measured and disturbed.curve == undisturbed.curve
    assert (disturbed.steps, disturbed.tokens) == (undisturbed.steps, undisturbed.tokens)


def wait(until, seconds=60):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
